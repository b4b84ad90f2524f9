"""Timesteps and coefficients of the solvers of `fastfar.solver`, whose formulas these are.

Tables come in training order, the cleanest step first; columns and timesteps are in sampling order.
Columns are float64, (T,), by their names in `fastfar.solver.COLUMNS`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastfar.diffusion import DiffusionTables, cosine_alpha_bar

# f exceeds 1 between the modes of a posterior; a network that says much more is wrong.
MAX_FRACTION = 1.2

# Where spacing "log_snr" begins unless told otherwise: DPM-Solvers for cosine schedules cut there.
MIN_LOG_SNR = -5.1


def even_in_time(first: int, steps: int, num_timesteps: int) -> list[int]:
    """T timesteps from `first` to 0."""
    if steps == 1:
        return [first]
    return [round(first * (steps - 1 - i) / (steps - 1)) for i in range(steps)]


def _log_snr(num_timesteps: int) -> Tensor:
    """(num_timesteps,) lambda = ln(a / s)."""
    alpha_bar = cosine_alpha_bar(num_timesteps)
    return (alpha_bar / (1.0 - alpha_bar)).log() / 2.0


def noisiest_log_snr(num_timesteps: int) -> int:
    """The last timestep before lambda, which ends near -10, runs away."""
    return int((_log_snr(num_timesteps) >= MIN_LOG_SNR).sum()) - 1


def even_in_log_snr(first: int, steps: int, num_timesteps: int) -> list[int]:
    """T timesteps from `first` on, even in lambda, of T equal parts between it and timestep 0.

    The last one stops a part before 0: from there it is one jump to the clean token. ValueError
    where so many do not fit.
    """
    log_snr = _log_snr(num_timesteps)
    parts = torch.arange(steps, dtype=torch.float64) / steps
    wanted = log_snr[first] + parts * (log_snr[0] - log_snr[first])
    chosen: list[int] = (log_snr[:, None] - wanted).abs().argmin(dim=0).tolist()
    # Timesteps are whole: many of them crowd at the clean end, where lambda is steep.
    for i in reversed(range(steps - 1)):
        chosen[i] = max(chosen[i], chosen[i + 1] + 1)
    if chosen[0] != first and steps > 1:
        raise ValueError(
            f"{steps} steps are too many for spacing 'log_snr' from timestep {first}: use 'time'"
        )
    return chosen


def _known_deviation(one: Tensor) -> dict[str, Tensor]:
    """Columns of noise whose deviation is known beforehand, and no look at the x0 before."""
    zero = torch.zeros_like(one)
    bounds = {"fraction_min": one * -math.inf, "fraction_max": one * math.inf}
    return {"x0_previous": zero, "low": zero, "high": zero, "noise": one, "linear": zero, **bounds}


def ancestral_columns(tables: DiffusionTables, variance: str) -> dict[str, Tensor]:
    """Of method "ddpm"; variance: see `Solver`."""
    zero, one = torch.zeros_like(tables.recip), torch.ones_like(tables.recip)
    columns = _known_deviation(one)
    columns |= {"x": tables.mean_xt.flip(0), "x0": tables.mean_x0.flip(0)}
    if variance in ("log", "clamped_log"):
        columns |= {"low": tables.log_posterior.flip(0), "high": tables.log_beta.flip(0)}
    if variance == "clamped_log":
        columns |= {"fraction_min": zero, "fraction_max": one}
    if variance == "linear":
        columns |= {"low": tables.log_posterior.exp().flip(0), "linear": one}
        columns |= {"high": tables.log_beta.exp().flip(0)}
        columns |= {"fraction_min": zero, "fraction_max": one * MAX_FRACTION}
    return columns


def dpm_solver_columns(
    tables: DiffusionTables, second_order: list[bool], stochastic: bool
) -> dict[str, Tensor]:
    """Of the ODE or of the SDE; DDIM is the ODE's first order."""
    a, s = tables.signal.flip(0), tables.sigma.flip(0)
    a_next, s_next = torch.cat([a[1:], a.new_ones(1)]), torch.cat([s[1:], s.new_zeros(1)])
    ratio = s_next * a / (s * a_next)  # e^-h
    decay = ratio**2 if stochastic else ratio
    h = -ratio.log()
    weight = torch.zeros_like(h)  # of the difference to the x0 before
    for i, second in enumerate(second_order):
        if second:
            weight[i] = h[i] / (2.0 * h[i - 1])
    x0 = a_next * (1.0 - decay)
    return {
        **_known_deviation(torch.ones_like(h)),
        "x": s_next / s * ratio if stochastic else s_next / s,
        "x0": x0 * (1.0 + weight),
        "x0_previous": -x0 * weight,
        "noise": s_next * (1.0 - decay).sqrt() if stochastic else torch.zeros_like(h),
    }
