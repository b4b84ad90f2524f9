"""Tensors between guard bands: what a kernel must neither read nor write lies around them.

The bands are NaN (for integers: the smallest number), so a read beyond the end shows in the
result, and a write beyond the end shows in the band.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BAND = 256  # elements before and after


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return float("nan")
    return False if dtype is torch.bool else torch.iinfo(dtype).min


def _buffer(numel: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.full((numel + 2 * BAND,), _poison(dtype), dtype=dtype, device=device)


def guarded(x: Tensor) -> Tensor:
    """A contiguous copy of x inside a poisoned buffer."""
    buffer = _buffer(x.numel(), x.dtype, x.device)
    inside = buffer[BAND : BAND + x.numel()].view(x.shape)
    inside.copy_(x.detach())
    return inside


@dataclass(frozen=True)
class Output:
    """A poisoned tensor to be written, and its bands."""

    tensor: Tensor
    buffer: Tensor

    def intact(self) -> None:
        """AssertionError where a band was written or an element was not."""
        for band in (self.buffer[:BAND], self.buffer[-BAND:]):
            same = band.isnan() if band.dtype.is_floating_point else band == _poison(band.dtype)
            assert bool(same.all()), "written outside of the output"
        if self.tensor.dtype.is_floating_point:
            assert not bool(self.tensor.isnan().any()), "part of the output was not written"


def outputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Output:
    """A NaN-poisoned output with guard bands."""
    numel = int(torch.Size(shape).numel())
    buffer = _buffer(numel, dtype, device)
    return Output(buffer[BAND : BAND + numel].view(shape), buffer)
