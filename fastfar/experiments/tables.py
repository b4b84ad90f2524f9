"""Variance tables for the plans of an experiment, measured once per outer step and timestep."""

from __future__ import annotations

import json
from functools import cached_property

from torch import Tensor

from fastfar._files import atomic_write
from fastfar.evaluation.samples import digest
from fastfar.evaluation.variance import optimal_variance
from fastfar.experiments.base import Setting
from fastfar.experiments.diagnostics import held_out
from fastfar.plan import SamplingPlan


class VarianceTables:
    """`optimal_variance` on held-out images; what it measures is kept in the work folder.

    The fractions belong to the teacher's levels, masks and guidance-free half: plans that differ
    from it in more than steps, solvers and guidance need tables of their own.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        teacher = setting.teacher_plan
        places = [teacher.levels, teacher.input_levels, teacher.mask_ratios, teacher.x0_range]
        identity = digest([setting.weights, setting.conditions, places])
        self.file = setting.work / "variance" / f"{identity}.json"

    @cached_property
    def _known(self) -> dict[tuple[int, int], tuple[float, ...]]:
        if not self.file.is_file():
            return {}
        stored = json.loads(self.file.read_text(encoding="utf-8"))
        return {(k, t): tuple(values) for k, t, values in stored}

    @cached_property
    def _held_out(self) -> tuple[Tensor, Tensor]:
        return held_out(self.setting, self.setting.conditions)

    def __call__(self, plan: SamplingPlan) -> SamplingPlan:
        """`plan` with measured variances at its ancestral steps."""
        setting, before = self.setting, len(self._known)
        setting.tell(f"variance table of T = {plan.diffusion_steps}")
        plan = optimal_variance(
            setting.pipeline.model,
            *self._held_out,
            plan,
            backend=setting.backend,
            known=self._known,
        )
        if len(self._known) > before:
            stored = [[k, t, values] for (k, t), values in sorted(self._known.items())]
            with atomic_write(self.file) as temporary:
                temporary.write_text(json.dumps(stored), encoding="utf-8")
        return plan
