"""The sampling plan: which level, mask, guidance, temperature and step count when - as data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastfar.solver import PUBLISHED, Solver, require

_LEVELS = {
    "nomask": (0, 2, 3, 4, 5, 6, 7, 8, 9, 10),
    "mask": (0, 12, 12, 4, 5, 6, 7, 8, 9, 10, 11),
    "t2i": (0, 2, 3, 4, 5, 6, 7, 8, 10, 13),
}

# At t = 900 an error of eps is 6 times as large in x0; at 980 it would be 34 times.
_FAST = Solver(method="sde_dpmpp_2m", spacing="log_snr", first_timestep=900)


@dataclass(frozen=True)
class SamplingPlan:
    """What each of the S outer steps of a sampling run does.

    Attributes:
        levels: S level numbers, as told to the head.
        input_levels: S entries; entry k is the level to which the result of step k - 1 is
            low-passed to become the input of step k, None leaves it unfiltered. Entry 0 is
            ignored: the first input is zero.
        guidance_scale: s; outer step k mixes eps = eps_u + s_k (eps_c - eps_u).
        guidance_ramp: S factors r_k in [0, 1] of s_k = 1 + (s - 1) r_k; s_k = 1 is no guidance.
        temperatures: factor on the noise of the ancestral steps.
        diffusion_steps: T of each outer step.
        mask_ratios: share of masked tokens at the input of each step, floor(L * ratio) of them;
            entry 0 is 1. None samples without masks.
        x0_range: bounds for the predicted clean token at every diffusion step, None as published.
        solvers: how the head samples at each outer step; one `Solver` serves them all. Anything but
            the published one is approximate.

    Raises:
        ValueError: an entry is missing, out of range or not finite; the text says which.

    Source: FAR's published code (`official`), FAR arXiv 2503.05305 section 3.4 (`paper`).
    """

    levels: tuple[int, ...]
    input_levels: tuple[int | None, ...]
    guidance_scale: float
    guidance_ramp: tuple[float, ...]
    temperatures: tuple[float, ...]
    diffusion_steps: tuple[int, ...]
    mask_ratios: tuple[float, ...] | None = None
    x0_range: tuple[float, float] | None = None
    solvers: tuple[Solver, ...] = (PUBLISHED,)

    def __post_init__(self) -> None:
        if isinstance(self.solvers, Solver):
            object.__setattr__(self, "solvers", (self.solvers,))
        if len(self.solvers) == 1:
            object.__setattr__(self, "solvers", tuple(self.solvers) * len(self.levels))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        self._check_lengths()
        self._check_levels()
        require(
            math.isfinite(self.guidance_scale) and self.guidance_scale >= 0,
            f"guidance_scale must be finite and at least 0, got {self.guidance_scale}",
        )
        for factor in self.guidance_ramp:
            require(0 <= factor <= 1, f"guidance_ramp must lie in [0, 1], got {factor}")
        for value in self.temperatures:
            require(
                math.isfinite(value) and value >= 0,
                f"temperatures must be finite and at least 0, got {value}",
            )
        for steps in self.diffusion_steps:
            require(
                isinstance(steps, int) and 1 <= steps <= 1000,
                f"diffusion_steps must be whole numbers in 1..1000, got {steps}",
            )
        for solver, steps in zip(self.solvers, self.diffusion_steps, strict=True):
            solver.check(steps)
        self._check_mask()
        if self.x0_range is not None:
            low, high = self.x0_range
            require(
                math.isfinite(low) and math.isfinite(high) and low < high,
                f"x0_range must be (low, high) with low < high, got {self.x0_range}",
            )

    def _check_lengths(self) -> None:
        steps = len(self.levels)
        require(steps >= 1, "a plan needs at least one level")
        for name in ("input_levels", "guidance_ramp", "temperatures", "diffusion_steps", "solvers"):
            given = len(getattr(self, name))
            require(given == steps, f"{name} has {given} entries, levels has {steps}")

    def _check_levels(self) -> None:
        for level in self.levels:
            require(
                isinstance(level, int) and level >= 0,
                f"levels must be whole numbers from 0 upwards, got {level!r}",
            )
        for given in self.input_levels:
            require(
                given is None or (isinstance(given, int) and given >= 0),
                f"input_levels must be whole numbers from 0 upwards or None, got {given!r}",
            )
        require(self.levels[0] == 0, f"the first level must be 0, got {self.levels[0]}")
        # A masked run may look at sharp levels while few tokens are visible (the published
        # schedule starts 0, 12, 12, 4, 5, ...), so order is only asked of unmasked runs.
        if self.mask_ratios is None:
            require(
                all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False)),
                f"levels must rise from step to step, got {self.levels}; "
                "put them in ascending order or give mask_ratios",
            )

    def _check_mask(self) -> None:
        if self.mask_ratios is None:
            return
        require(
            len(self.mask_ratios) == len(self.levels),
            f"mask_ratios has {len(self.mask_ratios)} entries, levels has {len(self.levels)}",
        )
        require(self.mask_ratios[0] == 1.0, "the first mask ratio must be 1: nothing is known yet")
        for before, after in zip(self.mask_ratios, self.mask_ratios[1:], strict=False):
            require(
                0.0 <= after <= before,
                f"mask_ratios must lie in [0, 1] and never rise, got {self.mask_ratios}",
            )

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """s_k of every outer step."""
        return tuple(1.0 + (self.guidance_scale - 1.0) * r for r in self.guidance_ramp)

    @property
    def is_approximate(self) -> bool:
        """Whether a sampler is not the published one."""
        return any(solver != PUBLISHED for solver in self.solvers)

    @property
    def head_calls(self) -> int:
        """Head evaluations per token row over the whole image: the sum of `diffusion_steps`."""
        return sum(self.diffusion_steps)

    def num_masked(self, step: int, num_tokens: int) -> int:
        """Tokens masked at the input of outer step `step`."""
        if self.mask_ratios is None:
            return 0
        return math.floor(num_tokens * self.mask_ratios[step])

    def check_fits(self, num_levels: int) -> None:
        """ValueError if a level lies beyond the model's `num_levels`."""
        used = [*self.levels, *(level for level in self.input_levels if level is not None)]
        require(
            max(used) <= num_levels and min(used) >= 0,
            f"the plan uses levels {sorted(set(used))}, the model has levels 0..{num_levels}",
        )

    @classmethod
    def official(
        cls, mode: str = "nomask", guidance_scale: float = 3.0, diffusion_steps: int = 100
    ) -> SamplingPlan:
        """The published samplers: mode "nomask", "mask" or "t2i".

        Guidance rises as 1 + (s - 1) k / n ("t2i": constant s), temperature as
        0.8 + 0.2 (1 - cos(pi/2 (k + 1) / n)) ("mask": 0.85 + 0.15 k / n); T is the same at every
        step. "mask" does not filter the result of step 0.
        """
        require(mode in _LEVELS, f"mode must be one of {sorted(_LEVELS)}, got {mode!r}")
        levels = _LEVELS[mode]
        n = len(levels)
        ramp = [(1.0 - math.cos(math.pi / 2 * (k + 1) / n)) for k in range(n)]
        masked = mode != "nomask"
        return cls(
            levels=levels,
            input_levels=(None, None if mode == "mask" else levels[1], *levels[2:]),
            guidance_scale=guidance_scale,
            guidance_ramp=tuple(1.0 if mode == "t2i" else k / n for k in range(n)),
            temperatures=tuple(
                0.85 + 0.15 * k / n if mode == "mask" else 0.8 + 0.2 * ramp[k] for k in range(n)
            ),
            diffusion_steps=(diffusion_steps,) * n,
            mask_ratios=cosine_mask_ratios(n) if masked else None,
        )

    @classmethod
    def paper(
        cls,
        mode: str = "nomask",
        guidance_scale: float = 3.0,
        diffusion_steps: tuple[int, int] = (40, 100),
    ) -> SamplingPlan:
        """`official` with the paper's frequency-aware T: linear from the first to the last step."""
        plan = cls.official(mode, guidance_scale)
        return dataclasses.replace(plan, diffusion_steps=ramp(*diffusion_steps, len(plan)))

    @classmethod
    def fast(
        cls,
        base: str | SamplingPlan = "nomask",
        guidance_scale: float | None = None,
    ) -> SamplingPlan:
        """`base` (a plan, or a mode of `official`) with few head calls; approximate.

        Six steps of SDE-DPM-Solver++(2M), even in log-SNR from t = 900, at every outer step.

        Raises:
            ValueError: an unknown mode.

        Source: benchmarks/FEWSTEP.md and LOG.md: measured on two demo models, on nothing else.
        Equal to T = 100 on the first, 0.04 lower in precision on the second.
        """
        plan = cls.official(base) if isinstance(base, str) else base
        return plan.with_changes(guidance_scale=guidance_scale, diffusion_steps=6, solvers=_FAST)

    def with_changes(
        self,
        *,
        guidance_scale: float | None = None,
        diffusion_steps: int | tuple[int, ...] | None = None,
        solvers: Solver | tuple[Solver, ...] | None = None,
        **changes: Any,
    ) -> SamplingPlan:
        """A copy with another guidance scale (same ramp), T or solver, or any field by name."""
        if guidance_scale is not None:
            changes["guidance_scale"] = guidance_scale
        if isinstance(diffusion_steps, int):
            diffusion_steps = (diffusion_steps,) * len(self)
        if diffusion_steps is not None:
            changes["diffusion_steps"] = diffusion_steps
        if solvers is None and len(set(self.solvers)) == 1:
            solvers = self.solvers[0]  # of as many steps as the copy may have
        if solvers is not None:
            changes["solvers"] = solvers
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; solvers only where one is not the published one."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        solvers = values.pop("solvers")
        if set(solvers) != {PUBLISHED}:
            values["solvers"] = tuple(solver.to_dict() for solver in solvers)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingPlan:
        """Inverse of `to_dict`; an unknown name is a ValueError."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown SamplingPlan entries {unknown}; known are {sorted(known)}")
        solvers = values.get("solvers")
        if solvers is None:
            return cls(**values)
        return cls(**{**values, "solvers": tuple(Solver.from_dict(each) for each in solvers)})


def ramp(first: int, last: int, count: int) -> tuple[int, ...]:
    """Whole numbers from `first` to `last` in equal steps, rounded."""
    return tuple(round(first + (last - first) * k / max(count - 1, 1)) for k in range(count))


def cosine_mask_ratios(num_steps: int) -> tuple[float, ...]:
    """cos(pi/2 k / n) for k = 0..n-1: all tokens masked at first, few at the last step."""
    return tuple(math.cos(math.pi / 2 * k / num_steps) for k in range(num_steps))
