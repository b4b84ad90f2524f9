"""What the kernels that keep a whole row in registers share: LayerNorm, its backward, column sums.

A program holds one row at a time, padded to a power of two; lanes beyond the row are 0. Sums over
rows (gradients of vectors) need no atomics: each program adds up its own rows and writes one
partial sum, and `column_sums` adds those in a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._launch import launch

MAX_WIDTH = 16384  # numbers of a row that one program can hold


def row_options(width: int) -> dict[str, Any]:
    """Constants of a launch for rows of this width: 8 numbers a thread, 16 bytes of bfloat16.

    Raises ValueError where a row does not fit in one program.
    """
    if width > MAX_WIDTH:
        raise ValueError(f"rows of {width} numbers; a program holds at most {MAX_WIDTH}")
    block = triton.next_power_of_2(max(width, 1))
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


def programs(rows: int) -> int:
    """How many programs share the rows where partial sums are kept: the same on every device."""
    return max(1, min(-(-rows // 4), 512))


@triton.jit
def load_row(pointer, row, stride, columns, keep):
    """Row `row` as float32; row and so its offset is int64."""
    return tl.load(pointer + row * stride + columns, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def store_row(pointer, row, stride, columns, keep, value):
    tl.store(pointer + row * stride + columns, value.to(pointer.dtype.element_ty), mask=keep)


@triton.jit
def normalise(x, keep, width, eps):
    """(x - mean) / sqrt(var + eps) and 1 / sqrt(var + eps); two passes, over registers."""
    centred = tl.where(keep, x - tl.sum(x, axis=0) / width, 0.0)
    rstd = tl.math.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    return centred * rstd, rstd


@triton.jit
def normalise_backward(dn, n, rstd, width):
    """Gradient of x from the gradient of n = normalise(x); both are 0 beyond the row."""
    return rstd * (dn - tl.sum(dn, axis=0) / width - n * (tl.sum(dn * n, axis=0) / width))


@triton.jit
def column_sums_kernel(
    partial_KPD, out_KD, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    k = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    base = partial_KPD + k.to(tl.int64) * count * width
    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)
        keep = (rows[:, None] < count) & (columns[None, :] < width)
        offsets = rows[:, None].to(tl.int64) * width + columns[None, :]
        total += tl.load(base + offsets, mask=keep, other=0.0)
    sums = tl.sum(total, axis=0)
    tl.store(out_KD + k * width + columns, sums, mask=columns < width)


def column_sums(partial_KPD: torch.Tensor, out_KD: torch.Tensor) -> None:
    """out[k] = sum over p of partial[k, p], in a fixed order; float32, contiguous."""
    kinds, count, width = partial_KPD.shape
    columns = 32
    grid = (triton.cdiv(width, columns), kinds)
    launch(
        column_sums_kernel, grid, partial_KPD, out_KD, count, width,
        ROWS=64, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
