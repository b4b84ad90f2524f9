"""The one matrix product, all its parts, in Triton's interpreter against float64."""

from __future__ import annotations

from typing import Any

import interpreter
import pytest
import torch
import torch.nn.functional as F
from guarded import guarded, outputs
from torch import Tensor

interpreter.need()
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
# Architectures whose configurations differ; the interpreter runs any of them.
ARCHS = pytest.mark.parametrize("arch", [80, 90, 942])
SHAPES = pytest.mark.parametrize(
    ("rows", "columns", "depth"), [(1, 1, 1), (3, 40, 17), (70, 130, 64), (65, 257, 96)]
)


def statistics_of(x_MK: Tensor, tile: int) -> Tensor:
    """What a producer of x would have written."""
    parts = [
        torch.stack([part.mean(1), part.var(1, correction=0) * part.shape[1]], dim=-1)
        for part in x_MK.double().split(tile, dim=1)
    ]
    return torch.stack(parts, dim=1).float()


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return guarded(torch.randn(*shape).to(dtype))


def check(out: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    limit = 2e-6 if dtype is torch.float32 else 3e-3
    error = (out.double() - truth).norm() / truth.norm().clamp(min=1e-30)
    assert float(error) < limit


@DTYPES
@ARCHS
@SHAPES
def test_plain_product(
    rows: int, columns: int, depth: int, arch: int, dtype: torch.dtype
) -> None:
    from fastfar.kernels.gpu._gemm import gemm

    a, w = draw(rows, depth, dtype=dtype), draw(columns, depth, dtype=dtype)
    out = outputs((rows, columns), dtype)
    gemm(a, w, out.tensor, arch=arch)
    out.intact()
    check(out.tensor, a.double() @ w.double().T, dtype)


@DTYPES
@pytest.mark.parametrize("kind", ["linear", "modulated", "gated", "modulations"])
@pytest.mark.parametrize("shared", [False, True])
def test_all_parts_together(kind: str, shared: bool, dtype: torch.dtype) -> None:
    from fastfar.kernels.gpu._gemm import gemm, gemm_config

    rows, columns, depth, tile, arch = 74, 200, 160, 64, 80
    given = rows // 2 if shared else rows
    h = draw(given, depth) + 3.0  # a mean far from zero
    residual = draw(rows if kind == "gated" else given, columns)
    w, bias = draw(columns, depth, dtype=dtype), draw(columns)
    modulations = draw(rows, depth + 2 * columns, dtype=dtype)  # one tensor, read in place
    scale, addend, gate = modulations.split([depth, columns, columns], dim=1)
    out, copy = outputs((rows, columns), torch.float32), outputs((rows, columns), dtype)
    bn = gemm_config(kind, arch, dtype.itemsize).tiles["BN"]
    statistics = outputs((rows, -(-columns // bn), 2), torch.float32)
    gemm(
        h,
        w,
        out.tensor,
        arch=arch,
        kind=kind,
        bias_N=bias,
        statistics=guarded(statistics_of(h, tile)),
        statistics_tile=tile,
        scale_MK=scale,
        addend_MN=addend,
        activation="silu",
        gate_MN=gate,
        residual_MN=residual,
        copy_MN=copy.tensor,
        out_statistics=statistics.tensor,
    )
    for each in (out, copy, statistics):
        each.intact()
    repeats = rows // given
    normed = F.layer_norm(h.double(), (depth,), eps=1e-6).repeat(repeats, 1) * scale.double()
    y = F.silu(normed.to(dtype).double() @ w.double().T + bias.double() + addend.double())
    truth = residual.double().repeat(rows // len(residual), 1) + gate.double() * y
    check(out.tensor, truth, dtype)
    check(copy.tensor, truth, dtype)
    assert torch.equal(out.tensor.to(dtype), copy.tensor)
    torch.testing.assert_close(
        statistics.tensor, statistics_of(out.tensor, bn), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("name", "function"), [("gelu", F.gelu), ("silu", F.silu)])
def test_activations(name: str, function: Any) -> None:
    from fastfar.kernels.gpu._gemm import gemm

    a, w = draw(5, 32), draw(70, 32)
    out = outputs((5, 70), torch.float32)
    gemm(a, w, out.tensor, arch=80, activation=name)
    check(out.tensor, function(a.double() @ w.double().T), torch.float32)


def test_rows_far_into_memory_are_addressed_in_64_bits() -> None:
    """A row stride that makes the last row's offset larger than 2^31 elements."""
    from fastfar.kernels.gpu._gemm import gemm

    stride = 2**30
    storage = torch.UntypedStorage(2 * (2 * stride + 64) * 2)  # pages that nobody touches are free
    a = torch.tensor([], dtype=torch.float16).set_(storage, 0, (3, 32), (stride, 1))
    a.copy_(torch.randn(3, 32))
    w, out = draw(40, 32, dtype=torch.float16), outputs((3, 40), torch.float16)
    gemm(a, w, out.tensor, arch=80)
    check(out.tensor, a.double() @ w.double().T, torch.float16)
