"""When two samplers count as equal: images of a candidate against those of the reference R.

Per seed and on all seeds together:

    FD <= FD_R + max(2 q, 2 % of FD_R);  precision and recall within 0.015 of R's;
    class agreement within 0.01 of R's

q, the yardstick, is the spread of FD between disjoint halves of R, so the rule asks no more of a
candidate than R could show of itself: the deviation of half of R is also that of the difference
between two whole sets.

Legend: N image, F feature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastfar.evaluation.evaluate import Row
from fastfar.evaluation.metrics import Array, FeatureStatistics, frechet_distance

FD_SHARE, FD_SPREADS = 0.02, 2.0
TOLERANCE = {"precision": 0.015, "recall": 0.015, "class_agreement": 0.01}
SPLITS, _SEED = 5, 0
POOLED = "pooled"


@dataclass(frozen=True)
class Comparison:
    """One figure of one seed (or "pooled"): `value` of the candidate beside R's `reference`.

    `allowed` is how far it may lie: above R for "fd", on either side for the others.
    """

    seed: str
    name: str
    value: float
    reference: float
    allowed: float

    @property
    def difference(self) -> float:
        return self.value - self.reference

    @property
    def excess(self) -> float:
        """How far it lies beyond what is allowed; 0 where it is equal."""
        distance = self.difference if self.name == "fd" else abs(self.difference)
        return max(0.0, distance - self.allowed)

    @property
    def better(self) -> bool:
        """On the good side of R: lower for "fd", higher for the others."""
        return self.difference < 0 if self.name == "fd" else self.difference > 0

    def __str__(self) -> str:
        return (
            f"{self.name} of seed {self.seed}: {self.value:.4g} against {self.reference:.4g} "
            f"({self.difference:+.4g}, {self.allowed:.4g} allowed)"
        )


@dataclass(frozen=True)
class Verdict:
    """All comparisons of a candidate.

    `equal`: every figure of every seed, and of all together, is within its bounds.
    `not_worse`: every figure that is out of bounds is out on the good side.
    """

    comparisons: tuple[Comparison, ...]

    @property
    def failed(self) -> tuple[Comparison, ...]:
        return tuple(part for part in self.comparisons if part.excess > 0)

    @property
    def equal(self) -> bool:
        return not self.failed

    @property
    def not_worse(self) -> bool:
        return all(part.better for part in self.failed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "equal": self.equal,
            "not_worse": self.not_worse,
            "failed": [str(part) for part in self.failed],
            "comparisons": [dataclasses.asdict(part) for part in self.comparisons],
        }


def decide(
    reference: Mapping[str, Row], candidate: Mapping[str, Row], yardstick: Mapping[str, float]
) -> Verdict:
    """Whether the candidate is equal to R.

    Args:
        reference, candidate: rows by seed, with "pooled" for all seeds together.
        yardstick: q by the same keys.

    Raises:
        ValueError: the keys differ or there are none, or two rows do not compare: another number
            of images, another extractor, other real images.
    """
    if not candidate or set(reference) != set(candidate) or set(yardstick) != set(candidate):
        raise ValueError(
            f"rows of R: {sorted(reference)}, of the candidate: {sorted(candidate)}, yardsticks: "
            f"{sorted(yardstick)}; give the same seeds for all three"
        )
    comparisons = []
    for seed, row in candidate.items():
        other = reference[seed]
        for name in ("count", "extractor", "reference"):
            if getattr(row, name) != getattr(other, name):
                raise ValueError(
                    f"seed {seed}: {name} is {getattr(row, name)} for the candidate and "
                    f"{getattr(other, name)} for R; such figures do not compare"
                )
        allowed = max(FD_SPREADS * yardstick[seed], FD_SHARE * other.fd)
        comparisons.append(Comparison(seed, "fd", row.fd, other.fd, allowed))
        for name, tolerance in TOLERANCE.items():
            value, expected = getattr(row, name), getattr(other, name)
            if value is not None and expected is not None:
                comparisons.append(Comparison(seed, name, value, expected, tolerance))
    return Verdict(tuple(comparisons))


def fd_spread(features_NF: Array, real: FeatureStatistics, splits: int = SPLITS) -> float:
    """q: standard deviation of the FD of half of R, from disjoint halves.

    q^2 = mean over splits of (FD_a - FD_b)^2 / 2.  Of images i and i + 10, which are of one class,
    a coin sends one to each half, so both halves hold as many of each class.

    Args:
        features_NF: R's features, rows in the order of `draw_samples` (image i has label i mod 10);
            several seeds one after the other, each with a multiple of 10.
        real: statistics of the real images.
        splits: number of random splits.

    Raises:
        ValueError: fewer than 40 images.
    """
    count = len(features_NF) // 20 * 20
    if count < 40:
        raise ValueError(f"{len(features_NF)} images are too few for two halves: give at least 40")
    generator = np.random.default_rng(_SEED)
    rows = np.arange(count).reshape(-1, 2, 10)
    differences = []
    for _ in range(splits):
        swapped = generator.random((len(rows), 10)) < 0.5
        first = np.where(swapped, rows[:, 1], rows[:, 0]).ravel()
        second = np.where(swapped, rows[:, 0], rows[:, 1]).ravel()
        first_fd, second_fd = (
            frechet_distance(FeatureStatistics.of(features_NF[half]), real)
            for half in (first, second)
        )
        differences.append(first_fd - second_fd)
    return float(np.sqrt(np.mean(np.square(differences)) / 2.0))
