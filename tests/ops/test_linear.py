"""linear against its reference, in PyTorch and natively."""

from __future__ import annotations

import pytest
import torch
from native_training import assert_native, assert_same_for_all_threads, opcheck_of
from tolerances import DTYPES, assert_close_to_reference, with_gap
from torch import Tensor

from fastfar import reference
from fastfar._native import NativeLibrary
from fastfar.ops import linear, use_backend

OPS = (linear, reference.linear)
SHAPES = [(1, 1, 1), (2, 16, 48), (3, 33, 31), (7, 13, 5), (65, 96, 64), (700, 40, 33)]  # M, N, K


def inputs(rows: int, n: int, k: int) -> tuple[Tensor, ...]:
    x_MK, weight, bias = torch.randn(rows, k), torch.randn(n, k) * k**-0.5, torch.randn(n)
    return x_MK.double(), weight.double(), bias.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype) -> None:
    assert_close_to_reference(*OPS, *inputs(7, 13, 5), dtype=dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native(shape: tuple[int, int, int], dtype: torch.dtype, isa: str) -> None:
    assert_native(*OPS, *inputs(*shape), dtype=dtype)


def test_native_not_contiguous(isa: str) -> None:
    assert_native(*OPS, *inputs(7, 13, 5), dtype=torch.float32, layout=with_gap)
    x_MK, weight, bias = (x.float() for x in inputs(6, 5, 4))
    with use_backend("native"):
        expected = linear(x_MK, weight, bias)
        assert torch.equal(linear(x_MK.view(2, 3, 4), weight, bias).view(6, 5), expected)
        assert torch.equal(linear(x_MK.t().contiguous().t(), weight, bias), expected)


def test_threads_do_not_matter(isa: str) -> None:
    assert_same_for_all_threads(linear, inputs(1100, 33, 65))


def test_autocast(isa: str) -> None:
    """Products in bfloat16, gradients of the float32 parameters in float32."""
    x_MK, weight, bias = (x.float().requires_grad_() for x in inputs(9, 8, 7))
    with use_backend("native"), torch.autocast("cpu", torch.bfloat16):
        out_MN = linear(x_MK, weight, bias)
    assert out_MN.dtype is torch.bfloat16
    out_MN.float().square().sum().backward()
    assert x_MK.grad is not None and weight.grad is not None and bias.grad is not None
    assert {x_MK.grad.dtype, weight.grad.dtype, bias.grad.dtype} == {torch.float32}
    dout_MN = (2 * out_MN.float()).detach().bfloat16().float()
    torch.testing.assert_close(weight.grad, dout_MN.t() @ x_MK.detach(), rtol=0.02, atol=0.05)


def test_opcheck(isa: str) -> None:
    x_MK, weight, bias = (x.float() for x in inputs(3, 4, 5))
    x_MK.requires_grad_()
    weight.requires_grad_()
    opcheck_of("linear", x_MK, weight, bias, torch.float32, torch.float32)


def test_what_is_not_taken(library: NativeLibrary) -> None:
    x_MK, weight, bias = inputs(3, 4, 5)
    with use_backend("native"):
        with pytest.raises(TypeError, match=r"float64.*float32 and bfloat16"):
            linear(x_MK, weight, bias)
        with pytest.raises(ValueError, match="weight is"):
            linear(x_MK.float(), weight.float().t(), bias.float())
