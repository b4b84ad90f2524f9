"""Kernels for the test of the compile proof: two that are as they should be, and two that are not.

The same form as launches.py. Not run, only compiled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastfar.kernels.gpu._launch import launch


@triton.jit
def inner(x, y, total, PRECISION: tl.constexpr, WITH_DOT: tl.constexpr):
    if WITH_DOT:
        total = tl.dot(x, y, total, input_precision=PRECISION)
    else:
        total += tl.sum(x[:, :, None].to(tl.float32) * y[None].to(tl.float32), axis=1)
    return total


@triton.jit
def product_kernel(
    a, b, c, bias, M, N, K, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, WITH_DOT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        x = tl.load(a + rows[:, None] * K + (start + depth)[None, :])
        y = tl.load(b + columns[None, :] * K + (start + depth)[:, None])
        total = inner(x, y, total, PRECISION, WITH_DOT)
    if bias is not None:
        total += tl.load(bias + columns)[None, :]
    tl.store(c + rows[:, None] * N + columns[None, :], (scale * total).to(c.dtype.element_ty))


@triton.jit
def rows_kernel(x, out, width, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + tl.program_id(0) * width + columns, mask=columns < width, other=0.0)
    tl.store(out + tl.program_id(0) * width + columns, values / tl.sum(values.to(tl.float32)))


def _product(arch: int, dtype: torch.dtype, with_dot: bool, size: int, num_warps: int) -> None:
    a, b, c = (torch.empty(512, 512, dtype=dtype, device="cuda") for _ in range(3))
    launch(
        product_kernel,
        (512 // size, 512 // size),
        *(a, b, c, None, 512, 512, 512, 0.5),
        BM=size,
        BN=size,
        BK=32,
        PRECISION="ieee" if arch > 900 or dtype is not torch.float32 else "tf32x3",
        WITH_DOT=with_dot,
        num_warps=num_warps,
        num_stages=2,
    )


def _rows(arch: int, dtype: torch.dtype) -> None:
    x, out = torch.empty(2, 512, 1000, dtype=dtype, device="cuda").unbind()
    for each in (out, out):  # twice the same: one row of the table
        launch(rows_kernel, (512,), x, each, 1000, BLOCK=1024, num_warps=4, num_stages=1)
    unaligned = torch.empty(512001, dtype=dtype, device="cuda").narrow(0, 1, 512000)
    launch(rows_kernel, (512,), x, unaligned, 1000, BLOCK=1024, num_warps=4, num_stages=1)


def _refused(arch: int, dtype: torch.dtype) -> None:
    x = torch.empty(8, dtype=dtype, device="cuda")
    launch(rows_kernel, (1,), x, x, 8, BLOCK=7, num_warps=4, num_stages=1)


def _raises(arch: int, dtype: torch.dtype) -> None:
    torch.empty(2, dtype=dtype, device="cuda").item()


LAUNCHES = {
    "product": lambda arch, dtype: _product(arch, dtype, True, 64, 4),
    "rows": _rows,
    "spilling": lambda arch, dtype: _product(arch, dtype, True, 128, 1),
    "without a dot": lambda arch, dtype: _product(arch, dtype, False, 16, 4),
    "refused": _refused,
    "raises": _raises,
}
