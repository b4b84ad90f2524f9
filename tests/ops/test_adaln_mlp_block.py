"""adaln_mlp_block against its reference."""

from __future__ import annotations

import pytest
import torch
from tolerances import DTYPES, assert_close_to_reference, with_gap
from torch import Tensor

from fastfar import reference
from fastfar.ops import adaln_mlp_block

OPS = (adaln_mlp_block, reference.adaln_mlp_block)
SHAPES = [(1, 8), (7, 13), (31, 5), (64, 64), (127, 32)]  # N, W


def inputs(rows: int, width: int) -> tuple[Tensor, ...]:
    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, dtype=torch.float64)

    return (
        normal(rows, width),
        normal(rows, width, scale=0.5),
        normal(rows, width, scale=0.5),
        normal(rows, width),
        1 + normal(width, scale=0.2),
        normal(width, scale=0.2),
        normal(width, width, scale=width**-0.5),
        normal(width, scale=0.2),
        normal(width, width, scale=width**-0.5),
        normal(width, scale=0.2),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_close_to_reference(*OPS, *inputs(*shape), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_contiguous(dtype: torch.dtype) -> None:
    assert_close_to_reference(*OPS, *inputs(7, 13), dtype=dtype, layout=with_gap)


def test_modulations_as_chunks_of_one_matrix() -> None:
    """As the head calls it: three slices of one linear layer's output."""
    x, shift, scale, gate, *rest = inputs(7, 12)
    chunks = torch.cat([shift, scale, gate], dim=1).chunk(3, dim=-1)
    torch.testing.assert_close(
        adaln_mlp_block(x, *chunks, *rest),
        reference.adaln_mlp_block(x, shift, scale, gate, *rest),
    )


def test_a_closed_gate_is_the_identity() -> None:
    x, shift, scale, gate, *rest = inputs(5, 7)
    assert torch.equal(adaln_mlp_block(x, shift, scale, 0 * gate, *rest), x)


def test_gradcheck() -> None:
    args = [x.requires_grad_() for x in inputs(3, 4)]
    assert torch.autograd.gradcheck(adaln_mlp_block, args)
