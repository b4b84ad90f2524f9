"""Rows stand alone, and survive a crash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from example_rows import row

from fastfar.bench import rows
from fastfar.bench.rows import Row


def test_a_row_survives_json(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "x.jsonl"
    first = row(plan={"levels": [0, 2]}, stages_s={"head": 0.5}, extrapolation="8 of 256 steps")
    rows.append(path, [first])
    rows.append(path, [row(seconds=1.0), {"op": "older", "median_s": 1.0}])
    text = path.read_text(encoding="utf-8").splitlines()
    again = rows.read(path)
    assert len(text) == 3 and len(again) == 2  # a line of another schema is not a row
    assert again[0] == first and again[0].extrapolation == "8 of 256 steps"
    # What follows from the fields stands in the line, too: a reader needs no code of ours.
    line = json.loads(text[0])
    assert line["median_s"] == first.median_s and line["gate"] == first.gate
    assert line["share_of_peak"] == first.share_of_peak and line["device"] == first.device
    for name in ("commit", "dirty", "torch", "cpu", "native_isa", "threads", "command", "time"):
        assert name in line["environment"]


def test_environment_says_where_and_how() -> None:
    here = rows.environment()
    assert here["gpu"] is None and here["commit"] and isinstance(here["dirty"], bool)
    assert here["threads"] >= 1 and here["cpu"] and here["command"]


def test_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows.append(path, [row()])
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole + whole[: len(whole) // 2], encoding="utf-8")
    assert len(rows.read(path)) == 1
    rows.append(path, [row(seconds=2.0)])  # stands on a line of its own
    assert len(rows.read(path)) == 2
    path.write_text('{"a": 1}\nnot json}\n{"b": 2}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2"):
        rows.read_lines(path)
    path.write_text('{"a": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="no row of schema"):
        rows.read(path)


@pytest.mark.parametrize(
    ("error", "limit", "gate"),
    [(1e-3, 1e-2, "green"), (2e-2, 1e-2, "red"), (None, None, "none"),
     (float("nan"), 1.0, "red"), (float("inf"), float("inf"), "red")],
)  # fmt: skip
def test_gate_of_a_row(error: float | None, limit: float | None, gate: str) -> None:
    assert row(error=error, error_limit=limit).gate == gate


def test_figures_of_a_row() -> None:
    made = row(samples_s=(1.0, 2.0, 4.0), peak_flops_per_s=(1e12, 2e12, 1e12), batch=4,
               executed_flops=10**12)  # fmt: skip
    assert made.median_s == 2.0 and made.images_per_s == 2.0
    assert made.share_of_peak == pytest.approx(0.25)  # the median of 1, 0.25, 0.25
    assert row(executed_flops=None).share_of_peak is None
    empty = row(samples_s=())
    assert empty.median_s is None and empty.images_per_s is None and empty.share_of_peak is None
    figures = rows.quantiles([float(i) for i in range(21)])
    assert (figures["p5_s"], figures["median_s"], figures["p95_s"]) == (1.0, 10.0, 19.0)
    assert rows.quantiles([4.0])["p95_s"] == 4.0 and figures["repeats"] == 21


def test_errors() -> None:
    with pytest.raises(ValueError, match="as published"):
        row(mode="fast")
    line = row().to_dict()
    with pytest.raises(ValueError, match="schema 99"):
        Row.from_dict({**line, "schema": 99})
    del line["dtype"]
    with pytest.raises(ValueError, match="dtype"):
        Row.from_dict(line)
