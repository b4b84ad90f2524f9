"""Sampling plans by their names on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastfar.pipeline import FARPipeline
    from fastfar.plan import SamplingPlan

PLANS = ("official-nomask", "official-mask", "paper-nomask", "paper-mask", "fast")
HELP = (
    "a published schedule instead of the checkpoint's own; fast is the checkpoint's own with few "
    "head calls: approximate"
)


def plan_named(name: str | None, pipe: FARPipeline) -> SamplingPlan:
    """The plan called `name`, with the bounds on x0 of the checkpoint's own; None is that one."""
    if name is None:
        return pipe.plan
    plan_class = type(pipe.plan)
    if name == "fast":
        return plan_class.fast(pipe.plan)
    rule, mode = name.split("-")
    plan = plan_class.paper(mode) if rule == "paper" else plan_class.official(mode)
    return plan.with_changes(x0_range=pipe.plan.x0_range)
