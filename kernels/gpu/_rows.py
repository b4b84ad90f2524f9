"""What the kernels that keep whole rows in registers share: LayerNorm, its backward, column sums.

A program holds ROWS rows at a time (one on a GPU), padded to a power of two; beyond the end they
are 0. Sums over rows (gradients of vectors) need no atomics: each program adds up its own rows and
writes one partial sum, and `column_sums` adds those in a fixed order, so results repeat bit for
bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._configs import INTERPRETER
from ._launch import launch

MAX_WIDTH = 16384  # numbers of a row that one program can hold


def row_options(width: int, arch: int) -> dict[str, Any]:
    """Constants of a launch for rows of this width: 8 numbers a thread, 16 bytes of bfloat16.

    The interpreter takes the time that a program has instructions, however many rows it holds.

    Raises ValueError where a row does not fit in one program.
    """
    if width > MAX_WIDTH:
        raise ValueError(f"rows of {width} numbers; a program holds at most {MAX_WIDTH}")
    block = triton.next_power_of_2(max(width, 1))
    rows = 4 if arch == INTERPRETER else 1
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


def tiles(rows: int, options: dict[str, Any]) -> tuple[int]:
    """The grid of a kernel whose programs take ROWS rows each."""
    return (triton.cdiv(rows, options["ROWS"]),)


def programs(rows: int) -> int:
    """How many programs share the rows where partial sums are kept: the same on every device."""
    return max(1, min(triton.cdiv(rows, 4), 512))


@triton.jit
def tile_of(tile, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Tile number `tile`: its rows (ROWS, 1), int64, its columns (1, BLOCK), and what is inside."""
    index = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    return index, columns, (index < rows) & (columns < width)


@triton.jit
def load_rows(pointer, index, stride, columns, keep):
    """Rows `index` (int64) as float32."""
    return tl.load(pointer + index * stride + columns, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def store_rows(pointer, index, stride, columns, keep, value):
    tl.store(pointer + index * stride + columns, value.to(pointer.dtype.element_ty), mask=keep)


@triton.jit
def load_vector(pointer, columns, width):
    """(1, BLOCK) numbers that all rows share, as float32."""
    return tl.load(pointer + columns, mask=columns < width, other=0.0).to(tl.float32)


@triton.jit
def store_partial(partial_PD, program, columns, width, total):
    """The sum over the rows of `total` as row `program`."""
    sums = tl.sum(total, axis=0)[None, :]
    tl.store(partial_PD + program.to(tl.int64) * width + columns, sums, mask=columns < width)


@triton.jit
def normalise(x, keep, width, eps):
    """(x - mean) / sqrt(var + eps) and 1 / sqrt(var + eps); two passes, over registers."""
    centred = tl.where(keep, x - tl.sum(x, axis=1)[:, None] / width, 0.0)
    rstd = tl.math.rsqrt(tl.sum(centred * centred, axis=1)[:, None] / width + eps)
    return centred * rstd, rstd


@triton.jit
def normalise_backward(dn, n, rstd, width):
    """Gradient of x from the gradient of n = normalise(x); both are 0 beyond the row."""
    mean = tl.sum(dn, axis=1)[:, None] / width
    return rstd * (dn - mean - n * (tl.sum(dn * n, axis=1)[:, None] / width))


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
