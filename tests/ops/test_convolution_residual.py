"""convolution_residual against its reference, with plain weights and with packed ones."""

from __future__ import annotations

import pytest
import torch
from tolerances import DTYPES, assert_close_to_reference, relative, with_gap
from torch import Tensor

from fastfar import reference
from fastfar.ops import convolution_residual, use_backend
from fastfar.ops._convolution import can_pack, is_packed, pack_convolution

OPS = (convolution_residual, reference.convolution_residual)
# B, C, H, W, outputs, kernel
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 3, 5, 4, 7, 3), (1, 16, 8, 8, 32, 3), (3, 33, 3, 6, 5, 1)]
Shape = tuple[int, int, int, int, int, int]


def inputs(
    batch: int, channels: int, height: int, width: int, outputs: int, kernel: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    weight = normal(outputs, channels, kernel, kernel) / (kernel * channels**0.5)
    return (
        normal(batch, channels, height, width),
        weight,
        normal(outputs),
        normal(batch, outputs, height, width),
    )


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: Shape, dtype: torch.dtype, backend: str) -> None:
    args = inputs(*shape)
    with use_backend(backend):
        for layout in (torch.Tensor.contiguous, with_gap):
            for tensors in (args, args[:3]):
                assert_close_to_reference(*OPS, *tensors, dtype=dtype, layout=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed(shape: Shape, dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        pytest.skip(f"no packed convolutions in {dtype} here")

    def packing(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        packed = pack_convolution(weight, weight.dtype)
        assert is_packed(packed) and packed.dtype is dtype and packed.shape == weight.shape
        with use_backend("native"):
            out = convolution_residual(x, packed, *rest)
        assert out.is_contiguous(memory_format=torch.channels_last)
        return out

    args = inputs(*shape)
    for layout in (torch.Tensor.contiguous, with_gap):
        for tensors in (args, args[:3]):
            assert_close_to_reference(
                packing,
                reference.convolution_residual,
                *tensors,
                dtype=dtype,
                gradients=False,
                layout=layout,
            )


def test_packed_sum_is_rounded_once_and_leaves_the_residual_alone() -> None:
    if not can_pack(torch.bfloat16):
        pytest.skip("no packed convolutions in bfloat16 here")
    x, weight, bias, residual = (t.bfloat16() for t in inputs(1, 32, 8, 8, 64, 3))
    before = residual.clone()
    with use_backend("native"):
        out = convolution_residual(x, pack_convolution(weight, torch.bfloat16), bias, residual)
    exact = (t.double() for t in (x, weight, bias, residual))
    truth = reference.convolution_residual(*exact)
    assert relative(out, truth) < 1.1 * relative(truth.bfloat16(), truth)
    assert torch.equal(residual, before)


def test_what_cannot_be_packed() -> None:
    assert not can_pack(torch.float64) and not can_pack(torch.float16)
    assert not is_packed(torch.zeros(1, 1, 3, 3))
