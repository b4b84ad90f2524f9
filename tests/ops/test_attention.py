"""attention against its reference: values, gradients, key masks."""

from __future__ import annotations

import pytest
import torch
from tolerances import DTYPES, assert_close_to_reference, relative, with_gap
from torch import Tensor

from fastfar import reference
from fastfar.ops import attention

SHAPES = [(1, 1, 1, 4), (2, 7, 3, 5), (3, 13, 2, 16), (1, 67, 2, 8)]  # B, S, heads, E


def inputs(shape: tuple[int, int, int, int]) -> Tensor:
    batch, length, heads, width = shape
    return torch.randn(batch, length, 3, heads, width, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_close_to_reference(attention, reference.attention, inputs(shape), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_contiguous(dtype: torch.dtype) -> None:
    qkv = inputs((2, 7, 3, 5))
    assert_close_to_reference(
        attention, reference.attention, qkv, dtype=dtype, layout=with_gap
    )
    other_order = qkv.transpose(1, 3).contiguous().transpose(1, 3)
    torch.testing.assert_close(attention(other_order), reference.attention(qkv))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_key_mask(dtype: torch.dtype) -> None:
    mask = torch.rand(3, 13) < 0.5
    mask[:, 0], mask[1] = True, torch.arange(13) == 0  # one image with a single key
    qkv = inputs((3, 13, 2, 16))
    assert_close_to_reference(attention, reference.attention, qkv, mask, dtype=dtype)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_key_mask_equals_dropping_the_keys(needs_gradient: bool) -> None:
    qkv = inputs((2, 11, 3, 5)).requires_grad_(needs_gradient)
    mask = torch.rand(2, 11) < 0.6
    mask[:, 0] = True
    out = attention(qkv, mask)
    for image, kept in enumerate(mask):
        alone = reference.attention(qkv[image : image + 1, kept])[0]
        assert relative(out[image, kept], alone) < 1e-12
    if needs_gradient:
        out[mask].sum().backward()
        assert qkv.grad is not None and not qkv.grad[~mask].any()


def test_gradcheck() -> None:
    qkv = inputs((2, 3, 2, 2)).requires_grad_()
    mask = torch.tensor([[True, False, True], [True, True, True]])
    assert torch.autograd.gradcheck(lambda x: attention(x, mask), qkv)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_dropout_keeps_the_mean(needs_gradient: bool) -> None:
    qkv = inputs((1, 5, 2, 4)).requires_grad_(needs_gradient)
    draws = torch.stack([attention(qkv, dropout=0.3).detach() for _ in range(2000)])
    assert draws.std(0).min() > 0.01
    assert relative(draws.mean(0), attention(qkv)) < 0.05
