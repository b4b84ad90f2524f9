"""A stand-in for CUDA graphs that runs on a CPU: it records PyTorch's ops and replays them.

As in a real graph, Python runs at the capture and never again: what it computed there (numbers,
shapes, choices) is baked in, and a replay does the recorded ops on the recorded memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Body = Callable[[], None]


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recorder(TorchDispatchMode):
    """Records ops and spoils what they make, so that only a replay can make it again.

    Raises AssertionError for an op that reads a tensor back to the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "host sync in a capture"
        out = func(*args, **kwargs)
        read = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        made = [x for x in tensors(out) if x.untyped_storage().data_ptr() not in read]
        self.ops.append((func, args, kwargs, made))
        return out

    def spoil(self) -> None:
        for *_, made in self.ops:
            for x in made:
                if x.is_floating_point() and x.numel():
                    x.fill_(float("nan"))

    def replay(self) -> None:
        for func, args, kwargs, made in self.ops:
            before = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
            out = func(*args, **kwargs)
            fresh = [x for x in tensors(out) if x.untyped_storage().data_ptr() not in before]
            for x, value in zip(made, fresh, strict=True):
                x.copy_(value)


class RecordingCapturer:
    """Stands for `graphs.CudaCapturer`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.recorders: list[Recorder] = []
        self.replays: list[int] = []

    def capture(self, bodies: Sequence[Body]) -> list[Body]:
        for body in bodies:
            body()
        for body in bodies:
            recorder = Recorder()
            with recorder:
                body()
            recorder.spoil()
            self.recorders.append(recorder)
        return [lambda i=i: self._replay(i) for i in range(len(bodies))]  # type: ignore[misc]

    def _replay(self, index: int) -> None:
        self.replays.append(index)
        self.recorders[index].replay()

    def fill(self, buffer: Tensor, value: Tensor) -> None:
        buffer.copy_(value)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        yield
