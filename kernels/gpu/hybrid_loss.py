"""Training loss of the denoising MLP, one value per row, and its derivative.

    loss = w (mean_P (eps - noise)^2 + mean_P bound / log 2)
    bound = KL(posterior || model) = 1/2 (l - p - 1 + e^(p - l) + d^2 e^-l),  or at t = 0
            -log of the model's mass in the bin of width 2/255 around the target

with l = f log_beta + (1 - f) p, f = (v + 1) / 2, p the posterior's log variance and d the distance
of the means. In the bound eps is a constant: its derivative is that of v alone.

The normal distribution function is (1 + tanh(g(z))) / 2 = sigmoid(2 g(z)). It is odd around z = 0,
so differences are taken in the lower tail, where no digits are lost.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ._configs import config, row_tile
from ._launch import launch

# Rows of the table of coefficients, as `fastfar.diffusion.DiffusionTables` names them.
COEFFICIENTS = ("recip", "recip_m1", "mean_x0", "mean_xt", "log_beta", "log_posterior")


@triton.jit
def _cdf(z):
    """The normal distribution function, its complement and its derivative."""
    square = z * z
    g = 1.5957691216057308 * z * (1.0 + 0.044715 * square)  # 2 sqrt(2 / pi) (z + 0.044715 z^3)
    below, above = tl.sigmoid(g), tl.sigmoid(-g)
    return below, above, below * above * 1.5957691216057308 * (1.0 + 0.134145 * square)


@triton.jit
def _log(p, slope):
    """log max(p, 1e-12) and its derivative, from that of p."""
    limited = tl.maximum(p, 1e-12, propagate_nan=tl.PropagateNan.ALL)
    return tl.log(limited), tl.where(p < 1e-12, 0.0, slope / limited)


@triton.jit
def _likelihood(target, mean, log_variance):
    """log of the model's mass in the target's bin, and its derivative by the log variance."""
    centred = target - mean
    inverse = tl.exp(-0.5 * log_variance)
    z_upper, z_lower = inverse * (centred + 1.0 / 255.0), inverse * (centred - 1.0 / 255.0)
    upper, not_upper, upper_slope = _cdf(z_upper)
    lower, not_lower, lower_slope = _cdf(z_lower)
    # d z / d log variance = -z / 2.
    upper_slope *= -0.5 * z_upper
    lower_slope *= -0.5 * z_lower
    inside = tl.where(centred > 0, not_lower - not_upper, upper - lower)
    value, slope = _log(inside, upper_slope - lower_slope)
    first, first_slope = _log(upper, upper_slope)
    last, last_slope = _log(not_lower, -lower_slope)
    is_first, is_last = target < -0.999, target > 0.999
    value = tl.where(is_first, first, tl.where(is_last, last, value))
    return value, tl.where(is_first, first_slope, tl.where(is_last, last_slope, slope))


@triton.jit
def _load(ptr, stride, rows, columns, mask):
    offset = (rows * stride)[:, None] + columns
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _terms(
    output_ptr,
    target_ptr,
    noise_ptr,
    noised_ptr,
    table_ptr,
    t,
    rows,
    columns,
    P,
    target_rows,
    num_timesteps,
    output_stride,
    target_stride,
    noise_stride,
    noised_stride,
    mask,
):
    """Of a tile: eps - noise, the bound in nats, and the bound's derivative by v."""
    eps = _load(output_ptr, output_stride, rows, columns, mask)
    v = _load(output_ptr + P, output_stride, rows, columns, mask)
    target = _load(target_ptr, target_stride, rows % target_rows, columns, mask)
    noise = _load(noise_ptr, noise_stride, rows, columns, mask)
    noised = _load(noised_ptr, noised_stride, rows, columns, mask)
    at, T = table_ptr + t[:, None], num_timesteps
    recip, recip_m1, mean_x0 = tl.load(at), tl.load(at + T), tl.load(at + 2 * T)
    log_beta, log_posterior = tl.load(at + 4 * T), tl.load(at + 5 * T)

    fraction = 0.5 * v + 0.5
    log_variance = fraction * log_beta + (1.0 - fraction) * log_posterior
    x0 = recip * noised - recip_m1 * eps
    ratio = tl.exp(log_posterior - log_variance)
    distance = mean_x0 * (target - x0)
    distance = distance * distance * tl.exp(-log_variance)
    bound = 0.5 * (log_variance - log_posterior - 1.0 + ratio + distance)
    slope = 0.5 * (1.0 - ratio - distance)
    if tl.min(t, axis=0) == 0:  # seldom: one row in num_timesteps
        mean = mean_x0 * x0 + tl.load(at + 3 * T) * noised
        likelihood, by_log_variance = _likelihood(target, mean, log_variance)
        bound = tl.where((t == 0)[:, None], -likelihood, bound)
        slope = tl.where((t == 0)[:, None], -by_log_variance, slope)
    return eps - noise, bound, slope * 0.5 * (log_beta - log_posterior)


@triton.jit
def _timesteps(timestep_ptr, stride, rows, N, num_timesteps):
    """Timesteps of rows; one that is out of range is taken for the nearest in range."""
    t = tl.load(timestep_ptr + rows * stride, mask=rows < N, other=num_timesteps - 1)
    return tl.minimum(tl.maximum(t.to(tl.int64), 0), num_timesteps - 1)


@triton.jit
def _weight(weight_ptr, weight_stride, rows, N):
    if weight_ptr is None:
        return tl.full(rows.shape, 1.0, tl.float32)
    else:
        return tl.load(weight_ptr + rows * weight_stride, mask=rows < N, other=0).to(tl.float32)


@triton.jit
def hybrid_loss_kernel(
    output_ptr,
    target_ptr,
    noise_ptr,
    noised_ptr,
    timestep_ptr,
    weight_ptr,
    table_ptr,
    loss_ptr,
    N,
    P,
    target_rows,
    num_timesteps,
    output_stride,
    target_stride,
    noise_stride,
    noised_stride,
    timestep_stride,
    weight_stride,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    t = _timesteps(timestep_ptr, timestep_stride, rows, N, num_timesteps)
    total = tl.zeros((BN,), dtype=tl.float32)
    for start in range(0, P, BP):
        columns = start + tl.arange(0, BP)[None, :]
        mask = (rows < N)[:, None] & (columns < P)
        difference, bound, _ = _terms(
            output_ptr,
            target_ptr,
            noise_ptr,
            noised_ptr,
            table_ptr,
            t,
            rows,
            columns,
            P,
            target_rows,
            num_timesteps,
            output_stride,
            target_stride,
            noise_stride,
            noised_stride,
            mask,
        )
        terms = difference * difference + 1.4426950408889634 * bound
        total += tl.sum(tl.where(mask, terms, 0.0), axis=1)
    weight = _weight(weight_ptr, weight_stride, rows, N)
    tl.store(loss_ptr + rows, weight * (total / P), mask=rows < N)


@triton.jit
def hybrid_loss_backward_kernel(
    dloss_ptr,
    output_ptr,
    target_ptr,
    noise_ptr,
    noised_ptr,
    timestep_ptr,
    weight_ptr,
    table_ptr,
    doutput_ptr,
    N,
    P,
    target_rows,
    num_timesteps,
    dloss_stride,
    output_stride,
    target_stride,
    noise_stride,
    noised_stride,
    timestep_stride,
    weight_stride,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    t = _timesteps(timestep_ptr, timestep_stride, rows, N, num_timesteps)
    dloss = tl.load(dloss_ptr + rows * dloss_stride, mask=rows < N, other=0.0).to(tl.float32)
    scale = (dloss * _weight(weight_ptr, weight_stride, rows, N) / P)[:, None]
    for start in range(0, P, BP):
        columns = start + tl.arange(0, BP)[None, :]
        mask = (rows < N)[:, None] & (columns < P)
        difference, _, slope = _terms(
            output_ptr,
            target_ptr,
            noise_ptr,
            noised_ptr,
            table_ptr,
            t,
            rows,
            columns,
            P,
            target_rows,
            num_timesteps,
            output_stride,
            target_stride,
            noise_stride,
            noised_stride,
            mask,
        )
        doutput = doutput_ptr + (rows * 2 * P)[:, None] + columns
        dtype = doutput_ptr.dtype.element_ty
        tl.store(doutput, (2.0 * scale * difference).to(dtype), mask=mask)
        tl.store(doutput + P, (1.4426950408889634 * scale * slope).to(dtype), mask=mask)


def _stride(x: Any) -> int:
    """Distance of two rows; the numbers of a row lie side by side."""
    if x is None:
        return 0
    assert x.ndim == 1 or x.shape[1] == 1 or x.stride(1) == 1, "rows must be contiguous"
    return int(x.stride(0))


def _launch(kernel: Any, first: tuple[Any, ...], inputs: tuple[Any, ...], out: Any, arch: int):
    output_N2P, target_RP, *_, table_6T = inputs
    rows, numbers = output_N2P.shape[0], target_RP.shape[1]
    assert table_6T.shape[0] == len(COEFFICIENTS) and table_6T.is_contiguous()
    chosen = config("hybrid_loss", arch, 4)
    tile = row_tile(chosen, numbers)
    launch(
        kernel,
        (triton.cdiv(rows, tile["BN"]),),
        *first,
        *inputs,
        out,
        rows,
        numbers,
        target_RP.shape[0],
        table_6T.shape[1],
        *map(_stride, (*first, *inputs[:-1])),
        **tile,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


def hybrid_loss(
    output_N2P: Any,
    target_RP: Any,
    noise_NP: Any,
    noised_NP: Any,
    timestep_N: Any,
    weight_N: Any,
    table_6T: Any,
    loss_N: Any,
    *,
    arch: int,
) -> None:
    """The loss of every row; see the module.

    Args:
        output_N2P: (N, 2 P) eps and v. This and the next three may be float32, float16 or bfloat16,
            each another; rows at any distance, numbers of a row side by side.
        target_RP: (R, P), N a multiple of R: row n is compared with row n modulo R.
        noise_NP, noised_NP: (N, P).
        timestep_N: integers; out of range means the nearest in range.
        weight_N: factor of each row, any dtype, or None.
        table_6T: (6, T) float32, contiguous, see COEFFICIENTS.
        loss_N: contiguous float32 result.
        arch: architecture, see `_configs.config`.
    """
    inputs = (output_N2P, target_RP, noise_NP, noised_NP, timestep_N, weight_N, table_6T)
    _launch(hybrid_loss_kernel, (), inputs, loss_N, arch)


def hybrid_loss_backward(
    dloss_N: Any,
    output_N2P: Any,
    target_RP: Any,
    noise_NP: Any,
    noised_NP: Any,
    timestep_N: Any,
    weight_N: Any,
    table_6T: Any,
    doutput_N2P: Any,
    *,
    arch: int,
) -> None:
    """Gradient of output_N2P, contiguous, from that of the loss; the other arguments as above."""
    inputs = (output_N2P, target_RP, noise_NP, noised_NP, timestep_N, weight_N, table_6T)
    _launch(hybrid_loss_backward_kernel, (dloss_N,), inputs, doutput_N2P, arch)
