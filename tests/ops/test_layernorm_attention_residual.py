"""layernorm_attention_residual against its reference, on PyTorch and on every native set."""

from __future__ import annotations

import pytest
import torch
from dirty_scratch import assert_same_on_any_number_of_threads
from tolerances import DTYPES, assert_close_to_reference, relative, with_gap
from torch import Tensor

from fastfar import reference
from fastfar._native import NativeLibrary
from fastfar.ops import layernorm_attention_residual, use_backend
from fastfar.packing import pack

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


# --- native ----------------------------------------------------------------------------------

NATIVE_DTYPES = (torch.float32, torch.bfloat16)
# the last two: heads that straddle k tiles; K in pieces, and more rows than one block
NATIVE_SHAPES = [*SHAPES, (1, 3, 240, 3), (1, 34, 672, 2)]


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", NATIVE_SHAPES, ids=str)
def test_native(isa: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    *sizes, heads = shape
    mask = torch.rand(sizes[:2]) < 0.6
    mask[:, 0] = True
    with use_backend("native"):
        for key_mask, layout in ((None, with_gap), (mask, torch.Tensor.contiguous)):
            assert_close_to_reference(
                *OPS,
                *inputs(*sizes),
                key_mask,
                dtype=dtype,
                gradients=False,
                layout=layout,
                num_heads=heads,
            )


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_native_packed_weights_and_float32_activations(isa: str, dtype: torch.dtype) -> None:
    """As in sampling: what is not a matrix stays float32, and so does the result."""
    args = [x.float() for x in inputs(2, 37, 64)]
    rounded = [x.to(dtype) if x.ndim == 2 else x for x in args]
    as_packed = [pack(x, dtype) if x.ndim == 2 else x for x in args]
    truth = reference.layernorm_attention_residual(*[x.double() for x in rounded], num_heads=2)
    with use_backend("native"):
        out = layernorm_attention_residual(*as_packed, num_heads=2)
        assert torch.equal(out, layernorm_attention_residual(*rounded, num_heads=2))
        alone = layernorm_attention_residual(as_packed[0][1:], *as_packed[1:], num_heads=2)
    assert torch.equal(out[1:], alone)
    assert out.dtype == torch.float32
    assert relative(out - args[0], truth - args[0]) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_native_is_the_same_everywhere(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [x.to(dtype) for x in inputs(2, 41, 72)]
    with use_backend("native"):
        assert_same_on_any_number_of_threads(
            monkeypatch, lambda: layernorm_attention_residual(*args, num_heads=3)
        )


def test_native_leaves_training_to_pytorch(library: NativeLibrary) -> None:
    args = [x.float() for x in inputs(1, 5, 8)]
    with use_backend("native"):
        expected = layernorm_attention_residual(*args, num_heads=2)
        args[3].requires_grad_()
        out = layernorm_attention_residual(*args, num_heads=2)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        assert args[3].grad is not None
        args[5] = pack(args[5], torch.float32)
        with pytest.raises(ValueError, match="packed weights are for sampling only"):
            layernorm_attention_residual(*args, num_heads=2)


def test_native_refuses_what_it_cannot_do(library: NativeLibrary) -> None:
    args = [x.float() for x in inputs(1, 5, 8)]
    with use_backend("native"):
        with pytest.raises(TypeError, match=r"x_BSD is torch\.float64"):
            layernorm_attention_residual(args[0].double(), *args[1:], num_heads=2)
        with pytest.raises(TypeError, match="give one dtype"):
            layernorm_attention_residual(*args[:3], args[3].bfloat16(), *args[4:], num_heads=2)
        with pytest.raises(ValueError, match=r"3 heads do not share \(1, 5, 8\)"):
            layernorm_attention_residual(*args, num_heads=3)
        with pytest.raises(ValueError, match=r"qkv_weight is \(23, 8\), expected \(24, 8\)"):
            layernorm_attention_residual(*args[:3], args[3][1:], *args[4:], num_heads=2)
        with pytest.raises(ValueError, match=r"norm_bias is \(7,\), expected \(8,\)"):
            layernorm_attention_residual(*args[:2], args[2][1:], *args[3:], num_heads=2)
        assert layernorm_attention_residual(args[0][:, :0], *args[1:], num_heads=2).numel() == 0
