"""Tables of made-up rows: right figures, honest marks, the same in every form."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from command import Captured, fails
from example_rows import PEAK, ops, row, table3

from fastfar import cli
from fastfar.bench import report, rows, tables
from fastfar.bench.rows import Row
from fastfar.bench.tables import Table


def cell(table: Table, line: str, column: str) -> str:
    """Of the line that begins with a text."""
    (found,) = [cells for cells in table.lines if cells[0] == line]
    return found[table.header.index(column)]


def exactly(subject: str, seconds: float, **changes: Any) -> Row:
    """Five samples that are all the same."""
    return row(subject, title=subject, samples_s=(seconds,) * 5, **changes)


# --- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (172.4, "172 s"), (12.34, "12.3 s"), (1.234, "1.23 s"), (0.0212, "21.2 ms"),
     (3e-5, "30.0 us"), (5e-9, "5.00 ns"), (4000.0, "4000 s")],
)  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert tables.duration(seconds) == text


def test_numbers() -> None:
    assert tables.share(0.4567) == "45.7 %" and tables.share(None) == "-"
    assert tables.rate(2.05e12) == "2.05 T" and tables.rate(512.0) == "512 " 
    assert tables.size(3 << 30) == "3.00 GiB" and tables.size(5 << 20) == "5.0 MiB"
    assert tables.times(56.71) == "56.7 x" and tables.times(None) == "-"


# --- Table 3 ---------------------------------------------------------------------------------


def test_ratios_are_over_exact_far_h_of_the_papers_plan() -> None:
    found = [
        exactly("mar_huge/published", 150.0, mode="as published", extrapolation="8 of 256 steps"),
        exactly("var_d24/published", 9.0, mode="as published"),
        exactly("var_d24/well_run", 2.4),
        exactly("far_huge/native/official", 2.5, plan_name="official"),
        exactly("far_huge/native/paper", 3.0, plan_name="paper"),
        exactly("far_base/native/paper", 1.0, plan_name="paper"),
        exactly("far_huge/torch/paper", 2.0, plan_name="paper", error=0.5),  # a red gate
        exactly("llamagen_xl/published", 60.0, mode="as published", error=None),
    ]
    table = report.latency(found)
    assert report.anchor(found) is found[4]
    ratios = {line[0]: line[table.header.index("ratio")] for line in table.lines}
    assert ratios == {
        "mar_huge/published": "50.0 x",
        "var_d24/published": "3.00 x",
        "var_d24/well_run": "0.80 x",
        "far_huge/native/official": "0.83 x",
        "far_huge/native/paper": "1.00 x",
        "far_base/native/paper": "0.33 x",
        "far_huge/torch/paper": "red: wrong result",
        "llamagen_xl/published": "-",  # nothing says that it is right
    }
    assert any("ratio: time over that of far_huge/native/paper" in note for note in table.notes)
    # The paper stands beside what it measured, and beside our own first line.
    assert cell(table, "mar_huge/published", "paper") == "70.89 s"
    assert cell(table, "mar_huge/published", "paper's ratio") == "39.2 x"
    assert cell(table, "far_huge/native/paper", "paper") == "1.81 s"
    assert cell(table, "var_d24/well_run", "paper") == "-"
    # What was extrapolated is marked.
    assert cell(table, "mar_huge/published", "time") == "~150 s"
    assert any(note.startswith("~: extrapolated") for note in table.notes)
    assert table.strong == {4}


def test_ratios_of_models_that_were_not_resident_together() -> None:
    """Over what the anchor took in turns with them, not over what it took later."""
    base = exactly("far_huge/native/paper", 3.0, plan_name="paper")
    beside = {"subject": "far_huge/native/paper", "samples_s": [4.0, 4.0, 4.0]}
    assert report.over(exactly("var_d24/published", 8.0, extra={"anchor": beside}), base) == 2.0
    assert report.over(exactly("var_d24/published", 9.0), base) == 3.0
    assert report.over(base, None) is None


def test_without_an_exact_far_there_is_no_ratio() -> None:
    found = [exactly("var_d24/published", 9.0, mode="as published")]
    table = report.latency(found)
    assert report.anchor(found) is None
    assert cell(table, "var_d24/published", "ratio") == "-" and not table.strong


def test_anchor_of_other_models() -> None:
    """The fastest form of the plan with the most work: few steps are no measure of the others."""
    found = [exactly("demo/torch/T=16", 4.0, reference_flops=80), exactly("demo/native/T=16", 1.0,
             reference_flops=80), exactly("demo/native/T=4", 0.5, reference_flops=30)]  # fmt: skip
    assert report.anchor(found) is found[1]
    assert report.anchor([*found, exactly("far_huge/torch/official", 9.0)]) not in found


def test_other_tables() -> None:
    found = {table.title: table for table in report.tables([*table3(), *ops()])}
    assert list(found) == ["Latency", "Stages", "Per cent of peak", "Ops", "Memory", "What ran"]
    name = "FAR-H native, T = 40..100"
    assert cell(found["Stages"], name, "head") == "1.60 s (53 %)"
    assert cell(found["Stages"], "VAR-d24 well run", "head") == "-"
    assert cell(found["Memory"], name, "highest") == "3.00 GiB"
    work = found["Per cent of peak"]
    assert cell(work, name, "published FLOP") == "23.4 T"
    assert cell(work, name, "executed FLOP") == "8.00 T"
    assert cell(work, name, "peak of the run") == "4.00 T"
    how = cell(found["What ran"], "MAR-H as published", "how")
    assert how == "extrapolated: 8 of 256 steps, each standing for 32; random weights"
    assert len(found["Ops"].lines) == 16
    # 1 GFLOP and 6.6 MB in 2 ms: an eighth of 4 TFLOP/s, 15 % of 22 GB/s.
    (op,) = [each for each in ops() if each.op == "attention" and each.form == "native"]
    one = report.single_ops([dataclasses.replace(op, samples_s=(0.002,) * 5)])
    assert one.lines[0][6:8] == ("12.5 %", "15.0 %")
    batches = report.throughput([exactly("far_huge/native/paper", 4.0, batch=8)])
    assert cell(batches, "far_huge/native/paper", "images/s") == "2.00"
    assert report.tables([dataclasses.replace(op, samples_s=())]) == []


# --- which rows ------------------------------------------------------------------------------


def test_runs() -> None:
    """The last run of a file, of each measurement the last."""
    first, cut, whole = row(run="a"), row(run="b", note="interrupted"), row(run="b", seconds=2.0)
    assert report.of_run([first, cut, whole]) == [whole]
    assert report.of_run([first, cut, whole], "a") == [first]
    with pytest.raises(ValueError, match="no run 'c' in these rows; there are a, b"):
        report.of_run([first, whole], "c")
    with pytest.raises(ValueError, match="no rows to report"):
        report.of_run([])


def test_quality_is_joined_by_model_and_plan() -> None:
    plan = {"diffusion_steps": (16, 16)}
    found = [row("demo/native", plan=plan), row("demo/native", plan={"diffusion_steps": (4, 4)}),
             row("far_huge/native", plan=plan)]  # fmt: skip
    samples = {"kind": "samples", "FD": 3.3, "precision": 0.9, "recall": 0.4,
               "class_agreement": None}  # fmt: skip
    line = {
        "metric": "FD",
        "rows": [samples, samples | {"kind": "floor", "FD": 0.04}],
        "run": {"checkpoint": "models/demo", "plan": {"diffusion_steps": [16, 16]}},
    }
    joined = report.with_quality(found, [line, {"metric": "FD", "rows": [], "run": {}}])
    qualities = [each.quality for each in joined]
    assert qualities == [{"FD": 3.3, "precision": 0.9, "recall": 0.4}, None, None]
    outcome = {"FD-fashion": 4.0, "precision": 0.8, "recall": 0.3, "class_agreement": 0.97}
    experiment = {"kind": "images", "place": "0", "outcome": outcome, "checkpoint": "demo",
                  "plan": {"diffusion_steps": [4, 4]}}  # fmt: skip
    other = {**experiment, "place": "1", "outcome": {}}
    joined = report.with_quality(found, [line, experiment, other])
    assert [each.quality for each in joined[1:]] == [outcome, None]


# --- how they are shown ----------------------------------------------------------------------


TABLE = Table("T", ("name", "n"), (("a|b", "1"), ("c", "-")), ("note one", "note two"),
              strong=frozenset({1}))  # fmt: skip


def test_markdown() -> None:
    assert tables.as_markdown(TABLE).splitlines() == [
        "**T**", "", "| name | n |", "| --- | ---: |", "| a\\|b | 1 |", "| **c** | - |", "",
        "note one. note two",
    ]  # fmt: skip
    page = report.markdown(table3())
    assert page.startswith("Example CPU (amx), 2 threads; torch 2.13.0, fastfar 0.1.0, commit")
    assert "    fastfar bench table3 --save rows.jsonl\n" in page
    lines = [line for line in page.splitlines() if line.startswith("| **FAR-H native, T = 40..100")]
    assert len(lines) == 1 and lines[0].count("|") == 12


def test_text() -> None:
    assert tables.as_text(TABLE).splitlines() == [
        "name  n", "a|b   1", "c     -", "note one", "note two"
    ]  # fmt: skip


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.csv"
    report.write_csv(path, [*table3(), *ops()])
    with path.open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(table3()) + len(ops())
    assert found[0]["model"] == "mar_huge" and found[0]["environment.threads"] == "2"
    assert json.loads(found[0]["peak_flops_per_s"]) == [PEAK] * 5
    assert float(found[8]["stages_s.head"]) == 1.6 and found[9]["stages_s.head"] == ""
    assert float(found[0]["median_s"]) > 100


# --- the command -----------------------------------------------------------------------------


def test_command(capsys: Captured, tmp_path: Path) -> None:
    path, sheet = tmp_path / "x.jsonl", tmp_path / "x.csv"
    rows.append(path, [row(run="older", title="older"), *table3()])
    assert cli.main(["bench", "report", str(path), "--csv", str(sheet)]) == 0
    out, err = capsys.readouterr()
    assert "Example CPU" in out and "56.7 x" in out and "older" not in out
    assert sheet.is_file() and "9 rows in" in err
    assert max(map(len, out.splitlines())) > 130  # not squeezed where nobody looks
    assert cli.main(["bench", "report", str(path), "--markdown", "--run", "older"]) == 0
    out = capsys.readouterr().out
    assert "| **older** |" in out and "MAR-H" not in out
    assert cli.main(["bench", "report", str(path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 9
    assert "needs a file of rows" in fails(capsys, "bench", "report")
