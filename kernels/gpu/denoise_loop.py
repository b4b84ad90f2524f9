"""Kernels of the denoising loop that are no plain product: its ends, and SiLU of the conditions.

One diffusion step at depth d is 2 d + 1 launches: two products per block (`_gemm.py`) and `step`,
which closes it and opens the next one. The modulations of a chunk of steps are two more launches.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ._configs import config, precision
from ._launch import launch
from ._math import row_statistics, silu, store_statistics, tile_statistics


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
def project(
    x,
    rows,
    inside,
    w_ptr,
    bias_ptr,
    out_ptr,
    copy_ptr,
    statistics_ptr,
    width,
    channels,
    CHANNELS: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Input projection of x, a (BM, CHANNELS) block: the residual stream, and its statistics."""
    channel = tl.arange(0, CHANNELS)
    tiles = tl.cdiv(width, BN)
    for tile in range(0, tiles):
        column = tile * BN + tl.arange(0, BN)
        w = tl.load(
            w_ptr + column[None, :] * channels + channel[:, None],
            mask=(column < width)[None, :] & (channel < channels)[:, None],
            other=0.0,
        )
        h = tl.dot(x.to(w.dtype), w, input_precision=PRECISION)
        bias = tl.load(bias_ptr + column, mask=column < width, other=0.0)
        h += bias.to(tl.float32)[None, :]
        offsets = rows.to(tl.int64)[:, None] * width + column[None, :]
        mask = inside[:, None] & (column < width)[None, :]
        tl.store(out_ptr + offsets, h, mask=mask)
        if copy_ptr is not None:
            tl.store(copy_ptr + offsets, h.to(copy_ptr.dtype.element_ty), mask=mask)
        count = tl.minimum(width - tile * BN, BN).to(tl.float32)
        mean, squares = tile_statistics(h, column, width, count)
        store_statistics(statistics_ptr, rows, tile, tiles, mean, squares, inside)


@triton.jit
def project_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    copy_ptr,
    statistics_ptr,
    tokens,
    width,
    channels,
    CHANNELS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Residual stream of the first diffusion step: x_T W^T + bias, and its statistics."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < tokens
    channel = tl.arange(0, CHANNELS)
    offsets = rows.to(tl.int64)[:, None] * channels + channel[None, :]
    mask = inside[:, None] & (channel < channels)[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    project(
        x, rows, inside, w_ptr, bias_ptr, out_ptr, copy_ptr, statistics_ptr, width, channels,
        CHANNELS, BN, PRECISION,
    )  # fmt: skip


@triton.jit
def step_kernel(
    h_ptr,
    statistics_ptr,
    scale_ptr,
    addend_ptr,
    final_ptr,
    x_ptr,
    x0_ptr,
    noise_ptr,
    table_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    copy_ptr,
    out_statistics_ptr,
    tokens,
    width,
    channels,
    modulation_stride,
    guidance,
    low,
    high,
    eps,
    HALVES: tl.constexpr,
    SHARED: tl.constexpr,
    STATISTICS_TILE: tl.constexpr,
    STATISTICS_COUNT: tl.constexpr,
    EVEN_K: tl.constexpr,
    CHANNELS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Final layer, guidance, x = a x + b x0 + c x0_previous + s noise, next input projection."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < tokens
    safe = tl.minimum(rows, tokens - 1)
    channel = tl.arange(0, CHANNELS)
    wanted = channel < channels
    depth = tl.arange(0, BK)

    # Rows of the conditional half, then of the other one, whose variance nobody needs.
    conditional = tl.zeros((BM, CHANNELS), dtype=tl.float32)
    variance = tl.zeros((BM, CHANNELS), dtype=tl.float32)
    free = tl.zeros((BM, CHANNELS), dtype=tl.float32)
    for half in tl.static_range(HALVES):
        row = safe + half * tokens
        h_row = safe if SHARED else row
        mean, rstd = row_statistics(
            statistics_ptr, h_row, width, eps, STATISTICS_COUNT, STATISTICS_TILE
        )
        h_ptrs = h_ptr + h_row.to(tl.int64)[:, None] * width + depth[None, :]
        scale_ptrs = scale_ptr + row.to(tl.int64)[:, None] * modulation_stride + depth[None, :]
        weight_ptrs = final_ptr + channel.to(tl.int64)[None, :] * width + depth[:, None]
        for start in range(0, width, BK):
            if EVEN_K:
                h = tl.load(h_ptrs)
                scale = tl.load(scale_ptrs)
                w_eps = tl.load(weight_ptrs, mask=wanted[None, :], other=0.0)
            else:
                below = depth < width - start
                h = tl.load(h_ptrs, mask=below[None, :], other=0.0)
                scale = tl.load(scale_ptrs, mask=below[None, :], other=0.0)
                mask = wanted[None, :] & below[:, None]
                w_eps = tl.load(weight_ptrs, mask=mask, other=0.0)
            centred = (h.to(tl.float32) - mean[:, None]) * rstd[:, None]
            operand = (centred * scale.to(tl.float32)).to(w_eps.dtype)
            if half == 0:
                v_ptrs = weight_ptrs + channels * width
                if EVEN_K:
                    w_v = tl.load(v_ptrs, mask=wanted[None, :], other=0.0)
                else:
                    w_v = tl.load(v_ptrs, mask=mask, other=0.0)
                conditional = tl.dot(operand, w_eps, conditional, input_precision=PRECISION)
                variance = tl.dot(operand, w_v, variance, input_precision=PRECISION)
            else:
                free = tl.dot(operand, w_eps, free, input_precision=PRECISION)
            h_ptrs += BK
            scale_ptrs += BK
            weight_ptrs += BK
        offsets = row.to(tl.int64)[:, None] * modulation_stride + channel[None, :]
        mask = inside[:, None] & wanted[None, :]
        if half == 0:
            conditional += tl.load(addend_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            variance += tl.load(addend_ptr + offsets + channels, mask=mask, other=0.0).to(
                tl.float32
            )
        else:
            free += tl.load(addend_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    noise_estimate = conditional
    if HALVES == 2:
        noise_estimate = free + guidance * (conditional - free)

    offsets = rows.to(tl.int64)[:, None] * channels + channel[None, :]
    mask = inside[:, None] & wanted[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    noise = tl.load(noise_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x0 = tl.load(table_ptr) * x - tl.load(table_ptr + 1) * noise_estimate
    x0 = tl.maximum(x0, low, propagate_nan=tl.PropagateNan.ALL)
    x0 = tl.minimum(x0, high, propagate_nan=tl.PropagateNan.ALL)
    update = tl.load(table_ptr + 2) * x + tl.load(table_ptr + 3) * x0
    previous_factor = tl.load(table_ptr + 4)
    if previous_factor != 0.0:
        previous = tl.load(x0_ptr + offsets, mask=mask, other=0.0)
        update += previous_factor * previous
    noise_factor = tl.load(table_ptr + 7)
    if noise_factor != 0.0:
        fraction = 0.5 * variance + 0.5
        smallest, largest = tl.load(table_ptr + 5), tl.load(table_ptr + 6)
        log_variance = fraction * largest + (1.0 - fraction) * smallest
        update += noise_factor * tl.exp(0.5 * log_variance) * noise
    tl.store(x_ptr + offsets, update, mask=mask)
    tl.store(x0_ptr + offsets, x0, mask=mask)
    if out_ptr is not None:
        update = tl.where(mask, update, 0.0)
        project(
            update, rows, inside, w_ptr, bias_ptr, out_ptr, copy_ptr, out_statistics_ptr, width,
            channels, CHANNELS, BN, PRECISION,
        )  # fmt: skip


def _channels(channels: int) -> int:
    """Numbers of a token, padded to what a product takes."""
    return max(16, triton.next_power_of_2(channels))


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


def statistics_tile(arch: int, element_size: int) -> int:
    """Columns of a tile of the statistics that `first_projection` and `step` write."""
    return config("step", arch, element_size).tiles["BN"]


def first_projection(
    x_NP: Any, w_WP: Any, bias_W: Any, out_NW: Any, copy_NW: Any, statistics: Any, *, arch: int
) -> None:
    """h = x W^T + b, with statistics of its tiles.

    Args:
        x_NP: (N, P) float32.
        w_WP, bias_W: (w, P) and (w,).
        out_NW: (N, w) float32.
        copy_NW: (N, w) in the compute dtype, or None.
        statistics: (N, ceil(w / `statistics_tile`), 2) float32.
    """
    (tokens, channels), width = x_NP.shape, w_WP.shape[0]
    chosen = config("step", arch, w_WP.element_size())
    options = {**chosen.options, "num_stages": 1}
    del options["BK"]
    grid = (triton.cdiv(tokens, chosen.tiles["BM"]),)
    launch(
        project_kernel, grid, x_NP, w_WP, bias_W, out_NW, copy_NW, statistics, tokens, width,
        channels, CHANNELS=_channels(channels), PRECISION=precision(arch), **options,
    )  # fmt: skip


def step(
    h_MW: Any,
    statistics: Any,
    statistics_tile: int,
    scale_MW: Any,
    addend_M2P: Any,
    final_2PW: Any,
    x_NP: Any,
    x0_NP: Any,
    noise_NP: Any,
    table_8: Any,
    w_WP: Any,
    bias_W: Any,
    out_NW: Any,
    copy_NW: Any,
    out_statistics: Any,
    *,
    halves: int,
    guidance: float,
    low: float,
    high: float,
    eps: float,
    arch: int,
) -> None:
    """End of a diffusion step and beginning of the next one.

    [eps | v] = (rstd (h - mean) scale) W_f^T + addend per row; eps = eps_u + s (eps_c - eps_u);
    x0 = t0 x - t1 eps, bounded; x = t2 x + t3 x0 + t4 x0_previous + t7 exp(log var / 2) noise with
    log var = f t6 + (1 - f) t5, f = (v + 1) / 2; then h = x W^T + b with its statistics.

    Args:
        h_MW: (M, w) residual stream; (N, w) where both halves share it (depth 0).
        statistics, statistics_tile: of its rows.
        scale_MW, addend_M2P: (M, w) and (M, 2P), slices of the modulations.
        final_2PW: (2P, w) weight of the final layer.
        x_NP, x0_NP: (N, P) float32 state, read and written in place.
        noise_NP: (N, P).
        table_8: (8,) float32 row of coefficients t0 .. t7.
        w_WP, bias_W: input projection.
        out_NW, copy_NW, out_statistics: as in `first_projection`; out None at the last step.
        halves: 1, or 2 with the conditional rows first.
        guidance, low, high: s and the bounds of x0.
    """
    (tokens, channels), width = x_NP.shape, final_2PW.shape[1]
    chosen = config("step", arch, final_2PW.element_size())
    grid = (triton.cdiv(tokens, chosen.tiles["BM"]),)
    launch(
        step_kernel,
        grid,
        h_MW,
        statistics,
        scale_MW,
        addend_M2P,
        final_2PW,
        x_NP,
        x0_NP,
        noise_NP,
        table_8,
        w_WP,
        bias_W,
        out_NW,
        copy_NW,
        out_statistics,
        tokens,
        width,
        channels,
        scale_MW.stride(0),
        guidance,
        low,
        high,
        eps,
        HALVES=halves,
        SHARED=h_MW.shape[0] == tokens,
        STATISTICS_TILE=statistics_tile,
        STATISTICS_COUNT=triton.next_power_of_2(triton.cdiv(width, statistics_tile)),
        EVEN_K=width % chosen.tiles["BK"] == 0,
        CHANNELS=_channels(channels),
        PRECISION=precision(arch),
        **chosen.options,
    )
