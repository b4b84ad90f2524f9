"""Sampling plans by their names on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastfar.plan import SamplingPlan

PLANS = ("official-nomask", "official-mask", "paper-nomask", "paper-mask", "fast")
HELP = (
    "a published schedule instead of the checkpoint's own; fast is the checkpoint's own with few "
    "head calls: approximate"
)


def plan_named(name: str | None, own: SamplingPlan) -> SamplingPlan:
    """The plan called `name`, with the bounds on x0 of a checkpoint's own; None is that one."""
    if name is None:
        return own
    plan_class = type(own)
    if name == "fast":
        return plan_class.fast(own)
    rule, mode = name.split("-")
    plan = plan_class.paper(mode) if rule == "paper" else plan_class.official(mode)
    return plan.with_changes(x0_range=own.x0_range)
