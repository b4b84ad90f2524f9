"""Diffusion of one token (improved DDPM, arXiv 2102.09672): schedule, step and loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def cosine_betas(num_timesteps: int = 1000, max_beta: float = 0.999) -> Tensor:
    """beta_t = min(1 - abar((t+1)/N) / abar(t/N), max_beta), abar = cos^2(...); float64 (N,)."""

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    n = num_timesteps
    betas = [min(1 - alpha_bar((t + 1) / n) / alpha_bar(t / n), max_beta) for t in range(n)]
    return torch.tensor(betas, dtype=torch.float64)


def space_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """The `steps` timesteps kept, ascending, first and last included (improved DDPM, one section).

    Raises ValueError for steps outside 1..num_timesteps.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"{steps} diffusion steps: choose 1..{num_timesteps}")
    stride = (num_timesteps - 1) / (steps - 1) if steps > 1 else 1.0
    position, kept = 0.0, []
    for _ in range(steps):
        kept.append(round(position))  # ties to even, and the stride is accumulated, as published
        position += stride
    return kept


@dataclass(frozen=True)
class Schedule:
    """float64 tables over the T (respaced) steps, least noise first; `timestep` = unspaced t."""

    timestep: Tensor
    alpha_bar: Tensor
    log_beta: Tensor
    posterior_log_variance: Tensor
    x0_from_x: Tensor
    x0_from_eps: Tensor
    mean_from_x0: Tensor
    mean_from_x: Tensor


def make_schedule(num_timesteps: int = 1000, steps: int | None = None) -> Schedule:
    """Cosine schedule, respaced to `steps` (None = all).

    The respaced beta_i = 1 - abar(t_i) / abar(t_(i-1)) keeps abar at the kept timesteps.
    """
    steps = num_timesteps if steps is None else steps
    return schedule_at(space_timesteps(num_timesteps, steps), num_timesteps)


def schedule_at(kept: list[int], num_timesteps: int = 1000) -> Schedule:
    """Cosine schedule at these timesteps alone, ascending."""
    timestep = torch.tensor(kept, dtype=torch.int64)
    alpha_bar = torch.cumprod(1 - cosine_betas(num_timesteps), dim=0)[timestep]
    previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    beta = 1 - alpha_bar / previous
    variance = beta * (1 - previous) / (1 - alpha_bar)
    # The posterior variance at index 0 is 0: its logarithm takes the next entry ("clipped").
    variance = torch.cat([variance[1:2] if len(kept) > 1 else beta[:1], variance[1:]])
    return Schedule(
        timestep=timestep,
        alpha_bar=alpha_bar,
        log_beta=beta.log(),
        posterior_log_variance=variance.log(),
        x0_from_x=(1 / alpha_bar).sqrt(),
        x0_from_eps=(1 / alpha_bar - 1).sqrt(),
        mean_from_x0=beta * previous.sqrt() / (1 - alpha_bar),
        mean_from_x=(1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar),
    )


def _at(table: Tensor, index_N: Tensor, like_NP: Tensor) -> Tensor:
    """Entries of a float64 table as a column (N, 1), rounded once to the dtype of `like_NP`."""
    return table.to(index_N.device)[index_N].to(like_NP.dtype).unsqueeze(-1)


def q_sample(target_NP: Tensor, noise_NP: Tensor, timestep_N: Tensor, schedule: Schedule) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise."""
    signal_N1 = _at(schedule.alpha_bar.sqrt(), timestep_N, target_NP)
    sigma_N1 = _at((1 - schedule.alpha_bar).sqrt(), timestep_N, target_NP)
    return signal_N1 * target_NP + sigma_N1 * noise_NP


def add_noise(
    x0_RP: Tensor, noise_NP: Tensor, timestep_N: Tensor, *, num_timesteps: int = 1000
) -> Tensor:
    """`q_sample` of N = M R rows: the R clean tokens M times, all of them before any again."""
    x0_NP = x0_RP.repeat(noise_NP.shape[0] // x0_RP.shape[0], 1)
    return q_sample(x0_NP, noise_NP, timestep_N, make_schedule(num_timesteps))


def mean_and_log_variance(
    eps_NP: Tensor,
    v_NP: Tensor,
    x_NP: Tensor,
    index_N: Tensor,
    schedule: Schedule,
    x0_range: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and log variance of p(x_(t-1) | x_t).

    x0 = x / sqrt(abar) - sqrt(1/abar - 1) eps, clamped to x0_range if given; mean = c0 x0 + c1 x;
    log var = frac log(beta) + (1 - frac) log(posterior variance), frac = (v + 1) / 2.
    """
    x0_NP = _at(schedule.x0_from_x, index_N, x_NP) * x_NP
    x0_NP = x0_NP - _at(schedule.x0_from_eps, index_N, x_NP) * eps_NP
    if x0_range is not None:
        x0_NP = x0_NP.clamp(*x0_range)
    mean_NP = _at(schedule.mean_from_x0, index_N, x_NP) * x0_NP
    mean_NP = mean_NP + _at(schedule.mean_from_x, index_N, x_NP) * x_NP
    frac_NP = (v_NP + 1) / 2
    log_variance_NP = frac_NP * _at(schedule.log_beta, index_N, x_NP)
    low_N1 = _at(schedule.posterior_log_variance, index_N, x_NP)
    return mean_NP, log_variance_NP + (1 - frac_NP) * low_N1


def ancestral_step(
    eps_NP: Tensor,
    v_NP: Tensor,
    x_NP: Tensor,
    noise_NP: Tensor,
    index: int,
    schedule: Schedule,
    *,
    temperature: float = 1.0,
    x0_range: tuple[float, float] | None = None,
) -> Tensor:
    """x_(t-1) = mean + temperature * exp(log var / 2) * noise; no noise at index 0 (last step)."""
    index_N = torch.full(x_NP.shape[:1], index, dtype=torch.int64, device=x_NP.device)
    mean_NP, log_variance_NP = mean_and_log_variance(
        eps_NP, v_NP, x_NP, index_N, schedule, x0_range
    )
    if index == 0:
        return mean_NP
    return mean_NP + temperature * torch.exp(0.5 * log_variance_NP) * noise_NP


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal distribution function of improved DDPM."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _discretised_log_likelihood(target_NP: Tensor, mean_NP: Tensor, log_scale_NP: Tensor) -> Tensor:
    """log of the Gaussian mass in the target's bin of width 2/255; the outer bins are open."""
    centred = target_NP - mean_NP
    inverse_scale = torch.exp(-log_scale_NP)
    upper = _normal_cdf(inverse_scale * (centred + 1 / 255))
    lower = _normal_cdf(inverse_scale * (centred - 1 / 255))
    inner = (upper - lower).clamp(min=1e-12).log()
    first = upper.clamp(min=1e-12).log()
    last = (1 - lower).clamp(min=1e-12).log()
    return torch.where(target_NP < -0.999, first, torch.where(target_NP > 0.999, last, inner))


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
    """Per row: mean (noise - eps)^2 + variational bound in bits per dimension (eps detached).

    The bound is KL(q(x_(t-1) | x_t, x_0) || p) for t > 0 and -log p(x_0 | x_1) (discretised
    Gaussian) at t = 0: improved DDPM with learned-range variances and `LossType.MSE` (the bound is
    not rescaled by N / 1000).

    output_N2P: head output (eps, v). target_RP: x_0; all R rows serve N / R times, one after the
    other. noised_NP: x_t. timestep_N: int64. weight_N: factor of each row, None = 1. Returns
    loss_N.
    """
    schedule = make_schedule(num_timesteps)
    target_NP = target_RP.repeat(noise_NP.shape[0] // target_RP.shape[0], 1)
    eps_NP, v_NP = output_N2P.chunk(2, dim=-1)
    mse_N = ((noise_NP - eps_NP) ** 2).mean(dim=-1)

    true_mean_NP = _at(schedule.mean_from_x0, timestep_N, target_NP) * target_NP
    true_mean_NP = true_mean_NP + _at(schedule.mean_from_x, timestep_N, target_NP) * noised_NP
    true_log_NP = _at(schedule.posterior_log_variance, timestep_N, target_NP).expand_as(target_NP)
    mean_NP, log_NP = mean_and_log_variance(eps_NP.detach(), v_NP, noised_NP, timestep_N, schedule)
    squared_NP = (true_mean_NP - mean_NP) ** 2
    kl_NP = -1 + log_NP - true_log_NP + torch.exp(true_log_NP - log_NP)
    kl_NP = 0.5 * (kl_NP + squared_NP * torch.exp(-log_NP))
    nll_NP = -_discretised_log_likelihood(target_NP, mean_NP, 0.5 * log_NP)
    bound_NP = torch.where((timestep_N == 0).unsqueeze(-1), nll_NP, kl_NP)
    loss_N = mse_N + bound_NP.mean(dim=-1) / math.log(2)
    return loss_N if weight_N is None else weight_N.to(loss_N.dtype) * loss_N
