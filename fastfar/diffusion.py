"""Diffusion of one token: cosine schedule, respacing, learned-range variance.

With alpha_bar_t the cumulated signal share, x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) n.

Source: improved DDPM (Nichol and Dhariwal, arXiv 2102.09672): cosine schedule (eq. 17), learned
range variance (eq. 15), hybrid loss (eq. 16), respacing (section 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from fastfar._tables import lookup, real_tensors

MAX_BETA = 0.999


def cosine_alpha_bar(num_timesteps: int = 1000) -> Tensor:
    """(num_timesteps,) float64: cumulated alpha of the cosine schedule, betas capped at 0.999."""
    time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    signal = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1.0 - signal[1:] / signal[:-1]).clamp(max=MAX_BETA)
    return torch.cumprod(1.0 - beta, dim=0)


def spaced_timesteps(steps: int, num_timesteps: int = 1000) -> Tensor:
    """(steps,) int64 ascending: `steps` timesteps evenly spread over 0..num_timesteps - 1.

    Raises:
        ValueError: `steps` is not in 1..num_timesteps.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"diffusion steps must lie in 1..{num_timesteps}, got {steps}")
    stride = (num_timesteps - 1) / (steps - 1) if steps > 1 else 1.0
    # The published code accumulates the stride in floating point and rounds each time.
    position, chosen = 0.0, []
    for _ in range(steps):
        chosen.append(round(position))
        position += stride
    return torch.tensor(chosen)


@dataclass(frozen=True)
class DiffusionTables:
    """Coefficients of T ancestral steps, float64, entry 0 is the cleanest step.

    x_0 = recip x_t - recip_m1 eps;  mean = mean_x0 x_0 + mean_xt x_t;
    log var = f log_beta + (1 - f) log_posterior with f = (v + 1) / 2.
    """

    timestep: Tensor
    signal: Tensor
    sigma: Tensor
    recip: Tensor
    recip_m1: Tensor
    mean_x0: Tensor
    mean_xt: Tensor
    log_beta: Tensor
    log_posterior: Tensor

    def __len__(self) -> int:
        return len(self.timestep)


@lru_cache(maxsize=64)
def diffusion_tables(steps: int = 1000, num_timesteps: int = 1000) -> DiffusionTables:
    """Tables of the schedule respaced to `steps` steps. Shared and cached: do not write to them."""
    with real_tensors():
        return tables_at(spaced_timesteps(steps, num_timesteps), num_timesteps)


def tables_at(timestep: Tensor, num_timesteps: int = 1000) -> DiffusionTables:
    """Coefficients of ancestral steps at these timesteps alone, (T,) int64 ascending."""
    steps = len(timestep)
    alpha_bar = cosine_alpha_bar(num_timesteps)[timestep]
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    beta = 1.0 - alpha_bar / before
    alpha = 1.0 - beta
    variance = beta * (1.0 - before) / (1.0 - alpha_bar)
    # The posterior variance of the last step is 0; its logarithm is that of the step before.
    clipped = torch.cat([variance[1:2], variance[1:]]) if steps > 1 else beta
    return DiffusionTables(
        timestep=timestep,
        signal=alpha_bar.sqrt(),
        sigma=(1.0 - alpha_bar).sqrt(),
        recip=alpha_bar.rsqrt(),
        recip_m1=(1.0 / alpha_bar - 1.0).sqrt(),
        mean_x0=beta * before.sqrt() / (1.0 - alpha_bar),
        mean_xt=(1.0 - before) * alpha.sqrt() / (1.0 - alpha_bar),
        log_beta=beta.log(),
        log_posterior=clipped.log(),
    )


@cache  # without a bound: what a CUDA graph points to must stay
def device_table(
    columns: tuple[str, ...],
    steps: int,
    num_timesteps: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """(columns, steps) of `diffusion_tables` on a device. Shared and cached: do not write to it."""
    tables = diffusion_tables(steps, num_timesteps)
    with torch.inference_mode(False):
        stacked = torch.stack([getattr(tables, name) for name in columns])
        return stacked.to(device, dtype)


@cache  # as above
def device_timesteps(
    timesteps: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(T,) on a device. Shared and cached: do not write to it."""
    with real_tensors():
        timestep_T = torch.tensor(timesteps)
    with torch.inference_mode(False):
        return timestep_T.to(device, dtype)


@lookup(
    "timestep_coefficients",
    lambda timestep_N, names, num_timesteps, dtype: timestep_N.new_empty(
        (len(names.split()), timestep_N.shape[0], 1), dtype=dtype
    ),
)
def timestep_coefficients(
    timestep_N: Tensor, names: str, num_timesteps: int, dtype: torch.dtype
) -> Tensor:
    """(number of names, N, 1): what `diffusion_tables` holds under these names at each row's t.

    names: separated by spaces.
    """
    columns = tuple(names.split())
    table = device_table(columns, num_timesteps, num_timesteps, timestep_N.device, dtype)
    return table[:, timestep_N, None]


def repeats(x_RP: Tensor, rows: int) -> int:
    """The batch multiplier: how often the R rows of x make up `rows`; ValueError if they do not."""
    given = x_RP.shape[0]
    if given == rows:
        return 1
    if given == 0 or rows % given:
        raise ValueError(f"{rows} rows are no multiple of the {given} rows to be repeated")
    return rows // given


def repeated_rows(x_RP: Tensor, rows: int) -> Tensor:
    """(R, P) -> (rows, P): all R rows, then all of them again, the batch multiplier's order."""
    return x_RP.repeat(times, 1) if (times := repeats(x_RP, rows)) > 1 else x_RP


def timestep_embedding(
    timestep_N: Tensor, width: int = 256, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(N,) -> (N, width) in `dtype`: cosines, then sines, of t * 10000 ** (-i / (width / 2)).

    The angles reach 1000, so they need float32 at least.
    """
    half = width // 2
    index = torch.arange(half, dtype=dtype, device=timestep_N.device)
    frequency = torch.exp(index * (-math.log(10000.0) / half))
    angle = timestep_N.to(dtype).unsqueeze(1) * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
