"""groupnorm_silu against its reference, on PyTorch and on every native instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import DTYPES, assert_close_to_reference, relative, with_gap
from torch import Tensor

from fastfar import reference
from fastfar._native import NativeLibrary
from fastfar.ops import groupnorm_silu, use_backend

OPS = (groupnorm_silu, reference.groupnorm_silu)
# B, C, H, W, groups: one number; odd; one channel per group; several chunks, the last one short
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 6, 3, 5, 3),
    (3, 32, 4, 4, 32),
    (1, 96, 9, 17, 32),
    (2, 130, 7, 11, 5),
]
NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def inputs(batch: int, channels: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = torch.randn(2, channels, dtype=torch.float64)
    x_BCHW = 3 * torch.randn(batch, channels, height, width, dtype=torch.float64) + 1
    return x_BCHW, 1 + 0.3 * weight, 0.3 * bias


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_values_and_gradients(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, silu: bool
) -> None:
    *sizes, groups = shape
    for layout in (torch.Tensor.contiguous, channels_last, with_gap):
        assert_close_to_reference(
            *OPS, *inputs(*sizes), dtype=dtype, layout=layout, groups=groups, silu=silu
        )


def test_the_reference_is_pytorch_s_group_norm() -> None:
    x, weight, bias = inputs(2, 12, 5, 4)
    out = reference.groupnorm_silu(x, weight, bias, groups=4, eps=0.1)
    torch.testing.assert_close(out, F.silu(F.group_norm(x, 4, weight, bias, 0.1)))


# --- native ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native(isa: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    *sizes, groups = shape
    with use_backend("native"):
        for silu in (True, False):
            for layout in (torch.Tensor.contiguous, channels_last, with_gap):
                assert_close_to_reference(
                    *OPS,
                    *inputs(*sizes),
                    dtype=dtype,
                    gradients=False,
                    layout=layout,
                    groups=groups,
                    silu=silu,
                )


def test_bfloat16_is_rounded_once(isa: str) -> None:
    x, weight, bias = (x.bfloat16() for x in inputs(2, 64, 13, 8))
    with use_backend("native"):
        out = groupnorm_silu(x, weight, bias, groups=32)
    truth = reference.groupnorm_silu(x.double(), weight.double(), bias.double(), groups=32)
    assert out.dtype is torch.bfloat16
    assert relative(out, truth) < 1.1 * relative(truth.bfloat16(), truth)
    # Also far out, where the sigmoid is 0 or 1.
    x = torch.linspace(-200, 200, 4096)[None, None, None].bfloat16()
    with use_backend("native"):
        out = groupnorm_silu(x, torch.full((1,), 120.0), torch.zeros(1), groups=1)
    truth = reference.groupnorm_silu(x.double(), torch.full((1,), 120.0), torch.zeros(1), groups=1)
    assert (out.double() - truth).abs().le(0.005 * truth.abs() + 1e-30).all()


def test_an_offset_costs_no_digits(isa: str) -> None:
    """Numbers around 1000 with a spread of 0.01: squares minus a squared mean would be noise."""
    x = (1000 + 0.01 * torch.randn(1, 32, 20, 20, dtype=torch.float64)).float()
    one, zero = torch.ones(32), torch.zeros(32)
    with use_backend("native"):
        out = groupnorm_silu(x, one, zero, groups=8, silu=False)
    truth = reference.groupnorm_silu(x.double(), one, zero, groups=8, silu=False)
    assert (out.double().std() / truth.std() - 1).abs() < 1e-3
    assert (out - truth).abs().max() < 0.02  # a x + b with a x = 1e5: half a unit in the last place


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_native_is_the_same_for_any_number_of_threads(
    library: NativeLibrary, dtype: torch.dtype
) -> None:
    x, weight, bias = (t.to(dtype) for t in inputs(3, 48, 33, 9))
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 1, 2, 3, 4):
            torch.set_num_threads(threads)
            with use_backend("native"):
                outs.append(groupnorm_silu(x, weight, bias, groups=16))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_native_returns_channels_last(library: NativeLibrary) -> None:
    x, weight, bias = (t.float() for t in inputs(2, 8, 3, 4))
    with use_backend("native"):
        out = groupnorm_silu(x, weight, bias, groups=4)
        empty = groupnorm_silu(x[:0], weight, bias, groups=4)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert empty.shape == (0, 8, 3, 4)


def test_native_leaves_gradients_to_pytorch(library: NativeLibrary) -> None:
    x, weight, bias = inputs(2, 6, 3, 5)
    with use_backend("native"):
        assert_close_to_reference(*OPS, x, weight, bias, dtype=torch.float32, groups=3)


def test_native_errors(library: NativeLibrary) -> None:
    x, weight, bias = inputs(1, 6, 2, 2)
    with use_backend("native"):
        with pytest.raises(TypeError, match=r"float32 or bfloat16, got torch\.float64"):
            groupnorm_silu(x, weight, bias, groups=3)
        with pytest.raises(ValueError, match="6 channels cannot be split into 4"):
            groupnorm_silu(x.float(), weight, bias, groups=4)
        with pytest.raises(ValueError, match="6 numbers"):
            groupnorm_silu(x.float(), weight[:5], bias, groups=3)
        with pytest.raises(ValueError, match="on the CPU"):
            groupnorm_silu(x.float().to("meta"), weight, bias, groups=3)
