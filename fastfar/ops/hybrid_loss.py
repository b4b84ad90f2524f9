"""Training loss of the denoising MLP, one value per row."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastfar import _native
from fastfar.diffusion import diffusion_tables
from fastfar.ops import _launch
from fastfar.ops._registry import op

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


# An op of its own, so that torch.compile does not look inside: it cannot trace cached tables.
@torch.library.custom_op("fastfar::hybrid_loss_coefficients", mutates_args=())
def _coefficients(timestep_N: Tensor, num_timesteps: int, dtype: torch.dtype) -> Tensor:
    """Columns (len(_COLUMNS), N, 1) of the diffusion tables at each row's timestep."""
    tables = diffusion_tables(num_timesteps, num_timesteps)
    columns = torch.stack([getattr(tables, name) for name in _COLUMNS])
    return columns.to(timestep_N.device, dtype)[:, timestep_N, None]


@_coefficients.register_fake
def _(timestep_N: Tensor, num_timesteps: int, dtype: torch.dtype) -> Tensor:
    return timestep_N.new_empty((len(_COLUMNS), len(timestep_N), 1), dtype=dtype)


@op
def hybrid_loss(
    output_N2P: Tensor,
    target_NP: Tensor,
    noise_NP: Tensor,
    noised_NP: Tensor,
    timestep_N: Tensor,
    *,
    num_timesteps: int = 1000,
) -> Tensor:
    """mean_P (eps - noise)^2 + variational bound of the variance channel, in bits.

    The bound is KL(q(x_{t-1} | x_t, x_0) || N(mean, exp(log var))) / log 2, at t = 0 the negative
    log likelihood; its mean is computed from a detached eps, so it trains the variance only.

    Args:
        output_N2P: (N, 2 P), eps and v of the head.
        target_NP: (N, P), x_0.
        noise_NP: (N, P), the noise that eps is to predict.
        noised_NP: (N, P), x_t.
        timestep_N: (N,) int64 in 0..num_timesteps - 1.

    Returns:
        (N,) float32 (float64 for float64 inputs).

    Native: float32 or bfloat16 on the CPU, computed in float32; the gradient goes to output_N2P
    only. Where another input wants one, or is float64 or float16, PyTorch computes it.

    Source: improved DDPM, arXiv 2102.09672, section 3.1 (L_hybrid without the 0.001 factor, as
    its `LossType.MSE` with learned variance computes it).
    """
    dtype = torch.promote_types(target_NP.dtype, torch.float32)
    eps_NP, v_NP = output_N2P.to(dtype).chunk(2, dim=-1)
    coefficients = _coefficients(timestep_N, num_timesteps, dtype)
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
    return squared_N + bound.mean(dim=-1) / math.log(2.0)


# --- native ----------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _table(num_timesteps: int) -> Tensor:
    """(T, 6) float32, the coefficients of every timestep in the kernel's order."""
    t = diffusion_tables(num_timesteps, num_timesteps)
    return torch.stack([getattr(t, name) for name in _COLUMNS], dim=1).float().contiguous()


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
        "table_T6": _table(num_timesteps),
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
    target_NP: Tensor,
    noise_NP: Tensor,
    noised_NP: Tensor,
    timestep_N: Tensor,
    *,
    num_timesteps: int = 1000,
) -> Tensor:
    """See `hybrid_loss`."""
    name = "hybrid_loss"
    constant = {"target": target_NP, "noise": noise_NP, "noised": noised_NP}
    tensors = [output_N2P, *constant.values()]
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in constant.values())
    if wanted or any(x.dtype not in _native.DTYPES for x in tensors):
        plain: Tensor = hybrid_loss.implementations["torch"](
            *tensors, timestep_N, num_timesteps=num_timesteps
        )
        return plain
    _launch.check(name, {"output": output_N2P, **constant})
    if target_NP.dim() != 2:
        raise ValueError(f"native {name}: target is {tuple(target_NP.shape)}, expected (N, P)")
    rows, numbers = target_NP.shape
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
    return loss_N


hybrid_loss.register("native", _native_implementation)
