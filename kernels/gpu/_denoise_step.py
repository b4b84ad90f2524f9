"""The end of a diffusion step and the beginning of the next one: one kernel of `denoise_loop`."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ._configs import config
from ._launch import launch

MANY_PROGRAMS = 512  # from which one program takes all columns of its tokens


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
def _bounded(value, low, high):
    """value within [low, high]; NaN stays NaN."""
    value = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, high, propagate_nan=tl.PropagateNan.ALL)


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
        linear = tl.load(table_ptr + 8)
        least, most = tl.load(table_ptr + 9), tl.load(table_ptr + 10)

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
        x0 = _bounded(x0, low, high)
        x = x_factor * x + x0_factor * x0 + previous_factor * previous
        fraction = _bounded(0.5 * variance + 0.5, least, most)
        value = smallest + fraction * (largest - smallest)
        root = tl.sqrt(tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL))
        deviation = tl.where(linear != 0.0, root, tl.exp(0.5 * value))
        # Where a step has no noise there is none, however large the network's variance.
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


def step(
    h_MW: Any,
    addend_M2P: Any,
    final_2PW: Any,
    x_NP: Any,
    new_x_NP: Any,
    x0_NP: Any,
    new_x0_NP: Any,
    noise_NP: Any,
    table_11: Any,
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
    x0 = t0 x - t1 eps, bounded; x = t2 x + t3 x0 + t4 x0_previous + t7 deviation noise, with
    f = (v + 1) / 2 bounded to t9 .. t10, q = t5 + f (t6 - t5) and deviation = sqrt(max(q, 0)) where
    t8 is not 0, else exp(q / 2); then stream = x W^T + b, out = LN(stream) scale.

    Args:
        h_MW: (M, w) normalised and scaled operand of the final layer; None begins only, and what
            stands up to `table_11` is not read, x_NP excepted.
        addend_M2P: (M, 2P), slice of the modulations.
        final_2PW: (2P, w) weight of the final layer.
        x_NP, new_x_NP: (N, P) float32 state before and after; not the same memory.
        x0_NP, new_x0_NP: likewise.
        noise_NP: (N, P).
        table_11: (11,) float32, t0 .. t10: a row of `fastfar.solver.Schedule.table`. Launches whose
            rows are aligned to 16 bytes and not would be two kernels.
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
        table_11,
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
