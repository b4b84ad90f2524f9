"""Training loss of the denoising MLP, one value per row."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastfar import _native
from fastfar.diffusion import device_table, repeated_rows, repeats, timestep_coefficients
from fastfar.kernels.gpu._launch import is_recording
from fastfar.ops import _launch, _rows
from fastfar.ops._registry import op
from fastfar.ops._triton import architecture, kernels, traced

_COLUMNS = ("recip", "recip_m1", "mean_x0", "mean_xt", "log_beta", "log_posterior")


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation that improved DDPM uses."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _decoder_log_likelihood(target: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of a Gaussian's mass in a bin of width 2/255 around `target` (edges at -1 and 1)."""
    centred = target - mean
    inverse_scale = torch.exp(-log_scale)
    upper = _normal_cdf(inverse_scale * (centred + 1.0 / 255.0))
    lower = _normal_cdf(inverse_scale * (centred - 1.0 / 255.0))
    inner = torch.log((upper - lower).clamp(min=1e-12))
    below = torch.log(upper.clamp(min=1e-12))
    above = torch.log((1.0 - lower).clamp(min=1e-12))
    return torch.where(target < -0.999, below, torch.where(target > 0.999, above, inner))


@op
def hybrid_loss(
    output_N2P: Tensor,
    target_RP: Tensor,
    noise_NP: Tensor,
    noised_NP: Tensor,
    timestep_N: Tensor,
    *,
    weight_N: Tensor | None = None,
    num_timesteps: int = 1000,
) -> Tensor:
    """weight * (mean_P (eps - noise)^2 + variational bound of the variance channel, in bits).

    The bound is KL(q(x_{t-1} | x_t, x_0) || N(mean, exp(log var))) / log 2, at t = 0 the negative
    log likelihood; its mean is computed from a detached eps, so it trains the variance only.

    Args:
        output_N2P: (N, 2 P), eps and v of the head.
        target_RP: (R, P), x_0; row n of the others belongs to its row n modulo R, so that a batch
            multiplier N / R repeats no rows in memory.
        noise_NP: (N, P), the noise that eps is to predict.
        noised_NP: (N, P), x_t.
        timestep_N: (N,) int64 in 0..num_timesteps - 1.
        weight_N: (N,) factor of each row, as a level's weight or a mask; None is 1.

    Returns:
        (N,) float32 (float64 for float64 inputs).

    Raises:
        ValueError: N is no multiple of R.

    Native: float32 or bfloat16 on the CPU, computed in float32; the gradient goes to output_N2P
    only. Where another input wants one, or is float64 or float16, PyTorch computes it.
    Triton: the same, and float16 as well; each input may have another dtype. A timestep out of
    range is not seen (looking would wait for the GPU): the nearest in range is taken.

    Source: improved DDPM, arXiv 2102.09672, section 3.1 (L_hybrid without the 0.001 factor, as
    its `LossType.MSE` with learned variance computes it).
    """
    target_NP = repeated_rows(target_RP, len(noise_NP))
    dtype = torch.promote_types(target_NP.dtype, torch.float32)
    eps_NP, v_NP = output_N2P.to(dtype).chunk(2, dim=-1)
    coefficients = timestep_coefficients(timestep_N, " ".join(_COLUMNS), num_timesteps, dtype)
    recip, recip_m1, mean_x0, mean_xt, log_beta, log_posterior = coefficients
    squared_N = (eps_NP - noise_NP).square().mean(dim=-1)

    fraction = (v_NP + 1.0) / 2.0
    log_variance = fraction * log_beta + (1.0 - fraction) * log_posterior
    predicted_x0 = recip * noised_NP - recip_m1 * eps_NP.detach()
    mean = mean_x0 * predicted_x0 + mean_xt * noised_NP
    true_mean = mean_x0 * target_NP + mean_xt * noised_NP
    divergence = 0.5 * (
        log_variance
        - log_posterior
        - 1.0
        + torch.exp(log_posterior - log_variance)
        + (true_mean - mean).square() * torch.exp(-log_variance)
    )
    likelihood = _decoder_log_likelihood(target_NP, mean, 0.5 * log_variance)
    bound = torch.where((timestep_N == 0)[:, None], -likelihood, divergence)
    return _weighted(squared_N + bound.mean(dim=-1) / math.log(2.0), weight_N)


def _weighted(loss_N: Tensor, weight_N: Tensor | None) -> Tensor:
    return loss_N if weight_N is None else loss_N * weight_N.to(loss_N.dtype)


def _table(num_timesteps: int, like: Tensor) -> Tensor:
    """(6, T) float32, the coefficients of every timestep, on the device of `like`."""
    if is_recording():  # nothing reads it
        return like.new_empty((len(_COLUMNS), num_timesteps), dtype=torch.float32)
    return device_table(_COLUMNS, num_timesteps, num_timesteps, like.device, torch.float32)


# --- native ----------------------------------------------------------------------------------


def _fields(
    output_N2P: Tensor,
    target_NP: Tensor,
    noise_NP: Tensor,
    noised_NP: Tensor,
    timestep_N: Tensor,
    num_timesteps: int,
) -> dict[str, Tensor | float | None]:
    rows, numbers = target_NP.shape
    return {
        "dtype": _native.DTYPES[output_N2P.dtype],
        "threads": torch.get_num_threads(),
        "rows": rows,
        "numbers": numbers,
        "num_timesteps": num_timesteps,
        "output_N2P": output_N2P.contiguous(),
        "target_NP": target_NP.contiguous(),
        "noise_NP": noise_NP.contiguous(),
        "noised_NP": noised_NP.contiguous(),
        "timestep_N": timestep_N.contiguous(),
        "table_T6": _table(num_timesteps, target_NP).t().contiguous(),
    }


@torch.library.custom_op("fastfar::hybrid_loss", mutates_args=())
def _forward(
    output_N2P: Tensor,
    target_NP: Tensor,
    noise_NP: Tensor,
    noised_NP: Tensor,
    timestep_N: Tensor,
    num_timesteps: int,
) -> Tensor:
    fields = _fields(output_N2P, target_NP, noise_NP, noised_NP, timestep_N, num_timesteps)
    loss_N = torch.empty(len(target_NP), dtype=torch.float32)
    if loss_N.numel():
        _native.load().call("hybrid_loss", **fields, loss_N=loss_N)
    return loss_N


@torch.library.custom_op("fastfar::hybrid_loss_backward", mutates_args=())
def _backward(
    dloss_N: Tensor,
    output_N2P: Tensor,
    target_NP: Tensor,
    noise_NP: Tensor,
    noised_NP: Tensor,
    timestep_N: Tensor,
    num_timesteps: int,
) -> Tensor:
    fields = _fields(output_N2P, target_NP, noise_NP, noised_NP, timestep_N, num_timesteps)
    doutput_N2P = torch.empty(output_N2P.shape, dtype=output_N2P.dtype)
    if doutput_N2P.numel():
        fields |= {"dloss_N": dloss_N.contiguous(), "doutput_N2P": doutput_N2P}
        _native.load().call("hybrid_loss_backward", **fields)
    return doutput_N2P


@_forward.register_fake
def _(output_N2P: Tensor, target_NP: Tensor, *_: Any) -> Tensor:
    return target_NP.new_empty(target_NP.shape[0], dtype=torch.float32)


@_backward.register_fake
def _(dloss_N: Tensor, output_N2P: Tensor, *_: Any) -> Tensor:
    return output_N2P.new_empty(output_N2P.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.num_timesteps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dloss_N: Tensor) -> tuple[Tensor | None, ...]:
    return (_backward(dloss_N, *ctx.saved_tensors, ctx.num_timesteps), *[None] * 5)


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _native_implementation(
    output_N2P: Tensor,
    target_RP: Tensor,
    noise_NP: Tensor,
    noised_NP: Tensor,
    timestep_N: Tensor,
    *,
    weight_N: Tensor | None = None,
    num_timesteps: int = 1000,
) -> Tensor:
    """See `hybrid_loss`."""
    name = "hybrid_loss"
    constant = {"target": target_RP, "noise": noise_NP, "noised": noised_NP}
    tensors = [output_N2P, *constant.values()]
    if _rows.recorded(*constant.values()) or any(x.dtype not in _native.DTYPES for x in tensors):
        plain: Tensor = hybrid_loss.implementations["torch"](
            *tensors, timestep_N, weight_N=weight_N, num_timesteps=num_timesteps
        )
        return plain
    _launch.check(name, {"output": output_N2P, **constant})
    if target_RP.dim() != 2:
        raise ValueError(f"native {name}: target is {tuple(target_RP.shape)}, expected (N, P)")
    rows, numbers = len(noise_NP), target_RP.shape[1]
    tensors[1] = repeated_rows(target_RP, rows)
    _launch.shapes(
        name,
        output=(output_N2P, (rows, 2 * numbers)),
        noise=(noise_NP, (rows, numbers)),
        noised=(noised_NP, (rows, numbers)),
        timestep=(timestep_N, (rows,)),
    )
    if timestep_N.dtype != torch.int64:
        raise TypeError(f"native {name}: timestep is {timestep_N.dtype}; give int64")
    if len({x.dtype for x in tensors}) > 1:
        tensors = [x.float() for x in tensors]
    loss_N: Tensor = _forward(*tensors, timestep_N, num_timesteps)
    return _weighted(loss_N, weight_N)


hybrid_loss.register("native", _native_implementation)


# --- triton ----------------------------------------------------------------------------------


def _run_triton(
    output_N2P: Tensor,
    target_RP: Tensor,
    noise_NP: Tensor,
    noised_NP: Tensor,
    timestep_N: Tensor,
    weight_N: Tensor | None,
    num_timesteps: int,
) -> Tensor:
    loss_N = output_N2P.new_empty(len(output_N2P), dtype=torch.float32)
    tensors = (_rows.rows(x) for x in (output_N2P, target_RP, noise_NP, noised_NP))
    table_6T = _table(num_timesteps, output_N2P)
    kernels("hybrid_loss").hybrid_loss(
        *tensors, timestep_N, weight_N, table_6T, loss_N, arch=architecture(output_N2P)
    )
    return loss_N


@torch.library.custom_op("fastfar::hybrid_loss_triton", mutates_args=())
def _triton_forward(
    output_N2P: Tensor,
    target_RP: Tensor,
    noise_NP: Tensor,
    noised_NP: Tensor,
    timestep_N: Tensor,
    weight_N: Tensor | None,
    num_timesteps: int,
) -> Tensor:
    tensors = (output_N2P, target_RP, noise_NP, noised_NP, timestep_N, weight_N)
    return _run_triton(*tensors, num_timesteps)


def _run_triton_backward(
    dloss_N: Tensor,
    output_N2P: Tensor,
    target_RP: Tensor,
    noise_NP: Tensor,
    noised_NP: Tensor,
    timestep_N: Tensor,
    weight_N: Tensor | None,
    num_timesteps: int,
) -> Tensor:
    doutput_N2P = output_N2P.new_empty(output_N2P.shape)
    tensors = (_rows.rows(x) for x in (output_N2P, target_RP, noise_NP, noised_NP))
    table_6T = _table(num_timesteps, output_N2P)
    kernels("hybrid_loss").hybrid_loss_backward(
        dloss_N, *tensors, timestep_N, weight_N, table_6T, doutput_N2P,
        arch=architecture(output_N2P),
    )  # fmt: skip
    return doutput_N2P


@torch.library.custom_op("fastfar::hybrid_loss_triton_backward", mutates_args=())
def _triton_backward(
    dloss_N: Tensor,
    output_N2P: Tensor,
    target_RP: Tensor,
    noise_NP: Tensor,
    noised_NP: Tensor,
    timestep_N: Tensor,
    weight_N: Tensor | None,
    num_timesteps: int,
) -> Tensor:
    tensors = (output_N2P, target_RP, noise_NP, noised_NP, timestep_N, weight_N)
    return _run_triton_backward(dloss_N, *tensors, num_timesteps)


# What runs on fake tensors: the launchers, too, where their launches are being recorded.
@_triton_forward.register_fake
def _(output_N2P: Tensor, *rest: Any) -> Tensor:
    if is_recording():
        return _run_triton(output_N2P, *rest)
    return output_N2P.new_empty(output_N2P.shape[0], dtype=torch.float32)


@_triton_backward.register_fake
def _(dloss_N: Tensor, output_N2P: Tensor, *rest: Any) -> Tensor:
    if is_recording():
        return _run_triton_backward(dloss_N, output_N2P, *rest)
    return output_N2P.new_empty(output_N2P.shape)


def _triton_gradients(ctx: Any, dloss_N: Tensor) -> tuple[Tensor | None, ...]:
    return (_triton_backward(dloss_N, *ctx.saved_tensors, ctx.num_timesteps), *[None] * 6)


_triton_forward.register_autograd(_triton_gradients, setup_context=_setup_context)


def _triton_implementation(
    output_N2P: Tensor,
    target_RP: Tensor,
    noise_NP: Tensor,
    noised_NP: Tensor,
    timestep_N: Tensor,
    *,
    weight_N: Tensor | None = None,
    num_timesteps: int = 1000,
) -> Tensor:
    """See `hybrid_loss`."""
    tensors = (output_N2P, target_RP, noise_NP, noised_NP)
    wanted = _rows.recorded(*tensors[1:], weight_N)
    if wanted or any(x.dtype not in _rows.DTYPES for x in tensors):
        plain: Tensor = hybrid_loss.implementations["torch"](
            *tensors, timestep_N, weight_N=weight_N, num_timesteps=num_timesteps
        )
        return plain
    rows, numbers = noise_NP.shape
    repeats(target_RP, rows)  # or a ValueError
    _rows.check(
        "hybrid_loss",
        output=(output_N2P, (rows, 2 * numbers)),
        target=(target_RP, (target_RP.shape[0], numbers)),
        noise=(noise_NP, (rows, numbers)),
        noised=(noised_NP, (rows, numbers)),
    )
    for name, x in (("timestep", timestep_N), ("weight", weight_N)):
        if x is not None and (x.shape != (rows,) or x.device != output_N2P.device):
            raise ValueError(
                f"triton hybrid_loss: {name} is {tuple(x.shape)} on {x.device}, expected "
                f"{(rows,)} on {output_N2P.device}"
            )
    run = _triton_forward if _rows.recorded(output_N2P) or traced() else _run_triton
    loss_N: Tensor = run(*tensors, timestep_N, weight_N, num_timesteps)
    return loss_N


hybrid_loss.register("triton", _triton_implementation)
