"""Verdicts on two runs: right as often as they say, blind to a common slow-down, silent on rest."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from command import Captured, fails
from example_rows import ENVIRONMENT, PEAK, noisy, row
from scipy import stats

from fastfar import cli
from fastfar.bench import compare, rows
from fastfar.bench.compare import Comparison

REPETITIONS = 400


def one(a: rows.Row, b: rows.Row, **options: Any) -> Comparison:
    (found,) = compare.compare([a], [b], **options)
    return found


# --- statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [(1, 1), (4, 4), (5, 3), (7, 6)])
def test_distribution_of_the_rank_sum(m: int, n: int) -> None:
    """Against counting every order, and against scipy."""
    counts = [0] * (m * n + 1)
    for ranks in itertools.combinations(range(m + n), m):
        counts[sum(ranks) - m * (m - 1) // 2] += 1
    expected = list(itertools.accumulate(count / sum(counts) for count in counts))
    assert compare.rank_sum_cumulative(m, n) == pytest.approx(expected)
    a, b = list(range(m)), [each + 0.5 for each in range(n)]
    test = stats.mannwhitneyu(a, b, alternative="less", method="exact")
    assert compare.rank_sum_cumulative(m, n)[int(test.statistic)] == pytest.approx(test.pvalue)


def test_interval_is_the_test_inverted() -> None:
    """Ratios inside are those that scipy's exact test does not reject."""
    a, b = noisy(1.0, 7, 0.1, seed=1), noisy(1.1, 6, 0.1, seed=2)
    found = compare.ratio(a, b)
    for factor, inside in ((0.999, False), (1.001, True)):
        shifted = [each * found.low * factor for each in a]
        p = stats.mannwhitneyu(shifted, b, method="exact").pvalue
        assert bool(p > 0.05) is inside
    assert found.low < found.estimate < found.high


def test_false_positives_are_as_rare_as_stated() -> None:
    """No difference in truth, skewed noise of 5 %: the interval misses 1 in at most 5 % of runs."""
    missed = judged = 0
    for seed in range(REPETITIONS):
        a, b = (noisy(1.0, 6, 0.05, seed=2 * seed + side) for side in (0, 1))
        found = compare.ratio(a, b)
        missed += not found.low <= 1 <= found.high
        judged += found.verdict() != "no difference"
    assert judged <= missed  # the margin only takes verdicts away
    # At a true rate of 5 % a larger count comes once in 10,000 seeds.
    assert missed <= stats.binom.ppf(1 - 1e-4, REPETITIONS, 0.05)
    assert missed >= stats.binom.ppf(1e-4, REPETITIONS, 0.02)  # and the interval is not too wide


def test_a_fifth_is_found() -> None:
    """20 % slower in truth, noise of 5 %, seven samples: found nearly always, the right way."""
    verdicts = [
        compare.ratio(noisy(1.0, 7, 0.05, seed=s), noisy(1.2, 7, 0.05, seed=-s - 1)).verdict()
        for s in range(REPETITIONS)
    ]
    assert verdicts.count("slower") >= 0.97 * REPETITIONS
    assert "faster" not in verdicts


def test_margin() -> None:
    """A difference of 1 % without any noise is none, unless one asks for it."""
    a, b = (1.0, 1.0001, 1.0002, 0.9999, 1.0), (1.01, 1.0101, 1.0102, 1.0099, 1.01)
    assert compare.ratio(a, b).verdict() == "no difference"
    assert compare.ratio(a, b).verdict(margin=0.0) == "slower"
    assert compare.ratio(b, a).verdict(margin=0.0) == "faster"


def test_ratio_errors() -> None:
    with pytest.raises(ValueError, match="positive samples on both sides"):
        compare.ratio([], [1.0])
    with pytest.raises(ValueError, match="positive samples on both sides"):
        compare.ratio([1.0], [0.0])
    with pytest.raises(ValueError, match="between 0 and 1"):
        compare.ratio([1.0], [1.0], confidence=95)
    with pytest.raises(ValueError, match="margin"):
        compare.compare([], [], margin=-1)


# --- rows ------------------------------------------------------------------------------------


def test_the_yardstick_takes_out_what_slows_everything() -> None:
    """B is 20 % faster, but was measured while a neighbour took a third of the machine."""
    draw = random.Random(0)
    sides = []
    for seconds, share in ((1.0, 1.0), (0.8, 0.65)):
        speeds = [share * draw.uniform(0.9, 1.0) for _ in range(8)]
        quiet = noisy(seconds, 8, 0.02, seed=5)
        sides.append(
            row(samples_s=tuple(s / speed for s, speed in zip(quiet, speeds, strict=True)),
                peak_flops_per_s=tuple(PEAK * speed for speed in speeds))
        )  # fmt: skip
    found = one(*sides)
    assert found.verdict == "faster" and found.text.startswith("1.2")
    assert found.ratio is not None and found.ratio.estimate == pytest.approx(0.8, rel=0.03)
    raw = compare.ratio(*(side.samples_s for side in sides))
    assert raw.verdict() == "slower"  # what the clock alone would have said


def test_a_common_slow_down_is_no_difference() -> None:
    a = row(samples_s=noisy(1.0, 6, 0.02, seed=1), peak_flops_per_s=(PEAK,) * 6)
    slow = tuple(2 * seconds for seconds in noisy(1.0, 6, 0.02, seed=2))
    found = one(a, row(samples_s=slow, peak_flops_per_s=(PEAK / 2,) * 6))
    assert found.verdict == "no difference" and "at most" in found.text
    assert found.raw == pytest.approx(2, rel=0.05)


def test_without_a_peak_the_seconds_count() -> None:
    found = one(row(peak_flops_per_s=()), row())
    assert found.verdict == "no difference" and "seconds as they are" in found.remarks[0]
    assert "seconds as they are" in one(row(peak_kind="torch.matmul"), row()).remarks[0]


def test_sides_in_turns_may_go_by_the_clock() -> None:
    """Where the yardstick scatters more than the samples; chosen by that, not by the verdict."""
    wrong = by_clock = 0
    for seed in range(REPETITIONS):
        sides = [
            row(samples_s=noisy(1.0, 6, 0.05, seed=4 * seed + i),
                peak_flops_per_s=noisy(PEAK, 6, 0.04 + 0.02 * (seed % 2), seed=4 * seed + 2 + i))
            for i in (0, 1)
        ]  # fmt: skip
        (found,) = compare.compare(*([side] for side in sides), in_turns=True, margin=0.0)
        wrong += found.verdict != "no difference"
        by_clock += not found.by_peak
        assert one(*sides).by_peak  # separate runs: always
    assert 0.5 * REPETITIONS < by_clock < REPETITIONS
    assert wrong <= stats.binom.ppf(1 - 1e-4, REPETITIONS, 0.05)
    fifth = row(samples_s=noisy(1.2, 7, 0.05, seed=1), peak_flops_per_s=noisy(PEAK, 7, 0.3))
    usual = row(samples_s=noisy(1.0, 7, 0.05), peak_flops_per_s=noisy(PEAK, 7, 0.3, seed=1))
    assert one(usual, fifth).verdict == "no difference"
    assert one(usual, fifth, in_turns=True).verdict == "slower"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"environment": ENVIRONMENT | {"threads": 4}}, "threads 2 beside 4"),
        ({"environment": ENVIRONMENT | {"cpu": "Other CPU"}}, "cpu Example CPU beside Other CPU"),
        ({"environment": ENVIRONMENT | {"native_isa": "avx2"}}, "native_isa amx beside avx2"),
        ({"environment": ENVIRONMENT | {"gpu": {"name": "H100"}}}, "gpu None beside H100"),
        ({"mode": "approximate"}, "mode exact beside approximate"),
        ({"extrapolation": "8 of 256 steps"}, "extrapolation None beside 8 of 256 steps"),
        ({"error": 0.5}, "the gate of B is red"),
        ({"samples_s": ()}, "B has no times"),
        ({"samples_s": (1.0, 1.1)}, "5 and 2 samples are too few for 95 %"),
        ({"plan": {"diffusion_steps": [50]}}, "plan differs in diffusion_steps"),
        ({"subject": "far_huge/native/float32", "dtype": "float32"}, "dtype bfloat16 beside"),
        ({"subject": "far_base/native", "model": "far_base"}, "only in A"),
        ({"batch": 8}, "only in A"),
    ],
)  # fmt: skip
def test_not_comparable_is_said(changes: dict[str, Any], reason: str) -> None:
    plan: dict[str, Any] = {"plan": {"diffusion_steps": [100]}} if "plan" in changes else {}
    found = compare.compare([row(**plan)], [row(**changes)])[0]
    assert found.verdict == "not comparable" and found.ratio is None
    assert reason in found.text


def test_pairs() -> None:
    """By key; the last of equal keys; a plan that came from a file; other versions are told."""
    plan = {"levels": (0, 2)}
    a = [row(seconds=9.0), row(plan=plan), row("demo/native")]
    environment = ENVIRONMENT | {"torch": "2.14.0", "time": "later", "commit": "ba9876543210"}
    b = [row("var_d24/published"), row(plan={"levels": [0, 2]}, environment=environment)]
    found = compare.compare(a, b)
    assert [each.verdict for each in found] == ["no difference", *["not comparable"] * 2]
    assert [each.reasons for each in found[1:]] == [("only in A",), ("only in B",)]
    assert found[0].remarks == ("torch 2.13.0 beside 2.14.0",)


# --- the command -----------------------------------------------------------------------------


def test_command(capsys: Captured, tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    rows.append(a, [row(), row("demo/native/float32", 0.2)])
    rows.append(b, [row(samples_s=noisy(2.4, seed=3)), row("demo/native/float32", 0.2)])
    assert cli.main(["bench", "--compare", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "faster" in out and "no difference (at most" in out and "95 % interval" in out
    assert cli.main(["bench", "--compare", str(a), str(b), "--json", "--margin", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["verdict"] for each in found] == ["no difference"] * 2
    assert 0.7 < found[0]["ratio"]["low"] < found[0]["ratio"]["high"] < 0.9
    b.write_text('{"op": "image"}\n')  # of another schema
    assert "measure again" in fails(capsys, "bench", "--compare", str(a), str(b))
