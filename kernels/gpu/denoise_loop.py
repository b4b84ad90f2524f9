"""All of the denoising loop but its products, which are cuBLAS's.

One diffusion step at depth d is 2 d products and 2 d + 1 kernels: `add_silu` and `gate_layernorm`
around the products of each block, and `step`, which closes a step (final layer, guidance, update)
and opens the next one (input projection, its LayerNorm and scale). The modulations of a chunk of
steps are one more product, behind `activate`.

Products with these kernels inside were measured against this on an H100 and lost: see
benchmarks/LOG.md, "Fused products against cuBLAS".
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ._configs import config
from ._denoise_step import step
from ._launch import launch
from ._math import silu
from ._rows import load_rows, normalise, row_options, store_rows, tile_of, tiles

__all__ = ["activate", "add_silu", "gate_layernorm", "step"]


@triton.jit
def activate_kernel(
    base_ptr,
    time_ptr,
    out_ptr,
    rows,
    width,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """out[c rows + m] = silu(base[m] + time[c]), every step c of a chunk along axis 1."""
    step = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside_rows = (row < rows)[:, None]
    out_row = step.to(tl.int64) * rows + row
    for start in range(0, width, BN):
        column = start + tl.arange(0, BN)
        mask = inside_rows & (column < width)[None, :]
        offsets = row.to(tl.int64)[:, None] * width + column[None, :]
        base = tl.load(base_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        time = tl.load(
            time_ptr + step.to(tl.int64) * width + column, mask=column < width, other=0.0
        ).to(tl.float32)
        offsets = out_row[:, None] * width + column[None, :]
        value = silu(base + time[None, :])
        tl.store(out_ptr + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_silu_kernel(
    y_MW,
    addend_MW,
    out_MW,
    rows,
    width,
    addend_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = silu(y + addend)."""
    row, columns, keep = tile_of(tl.program_id(0), rows, width, ROWS, BLOCK)
    y = load_rows(y_MW, row, width, columns, keep)
    y += load_rows(addend_MW, row, addend_stride, columns, keep)
    store_rows(out_MW, row, width, columns, keep, silu(y))


@triton.jit
def gate_layernorm_kernel(
    y_MW,
    gate_MW,
    residual_RW,
    scale_MW,
    stream_MW,
    out_MW,
    rows,
    width,
    residual_rows,
    modulation_stride,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """stream = residual + gate * y; out = LN(stream) * scale. Row m adds residual m modulo R."""
    row, columns, keep = tile_of(tl.program_id(0), rows, width, ROWS, BLOCK)
    h = load_rows(residual_RW, row % residual_rows, width, columns, keep)
    gate = load_rows(gate_MW, row, modulation_stride, columns, keep)
    h += gate * load_rows(y_MW, row, width, columns, keep)
    if stream_MW is not None:
        store_rows(stream_MW, row, width, columns, keep, h)
    n, _ = normalise(h, keep, width, eps)
    n *= load_rows(scale_MW, row, modulation_stride, columns, keep)
    store_rows(out_MW, row, width, columns, keep, n)


# --- launchers -------------------------------------------------------------------------------

def activate(base_MW: Any, time_CW: Any, out_XW: Any, *, arch: int) -> None:
    """out[c M + m] = silu(base[m] + time[c]).

    Args:
        base_MW: (M, w) floating, contiguous.
        time_CW: (C, w), the time embedding of the steps of a chunk.
        out_XW: (C M, w).
    """
    (rows, width), steps = base_MW.shape, time_CW.shape[0]
    chosen = config("activate", arch, out_XW.element_size())
    grid = (triton.cdiv(rows, chosen.tiles["BM"]), steps)
    launch(activate_kernel, grid, base_MW, time_CW, out_XW, rows, width, **chosen.options)


def add_silu(y_MW: Any, addend_MW: Any, out_MW: Any, *, arch: int) -> None:
    """out = silu(y + addend), (M, w) each; addend may be a slice of a wider matrix."""
    rows, width = y_MW.shape
    options = row_options(width, arch)
    launch(
        add_silu_kernel, tiles(rows, options), y_MW, addend_MW, out_MW, rows, width,
        addend_MW.stride(0), **options,
    )  # fmt: skip


def gate_layernorm(
    y_MW: Any,
    gate_MW: Any,
    residual_RW: Any,
    scale_MW: Any,
    stream_MW: Any,
    out_MW: Any,
    *,
    eps: float,
    arch: int,
) -> None:
    """stream = residual + gate * y; out = (stream - mean) / sqrt(var + eps) * scale.

    Args:
        y_MW: (M, w), a block's update.
        gate_MW, scale_MW: (M, w) with the same stride: slices of the modulations; scale is that of
            what comes next.
        residual_RW: (R, w) float32, M a multiple of R: both halves of guidance share the first
            stream.
        stream_MW: (M, w) float32 or None; may be residual_RW.
        out_MW: (M, w) in the compute dtype.
    """
    rows, width = y_MW.shape
    options = row_options(width, arch)
    assert gate_MW.stride(0) == scale_MW.stride(0)
    launch(
        gate_layernorm_kernel, tiles(rows, options), y_MW, gate_MW, residual_RW, scale_MW,
        stream_MW, out_MW, rows, width, residual_RW.shape[0], gate_MW.stride(0), eps, **options,
    )  # fmt: skip
