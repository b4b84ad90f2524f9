"""adaln_mlp_block by Triton's kernels, in the interpreter, against the float64 reference.

bfloat16 is tested where no `tl.dot` is, which the interpreter computes wrongly, and with wider
limits: it cuts numbers off to bfloat16 where a GPU rounds them.
"""

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
from fastfar.ops import adaln_mlp_block

interpreter.need()
HALF = (torch.float16, torch.bfloat16)
SHAPES = [(1, 8), (2, 5), (3, 33), (9, 40)]


def run(*args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = adaln_mlp_block.implementations["triton"](*args, **kwargs)
    return result


def inputs(rows: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype)

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, int], dtype: torch.dtype) -> None:
    floor = 1 if shape[0] * shape[1] > 50 else 8  # few numbers: PyTorch's error is a coincidence
    layout = with_gap if shape == (3, 33) else torch.Tensor.contiguous
    assert_close_to_reference(
        run, reference.adaln_mlp_block, *inputs(*shape), dtype=dtype, layers=floor, layout=layout
    )


def test_modulations_are_read_in_place_from_slices_of_one_matrix() -> None:
    x, shift, scale, gate, *rest = inputs(5, 24, torch.float32)
    chunks = torch.cat([shift, scale, gate], dim=1).chunk(3, dim=-1)
    assert not any(each.is_contiguous() for each in chunks)
    with torch.no_grad():
        assert torch.equal(run(x, *chunks, *rest), run(x, shift, scale, gate, *rest))


def test_a_closed_gate_is_the_identity() -> None:
    x, shift, scale, gate, *rest = inputs(5, 7, torch.float32)
    assert torch.equal(run(x, shift, scale, 0 * gate, *rest), x)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("rows", "width", "arch"), [(9, 40, 0), (3, 192, 90)])
def test_launchers_write_their_outputs_and_nothing_else(
    rows: int, width: int, arch: int, dtype: torch.dtype
) -> None:
    """As under autocast: float32 stream, the rest in `dtype`. Two programs share the rows."""
    from fastfar.kernels.gpu import adaln_mlp_block as kernels

    x, shift, scale, gate, weight, bias, *_ = inputs(rows, width, torch.float32)
    x, weight, bias = (guarded(each) for each in (x, weight, bias))
    shift, scale, gate = (guarded(each.to(dtype)) for each in (shift, scale, gate))
    u, h, da, dg = (guarded(torch.randn(rows, width).to(dtype)) for _ in range(4))
    dout = guarded(torch.randn(rows, width))
    limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]

    def stream() -> Any:
        return outputs((rows, width), torch.float32)

    def product() -> Any:
        return outputs((rows, width), dtype)

    out, a, du, dgate, dh, g = stream(), product(), product(), product(), product(), product()
    kernels.gated_residual(x, gate, u, out.tensor, arch=arch)
    kernels.modulate(x, shift, scale, weight, bias, a.tensor, eps=1e-6, arch=arch)
    partial = [outputs((2, width), torch.float32) for _ in range(2)]
    kernels.gate_backward(dout, gate, u, du.tensor, dgate.tensor, partial[0].tensor, arch=arch)
    kernels.silu_backward(dg, h, dh.tensor, g.tensor, partial[1].tensor, arch=arch)
    dx, dshift, dscale, again = stream(), product(), product(), product()
    vectors = outputs((2, 2, width), torch.float32)
    kernels.modulate_backward(
        dout, da, x, shift, scale, weight, bias, dx.tensor, dshift.tensor, dscale.tensor,
        again.tensor, vectors.tensor, eps=1e-6, arch=arch,
    )  # fmt: skip
    written = (out, a, du, dgate, dh, g, dx, dshift, dscale, again, vectors, *partial)
    for each in written:
        each.intact()

    leaves = [each.double().requires_grad_() for each in (x, shift, scale, weight, bias)]
    normed = F.layer_norm(leaves[0], (width,), leaves[3], leaves[4], 1e-6)
    modulated = normed * (1 + leaves[2]) + leaves[1]
    grads = torch.autograd.grad(
        (modulated, leaves[0]), leaves, (da.double(), dout.double()), retain_graph=True
    )
    assert relative(out.tensor, x.double() + gate.double() * u.double()) < 1e-6
    assert relative(a.tensor, modulated) < limit and torch.equal(a.tensor, again.tensor)
    assert relative(du.tensor, dout.double() * gate.double()) < limit
    assert relative(dgate.tensor, dout.double() * u.double()) < limit
    assert relative(partial[0].tensor.sum(0), (dout.double() * gate.double()).sum(0)) < 1e-6
    hidden = h.double().requires_grad_()
    (slope,) = torch.autograd.grad(F.silu(hidden), hidden, dg.double())
    assert relative(g.tensor, F.silu(hidden)) < limit and relative(dh.tensor, slope) < limit
    assert relative(partial[1].tensor.sum(0), slope.sum(0)) < 1e-6
    for ours, theirs in zip((dx, dshift, dscale), grads, strict=False):
        assert relative(ours.tensor, theirs) < (1e-6 if ours is dx else limit)
    assert relative(vectors.tensor.sum(1), torch.stack(grads[3:])) < 1e-6


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """Products in autocast's dtype, a float32 residual stream, float32 gradients."""
    tensors = [x.requires_grad_() for x in inputs(7, 32, torch.float32)]
    cotangent = torch.randn(7, 32)
    with torch.autocast("cpu", dtype):
        out = run(*tensors)
    assert out.dtype is torch.float32
    grads = torch.autograd.grad(out, tensors, cotangent)
    doubled = [x.detach().double().requires_grad_() for x in tensors]
    truth = reference.adaln_mlp_block(*doubled)
    exact = torch.autograd.grad(truth, doubled, cotangent.double())
    assert relative(out, truth) > 1e-5, "the products were float32"
    for ours, theirs in zip([out, *grads], [truth, *exact], strict=True):
        assert ours.dtype is torch.float32
        assert relative(ours, theirs) < (2e-3 if dtype is torch.float16 else 2e-2)


def test_sampling_under_autocast() -> None:
    tensors = inputs(7, 32, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        out = run(*tensors)
    assert out.dtype is torch.float32
    assert relative(out, reference.adaln_mlp_block(*(x.double() for x in tensors))) < 1e-3


def test_every_bit_repeats() -> None:
    tensors = [x.requires_grad_() for x in inputs(9, 8, torch.float32)]
    first, second = (torch.autograd.grad(run(*tensors).sin().sum(), tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck() -> None:
    tensors = [x.requires_grad_() for x in inputs(3, 8, torch.float32)]
    opcheck_of("adaln_mlp_block_rows", *tensors, 1e-6)


def test_what_is_not_taken() -> None:
    x, *rest = inputs(3, 8, torch.float32)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        run(x.double(), *rest)
    with pytest.raises(ValueError, match=r"shift is \(3, 8\), expected \(2, 8\)"):
        run(x[:2], *rest)
    with pytest.raises(TypeError, match="give all weights in one of"):
        run(x, *rest[:5], rest[5].half(), *rest[6:])
