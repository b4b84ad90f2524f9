"""layernorm_attention_residual against its reference."""

from __future__ import annotations

import pytest
import torch
from tolerances import DTYPES, assert_close_to_reference, relative, with_gap
from torch import Tensor

from fastfar import reference
from fastfar.ops import layernorm_attention_residual

OPS = (layernorm_attention_residual, reference.layernorm_attention_residual)
SHAPES = [(1, 1, 4, 1), (2, 7, 6, 3), (3, 13, 22, 2), (1, 67, 32, 4)]  # B, S, D, heads


def inputs(batch: int, length: int, width: int) -> tuple[Tensor, ...]:
    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, dtype=torch.float64)

    return (
        normal(batch, length, width),
        1 + normal(width, scale=0.2),
        normal(width, scale=0.2),
        normal(3 * width, width, scale=width**-0.5),
        normal(3 * width, scale=0.2),
        normal(width, width, scale=width**-0.5),
        normal(width, scale=0.2),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    *sizes, heads = shape
    assert_close_to_reference(*OPS, *inputs(*sizes), dtype=dtype, num_heads=heads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_contiguous(dtype: torch.dtype) -> None:
    assert_close_to_reference(
        *OPS, *inputs(2, 7, 6), dtype=dtype, layout=with_gap, num_heads=3
    )


def test_transposed_input() -> None:
    x_BSD, *rest = inputs(3, 5, 8)
    transposed = x_BSD.transpose(0, 1).contiguous().transpose(0, 1)
    out = layernorm_attention_residual(transposed, *rest, num_heads=2)
    expected = reference.layernorm_attention_residual(x_BSD, *rest, num_heads=2)
    assert relative(out, expected) < 1e-12


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_key_mask_equals_dropping_the_keys(needs_gradient: bool) -> None:
    x_BSD, *rest = inputs(2, 11, 6)
    x_BSD.requires_grad_(needs_gradient)
    mask = torch.rand(2, 11) < 0.6
    mask[:, 0] = True
    out = layernorm_attention_residual(x_BSD, *rest, mask, num_heads=3)
    for image, kept in enumerate(mask):
        alone = x_BSD[image : image + 1, kept]
        expected = reference.layernorm_attention_residual(alone, *rest, num_heads=3)[0]
        assert relative(out[image, kept], expected) < 1e-12
    if needs_gradient:
        out[mask].sum().backward()
        assert x_BSD.grad is not None and not x_BSD.grad[~mask].any()


def test_gradcheck() -> None:
    args = [x.requires_grad_() for x in inputs(1, 3, 4)]
    assert torch.autograd.gradcheck(
        lambda *a: layernorm_attention_residual(*a, num_heads=2), args
    )
