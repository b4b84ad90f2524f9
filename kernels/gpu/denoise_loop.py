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
from ._launch import launch
from ._math import silu
from ._rows import load_rows, normalise, row_options, store_rows, tile_of, tiles


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


@triton.jit
def _projected_moments(x, moments_ptr, channels, CHANNELS: tl.constexpr, eps):
    """Mean and 1 / sqrt(variance + eps) over the columns of x W^T + b, without computing them.

    moments_ptr: (P + 2, P + 1) float32, see `fastfar.ops._folded_head`: covariance C of the columns
    of W, and c with those of b, so that the variance is x C x + 2 c x + c0; last, the means.
    """
    channel = tl.arange(0, CHANNELS)
    inside = channel < channels
    stride = channels + 1
    block = channel[:, None] * stride + channel[None, :]
    own = tl.load(moments_ptr + block, mask=inside[:, None] & inside[None, :], other=0.0)
    cross = tl.load(moments_ptr + channels * stride + channel, mask=inside, other=0.0)
    means = tl.load(moments_ptr + (channels + 1) * stride + channel, mask=inside, other=0.0)
    mean = tl.sum(x * means[None, :], axis=1)
    mean += tl.load(moments_ptr + (channels + 1) * stride + channels)
    variance = tl.sum(x * (tl.dot(x, own, input_precision="ieee") + 2.0 * cross[None, :]), axis=1)
    variance += tl.load(moments_ptr + channels * stride + channels)
    return mean, tl.rsqrt(tl.maximum(variance, 0.0) + eps)


@triton.jit
def _projected(
    x,
    tile,
    w_ptr,
    bias_ptr,
    width,
    channels,
    CHANNELS: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Columns of a tile, and x W^T + bias there: (BM, BN) float32. x has the dtype of W."""
    channel = tl.arange(0, CHANNELS)
    column = tile * BN + tl.arange(0, BN)
    inside = column < width
    w = tl.load(
        w_ptr + column[None, :] * channels + channel[:, None],
        mask=inside[None, :] & (channel < channels)[:, None],
        other=0.0,
    )
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return column, tl.dot(x, w, input_precision=PRECISION) + bias[None, :]


@triton.jit
def step_kernel(
    h_ptr,
    addend_ptr,
    final_ptr,
    x_ptr,
    new_x_ptr,
    x0_ptr,
    new_x0_ptr,
    noise_ptr,
    table_ptr,
    w_ptr,
    bias_ptr,
    moments_ptr,
    scale_ptr,
    stream_ptr,
    out_ptr,
    tokens,
    width,
    channels,
    addend_stride,
    scale_stride,
    guidance,
    low,
    high,
    eps,
    HALVES: tl.constexpr,
    CHANNELS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """See `step`. Programs along axis 1 share the columns of the next stream, TILES tiles each.

    Each of them computes the new x for itself, from tensors that none of them writes; the first
    one stores it.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < tokens
    safe = tl.minimum(rows, tokens - 1)
    channel = tl.arange(0, CHANNELS)
    wanted = channel < channels
    state = safe.to(tl.int64)[:, None] * channels + channel[None, :]
    mask = inside[:, None] & wanted[None, :]
    x = tl.load(x_ptr + state, mask=mask, other=0.0)

    if h_ptr is not None:
        # Everything small is asked for before the sum, which hides how long it takes.
        other = safe + tokens  # rows of the unconditional half
        offsets = safe.to(tl.int64)[:, None] * addend_stride + channel[None, :]
        conditional = tl.load(addend_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        variance = tl.load(addend_ptr + offsets + channels, mask=mask, other=0.0).to(tl.float32)
        free = tl.zeros((BM, CHANNELS), dtype=tl.float32)
        if HALVES == 2:
            offsets = other.to(tl.int64)[:, None] * addend_stride + channel[None, :]
            free = tl.load(addend_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        previous = tl.load(x0_ptr + state, mask=mask, other=0.0)
        noise = tl.load(noise_ptr + state, mask=mask, other=0.0).to(tl.float32)
        x_to_x0, eps_to_x0 = tl.load(table_ptr), tl.load(table_ptr + 1)
        x_factor, x0_factor = tl.load(table_ptr + 2), tl.load(table_ptr + 3)
        previous_factor, noise_factor = tl.load(table_ptr + 4), tl.load(table_ptr + 7)
        smallest, largest = tl.load(table_ptr + 5), tl.load(table_ptr + 6)

        depth = tl.arange(0, BK)
        h_ptrs = h_ptr + safe.to(tl.int64)[:, None] * width + depth[None, :]
        other_ptrs = h_ptr + other.to(tl.int64)[:, None] * width + depth[None, :]
        weight_ptrs = final_ptr + channel[None, :] * width + depth[:, None]
        for start in range(0, width, BK):
            within = wanted[None, :]
            below = depth < width - start
            if not EVEN_K:
                within = within & below[:, None]
            w_eps = tl.load(weight_ptrs, mask=within, other=0.0)
            w_v = tl.load(weight_ptrs + channels * width, mask=within, other=0.0)
            if EVEN_K:
                h = tl.load(h_ptrs)
            else:
                h = tl.load(h_ptrs, mask=below[None, :], other=0.0)
            conditional = tl.dot(h, w_eps, conditional, input_precision=PRECISION)
            variance = tl.dot(h, w_v, variance, input_precision=PRECISION)
            if HALVES == 2:
                if EVEN_K:
                    h = tl.load(other_ptrs)
                else:
                    h = tl.load(other_ptrs, mask=below[None, :], other=0.0)
                free = tl.dot(h, w_eps, free, input_precision=PRECISION)
            h_ptrs += BK
            other_ptrs += BK
            weight_ptrs += BK
        noise_estimate = conditional
        if HALVES == 2:
            noise_estimate = free + guidance * (conditional - free)

        x0 = x_to_x0 * x - eps_to_x0 * noise_estimate
        x0 = tl.maximum(x0, low, propagate_nan=tl.PropagateNan.ALL)
        x0 = tl.minimum(x0, high, propagate_nan=tl.PropagateNan.ALL)
        x = x_factor * x + x0_factor * x0 + previous_factor * previous
        fraction = 0.5 * variance + 0.5
        deviation = tl.exp(0.5 * (fraction * largest + (1.0 - fraction) * smallest))
        # At the last step there is none, however large the network's variance.
        x += tl.where(noise_factor != 0.0, noise_factor * deviation * noise, 0.0)
        if tl.program_id(1) == 0:
            tl.store(new_x_ptr + state, x, mask=mask)
            tl.store(new_x0_ptr + state, x0, mask=mask)

    if out_ptr is not None:
        x = tl.where(mask, x, 0.0).to(w_ptr.dtype.element_ty)
        mean, rstd = _projected_moments(x.to(tl.float32), moments_ptr, channels, CHANNELS, eps)
        all_tiles = tl.cdiv(width, BN)
        begin = tl.program_id(1) * TILES
        for tile in range(begin, tl.minimum(begin + TILES, all_tiles)):
            column, h = _projected(
                x, tile, w_ptr, bias_ptr, width, channels, CHANNELS, BN, PRECISION
            )
            keep = inside[:, None] & (column < width)[None, :]
            stream_ptrs = stream_ptr + rows.to(tl.int64)[:, None] * width + column[None, :]
            tl.store(stream_ptrs, h, mask=keep)
            n = (h - mean[:, None]) * rstd[:, None]
            for half in tl.static_range(HALVES):
                row = (rows + half * tokens).to(tl.int64)[:, None]
                scale_ptrs = scale_ptr + row * scale_stride + column[None, :]
                scale = tl.load(scale_ptrs, mask=keep, other=0.0).to(tl.float32)
                out_ptrs = out_ptr + row * width + column[None, :]
                tl.store(out_ptrs, (n * scale).to(out_ptr.dtype.element_ty), mask=keep)


# --- launchers -------------------------------------------------------------------------------

MANY_PROGRAMS = 512  # from which one program takes all columns of its tokens


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


def step(
    h_MW: Any,
    addend_M2P: Any,
    final_2PW: Any,
    x_NP: Any,
    new_x_NP: Any,
    x0_NP: Any,
    new_x0_NP: Any,
    noise_NP: Any,
    table_8: Any,
    w_WP: Any,
    bias_W: Any,
    moments: Any,
    scale_MW: Any,
    stream_NW: Any,
    out_MW: Any,
    *,
    halves: int,
    guidance: float,
    low: float,
    high: float,
    eps: float,
    arch: int,
) -> None:
    """End of a diffusion step, beginning of the next one, or both.

    [eps | v] = h W_f^T + addend per row; eps = eps_u + s (eps_c - eps_u);
    x0 = t0 x - t1 eps, bounded; x = t2 x + t3 x0 + t4 x0_previous + t7 exp(log var / 2) noise with
    log var = f t6 + (1 - f) t5, f = (v + 1) / 2; then stream = x W^T + b, out = LN(stream) scale.

    Args:
        h_MW: (M, w) normalised and scaled operand of the final layer; None begins only, and what
            stands up to `table_8` is not read, x_NP excepted.
        addend_M2P: (M, 2P), slice of the modulations.
        final_2PW: (2P, w) weight of the final layer.
        x_NP, new_x_NP: (N, P) float32 state before and after; not the same memory.
        x0_NP, new_x0_NP: likewise.
        noise_NP: (N, P).
        table_8: (8,) float32 row of coefficients t0 .. t7.
        w_WP, bias_W, moments: input projection, and what `_projected_moments` reads.
        scale_MW: (M, w) slice of the modulations of the next step.
        stream_NW: (N, w) float32.
        out_MW: (M, w), operand of the next step's first product, not h_MW; None ends only.
        halves: 1, or 2 with the conditional rows first.
        guidance, low, high: s and the bounds of x0.
    """
    (tokens, channels), width = x_NP.shape, final_2PW.shape[1]
    chosen = config("step", arch, final_2PW.element_size())
    options = chosen.options
    even = width % options["BK"] == 0
    if not even:  # masks take registers
        options["BK"] = max(16, options["BK"] // 4)
    token_tiles = triton.cdiv(tokens, options["BM"])
    columns = triton.cdiv(width, options["BN"])
    if out_MW is None or token_tiles * columns >= MANY_PROGRAMS:
        share = 1
    else:
        share = columns
    launch(
        step_kernel,
        (token_tiles, share),
        h_MW,
        addend_M2P,
        final_2PW,
        x_NP,
        new_x_NP,
        x0_NP,
        new_x0_NP,
        noise_NP,
        table_8,
        w_WP,
        bias_W,
        moments,
        scale_MW,
        stream_NW,
        out_MW,
        tokens,
        width,
        channels,
        0 if addend_M2P is None else addend_M2P.stride(0),
        0 if scale_MW is None else scale_MW.stride(0),
        guidance,
        low,
        high,
        eps,
        HALVES=halves,
        CHANNELS=max(16, triton.next_power_of_2(channels)),  # what a product takes
        EVEN_K=even,
        TILES=triton.cdiv(columns, share),
        PRECISION="ieee",  # of float32: errors of eps grow by 20,000 in the first steps
        **options,
    )
