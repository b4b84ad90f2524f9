"""transformer_block against its reference, on PyTorch and native; on Triton: tests/triton."""

from __future__ import annotations

import pytest
import torch
from tolerances import DTYPES, assert_close_to_reference, with_gap
from torch import Tensor

from fastfar import reference
from fastfar._native import NativeLibrary
from fastfar.ops import (
    layernorm_attention_residual,
    layernorm_mlp_residual,
    transformer_block,
    use_backend,
)

OPS = (transformer_block, reference.transformer_block)
HEADS = 3


def inputs(batch: int, length: int, width: int, hidden: int) -> tuple[Tensor, ...]:
    def normal(*shape: int, scale: float = 0.2) -> Tensor:
        return scale * torch.randn(*shape, dtype=torch.float64)

    def linear(out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        return normal(out_features, in_features, scale=in_features**-0.5), normal(out_features)

    return (
        normal(batch, length, width, scale=1.0),
        *(1 + normal(width), normal(width)),
        *linear(3 * width, width),
        *linear(width, width),
        *(1 + normal(width), normal(width)),
        *linear(hidden, width),
        *linear(width, hidden),
    )


def half_masked(batch: int, length: int) -> Tensor:
    mask_BS = torch.rand(batch, length) < 0.5
    mask_BS[:, 0] = True
    return mask_BS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype) -> None:
    args = inputs(2, 7, 12, 20)
    assert_close_to_reference(*OPS, *args, dtype=dtype, num_heads=HEADS, layers=2)
    assert_close_to_reference(
        *OPS, *args, half_masked(2, 7), dtype=dtype, num_heads=HEADS, layers=2, layout=with_gap
    )


def test_native_is_its_two_halves(library: NativeLibrary) -> None:
    args = [x.float() for x in inputs(2, 7, 12, 20)]
    mask = half_masked(2, 7)
    with use_backend("native"):
        out = transformer_block(*args, mask, num_heads=HEADS)
        y = layernorm_attention_residual(*args[:7], mask, num_heads=HEADS)
        assert torch.equal(out, layernorm_mlp_residual(y, *args[7:]))
    assert not torch.equal(out, transformer_block(*args, mask, num_heads=HEADS))


def test_dropout_is_passed_on() -> None:
    args = inputs(1, 3, 6, 8)
    out = transformer_block(*args, num_heads=HEADS, dropout=0.5)
    assert not torch.equal(out, transformer_block(*args, num_heads=HEADS, dropout=0.5))


def test_the_choice_of_attention_is_passed_on() -> None:
    args = [x.float() for x in inputs(1, 3, 6, 8)]
    expected = transformer_block(*args, num_heads=HEADS)
    out = transformer_block(*args, num_heads=HEADS, attention="sdpa_math")
    torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match="attention='none'"):
        transformer_block(*args, num_heads=HEADS, attention="none")
