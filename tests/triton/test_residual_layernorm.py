"""residual_layernorm by Triton's kernels, in the interpreter, against the float64 reference."""

from __future__ import annotations

from typing import Any

import interpreter
import pytest
import torch
import torch.nn.functional as F
from guarded import guarded, outputs
from native_training import opcheck_of
from tolerances import assert_close_to_reference, relative, with_gap
from torch import Tensor

from fastfar import reference
from fastfar.ops import residual_layernorm

interpreter.need()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Widths that fill no block; rows that fill no tile.
SHAPES = [(1, 1), (2, 5), (3, 192), (9, 8)]


def run(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = residual_layernorm.implementations["triton"](*args, **kwargs)
    return result


OPS = (run, reference.residual_layernorm)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    x, update = torch.randn(2, *shape, dtype=torch.float64)
    weight, bias = 0.2 * torch.randn(2, shape[-1], dtype=torch.float64)
    return tuple(each.to(dtype) for each in (x + 0.5, update, 1 + weight, bias))


def columns_first(x: Tensor) -> Tensor:
    """The same values, the numbers of a row far apart."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, update, *affine = inputs(*shape)
    floor = 1 if x.numel() > 50 else 8  # a few numbers: PyTorch's error is a coincidence
    assert_close_to_reference(*OPS, x, update, *affine, dtype=dtype, layers=floor)
    assert_close_to_reference(
        *OPS, x, None, *affine, dtype=dtype, layers=floor, layout=with_gap
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_not_contiguous_and_without_affine(dtype: torch.dtype) -> None:
    x, update, *affine = inputs(2, 3, 33)
    assert_close_to_reference(*OPS, x, update, *affine, dtype=dtype, layout=with_gap)
    assert_close_to_reference(
        *OPS, x, update, None, None, dtype=dtype, layout=columns_first
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_norm_is_that_of_the_rounded_sum(dtype: torch.dtype) -> None:
    """Which is what its backward, and whoever reads the sum, sees."""
    x, update, *affine = inputs(4, 70, dtype=dtype)
    total, normed = run(x, update, *affine)
    assert torch.equal(normed, run(total, None, *affine)[1])


def test_a_mean_far_from_zero_costs_no_precision() -> None:
    x, update, *affine = inputs(3, 96, dtype=torch.float32)
    x = 1000 + x
    expected = reference.residual_layernorm(*(each.double() for each in (x, update, *affine)))[1]
    plain = F.layer_norm(x + update, (96,), *affine, 1e-6)
    assert relative(run(x, update, *affine)[1], expected) <= 2 * relative(plain, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "arch"), [(1, 192, 0), (9, 33, 0), (3, 1280, 90)])
def test_launchers_write_their_outputs_and_nothing_else(
    rows: int, width: int, arch: int, dtype: torch.dtype
) -> None:
    """As under autocast: a float32 stream, everything else in `dtype`. Two programs backward."""
    from fastfar.kernels.gpu import residual_layernorm as kernels

    doubles = inputs(rows, width)
    kinds = (torch.float32, dtype, dtype, dtype)
    given = [guarded(each.to(kind)) for each, kind in zip(doubles, kinds, strict=True)]
    x, update, weight, _ = given
    total, normed = outputs((rows, width), torch.float32), outputs((rows, width), dtype)
    kernels.residual_layernorm(*given, total.tensor, normed.tensor, eps=1e-6, arch=arch)
    total.intact()
    normed.intact()
    leaves = [each.double().requires_grad_() for each in given]
    expected = reference.residual_layernorm(*leaves)
    # The interpreter cuts numbers off to bfloat16, where a GPU rounds them.
    limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert torch.equal(total.tensor, x + update)
    assert relative(normed.tensor, expected[1]) < limit

    dsum, dnormed = guarded(torch.randn(rows, width)), guarded(torch.randn(rows, width).to(dtype))
    dx, dupdate = outputs((rows, width), torch.float32), outputs((rows, width), dtype)
    partial = outputs((2, 2, width), torch.float32)
    vectors = outputs((2, width), torch.float32)
    kernels.residual_layernorm_backward(
        dsum, dnormed, total.tensor, weight, dx.tensor, dupdate.tensor, partial.tensor,
        vectors.tensor, eps=1e-6, arch=arch,
    )  # fmt: skip
    grads = torch.autograd.grad(expected, leaves, (dsum.double(), dnormed.double()))
    for each in (dx, dupdate, partial, vectors):
        each.intact()
    assert relative(dx.tensor, grads[0]) < 1e-6
    assert relative(dupdate.tensor, grads[1]) < limit
    assert relative(vectors.tensor, torch.stack(grads[2:])) < 1e-6


def test_one_output_alone_may_be_used() -> None:
    args = [x.requires_grad_() for x in inputs(5, 12, dtype=torch.float32)]
    doubles = [x.detach().double().requires_grad_() for x in args]
    for index in (0, 1):
        out, expected = run(*args)[index], reference.residual_layernorm(*doubles)[index]
        cotangent = torch.randn(5, 12)
        used = 2 if index == 0 else 4  # the sum does not depend on the affine
        grads = torch.autograd.grad(out, args, cotangent, allow_unused=True)
        exact = torch.autograd.grad(expected, doubles[:used], cotangent.double())
        for ours, theirs in zip(grads, exact, strict=False):
            assert ours is not None and relative(ours, theirs) < 1e-6
        assert all(each is None for each in grads[used:])


def test_autocast() -> None:
    """The stream stays float32; LN(s) comes in autocast's dtype; gradients are float32."""
    args = [x.requires_grad_() for x in inputs(6, 40, dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        total, normed = run(args[0], args[1].bfloat16(), *args[2:])
    assert total.dtype is torch.float32 and normed.dtype is torch.bfloat16
    grads = torch.autograd.grad((total, normed), args, (torch.ones_like(total), normed.detach()))
    assert all(g.dtype is torch.float32 and g.isfinite().all() for g in grads)


def test_no_rows() -> None:
    args = [x.requires_grad_() for x in inputs(0, 12, dtype=torch.float32)]
    total, normed = run(*args)
    assert total.shape == normed.shape == (0, 12)
    grads = torch.autograd.grad(normed.sum(), args)
    assert torch.equal(grads[2], torch.zeros(12))


def test_every_bit_repeats() -> None:
    args = [x.requires_grad_() for x in inputs(9, 8, dtype=torch.float32)]
    first, second = (torch.autograd.grad(run(*args)[1].sin().sum(), args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck() -> None:
    x, update, weight, bias = (
        each.requires_grad_() for each in inputs(3, 8, dtype=torch.float32)
    )
    opcheck_of("residual_layernorm", x, update, weight, bias, 1e-6, torch.float32)
    forward = torch.ops.fastfar.residual_layernorm.default
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(forward, (x, None, None, None, 1e-6, torch.float16), test_utils=quick)


def test_what_is_not_taken() -> None:
    x, update, weight, bias = inputs(3, 8, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"x is torch\.float64.*float32, float16 or bfloat16"):
        run(x.double(), update, weight, bias)
    with pytest.raises(ValueError, match=r"update is \(2, 8\), expected \(3, 8\)"):
        run(x, update[:2], weight, bias)
    with pytest.raises(ValueError, match="both norm_weight and norm_bias"):
        run(x, update, weight, None)
    with pytest.raises(ValueError, match="at most 16384"):
        run(torch.zeros(1, 16385), None, None, None)


def test_rows_far_into_memory_are_addressed_in_64_bits() -> None:
    """A distance between rows that makes the last one's offset larger than 2^31 elements."""
    stride = 2**30
    storage = torch.UntypedStorage(2 * (2 * stride + 8))  # pages that nobody touches are free
    x = torch.tensor([], dtype=torch.float16).set_(storage, 0, (3, 8), (stride, 1))
    x.copy_(torch.randn(3, 8))
    near = x.contiguous()
    assert torch.equal(run(x, near, None, None)[1], run(near, near, None, None)[1])
    assert torch.equal(run(near, x, None, None)[0], near + near)
