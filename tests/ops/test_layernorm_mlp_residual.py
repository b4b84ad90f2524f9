"""layernorm_mlp_residual against its reference, on PyTorch and on every native set."""

from __future__ import annotations

import pytest
import torch
from dirty_scratch import assert_same_on_any_number_of_threads
from tolerances import DTYPES, assert_close_to_reference, relative, with_gap
from torch import Tensor

from fastfar import reference
from fastfar._native import NativeLibrary
from fastfar.ops import layernorm_mlp_residual, use_backend
from fastfar.packing import pack

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


# --- native ----------------------------------------------------------------------------------

NATIVE_DTYPES = (torch.float32, torch.bfloat16)
# the last two: more than one block of rows; K of the second layer in pieces
NATIVE_SHAPES = [*SHAPES, (2, 40, 96, 65), (1, 35, 33, 2600)]


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", NATIVE_SHAPES, ids=str)
def test_native(isa: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    with use_backend("native"):
        for layout in (torch.Tensor.contiguous, with_gap):
            assert_close_to_reference(
                *OPS, *inputs(*shape), dtype=dtype, gradients=False, layout=layout
            )


def test_native_gelu_is_exact(isa: str) -> None:
    """With W_1 = 0 and W_2 = 1 the output is x + gelu(b_1), here for x = 0."""
    value = torch.cat([torch.linspace(-30, 30, 901), torch.linspace(-0.01, 0.01, 101)])
    size = len(value)
    zeros, ones = torch.zeros(1, 1, 1), torch.ones(1)
    fc2_weight = torch.zeros(size, size).fill_diagonal_(1.0)
    with use_backend("native"):
        out = layernorm_mlp_residual(
            zeros.expand(1, 1, size),
            ones.expand(size),
            torch.zeros(size),
            torch.zeros(size, size),
            value,
            fc2_weight,
            torch.zeros(size),
        )[0, 0]
    x = value.double()
    expected = 0.5 * x * torch.special.erfc(-x / 2**0.5)
    # a rounding of x beyond 1, of 1 below; half a rounding near 0
    assert bool(((out - expected).abs() <= 1.2e-7 * x.abs().clamp(max=1) + 6e-8 * x.abs()).all())


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_native_packed_weights_and_float32_activations(isa: str, dtype: torch.dtype) -> None:
    """As in sampling: what is not a matrix stays float32, and so does the result."""
    args = [x.float() for x in inputs(2, 37, 64, 130)]
    rounded = [x.to(dtype) if x.ndim == 2 else x for x in args]
    as_packed = [pack(x, dtype) if x.ndim == 2 else x for x in args]
    truth = reference.layernorm_mlp_residual(*[x.double() for x in rounded])
    with use_backend("native"):
        out = layernorm_mlp_residual(*as_packed)
        assert torch.equal(out, layernorm_mlp_residual(*rounded))
    assert out.dtype == torch.float32
    assert relative(out - args[0], truth - args[0]) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_native_is_the_same_everywhere(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [x.to(dtype) for x in inputs(2, 41, 72, 2600)]
    with use_backend("native"):
        assert_same_on_any_number_of_threads(monkeypatch, lambda: layernorm_mlp_residual(*args))


def test_native_rows_do_not_depend_on_others(library: NativeLibrary) -> None:
    args = [x.float() for x in inputs(3, 30, 16, 40)]
    with use_backend("native"):
        whole = layernorm_mlp_residual(*args)
        args[0][1] = float("nan")
        out = layernorm_mlp_residual(*args)
    assert out[1].isnan().all()
    assert torch.equal(out[::2], whole[::2])


def test_native_refuses_what_it_cannot_do(library: NativeLibrary) -> None:
    args = [x.float() for x in inputs(1, 5, 8, 12)]
    with use_backend("native"):
        with pytest.raises(TypeError, match=r"x_BSD is torch\.float64"):
            layernorm_mlp_residual(args[0].double(), *args[1:])
        with pytest.raises(TypeError, match="give one dtype"):
            layernorm_mlp_residual(*args[:3], args[3].bfloat16(), *args[4:])
        with pytest.raises(ValueError, match=r"fc2_weight is \(7, 12\), expected \(8, 12\)"):
            layernorm_mlp_residual(*args[:5], args[5][1:], args[6])
        assert layernorm_mlp_residual(args[0][:0], *args[1:]).shape == (0, 5, 8)
