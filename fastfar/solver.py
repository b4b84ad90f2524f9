"""Solvers of one token's diffusion: which timesteps, and with which coefficients x moves on.

With x_t = a_t x_0 + s_t n (a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar)), lambda = ln(a / s) and
E = the predicted x_0, every solver here is one update from timestep t to the next one, u:

    x_u = A x_t + B E + C E_previous + S n

    ddpm             A = (a_t / a_u) (1 - alpha_bar_u) / (1 - alpha_bar_t), B = a_u beta / s_t^2,
                     S^2 = (1 - f) beta_tilde + f beta ("linear"), with beta = 1 - a_t^2 / a_u^2,
                     beta_tilde = beta s_u^2 / s_t^2; "log" mixes the logarithms
    ddim             A = s_u / s_t, B = a_u - a_t s_u / s_t
    dpmpp_2m         A = s_u / s_t, a_u (1 - e^-h) times D, h = lambda_u - lambda_t
    sde_dpmpp_2m     A = s_u e^-h / s_t, a_u (1 - e^-2h) times D, S = s_u sqrt(1 - e^-2h)

where D = E + (E - E_previous) h / (2 h_previous), and D = E in the first step, in the last one and
where guidance is switched on or off. The last step always ends in E, without noise.

The linear rule with f = V / s_t^2, V = Var[x_0 | x_t], is the variance that a Gaussian reverse step
should have; f is learned ("log", "clamped_log", "linear": f = (v + 1) / 2 of the network), measured
("table") or follows from a token's moments ("closure"). What temperature multiplies:

    ddpm, sde_dpmpp_2m    the noise of the steps, as published
    ddim, dpmpp_2m        the start noise
    start "moments"       the deviation of the start from its mean as well

For a Gaussian token each of them makes the variance temperature^2 times what it was.

Source: improved DDPM, arXiv 2102.09672 (log rule); DDIM, 2010.02502; DPM-Solver++, 2211.01095;
Analytic-DPM, 2201.06503 (optimal variance); lower-variance starts: TDPM, 2202.09671.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfar._coefficients import (
    ancestral_columns,
    dpm_solver_columns,
    even_in_log_snr,
    even_in_time,
    noisiest_log_snr,
)
from fastfar._tables import real_tensors
from fastfar.diffusion import DiffusionTables, diffusion_tables, tables_at

METHODS = ("ddpm", "ddim", "dpmpp_2m", "sde_dpmpp_2m", "moments")
VARIANCES = ("log", "clamped_log", "linear", "table", "closure")
SPACINGS = ("time", "log_snr")
STARTS = ("normal", "moments")

# Columns of Schedule.table; names are those of the formulas above.
COLUMNS = (
    "x0_from_x",
    "x0_from_eps",
    "x",
    "x0",
    "x0_previous",
    "low",
    "high",
    "noise",
    "linear",
    "fraction_min",
    "fraction_max",
)
_DETERMINISTIC = ("ddim", "dpmpp_2m")


def require(condition: bool, message: str) -> None:
    """ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class Solver:
    """How one outer step samples its tokens. `Solver()` is the published sampler.

    Attributes:
        method: see the module's text; "moments" draws the token from its predicted mean and
            covariance in one call of a moment head (`fastfar.moments`).
        variance: of "ddpm" alone: where f comes from, and how it mixes.
        spacing: "time" spreads the timesteps evenly over t, "log_snr" over lambda, from
            `first_timestep` to the clean end.
        first_timestep: the noisiest timestep; None is the last of the training schedule, with the
            published rounding of the others ("time"), or the last with lambda >= -5.1 ("log_snr").
        timesteps: explicit, strictly descending; None follows `spacing`.
        start: x_T ~ N(0, 1), or "moments": N(a m, a^2 C + s^2) of the moment head's m and C.
        guidance_range: (low, high): only timesteps within it, both included, are guided; elsewhere
            the unconditional half is not computed. None guides everywhere.
        variance_table: f of "table", T rows of P numbers (or of one) in sampling order.

    Raises:
        ValueError: an unknown name, or fields that do not go together; the text says which.
    """

    method: str = "ddpm"
    variance: str = "log"
    spacing: str = "time"
    first_timestep: int | None = None
    timesteps: tuple[int, ...] | None = None
    start: str = "normal"
    guidance_range: tuple[int, int] | None = None
    variance_table: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        for name in ("timesteps", "guidance_range", "variance_table"):
            if (value := getattr(self, name)) is not None:
                rows = tuple(tuple(v) if isinstance(v, list | tuple) else v for v in value)
                object.__setattr__(self, name, rows)
        choices = {"method": METHODS, "variance": VARIANCES, "spacing": SPACINGS, "start": STARTS}
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(value in allowed, f"{name} must be one of {allowed}, got {value!r}")
        require(
            self.variance == "log" or self.method == "ddpm",
            f"variance={self.variance!r} belongs to method 'ddpm'; {self.method!r} has its own",
        )
        self._check_timesteps()
        if self.guidance_range is not None:
            range_ = self.guidance_range
            require(
                len(range_) == 2 and 0 <= range_[0] <= range_[1],
                f"guidance_range must be (low, high) with 0 <= low <= high, got {range_}",
            )
        require(
            (self.variance_table is not None) == (self.variance == "table"),
            "variance='table' and variance_table go together; "
            "fastfar.evaluation.variance.optimal_variance measures one",
        )
        for row in self.variance_table or ():
            require(
                len(row) > 0 and all(math.isfinite(f) and f >= 0 for f in row),
                f"variance_table must hold finite numbers from 0 upwards, got a row {row}",
            )

    def _check_timesteps(self) -> None:
        if self.timesteps is None:
            first = self.first_timestep
            require(
                first is None or (isinstance(first, int) and first >= 0),
                f"first_timestep must be a whole number from 0 upwards, got {first!r}",
            )
            return
        require(
            self.first_timestep is None and self.spacing == "time",
            "timesteps are given one by one: leave first_timestep and spacing out",
        )
        whole = all(isinstance(t, int) and t >= 0 for t in self.timesteps)
        falling = all(a > b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False))
        require(
            len(self.timesteps) > 0 and whole and falling,
            f"timesteps must be whole numbers from 0 upwards, strictly descending, got "
            f"{self.timesteps}",
        )

    @property
    def needs_moments(self) -> bool:
        """Whether it asks for a moment head."""
        return "moments" in (self.method, self.start) or self.variance == "closure"

    def check(self, steps: int) -> None:
        """ValueError where it cannot take `steps` steps."""
        if self.timesteps is not None:
            require(
                steps == len(self.timesteps),
                f"{len(self.timesteps)} timesteps are given for {steps} diffusion steps",
            )
        if self.variance_table is not None:
            require(
                steps == len(self.variance_table),
                f"variance_table has {len(self.variance_table)} rows for {steps} diffusion steps",
            )
        if self.method == "moments":
            require(steps == 1, f"method 'moments' is one call of its head, got {steps} steps")
        if self.first_timestep is not None:
            require(
                steps <= self.first_timestep + 1,
                f"{steps} diffusion steps do not fit below timestep {self.first_timestep}",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values of the fields that are not the published sampler's."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Solver:
        """Inverse of `to_dict`; an unknown name is a ValueError."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown Solver entries {unknown}; known are {sorted(known)}")
        return cls(**values)


PUBLISHED = Solver()


class Moments(NamedTuple):
    """Gaussian of every token: mean m, and covariance U diag(C) U^T.

    mean_NP: (N, P). variance_NP: (N, P), C. basis_PP: (P, P) orthonormal, U; columns are axes.
    """

    mean_NP: Tensor
    variance_NP: Tensor
    basis_PP: Tensor


class Segment(NamedTuple):
    """Steps first .. last - 1 of a schedule, all of them guided or none."""

    first: int
    last: int
    guided: bool


@dataclass(frozen=True, eq=False)
class Schedule:
    """A solver's T steps in sampling order. Shared and cached: do not write to its tensors.

    Attributes:
        timesteps: T of them, the noisiest first.
        table: (T, 11) float64, see `COLUMNS`.
        numbers: the same as plain numbers, T rows by column.
        alpha_bar: (T + 1,) float64 at the timesteps, and 1 at the end.
        segments: runs of steps with and without guidance.
    """

    timesteps: tuple[int, ...]
    table: Tensor
    numbers: tuple[Mapping[str, float], ...]
    alpha_bar: Tensor
    segments: tuple[Segment, ...]

    def __len__(self) -> int:
        return len(self.timesteps)


@lru_cache(maxsize=256)
def schedule(
    solver: Solver, steps: int, num_timesteps: int = 1000, temperature: float = 1.0
) -> Schedule:
    """The steps of `solver`. ValueError where it cannot take so many of them."""
    solver.check(steps)
    require(
        solver.method != "moments",
        "method 'moments' has no diffusion steps: sample_latents draws such a level itself",
    )
    with real_tensors():
        tables = _tables(solver, steps, num_timesteps)
        timesteps = tuple(tables.timestep.flip(0).tolist())
        segments = _segments(timesteps, solver.guidance_range)
        alpha_bar = (tables.signal**2).flip(0)
        alpha_bar = torch.cat([alpha_bar, alpha_bar.new_ones(1)])
        columns = {"x0_from_x": tables.recip.flip(0), "x0_from_eps": tables.recip_m1.flip(0)}
        if solver.method == "ddpm":
            columns |= ancestral_columns(tables, solver.variance)
        else:
            second = _second_order(steps, segments) if "2m" in solver.method else [False] * steps
            stochastic = solver.method == "sde_dpmpp_2m"
            columns |= dpm_solver_columns(tables, second, stochastic)
        columns["noise"] = columns["noise"] * temperature
        columns["noise"][-1] = 0.0
        stacked = torch.stack([columns[name] for name in COLUMNS], dim=1).contiguous()
        numbers = tuple(dict(zip(COLUMNS, row, strict=True)) for row in stacked.tolist())
    return Schedule(timesteps, stacked, numbers, alpha_bar, segments)


# --- timesteps -------------------------------------------------------------------------------


def _tables(solver: Solver, steps: int, num_timesteps: int) -> DiffusionTables:
    """Coefficients at the solver's timesteps, the cleanest first."""
    if solver.timesteps is not None:
        chosen = list(solver.timesteps)
    elif solver.first_timestep is None and solver.spacing == "time":
        return diffusion_tables(steps, num_timesteps)
    else:
        first = solver.first_timestep
        if first is None:
            first = noisiest_log_snr(num_timesteps)
        _check_range(first, num_timesteps)
        chosen = _SPACED[solver.spacing](first, steps, num_timesteps)
    _check_range(chosen[0], num_timesteps)
    return tables_at(torch.tensor(chosen[::-1]), num_timesteps)


def _check_range(timestep: int, num_timesteps: int) -> None:
    require(
        timestep < num_timesteps,
        f"timestep {timestep} lies beyond the model's 0..{num_timesteps - 1}",
    )


_SPACED = {"time": even_in_time, "log_snr": even_in_log_snr}


def _segments(
    timesteps: tuple[int, ...], guidance_range: tuple[int, int] | None
) -> tuple[Segment, ...]:
    low, high = (0, math.inf) if guidance_range is None else guidance_range
    guided = [low <= t <= high for t in timesteps]
    starts = [i for i in range(len(guided)) if i == 0 or guided[i] != guided[i - 1]]
    ends = [*starts[1:], len(guided)]
    return tuple(Segment(i, j, guided[i]) for i, j in zip(starts, ends, strict=True))


def _second_order(steps: int, segments: tuple[Segment, ...]) -> list[bool]:
    """Which steps may look at the x0 before: not the first of a segment, and not the last."""
    first = {segment.first for segment in segments}
    return [i not in first and i != steps - 1 for i in range(steps)]


# --- noise that is known before the loop -----------------------------------------------------


def shaped(
    solver: Solver,
    steps: Schedule,
    initial_NP: Tensor,
    noise_TNP: Tensor,
    temperature: float,
    moments: Moments | None = None,
) -> tuple[Tensor, Tensor]:
    """Start and noise of the steps as `solver` wants them, from standard normal ones.

    initial_NP: (N, P). noise_TNP: (T, N, P). The published solver takes them as they are.

    Raises:
        ValueError: the solver needs moments and there are none; a variance table of another width.
    """
    if solver.needs_moments and moments is None:
        raise ValueError(
            "this solver starts from, or takes its variance from, a token's moments: give the "
            "moments of a moment head (fastfar.moments), or use start='normal' and another variance"
        )
    if solver.start == "moments" and moments is not None:
        signal = 1.0 / steps.numbers[0]["x0_from_x"]
        deviation_NP = (signal**2 * moments.variance_NP + (1.0 - signal**2)).sqrt()
        spread_NP = (temperature * deviation_NP * initial_NP) @ moments.basis_PP.mT
        initial_NP = signal * moments.mean_NP + spread_NP
    elif solver.method in _DETERMINISTIC:
        initial_NP = temperature * initial_NP
    if solver.variance == "table":
        deviation_T1P = _noise_table(solver, steps, noise_TNP.device, noise_TNP.dtype)
        require(
            deviation_T1P.shape[-1] in (1, noise_TNP.shape[-1]),
            f"variance_table has {deviation_T1P.shape[-1]} numbers a row, tokens have "
            f"{noise_TNP.shape[-1]}",
        )
        noise_TNP = noise_TNP * deviation_T1P
    elif solver.variance == "closure" and moments is not None:
        table = _noise_table(solver, steps, noise_TNP.device, noise_TNP.dtype)
        beta_T11, posterior_T11, alpha_bar_T11 = table.unbind()
        variance_NP = moments.variance_NP
        fraction_TNP = variance_NP / (alpha_bar_T11 * variance_NP + (1.0 - alpha_bar_T11))
        deviation_TNP = (posterior_T11 + fraction_TNP * (beta_T11 - posterior_T11)).sqrt()
        noise_TNP = (noise_TNP * deviation_TNP) @ moments.basis_PP.mT
    return initial_NP, noise_TNP


@cache  # without a bound: what a CUDA graph points to must stay
def _noise_table(
    solver: Solver, steps: Schedule, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """What `shaped` reads on a device. Shared and cached: do not write to it.

    Of "table" (T, 1, P), the deviations; of "closure" beta, beta_tilde and alpha_bar, (3, T, 1, 1).
    """
    with real_tensors():
        now, after = steps.alpha_bar[:-1, None, None], steps.alpha_bar[1:, None, None]
        beta = 1.0 - now / after
        posterior = beta * (1.0 - after) / (1.0 - now)
        if solver.variance_table is None:
            table = torch.stack([beta, posterior, now])
        else:
            fraction_T1P = torch.tensor(solver.variance_table, dtype=torch.float64)[:, None]
            table = (posterior + fraction_T1P * (beta - posterior)).sqrt()
    with torch.inference_mode(False):
        return table.to(device, dtype)
