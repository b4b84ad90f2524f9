"""Right before fast: how far a result may be from the truth before its time means anything."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfar.bench.timing import relative

FACTOR = 2.0
FLOORS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Gate:
    """Outcome of a subject's check.

    Attributes:
        error: relative error to the truth; None where there is nothing to compare with.
        limit: what is allowed.
        note: what was compared with what.
    """

    error: float | None
    limit: float | None
    note: str = ""

    @property
    def green(self) -> bool:
        """Whether the result is right; False for a NaN, and where nothing was compared."""
        if self.error is None or self.limit is None:
            return False
        return math.isfinite(self.error) and self.error <= self.limit


def distance(out: Tensor, truth: Tensor) -> float:
    """`relative`; infinite where the shapes differ."""
    return relative(out, truth) if out.shape == truth.shape else float("inf")
