"""Whether two variants differ: a paired test over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST_SEEDS, LEVEL = 3, 0.05


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences, Student's t = mean / (sd / sqrt(n)), and its two-sided p.

    One difference has no t and no p (NaN).
    """

    mean: float
    t: float
    p: float
    count: int

    @property
    def is_one(self) -> bool:
        """Whether it may be called a difference: at least 3 seeds and p below 5 %."""
        return self.count >= FEWEST_SEEDS and self.p < LEVEL


def paired(differences: Sequence[float]) -> Difference:
    """Student's paired t test of n differences, n - 1 degrees of freedom.

    Raises:
        ValueError: there are none.
    """
    if not differences:
        raise ValueError("a paired test needs at least one pair")
    count, mean = len(differences), statistics.fmean(differences)
    if count == 1:
        return Difference(mean, math.nan, math.nan, count)
    error = statistics.stdev(differences) / math.sqrt(count)
    t = mean / error if error else math.inf * mean if mean else 0.0  # 0: the very same images
    return Difference(mean, t, two_sided_p(t, count - 1), count)


def two_sided_p(t: float, freedom: int) -> float:
    """P(|T| > |t|) of Student's T.

    With t = sqrt(freedom) tan(a), T's density is proportional to cos(a)^(freedom - 1).
    """
    edge = math.atan(abs(t) / math.sqrt(freedom))
    return _area(edge, math.pi / 2, freedom) / _area(0.0, math.pi / 2, freedom)


def _area(low: float, high: float, freedom: int, points: int = 2001) -> float:
    angles = np.linspace(low, high, points)
    heights = np.cos(angles) ** (freedom - 1)
    return float((heights[1:] + heights[:-1]).sum() / 2 * (angles[1] - angles[0]))
