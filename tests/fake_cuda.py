"""Tensors without numbers, and a watch over what runs on them: capture safety without a GPU.

A fake CUDA tensor has shape, dtype and device but no numbers, so what would wait for the device
cannot go on, and what depends on numbers has no answer. The watch adds what a CUDA graph forbids
besides: tensors of the host, and copies between host and device.

A CPU build of PyTorch cannot differentiate fake CUDA tensors. Where gradients are wanted, PyTorch's
"meta" device stands for the GPU: its tensors have no numbers either, and are on no host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastfar import diffusion, levels, solver
from fastfar._weights import skeleton
from fastfar.backend import described_gpu
from fastfar.config import FARConfig
from fastfar.model import FAR
from fastfar.ops import _denoise_triton

_ALLOCATIONS = ("aten::empty", "aten::new_empty")


@dataclass(frozen=True)
class Call:
    """One op: name, arguments and results, with (shape, dtype) for a tensor."""

    name: str
    arguments: tuple[Any, ...]
    results: tuple[Any, ...]
    launches: bool  # a kernel, or several: it is no view, no allocation and no question


class Watch(TorchDispatchMode):
    """Notes the ops called inside; AssertionError for what a capture forbids.

    Reading a value back and shapes that depend on values are stopped by the tensors themselves.

    device: type of the device that all tensors are to be on; None allows any (for a warm-up).
    """

    def __init__(self, device: str | None = "cuda") -> None:
        super().__init__()
        self._device = device
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given, made = _tensors((args, kwargs)), _tensors(out)
        for x in [*given, *made] if self._device is not None else ():
            where = x.device.type
            assert where == self._device, f"{func} on a tensor of the host {tuple(x.shape)}"
        name = func._schema.name
        allocates = name.startswith(_ALLOCATIONS)
        self.calls.append(
            Call(
                name,
                tuple(tree_leaves(tree_map(_described, (args, kwargs)))),
                tuple(tree_leaves(tree_map(_described, out))),
                func._schema.is_mutable or bool(_memory(made) - _memory(given) and not allocates),
            )
        )
        return out

    @property
    def launches(self) -> Counter[str]:
        """How often each op was called that launches something."""
        return Counter(call.name for call in self.calls if call.launches)


class _Methods(TorchFunctionMode):
    """x[...] and x.copy_(y) by PyTorch's ops: the methods want a CUDA build, even for fake ones."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.copy_:
            func = torch.ops.aten.copy_.default
        if func is not Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        x, index = args
        index = index if isinstance(index, tuple) else (index,)
        gathered: list[Tensor | None] = []
        axis = 0
        for position, part in enumerate(index):
            if isinstance(part, Tensor):
                gathered += [None] * (axis - len(gathered)) + [part]
            elif isinstance(part, int):
                x = torch.select(x, axis, part)
                continue
            elif part is None:
                x = torch.unsqueeze(x, axis)
            elif part is Ellipsis:
                later = index[position + 1 :]
                axis = x.dim() - sum(other is not None for other in later)
                continue
            elif part != slice(None):
                x = torch.ops.aten.slice.Tensor(x, axis, part.start, part.stop, part.step or 1)
            axis += 1
        return torch.ops.aten.index.Tensor(x, gathered) if gathered else x


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _memory(tensors: list[Tensor]) -> set[int]:
    return {x.untyped_storage()._cdata for x in tensors}


def _described(leaf: Any) -> Any:
    return str((tuple(leaf.shape), leaf.dtype)) if isinstance(leaf, Tensor) else leaf


_CACHES = (
    diffusion.device_table,
    diffusion.device_timesteps,
    solver._noise_table,
    levels.filter_table,
    _denoise_triton._device_update_table,
)


@contextmanager
def own_tables() -> Iterator[None]:
    """Device tables made inside are forgotten at the end: they have no numbers."""
    for cache in _CACHES:
        cache.cache_clear()
    try:
        yield
    finally:
        for cache in _CACHES:
            cache.cache_clear()


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Tensors made inside are fake ones; make them on "cuda". Tables of the host are real."""
    h100 = described_gpu(90)
    with own_tables(), h100, FakeTensorMode(allow_non_fake_inputs=True), _Methods():
        yield


def fill_host_tables(config: FARConfig) -> None:
    """Tables of the host that a run needs, before `fake_cuda` is entered: they are to be real."""
    levels.filter_matrices(config.latent_size, config.num_levels, config.filter)


def fake_far(config: FARConfig, dtype: torch.dtype, device: str = "cuda") -> FAR:
    """FAR whose parameters have no numbers; call it inside `fake_cuda` or `own_tables`."""
    with skeleton():
        model = FAR(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(empty))
    return model.eval()
