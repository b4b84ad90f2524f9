"""What the native launchers of the transformer's ops share: checks, dtypes, scratch."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from fastfar import _native
from fastfar.packing import PackedWeight

ALLOWED = "float32 or bfloat16"
_own = threading.local()


def needs_pytorch(tensors: Mapping[str, Tensor | None], dropout: float = 0.0) -> bool:
    """Whether an op without native backward must leave this call to its PyTorch implementation.

    Raises ValueError where that cannot be done either, because weights are packed.
    """
    given = [x for x in tensors.values() if x is not None]
    leave = dropout > 0 or (torch.is_grad_enabled() and any(x.requires_grad for x in given))
    if leave and any(isinstance(x, PackedWeight) for x in given):
        raise ValueError(
            "packed weights are for sampling only, without dropout and under torch.no_grad(); "
            "train the model that they were packed from"
        )
    return leave


def check(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raises TypeError for a dtype and ValueError for a device that the native ops do not take."""
    for name, x in tensors.items():
        if x is None or isinstance(x, PackedWeight):
            continue
        if x.device.type != "cpu":
            raise ValueError(f"native {op}: {name} is on {x.device}; give it on the CPU")
        if x.dtype not in _native.DTYPES:
            raise TypeError(f"native {op}: {name} is {x.dtype}; give {ALLOWED}")


def shapes(op: str, **tensors: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raises ValueError for a tensor, packed or not, of another shape."""
    for what, (x, expected) in tensors.items():
        if isinstance(x, PackedWeight):
            shape: tuple[int, ...] = (x.out_features, x.in_features)
        else:
            shape = tuple(x.shape)
        if shape != expected:
            raise ValueError(f"native {op}: {what} is {shape}, expected {expected}")


def compute_dtype(op: str, *weights: Tensor) -> torch.dtype:
    """The dtype of all weights, packed or not; TypeError where they differ."""
    dtypes = {w.compute_dtype if isinstance(w, PackedWeight) else w.dtype for w in weights}
    if len(dtypes) > 1:
        raise TypeError(f"native {op}: weights of {sorted(map(str, dtypes))}; give one dtype")
    return dtypes.pop()


def vector(op: str, name: str, x: Tensor, size: int) -> Tensor:
    """x as `size` contiguous float32 numbers; ValueError for another shape."""
    if x.shape != (size,):
        raise ValueError(f"native {op}: {name} is {tuple(x.shape)}, expected {(size,)}")
    return x.float().contiguous()


def key_mask(op: str, mask_BS: Tensor | None, batch: int, length: int) -> Tensor | None:
    """The mask as one byte per key; ValueError or TypeError unless it is bool (batch, length)."""
    if mask_BS is None:
        return None
    if mask_BS.dtype != torch.bool:
        raise TypeError(f"native {op}: key_mask_BS is {mask_BS.dtype}; give bool")
    if mask_BS.shape != (batch, length) or mask_BS.device.type != "cpu":
        raise ValueError(
            f"native {op}: key_mask_BS is {tuple(mask_BS.shape)} on {mask_BS.device}, expected "
            f"{(batch, length)} on the CPU"
        )
    return mask_BS.contiguous()


def workspace(size: int) -> Tensor:
    """At least `size` bytes that this thread keeps for its next call.

    A fresh allocation of this size would be mapped and cleared by the system at every call.
    """
    buffer: Tensor | None = getattr(_own, "buffer", None)
    if buffer is None or buffer.numel() < size:
        _own.buffer = None  # so that the old one is free before the new one is taken
        _own.buffer = buffer = torch.empty(size, dtype=torch.uint8)
    return buffer


def launch(op: str, **fields: Tensor | float | None) -> None:
    """Call the native `op` with its scratch; fields: all but `scratch`, in order."""
    library = _native.load()
    size = library.scratch(op, **fields, scratch=None)
    if size < 0:
        raise RuntimeError(f"fastfar_{op}_scratch refused its arguments (code {size}): {fields}")
    library.call(op, **fields, scratch=workspace(size))
