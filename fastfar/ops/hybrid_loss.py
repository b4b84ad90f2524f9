"""Training loss of the denoising MLP, one value per row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastfar.diffusion import diffusion_tables
from fastfar.ops._registry import op


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

    Source: improved DDPM, arXiv 2102.09672, section 3.1 (L_hybrid without the 0.001 factor, as
    its `LossType.MSE` with learned variance computes it).
    """
    dtype = torch.promote_types(target_NP.dtype, torch.float32)
    eps_NP, v_NP = output_N2P.to(dtype).chunk(2, dim=-1)
    tables = diffusion_tables(num_timesteps, num_timesteps)

    def at_t(values: Tensor) -> Tensor:
        return values.to(target_NP.device, dtype)[timestep_N, None]

    squared_N = (eps_NP - noise_NP).square().mean(dim=-1)

    fraction = (v_NP + 1.0) / 2.0
    log_posterior = at_t(tables.log_posterior)
    log_variance = fraction * at_t(tables.log_beta) + (1.0 - fraction) * log_posterior
    mean_x0, mean_xt = at_t(tables.mean_x0), at_t(tables.mean_xt)
    predicted_x0 = at_t(tables.recip) * noised_NP - at_t(tables.recip_m1) * eps_NP.detach()
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
