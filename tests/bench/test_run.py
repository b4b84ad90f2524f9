"""What a run does, with subjects that make no images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench.stand_ins import StandIn, need_of_gigabytes, recipe

from fastfar.bench import peak, rows
from fastfar.bench.estimate import Estimate, estimate
from fastfar.bench.gate import Gate
from fastfar.bench.run import Options, run
from fastfar.bench.subjects import Recipe

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks that take no time: 1 TFLOP/s; no question to git either."""
    monkeypatch.setattr(rows, "commit", lambda: ("0123456789ab", False))
    monkeypatch.setattr(peak, "peak_flops", lambda *_, **__: 1e12)
    monkeypatch.setattr(peak, "bandwidth", lambda *_, **__: 1e10)


def together(recipes: list[Recipe], *_: object) -> Estimate:
    return Estimate([list(recipes)], 1.0, 1, None)


def one_by_one(recipes: list[Recipe], *rest: object) -> Estimate:
    anchor = rest[-1]
    groups = [[each] for each in recipes if each is not anchor]
    return Estimate([[anchor, *group] for group in groups], 1.0, 1, None)  # type: ignore[list-item]


def test_all_take_turns_after_their_gates() -> None:
    calls: list[str] = []
    recipes = [recipe(StandIn(key, calls)) for key in "ab"]
    outcome = run(recipes, Options(repeats=2, stages=False), CPU, plan=together)
    assert calls == ["build a", "build b", "a", "check a", "b", "check b", "a", "b", "a", "b"]
    assert [row.subject for row in outcome.rows] == ["a", "b"] and not outcome.red
    for row in outcome.rows:
        assert len(row.samples_s) == len(row.peak_flops_per_s) == 2
        assert row.cold_s is not None and row.round_grain == "subject"
        assert row.extra["complete"] and row.run.startswith("latency-")
        assert row.key == ("image", row.subject, 1, "none")


def test_batches_follow_each_other_and_warm_up() -> None:
    calls: list[str] = []
    outcome = run([recipe(StandIn("a", calls))], Options(batches=(1, 4), repeats=1, stages=False),
                  CPU, plan=together)  # fmt: skip
    assert [(row.batch, row.executed_flops) for row in outcome.rows] == [(1, 1000), (4, 4000)]
    assert calls.count("a") == 4  # cold, timed; new shapes, timed
    assert outcome.rows[0].cold_s is not None and outcome.rows[1].cold_s is None


def test_a_red_gate_is_said_and_kept() -> None:
    told: list[str] = []
    wrong = recipe(StandIn("a", [], Gate(0.5, 1e-2, "given")))
    outcome = run([wrong], Options(repeats=1, stages=False), CPU, told.append, plan=together)
    assert [row.gate for row in outcome.red] == ["red"]
    assert any("THE GATE IS RED" in line for line in told)


def test_what_cannot_run_says_why() -> None:
    class Broken(StandIn):
        def check(self) -> Gate:
            raise RuntimeError("no such kernel")

    recipes = [recipe(StandIn("a", []), reason="no GPU"), recipe(Broken("b", [])),
               recipe(StandIn("c", []))]  # fmt: skip
    outcome = run(recipes, Options(repeats=1, stages=False), CPU, plan=together)
    assert outcome.skipped == {"a": "no GPU", "b": "RuntimeError: no such kernel"}
    assert [row.subject for row in outcome.rows] == ["c"]


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    options = Options(repeats=2, save=path, stages=False)
    # b is interrupted in its last round: a has its row, b what it had.
    recipes = [recipe(StandIn("a", [])), recipe(StandIn("b", [], fails_at=2))]
    with pytest.raises(KeyboardInterrupt):
        run(recipes, options, CPU, plan=together)
    first = rows.read(path)
    assert [(row.subject, row.extra["complete"]) for row in first] == [("a", True), ("b", False)]
    assert first[1].note == "interrupted after 1 rounds" and len(first[1].samples_s) == 1

    calls: list[str] = []
    recipes = [recipe(StandIn("a", calls)), recipe(StandIn("b", calls))]
    outcome = run(recipes, Options(repeats=2, save=path, stages=False, resume=True), CPU,
                  plan=together)  # fmt: skip
    assert "a" not in calls and calls.count("b") == 3
    assert [row.subject for row in outcome.rows] == ["a", "b"]
    assert {row.run for row in rows.read(path)} == {first[0].run}
    # Other settings are another run.
    calls.clear()
    run(recipes, Options(repeats=1, save=path, stages=False, resume=True), CPU, plan=together)
    assert "a" in calls and rows.read(path)[-1].run != first[0].run
    with pytest.raises(ValueError, match="--save FILE"):
        run(recipes, Options(resume=True), CPU, plan=together)


def test_groups_share_the_anchor() -> None:
    """Where models do not fit together, ratios are over calls that took turns with the anchor."""
    calls: list[str] = []
    a, b, fast = (recipe(StandIn(key, calls)) for key in ("a", "b", "fast"))
    outcome = run([a, b, fast], Options(repeats=2, stages=False), CPU, anchor=fast, plan=one_by_one)
    assert calls.count("build fast") == 2
    assert [row.subject for row in outcome.rows] == ["fast", "a", "b"]  # its row once
    for row in outcome.rows[1:]:
        assert row.extra["anchor"]["subject"] == "fast" and row.round_grain == "group"
        assert len(row.extra["anchor"]["samples_s"]) == 2


# --- estimates -------------------------------------------------------------------------------


def expected(keys: list[str], gigabytes: float, anchor: int | None = None) -> list[list[str]]:
    recipes = [recipe(StandIn(key, [])) for key in keys]
    found = estimate(
        recipes, (1,), 3, CPU, None if anchor is None else recipes[anchor],
        round(gigabytes * 2**30), need_of_gigabytes,
    )  # fmt: skip
    assert "about" in found.text(3) and found.seconds > 4 * len(keys)
    return [[each.key for each in group] for group in found.groups]


def test_what_fits_is_together_and_what_does_not_takes_turns() -> None:
    keys = ["a 3", "b 3", "c 3"]
    assert expected(keys, 12) == [keys]
    assert expected(keys, 9) == [["a 3", "b 3"], ["c 3"]]
    assert expected(["a 3", "b 3", "c 1"], 6, anchor=2) == [["c 1", "a 3"], ["b 3", "c 1"]]


def test_what_does_not_fit_is_refused_beforehand() -> None:
    with pytest.raises(ValueError, match=r"a 3 needs 3\.98 GiB of memory, 2\.00 GiB are available"):
        expected(["a 3"], 2)
