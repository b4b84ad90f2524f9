"""Sampling of clean tokens by the solvers of `fastfar.solver`, each as its paper writes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .diffusion import Schedule, ancestral_step, make_schedule, mean_and_log_variance, schedule_at
from .head import head_forward

_MAX_FRACTION = 1.2


class Solver(Protocol):
    """What `denoise_loop` reads of a solver; see `fastfar.solver.Solver`."""

    @property
    def method(self) -> str: ...
    @property
    def variance(self) -> str: ...
    @property
    def spacing(self) -> str: ...
    @property
    def first_timestep(self) -> int | None: ...
    @property
    def timesteps(self) -> Sequence[int] | None: ...
    @property
    def start(self) -> str: ...
    @property
    def guidance_range(self) -> Sequence[int] | None: ...
    @property
    def variance_table(self) -> Sequence[Sequence[float]] | None: ...


class Moments(Protocol):
    """Mean (N, P), variances (N, P) along the columns of the orthonormal basis (P, P)."""

    @property
    def mean_NP(self) -> Tensor: ...
    @property
    def variance_NP(self) -> Tensor: ...
    @property
    def basis_PP(self) -> Tensor: ...


def solver_timesteps(solver: Solver, steps: int, num_timesteps: int) -> list[int] | None:
    """The timesteps of a solver, descending; None for the published ones."""
    if solver.timesteps is not None:
        return list(solver.timesteps)
    if solver.first_timestep is None and solver.spacing == "time":
        return None
    alpha_bar = make_schedule(num_timesteps).alpha_bar
    log_snr = [0.5 * math.log(a / (1 - a)) for a in alpha_bar.tolist()]
    first = solver.first_timestep
    if first is None:
        first = max(t for t, value in enumerate(log_snr) if value >= -5.1)
    if solver.spacing == "time":
        return [round(first - first * i / max(steps - 1, 1)) for i in range(steps)]
    chosen: list[int] = []
    for i in reversed(range(steps)):
        wanted = log_snr[first] + (log_snr[0] - log_snr[first]) * i / steps
        nearest = min(range(num_timesteps), key=lambda t: abs(log_snr[t] - wanted))
        chosen.append(max(nearest, chosen[-1] + 1) if chosen else nearest)
    return chosen[::-1]


def _variance(
    solver: Solver,
    eps_NP: Tensor,
    v_NP: Tensor,
    x_NP: Tensor,
    index: int,
    schedule: Schedule,
    moments: Moments | None,
) -> Tensor:
    """Variance of an ancestral step: (N, P), or covariance (N, P, P) where moments give it."""
    steps = len(schedule.timestep)
    high = math.exp(schedule.log_beta[index])
    low = math.exp(schedule.posterior_log_variance[index])
    if solver.variance == "clamped_log":
        index_N = torch.full(x_NP.shape[:1], index, dtype=torch.int64, device=x_NP.device)
        v_NP = v_NP.clamp(-1, 1)
        return mean_and_log_variance(eps_NP, v_NP, x_NP, index_N, schedule)[1].exp()
    if solver.variance == "linear":
        return low + ((v_NP + 1) / 2).clamp(0, _MAX_FRACTION) * (high - low)
    if solver.variance == "table":
        assert solver.variance_table is not None
        fraction_P = x_NP.new_tensor(solver.variance_table[steps - 1 - index])
        return low + fraction_P.expand_as(x_NP) * (high - low)
    assert moments is not None
    alpha_bar = schedule.alpha_bar[index].item()
    posterior_NP = moments.variance_NP * (1 - alpha_bar)
    posterior_NP = posterior_NP / (alpha_bar * moments.variance_NP + 1 - alpha_bar)
    factor = schedule.mean_from_x0[index].item()
    return torch.diag_embed(low + factor**2 * posterior_NP)


def _ancestral(
    solver: Solver | None,
    eps_NP: Tensor,
    v_NP: Tensor,
    x_NP: Tensor,
    noise_NP: Tensor,
    index: int,
    schedule: Schedule,
    temperature: float,
    x0_range: tuple[float, float] | None,
    moments: Moments | None,
) -> Tensor:
    if solver is None or solver.variance == "log" or index == 0:
        return ancestral_step(
            eps_NP, v_NP, x_NP, noise_NP, index, schedule,
            temperature=temperature, x0_range=x0_range,
        )  # fmt: skip
    index_N = torch.full(x_NP.shape[:1], index, dtype=torch.int64, device=x_NP.device)
    mean_NP, _ = mean_and_log_variance(eps_NP, v_NP, x_NP, index_N, schedule, x0_range)
    variance = _variance(solver, eps_NP, v_NP, x_NP, index, schedule, moments)
    if solver.variance == "closure":
        assert moments is not None
        root_NPP = moments.basis_PP @ variance.sqrt()
        return mean_NP + temperature * (root_NPP @ noise_NP.unsqueeze(-1)).squeeze(-1)
    return mean_NP + temperature * variance.sqrt() * noise_NP


def _dpm_solver(
    method: str,
    x0_NP: Tensor,
    previous_NP: Tensor | None,
    x_NP: Tensor,
    noise_NP: Tensor,
    alpha_bar: Sequence[float],
    index: int,
    temperature: float,
) -> Tensor:
    """DDIM (arXiv 2010.02502, eq. 12 without noise) and DPM-Solver++ (2211.01095, algorithm 2)."""
    now = alpha_bar[index]
    if index == 0:
        return x0_NP
    after = alpha_bar[index - 1]
    a, s, a_next, s_next = (math.sqrt(v) for v in (now, 1 - now, after, 1 - after))
    if method == "ddim":
        return a_next * x0_NP + s_next * (x_NP - a * x0_NP) / s
    h = math.log(a_next / s_next) - math.log(a / s)
    if previous_NP is not None:
        before = alpha_bar[index + 1]
        h_previous = math.log(a / s) - 0.5 * math.log(before / (1 - before))
        x0_NP = x0_NP + (x0_NP - previous_NP) * h / (2 * h_previous)
    if method == "dpmpp_2m":
        return s_next / s * x_NP - a_next * math.expm1(-h) * x0_NP
    deviation = s_next * math.sqrt(-math.expm1(-2 * h))
    mean_NP = s_next / s * math.exp(-h) * x_NP - a_next * math.expm1(-2 * h) * x0_NP
    return mean_NP + temperature * deviation * noise_NP


def _start(
    solver: Solver,
    initial_NP: Tensor,
    alpha_bar: float,
    temperature: float,
    moments: Moments | None,
) -> Tensor:
    if solver.start == "moments":
        assert moments is not None
        variance_NP = alpha_bar * moments.variance_NP + 1 - alpha_bar
        spread_NP = torch.einsum("pq,nq->np", moments.basis_PP, variance_NP.sqrt() * initial_NP)
        return math.sqrt(alpha_bar) * moments.mean_NP + temperature * spread_NP
    return temperature * initial_NP if solver.method in ("ddim", "dpmpp_2m") else initial_NP


def denoise_loop(
    head: Mapping[str, Tensor],
    condition_MD: Tensor,
    level: float,
    initial_NP: Tensor,
    noise_TNP: Tensor,
    *,
    guidance_scale: float,
    temperature: float,
    x0_range: tuple[float, float] | None = None,
    num_timesteps: int = 1000,
    solver: Solver | None = None,
    moments: Moments | None = None,
) -> Tensor:
    """Sample clean tokens x from p(x | z, level): T steps of a solver with guidance on epsilon.

    head: keys without the prefix `diffloss.net.`. condition_MD: M = 2 N (conditional rows first)
    with guidance eps = eps_u + s (eps_c - eps_u), the variance channel being the conditional one; M
    = N without guidance. initial_NP: start noise. noise_TNP: T = number of steps; noise_TNP[0] is
    used first, the last never. x0_range: bounds of the predicted x0, None = unbounded (published).
    solver: None is the published one, ancestral sampling at respaced timesteps. Returns x_NP.
    Raises ValueError where M is neither N nor 2 N.
    """
    rows, steps = initial_NP.shape[0], noise_TNP.shape[0]
    if condition_MD.shape[0] not in (rows, 2 * rows):
        raise ValueError(
            f"condition has {condition_MD.shape[0]} rows for {rows} tokens: give {rows}, "
            f"or {2 * rows} with the conditional rows first"
        )
    chosen = None if solver is None else solver_timesteps(solver, steps, num_timesteps)
    schedule = make_schedule(num_timesteps, steps)
    if chosen is not None:
        schedule = schedule_at(chosen[::-1], num_timesteps)
    alpha_bar = schedule.alpha_bar.tolist()
    x_NP, previous_NP, was_in_range = initial_NP, None, None
    if solver is not None:
        x_NP = _start(solver, initial_NP, alpha_bar[-1], temperature, moments)
    for noise_NP, index in zip(noise_TNP, reversed(range(steps)), strict=True):
        timestep = int(schedule.timestep[index])
        in_range = True
        if solver is not None and solver.guidance_range is not None:
            low, high = solver.guidance_range
            in_range = low <= timestep <= high
        halves = 2 if in_range and condition_MD.shape[0] == 2 * rows else 1
        # Both halves see the state of the conditional one.
        level_M = initial_NP.new_full((halves * rows,), level)
        t_M = torch.full_like(level_M, timestep)
        output_M2P = head_forward(
            head, x_NP.repeat(halves, 1), t_M, condition_MD[: halves * rows], level_M
        )
        eps_MP, v_MP = output_M2P.chunk(2, dim=-1)
        eps_NP, v_NP = eps_MP[:rows], v_MP[:rows]
        if halves == 2:
            eps_NP = eps_MP[rows:] + guidance_scale * (eps_NP - eps_MP[rows:])
        if solver is None or solver.method == "ddpm":
            x_NP = _ancestral(
                solver,
                eps_NP,
                v_NP,
                x_NP,
                noise_NP,
                index,
                schedule,
                temperature,
                x0_range,
                moments,
            )
            continue
        x0_NP = (x_NP - math.sqrt(1 - alpha_bar[index]) * eps_NP) / math.sqrt(alpha_bar[index])
        if x0_range is not None:
            x0_NP = x0_NP.clamp(*x0_range)
        if in_range is not was_in_range:
            previous_NP = None  # the prediction jumps there: no history across it
        x_NP = _dpm_solver(
            solver.method, x0_NP, previous_NP, x_NP, noise_NP, alpha_bar, index, temperature
        )
        previous_NP, was_in_range = x0_NP, in_range
    return x_NP
