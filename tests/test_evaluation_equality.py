"""When two samplers are equal: bounds, both sides, and the yardstick."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastfar.evaluation.equality import decide, fd_spread
from fastfar.evaluation.evaluate import Row
from fastfar.evaluation.metrics import FeatureStatistics, frechet_distance

SEEDS = ("0", "1", "pooled")
Q = dict.fromkeys(SEEDS, 0.05)


def row(fd: float = 3.0, **changes: Any) -> Row:
    values = {"precision": 0.87, "recall": 0.43, "class_agreement": 0.97, "count": 5000}
    values |= {"name": "x", "kind": "samples", "extractor": "abc", "reference": "test 10000"}
    return Row(**{**values, "fd": fd, **changes})


def rows(*fds: float, **changes: Any) -> dict[str, Row]:
    return {seed: row(fd, **changes) for seed, fd in zip(SEEDS, fds, strict=True)}


R = rows(3.0, 3.1, 3.0)


def test_r_is_equal_to_itself() -> None:
    verdict = decide(R, R, Q)
    assert verdict.equal and verdict.not_worse and not verdict.failed
    assert len(verdict.comparisons) == 4 * len(SEEDS)


def test_one_seed_is_enough_to_fail() -> None:
    verdict = decide(R, rows(3.0, 3.25, 3.0), Q)
    (failed,) = verdict.failed
    assert (failed.seed, failed.name) == ("1", "fd")
    # 2 q = 0.1 is more than 2 % of 3.1.
    assert failed.excess == pytest.approx(0.05)
    assert not verdict.equal and not verdict.not_worse
    assert "fd of seed 1: 3.25 against 3.1 (+0.15, 0.1 allowed)" in verdict.to_dict()["failed"][0]


def test_two_percent_where_the_spread_is_smaller() -> None:
    small = dict.fromkeys(SEEDS, 0.001)
    assert decide(R, rows(3.05, 3.1, 3.0), small).equal
    assert not decide(R, rows(3.07, 3.1, 3.0), small).equal


def test_a_lower_distance_is_no_failure_but_a_higher_recall_is() -> None:
    assert decide(R, rows(1.0, 1.0, 1.0), Q).equal
    verdict = decide(R, rows(3.0, 3.1, 3.0, recall=0.46), Q)
    assert not verdict.equal and verdict.not_worse
    verdict = decide(R, rows(3.0, 3.1, 3.0, recall=0.40), Q)
    assert not verdict.not_worse


@pytest.mark.parametrize("name, edge", [("precision", 0.015), ("class_agreement", 0.01)])
def test_bounds(name: str, edge: float) -> None:
    centre = getattr(row(), name)
    for sign in (-1, 1):
        inside = rows(3.0, 3.1, 3.0, **{name: centre + sign * edge * 0.99})
        outside = rows(3.0, 3.1, 3.0, **{name: centre + sign * edge * 1.01})
        assert decide(R, inside, Q).equal
        assert not decide(R, outside, Q).equal


def test_rows_that_do_not_compare_are_refused() -> None:
    with pytest.raises(ValueError, match="count is 1000 for the candidate"):
        decide(R, rows(3.0, 3.0, 3.0, count=1000), Q)
    with pytest.raises(ValueError, match="same seeds"):
        decide(R, {"0": row()}, Q)


def test_the_yardstick_is_the_spread_of_halves() -> None:
    """Gaussian features: compare with the spread of fresh sets of half the size."""
    generator = np.random.default_rng(0)
    real = FeatureStatistics(np.zeros(3), np.eye(3), 10_000)
    fresh = [
        frechet_distance(FeatureStatistics.of(0.5 + generator.normal(size=(400, 3))), real)
        for _ in range(200)
    ]
    found = [fd_spread(0.5 + generator.normal(size=(800, 3)), real, splits=20) for _ in range(10)]
    assert np.mean(found) == pytest.approx(np.std(fresh), rel=0.25)
    with pytest.raises(ValueError, match="at least 40"):
        fd_spread(generator.normal(size=(39, 3)), real)
