"""adaln_mlp_block against its reference."""

from __future__ import annotations

import pytest
import torch
from native_training import assert_native, assert_same_for_all_threads, opcheck_of
from tolerances import DTYPES, assert_close_to_reference, relative, with_gap
from torch import Tensor

from fastfar import reference
from fastfar._native import NativeLibrary
from fastfar.ops import adaln_mlp_block, use_backend

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


# --- native ----------------------------------------------------------------------------------

NATIVE_SHAPES = [(1, 16), (2, 1), (3, 33), (7, 13), (65, 64), (300, 48)]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", NATIVE_SHAPES, ids=str)
def test_native(shape: tuple[int, int], dtype: torch.dtype, isa: str) -> None:
    floor = 1 if shape[0] * shape[1] > 200 else 8  # a few numbers: PyTorch's error is a coincidence
    assert_native(*OPS, *inputs(*shape), dtype=dtype, layers=floor)


def test_native_not_contiguous(isa: str) -> None:
    assert_native(*OPS, *inputs(7, 13), dtype=torch.float32, layout=with_gap)


def test_native_chunks_and_closed_gates(isa: str) -> None:
    x, shift, scale, gate, *rest = (each.float() for each in inputs(37, 12))
    chunks = torch.cat([shift, scale, gate], dim=1).chunk(3, dim=-1)
    with use_backend("native"):
        expected = adaln_mlp_block(x, shift, scale, gate, *rest)
        assert torch.equal(adaln_mlp_block(x, *chunks, *rest), expected)
        assert torch.equal(adaln_mlp_block(x, shift, scale, 0 * gate, *rest), x)


def test_threads_do_not_matter(isa: str) -> None:
    assert_same_for_all_threads(adaln_mlp_block, inputs(1100, 40))


def test_autocast(isa: str) -> None:
    """bfloat16 products, a float32 residual stream, float32 gradients of the parameters."""
    tensors = [x.float().requires_grad_() for x in inputs(70, 32)]
    cotangent = torch.randn(70, 32)
    with use_backend("native"), torch.autocast("cpu", torch.bfloat16):
        out = adaln_mlp_block(*tensors)
    assert out.dtype is torch.float32
    grads = torch.autograd.grad(out, tensors, cotangent)
    doubled = [x.detach().double().requires_grad_() for x in tensors]
    truth = reference.adaln_mlp_block(*doubled)
    for ours, exact in zip(
        [out, *grads], [truth, *torch.autograd.grad(truth, doubled, cotangent.double())],
        strict=True,
    ):
        assert ours.dtype is torch.float32 and relative(ours, exact) < 0.01


def test_opcheck(isa: str) -> None:
    tensors = [x.float() for x in inputs(3, 8)]
    for x in tensors:
        x.requires_grad_()
    opcheck_of("adaln_mlp_block", *tensors, 1e-6, torch.float32)


def test_what_is_not_taken(library: NativeLibrary) -> None:
    x, *rest = inputs(3, 8)
    with use_backend("native"):
        with pytest.raises(TypeError, match=r"float64.*float32 and bfloat16"):
            adaln_mlp_block(x, *rest)
        with pytest.raises(ValueError, match="shift is"):
            adaln_mlp_block(x[:2].float(), *(each.float() for each in rest))
