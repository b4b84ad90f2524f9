"""layernorm_mlp_residual against its reference."""

from __future__ import annotations

import pytest
import torch
from tolerances import DTYPES, assert_close_to_reference, relative, with_gap
from torch import Tensor

from fastfar import reference
from fastfar.ops import layernorm_mlp_residual

OPS = (layernorm_mlp_residual, reference.layernorm_mlp_residual)
SHAPES = [(1, 1, 4, 16), (2, 7, 5, 20), (3, 13, 11, 17), (1, 67, 32, 128)]  # B, S, D, hidden


def inputs(batch: int, length: int, width: int, hidden: int) -> tuple[Tensor, ...]:
    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, dtype=torch.float64)

    return (
        normal(batch, length, width),
        1 + normal(width, scale=0.2),
        normal(width, scale=0.2),
        normal(hidden, width, scale=width**-0.5),
        normal(hidden, scale=0.2),
        normal(width, hidden, scale=hidden**-0.5),
        normal(width, scale=0.2),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_close_to_reference(*OPS, *inputs(*shape), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_contiguous(dtype: torch.dtype) -> None:
    assert_close_to_reference(*OPS, *inputs(2, 7, 5, 20), dtype=dtype, layout=with_gap)


def test_the_gelu_is_the_exact_one() -> None:
    """At D = 1 the norm is its bias: the output is x + gelu(norm_bias), computed by erf."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for value in (-3.0, -0.5, 1.5):
        shifted = zero + value
        out = layernorm_mlp_residual(
            zero[None, None], one, shifted, one[None], zero, one[None], zero
        )
        expected = value * 0.5 * (1 + torch.erf(shifted / 2**0.5))
        torch.testing.assert_close(out.flatten(), expected, rtol=0, atol=1e-14)


def test_dropout_keeps_the_mean() -> None:
    args = inputs(1, 2, 4, 8)
    draws = torch.stack([layernorm_mlp_residual(*args, dropout=0.2) for _ in range(4000)])
    assert draws.std(0).min() > 0.01
    assert relative(draws.mean(0), layernorm_mlp_residual(*args)) < 0.05


def test_gradcheck() -> None:
    args = [x.requires_grad_() for x in inputs(1, 2, 3, 5)]
    assert torch.autograd.gradcheck(layernorm_mlp_residual, args)
