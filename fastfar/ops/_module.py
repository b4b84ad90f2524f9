"""What the modules that run on ops share: the choice of a back end, and checkpointing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

from fastfar.backend import by_device
from fastfar.ops._registry import active_backend, use_backend


class OpModule(nn.Module):
    """A module that runs its ops on a back end of its own choice.

    Args:
        backend: "auto" (by the device of the input: Triton's kernels on CUDA where they are
            usable, else PyTorch), "torch", "native" (CPU) or "triton"; None leaves the choice to
            the caller, by `fastfar.ops.use_backend`.

    Raises:
        ValueError: unknown name, or a back end that is off, with the reason.
    """

    def __init__(self, backend: str | None) -> None:
        super().__init__()
        self.backend = backend
        # Looked up now: the forward stays free of probes, and can be compiled.
        self._by_device = None if backend is None else by_device(backend)

    def on_backend(self, x: Tensor) -> AbstractContextManager[None]:
        """A context in which ops run on the module's back end for the device of x.

        Raises ValueError where that back end does not run on this device.
        """
        if self._by_device is None:
            return nullcontext()
        chosen = self._by_device.get(x.device.type, self._by_device.get(""))
        if chosen is None:
            allowed = " and ".join(sorted(self._by_device))
            raise ValueError(
                f"backend={self.backend!r} runs on {allowed}, the input is on {x.device}; move the "
                "input, or use backend='auto'"
            )
        return use_backend(chosen)


def checkpointed(module: nn.Module, *args: Any) -> Any:
    """module(*args), whose activations are computed again in the backward instead of kept.

    The second forward runs outside of the caller's contexts: random numbers and autocast are
    restored by PyTorch, the back end here.
    """
    if is_compiling():
        return checkpoint(module, *args, use_reentrant=False)
    backend = active_backend()

    def run(*inner: Any) -> Any:
        with use_backend(backend):
            return module(*inner)

    return checkpoint(run, *args, use_reentrant=False)
