"""layernorm_linear against its reference, on PyTorch and on every native instruction set."""

from __future__ import annotations

import pytest
import torch
from dirty_scratch import assert_same_on_any_number_of_threads
from tolerances import DTYPES, assert_close_to_reference, relative, with_gap
from torch import Tensor

from fastfar import reference
from fastfar._native import NativeLibrary
from fastfar.ops import layernorm_linear, use_backend
from fastfar.packing import pack

OPS = (layernorm_linear, reference.layernorm_linear)
SHAPES = [(1, 1, 4, 4), (2, 7, 5, 20), (3, 13, 11, 17), (1, 67, 32, 33)]  # B, S, D, N
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
# the last two: more than one block of rows; K in pieces
NATIVE_SHAPES = [*SHAPES, (2, 40, 96, 65), (1, 35, 2600, 7)]


def inputs(batch: int, length: int, width: int, outputs: int) -> tuple[Tensor, ...]:
    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, dtype=torch.float64)

    return (
        normal(batch, length, width),
        1 + normal(width, scale=0.2),
        normal(width, scale=0.2),
        normal(outputs, width, scale=width**-0.5),
        normal(outputs, scale=0.2),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for layout in (torch.Tensor.contiguous, with_gap):
        assert_close_to_reference(*OPS, *inputs(*shape), dtype=dtype, layout=layout)


def test_gradcheck() -> None:
    args = [x.requires_grad_() for x in inputs(1, 2, 3, 5)]
    assert torch.autograd.gradcheck(layernorm_linear, args)


# --- native ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", NATIVE_SHAPES, ids=str)
def test_native(isa: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    with use_backend("native"):
        for layout in (torch.Tensor.contiguous, with_gap):
            assert_close_to_reference(
                *OPS, *inputs(*shape), dtype=dtype, gradients=False, layout=layout
            )


@pytest.mark.parametrize("width", [5, 37, 192])
def test_native_an_offset_costs_no_digits(isa: str, width: int) -> None:
    """Rows around 1000: a variance from the mean of squares would have no digit left."""
    x_BSD, norm_weight, norm_bias, weight, bias = inputs(1, 9, width, 16)
    args = (x_BSD + 1000, norm_weight, norm_bias, weight, bias)
    with use_backend("native"):
        assert_close_to_reference(*OPS, *args, dtype=torch.float32, gradients=False)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_native_packed_weights_and_float32_activations(isa: str, dtype: torch.dtype) -> None:
    """As in sampling: what is not a matrix stays float32, and so does the result."""
    args = [x.float() for x in inputs(2, 37, 64, 130)]
    rounded = [x.to(dtype) if x.ndim == 2 else x for x in args]
    as_packed = [pack(x, dtype) if x.ndim == 2 else x for x in args]
    truth = reference.layernorm_linear(*[x.double() for x in rounded])
    with use_backend("native"):
        out = layernorm_linear(*as_packed)
        assert torch.equal(out, layernorm_linear(*rounded))
        one = layernorm_linear(as_packed[0][1, 5], *as_packed[1:])  # a single row
    assert out.dtype == torch.float32
    assert torch.equal(one, out[1, 5])
    assert relative(out, truth) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_native_is_the_same_everywhere(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [x.to(dtype) for x in inputs(2, 41, 2600, 72)]
    with use_backend("native"):
        assert_same_on_any_number_of_threads(monkeypatch, lambda: layernorm_linear(*args))


def test_native_leaves_training_to_pytorch(library: NativeLibrary) -> None:
    args = [x.float() for x in inputs(1, 5, 8, 6)]
    with use_backend("native"):
        expected = layernorm_linear(*args)
        args[3].requires_grad_()
        out = layernorm_linear(*args)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
    assert args[3].grad is not None


def test_native_refuses_what_it_cannot_do(library: NativeLibrary) -> None:
    args = [x.float() for x in inputs(1, 5, 8, 6)]
    with use_backend("native"):
        with pytest.raises(TypeError, match=r"weight is torch\.float16; give float32 or bfloat16"):
            layernorm_linear(*args[:3], args[3].half(), args[4])
        with pytest.raises(ValueError, match=r"weight is \(6, 7\), expected \(6, 8\)"):
            layernorm_linear(*args[:3], args[3][:, 1:], args[4])
        assert layernorm_linear(args[0][:, :0], *args[1:]).shape == (1, 0, 6)
