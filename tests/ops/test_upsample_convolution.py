"""upsample_convolution against its reference, also as four small convolutions."""

from __future__ import annotations

import pytest
import torch
from tolerances import DTYPES, assert_close_to_reference, with_gap
from torch import Tensor

from fastfar import reference
from fastfar.ops import upsample_convolution, use_backend
from fastfar.ops._convolution import can_pack
from fastfar.ops.upsample_convolution import pack_upsample

OPS = (upsample_convolution, reference.upsample_convolution)
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 5, 4, 7), (1, 16, 8, 3, 32), (3, 6, 1, 6, 5)]  # B, C, H, W, N
Shape = tuple[int, int, int, int, int]


def inputs(batch: int, channels: int, height: int, width: int, outputs: int) -> tuple[Tensor, ...]:
    weight = torch.randn(outputs, channels, 3, 3, dtype=torch.float64) / (3 * channels**0.5)
    x_BCHW = torch.randn(batch, channels, height, width, dtype=torch.float64)
    return x_BCHW, weight, torch.randn(outputs, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_values_and_gradients(shape: Shape, dtype: torch.dtype, backend: str) -> None:
    with use_backend(backend):
        for layout in (torch.Tensor.contiguous, with_gap):
            assert_close_to_reference(*OPS, *inputs(*shape), dtype=dtype, layout=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed(shape: Shape, dtype: torch.dtype) -> None:
    """The sums of taps are rounded like the taps themselves: the error is of the same size."""
    if not can_pack(dtype):
        pytest.skip(f"no packed convolutions in {dtype} here")

    def packing(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with use_backend("native"):
            out = upsample_convolution(x, pack_upsample(weight, x.dtype), bias)
        assert out.is_contiguous(memory_format=torch.channels_last)
        return out

    for layout in (torch.Tensor.contiguous, with_gap):
        assert_close_to_reference(
            packing,
            reference.upsample_convolution,
            *inputs(*shape),
            dtype=dtype,
            gradients=False,
            layout=layout,
        )


def test_every_tap_lands_where_it_belongs() -> None:
    """One tap at a time, with whole numbers: exact."""
    if not can_pack(torch.float32):
        pytest.skip("no packed convolutions here")
    x = torch.arange(1.0, 13.0).view(1, 1, 3, 4)
    for tap in range(9):
        weight = torch.zeros(1, 1, 9)
        weight[..., tap] = 1.0
        weight = weight.view(1, 1, 3, 3)
        with use_backend("native"):
            out = upsample_convolution(x, pack_upsample(weight, x.dtype), torch.zeros(1))
        assert torch.equal(out, reference.upsample_convolution(x, weight, torch.zeros(1)))
