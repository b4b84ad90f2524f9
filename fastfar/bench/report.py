"""Tables made from rows alone: for the terminal, as Markdown, as CSV.

Ratios are taken within one run only, over one row of it (`anchor`), and never where a gate is not
green. How tables are shown: `fastfar.bench.tables`.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastfar.bench.compare import Comparison
from fastfar.bench.rows import Row, quantiles
from fastfar.bench.tables import (
    NONE,
    Table,
    as_markdown,
    digits,
    duration,
    rate,
    share,
    size,
    times,
)

# Table 3 of the FAR paper (arXiv 2503.05305): seconds of one 256 x 256 image on one NVIDIA H20.
PAPER = {"mar_huge": 70.89, "llamagen_xl": 13.12, "var_d24": 0.92, "far_huge": 1.81}


def median(samples: Sequence[float]) -> float | None:
    """None of no samples."""
    return statistics.median(samples) if samples else None


# --- which rows ------------------------------------------------------------------------------


def of_run(rows: Sequence[Row], run: str | None = None) -> list[Row]:
    """Rows of one run, the last of the file if none is named; a repeated key counts once, as last.

    Raises:
        ValueError: there is no such run, or no row at all.
    """
    known = list(dict.fromkeys(row.run for row in rows))
    if not known:
        raise ValueError("there are no rows to report: measure with --save first")
    chosen = known[-1] if run is None else run
    if chosen not in known:
        raise ValueError(f"no run {run!r} in these rows; there are {', '.join(known)}")
    return list({row.key: row for row in rows if row.run == chosen}.values())


def anchor(rows: Sequence[Row]) -> Row | None:
    """The row that ratios are taken over: FAR in exact mode at batch 1, of the paper's plan.

    Where there is no FAR-H another model; where the paper's plan is missing the plan with the most
    work; of one plan the fastest form. Only a green gate counts. None if there is no such row.
    """
    green = [row for row in rows if row.op == "image" and row.batch == 1 and row.gate == "green"]
    exact = [row for row in green if row.mode == "exact" and row.samples_s]
    if not exact:
        return None
    return min(
        exact,
        key=lambda row: (
            row.model != "far_huge",
            row.plan_name != "paper",
            -(row.reference_flops or 0),
            row.median_s or 0.0,
        ),
    )


def over(row: Row, base: Row | None) -> float | None:
    """Median time over that of `base`; None where one of them is not known to be right.

    A row whose model was not resident beside the base's has the samples that the base took in turns
    with it (`extra["anchor"]`): those count.
    """
    if base is None or row.gate != "green" or base.gate != "green":
        return None
    beside = row.extra.get("anchor") or {}
    samples = beside["samples_s"] if beside.get("subject") == base.subject else base.samples_s
    return row.median_s / statistics.median(samples) if row.median_s and samples else None


def with_quality(rows: Iterable[Row], evaluations: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows with the figures of `fastfar eval` or `experiment` (--output) of their model and plan.

    A row is an evaluation's where the plan is the same and its model is the evaluated checkpoint.
    Of an experiment the images of seed 0 count, which are equally many for all: FD depends on N.
    """
    figures: dict[str, dict[str, float]] = {}
    for line in evaluations:
        about, samples = line.get("run") or {}, None
        images = line.get("kind") == "images" and not line.get("correlation")
        if images and line.get("place") == "0":
            about, samples = line, line["outcome"]
        else:
            found = (each for each in line.get("rows", ()) if each["kind"] == "samples")
            samples = next(found, None)
        if samples is not None and about.get("plan") is not None:
            names = (line.get("metric", "FD-fashion"), "precision", "recall", "class_agreement")
            known = {name: float(samples[name]) for name in names if samples[name] is not None}
            figures[_joined_by(Path(str(about["checkpoint"])).name, about["plan"])] = known
    return [
        dataclasses.replace(row, quality=figures.get(_joined_by(row.model, row.plan), row.quality))
        for row in rows
    ]


def _joined_by(model: str, plan: Any) -> str:
    return json.dumps([model, plan], sort_keys=True)


# --- tables ----------------------------------------------------------------------------------


def heading(rows: Sequence[Row]) -> str:
    """Machine, versions, commit and date of a run, one line per different one."""
    return "\n".join(dict.fromkeys(_machine(row) for row in rows))


def _machine(row: Row) -> str:
    here = row.environment
    gpu = f"{here['gpu']['name']}; " if here.get("gpu") else ""
    isa = f" ({here['native_isa']})" if here.get("native_isa") else ""
    threads = f"{here.get('threads')} thread{'' if here.get('threads') == 1 else 's'}"
    commit = f"{here.get('commit')}{' with changes' if here.get('dirty') else ''}"
    return (
        f"{gpu}{here.get('cpu')}{isa}, {threads}; torch {here.get('torch')}, "
        f"fastfar {here.get('fastfar')}, commit {commit}; {str(here.get('time'))[:10]}"
    )


def commands(rows: Iterable[Row]) -> list[str]:
    """The commands that made the rows, each once."""
    return list(dict.fromkeys(str(row.environment.get("command")) for row in rows))


def tables(rows: Sequence[Row]) -> list[Table]:
    """All tables that these rows (of one run, see `of_run`) have anything for."""
    images = [row for row in rows if row.op == "image" and row.samples_s]
    ops = [row for row in rows if row.op != "image" and row.samples_s]
    found = [
        latency([row for row in images if row.batch == 1]),
        throughput([row for row in images if row.batch > 1]),
        stages(images),
        work(images),
        single_ops(ops),
        memory(rows),
        what_ran(images),
    ]
    return [table for table in found if table.lines]


def latency(rows: Sequence[Row]) -> Table:
    """One image from label to pixels: time, its parts, ratio to FAR, and the paper's own."""
    base = anchor(rows)
    lines = []
    for row in rows:
        # The paper's times are of published code; the anchor stands where its FAR-H does.
        theirs = PAPER.get(row.model) if row.mode == "as published" or row is base else None
        figures = quantiles(row.samples_s)
        mark = "~" if row.extrapolation else ""
        lines.append(
            (row.title, row.mode, _marked(mark, row.median_s),
             f"{duration(figures['p5_s'])} to {duration(figures['p95_s'])}",
             _marked(mark, median(row.tokens_samples_s)),
             duration(median(row.decode_samples_s)), duration(row.cold_s),
             share(row.share_of_peak), _judged(row, over(row, base)),
             NONE if theirs is None else f"{theirs:.2f} s",
             times(theirs and theirs / PAPER["far_huge"]))
        )  # fmt: skip
    notes = ["time: median to pixels; tokens and decoding: its two parts; cold: the first call"]
    if base is not None:
        notes.append(f"ratio: time over that of {base.title}, in the same run")
    if any(row.extrapolation for row in rows):
        notes.append("~: extrapolated, see what ran")
    if any(row.model in PAPER for row in rows):
        notes.append("paper: its Table 3, batch 1 on an NVIDIA H20, and the ratio to its FAR-H")
    header = ("one image", "mode", "time", "p5 to p95", "tokens", "decoding", "cold", "of peak",
              "ratio", "paper", "paper's ratio")  # fmt: skip
    return Table("Latency", header, tuple(lines), tuple(notes), frozenset({0, 1}),
                 frozenset(i for i, row in enumerate(rows) if row is base))  # fmt: skip


def throughput(rows: Sequence[Row]) -> Table:
    """Several images at a time."""
    lines = [
        (row.title, row.mode, str(row.batch), duration(row.median_s),
         digits(row.images_per_s or 0.0), share(row.share_of_peak), _gate(row))
        for row in rows
    ]  # fmt: skip
    header = ("several images", "mode", "batch", "time", "images/s", "of peak", "gate")
    return Table("Throughput", header, tuple(lines), words=frozenset({0, 1}))


def stages(rows: Sequence[Row]) -> Table:
    """Seconds of each stage, its share of their sum and, where counted, its per cent of peak."""
    rows = [row for row in rows if row.stages_s]
    names = list(dict.fromkeys(name for row in rows for name in row.stages_s))
    lines = []
    for row in rows:
        whole = sum(row.stages_s.values()) or 1.0
        peak, flops = median(row.peak_flops_per_s), row.extra.get("stage_flops") or {}
        cells = []
        for name in names:
            if not (seconds := row.stages_s.get(name)):
                cells.append(NONE)
                continue
            used = f", {share(flops[name] / seconds / peak)} of peak" if (
                peak and flops.get(name)) else ""  # fmt: skip
            cells.append(f"{duration(seconds)} ({100 * seconds / whole:.0f} %{used})")
        lines.append((row.title, str(row.batch), *cells))
    notes = ("from a run of its own, with its share of the sum; of peak: executed FLOP/s over the "
             "median peak of the row",) if lines else ()  # fmt: skip
    return Table("Stages", ("where the time goes", "batch", *names), tuple(lines), notes)


def work(rows: Sequence[Row]) -> Table:
    """Arithmetic as published and as executed, against the peak of the same run."""
    lines = []
    for row in rows:
        counts = row.reference_flops, row.executed_flops
        if row.median_s is None or not any(counts):
            continue
        rates = [rate(count and count / row.median_s) for count in counts]
        lines.append(
            (row.title, str(row.batch), rate(counts[0]), rate(counts[1]), *rates,
             rate(median(row.peak_flops_per_s)), share(row.share_of_peak))
        )  # fmt: skip
    header = ("arithmetic", "batch", "published FLOP", "executed FLOP", "published FLOP/s",
              "executed FLOP/s", "peak of the run", "of peak")  # fmt: skip
    note = "of peak: executed FLOP/s over the peak right before and after each sample, median"
    return Table("Per cent of peak", header, tuple(lines), (note,) if lines else ())


def single_ops(rows: Sequence[Row]) -> Table:
    """Single ops: time, how many times as fast as on PyTorch, share of the peaks, error."""
    plain = {(row.op, row.dtype, row.shape, row.batch): row for row in rows if row.form == "torch"}
    lines = []
    for row in rows:
        slower = over(row, plain.get((row.op, row.dtype, row.shape, row.batch)))
        seconds = row.median_s or float("nan")
        memory_share = row.bytes / seconds / row.bandwidth if row.bytes and row.bandwidth else None
        lines.append(
            (row.op, row.form, row.dtype, row.shape, duration(row.median_s),
             times(slower and 1 / slower), share(row.share_of_peak), share(memory_share),
             NONE if row.error is None else f"{row.error:.1e}", _gate(row))
        )  # fmt: skip
    header = ("op", "form", "dtype", "shape", "time", "over torch", "of peak", "of memory", "error",
              "gate")  # fmt: skip
    return Table("Ops", header, tuple(lines), words=frozenset({0, 1, 2, 3}))


def memory(rows: Sequence[Row]) -> Table:
    """Highest use."""
    rows = [row for row in rows if row.peak_memory_bytes is not None]
    lines = tuple(
        (row.title, str(row.batch), size(row.peak_memory_bytes), row.memory_note) for row in rows
    )
    header = ("memory", "batch", "highest", "how measured")
    return Table("Memory", header, lines, words=frozenset({0, 3}))


def what_ran(rows: Sequence[Row]) -> Table:
    """How each form ran and what is exact about it: once per title."""
    lines = []
    for row in {row.title: row for row in rows}.values():
        about = [row.ways, f"extrapolated: {row.extrapolation}" if row.extrapolation else ""]
        about += ["random weights" if row.random_weights else "", row.note]
        lines.append(
            (row.title, row.mode, row.dtype, str(row.steps or NONE),
             NONE if row.num_parameters is None else f"{row.num_parameters / 1e6:.1f} M",
             NONE if row.error is None else f"{row.error:.1e}",
             NONE if row.error_limit is None else f"{row.error_limit:.1e}",
             "; ".join(text.rstrip(".") for text in about if text) or NONE)
        )  # fmt: skip
    header = ("what ran", "mode", "dtype", "outer steps", "parameters", "error", "allowed", "how")
    notes = dict.fromkeys(f"gate: {row.gate_note}" for row in rows if row.gate_note)
    return Table("What ran", header, tuple(lines), tuple(notes), frozenset({0, 1, 2, 7}))


def comparison(found: Sequence[Comparison]) -> Table:
    """Verdicts of `compare`, one line per measurement."""
    lines: list[tuple[str, ...]] = []
    notes: list[str] = []
    for each in found:
        row, ratio = each.row, each.ratio
        name = f"{row.title}, batch {row.batch}" if row.op == "image" else row.subject
        interval = NONE if ratio is None else f"{ratio.low:.3f} to {ratio.high:.3f}"
        lines.append(
            (name, *(duration(side.median_s if side else None) for side in (each.a, each.b)),
             NONE if each.raw is None else f"{each.raw:.3f}",
             NONE if ratio is None else f"{ratio.estimate:.3f}", interval,
             NONE if ratio is None else "peak" if each.by_peak else "clock", each.text)
        )  # fmt: skip
        notes += each.remarks
    judged = [each for each in found if each.ratio is not None]
    if judged and judged[0].ratio is not None:
        level, margin = judged[0].ratio.confidence, judged[0].margin
        notes.append(
            f"B / A: time of B over A as it is, and set against the peak of the same moment, with "
            f"its {100 * level:.0f} % interval; a verdict needs all of it beyond "
            f"{100 * margin:.0f} %. Without any difference, chance alone would make at most "
            f"{digits((1 - level) * len(judged))} of {len(judged)} verdicts."
        )
    header = ("A beside B", "A", "B", "B / A", "estimate", "interval", "by", "B is")
    words = frozenset({0, 6, 7})
    return Table("Comparison", header, tuple(lines), tuple(dict.fromkeys(notes)), words)


def _gate(row: Row) -> str:
    return "red: wrong result" if row.gate == "red" else row.gate


def _marked(mark: str, seconds: float | None) -> str:
    return NONE if seconds is None else mark + duration(seconds)


def _judged(row: Row, ratio: float | None) -> str:
    return _gate(row) if row.gate == "red" else times(ratio)


# --- files -----------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """Tables of one run with machine and commands, ready for a page."""
    code = "\n".join(f"    {command}" for command in commands(rows))
    return "\n\n".join([heading(rows), code, *map(as_markdown, tables(rows))]) + "\n"


def write_csv(path: str | Path, rows: Sequence[Row]) -> None:
    """All rows with one column per figure; those of the environment as "environment.cpu" etc.

    Lists stay JSON. OSError where the file cannot be written.
    """
    flat = []
    for row in rows:
        values: dict[str, Any] = {}
        for name, value in row.to_dict().items():
            if isinstance(value, Mapping) and name != "plan":
                values |= {f"{name}.{key}": each for key, each in value.items()}
            else:
                values[name] = value
        flat.append(
            {
                name: json.dumps(value) if isinstance(value, (dict, list, tuple)) else value
                for name, value in values.items()
            }
        )
    columns = list(dict.fromkeys(name for values in flat for name in values))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flat)
