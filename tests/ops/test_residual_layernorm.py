"""residual_layernorm against its reference, on PyTorch; on Triton: tests/triton."""

from __future__ import annotations

import pytest
import torch
from tolerances import DTYPES, assert_close_to_reference, with_gap
from torch import Tensor

from fastfar import reference
from fastfar.ops import residual_layernorm

SHAPES = [(1, 4), (3, 2, 33), (7, 192)]


OPS = (residual_layernorm, reference.residual_layernorm)


def inputs(*shape: int) -> tuple[Tensor, ...]:
    x, update = torch.randn(2, *shape, dtype=torch.float64)
    weight, bias = 0.2 * torch.randn(2, shape[-1], dtype=torch.float64)
    return x + 0.5, update, 1 + weight, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, update, *affine = inputs(*shape)
    for args in ((x, update, *affine), (x, None, *affine), (x, update, None, None)):
        assert_close_to_reference(*OPS, *args, dtype=dtype)
    assert_close_to_reference(*OPS, x, update, *affine, dtype=dtype, layout=with_gap)


def test_without_an_update_x_is_the_sum() -> None:
    x, _, *affine = inputs(3, 8)
    assert residual_layernorm(x, None, *affine)[0] is x


def test_the_sum_keeps_the_dtype_of_x() -> None:
    x, update, *affine = (each.float() for each in inputs(3, 8))
    total, normed = residual_layernorm(x, update.bfloat16(), *affine)
    assert total.dtype is normed.dtype is torch.float32
    assert torch.equal(total, x + update.bfloat16())


def test_gradcheck() -> None:
    args = [x.requires_grad_() for x in inputs(2, 5)]
    assert torch.autograd.gradcheck(residual_layernorm, args)
