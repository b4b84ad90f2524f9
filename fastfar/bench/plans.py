"""Sampling plans in words: for keys, titles and rows."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastfar.plan import SamplingPlan
from fastfar.solver import Solver


def first_steps(plan: SamplingPlan, count: int) -> SamplingPlan:
    """The plan cut after `count` outer steps."""
    cut: dict[str, Any] = {
        each.name: value[:count]
        for each in dataclasses.fields(plan)
        if each.name != "x0_range" and isinstance(value := getattr(plan, each.name), tuple)
    }
    return dataclasses.replace(plan, **cut)


def plan_mode(plan: SamplingPlan) -> str:
    """ "published", or which fields differ from the published plan of that kind."""
    kind = "nomask" if plan.mask_ratios is None else "mask"
    published = SamplingPlan.official(kind, plan.guidance_scale)
    names = [each.name for each in dataclasses.fields(plan)]
    changed = [n for n in names if getattr(plan, n) != getattr(published, n)]
    return "published" if not changed else "changed: " + ", ".join(changed)


def plan_name(plan: SamplingPlan) -> str:
    """Of the published T "official", of the paper's "paper", else "T=8"; with masks "-mask".

    The preset is "fast"; other samplers than the published one carry their names and calls.
    """
    kind = "nomask" if plan.mask_ratios is None else "mask"
    steps = plan.diffusion_steps
    if plan == SamplingPlan.fast(plan):
        name = "fast"
    elif plan.is_approximate:
        methods = "+".join(dict.fromkeys(_solver_name(solver) for solver in plan.solvers))
        name = f"{methods}-{plan.head_calls}-calls"
    elif steps == SamplingPlan.official(kind).diffusion_steps:
        name = "official"
    elif steps == SamplingPlan.paper(kind).diffusion_steps:
        name = "paper"
    else:
        name = "T=" + "..".join(map(str, dict.fromkeys((min(steps), max(steps)))))
    return name if kind == "nomask" else name + "-mask"


def _solver_name(solver: Solver) -> str:
    return solver.variance if solver.method == "ddpm" else solver.method


def steps_text(plan: SamplingPlan) -> str:
    """ "T = 100", "T = 40..100", "T = 3..13 (fast)", for a title."""
    ends = dict.fromkeys((min(plan.diffusion_steps), max(plan.diffusion_steps)))
    solved = f" ({plan_name(plan).removesuffix('-mask')})" if plan.is_approximate else ""
    masked = "" if plan.mask_ratios is None else ", masked"
    return "T = " + "..".join(map(str, ends)) + solved + masked
