"""Which tokens of an outer step's result anybody looks at: the head computes no others.

In masked sampling the next outer step sees the visible tokens of the low-passed result, and the
last result is seen whole. A token that nothing of this depends on may have any finite value.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fastfar.config import FARConfig
from fastfar.levels import footprint
from fastfar.plan import SamplingPlan

# "all": every row. "fixed": only those that are looked at, where their number follows from the plan
# alone; for CUDA graphs. "seen": only those that are looked at, however many that are.
Rows = Literal["all", "fixed", "seen"]


def seen_rows(
    plan: SamplingPlan, k: int, config: FARConfig, order_BL: Tensor | None, rows: Rows = "seen"
) -> Tensor | None:
    """Rows b L + i of the tokens i of images b that the head has to compute at outer step k.

    Not filtered: the tokens that are visible at step k + 1. Filtered to level l: the tokens that a
    visible one depends on through A_l; their number varies, so counting them waits for a GPU.

    Args:
        order_BL: (B, L) int64 order of the tokens, the first ones stay masked; None: no masks.
        rows: which ones to leave out.

    Returns:
        (M,) int64 on the order's device, each row once; None for all rows.
    """
    if rows == "all" or order_BL is None or not _some_hidden(plan, k, config):
        return None
    batch, length = order_BL.shape
    visible_BV = order_BL[:, plan.num_masked(k + 1, length) :]
    level = plan.input_levels[k + 1]
    if level is None or level == config.num_levels:
        first_B = torch.arange(0, batch * length, length, device=order_BL.device)
        return (visible_BV + first_B[:, None]).flatten()
    if rows == "fixed":
        return None
    needed_LL = _footprint(config, level).to(order_BL.device)
    return needed_LL[visible_BV].any(dim=1).flatten().nonzero().flatten()


def mean_rows(plan: SamplingPlan, k: int, config: FARConfig, rows: Rows = "seen") -> float:
    """Rows per image that the head computes at outer step k, their mean over random orders.

    A token that f tokens depend on is left out if all of them are masked: with V of L tokens
    visible, in C(L - f, V) of C(L, V) cases.
    """
    length = config.num_tokens
    if rows == "all" or plan.mask_ratios is None or not _some_hidden(plan, k, config):
        return float(length)
    visible = length - plan.num_masked(k + 1, length)
    level = plan.input_levels[k + 1]
    if level is None or level == config.num_levels:
        return float(visible)
    if rows == "fixed":
        return float(length)
    cases = math.comb(length, visible)
    dependent_L: list[int] = _footprint(config, level).sum(dim=0).tolist()
    return sum(1.0 - math.comb(length - f, visible) / cases for f in dependent_L)


def _some_hidden(plan: SamplingPlan, k: int, config: FARConfig) -> bool:
    """Whether some of the result of step k is masked before anybody looks at it."""
    return k + 1 < len(plan) and plan.num_masked(k + 1, config.num_tokens) > 0


def _footprint(config: FARConfig, level: int) -> Tensor:
    return footprint(
        level, config.latent_size, config.patch_size, config.num_levels, config.filter
    )
