"""Tables of an experiment from its rows alone: the prediction beside the outcome, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastfar.evaluation import METRIC
from fastfar.evaluation.equality import POOLED
from fastfar.experiments.base import Part, Row, Rows


def report(experiment: str, parts: Mapping[str, Part], rows: Rows) -> str:
    """Markdown of all parts that have rows."""
    pieces = [f"# Experiment {experiment}"]
    reference = _reference(rows)
    if reference:
        pieces += ["## R", *reference]
    for part in parts.values():
        found = rows.find(experiment=experiment, part=part.name)
        if not found:
            continue
        pieces += [
            f"## {part.name}: {part.question}",
            f"*Prediction.* {part.prediction}",
            f"*Rule.* {part.rule}",
        ]
        diagnosed = (row for row in found if row["kind"] == "diagnostic")
        pieces += [_diagnostic(row) for row in diagnosed]
        tokens = [row for row in found if row["kind"] == "tokens"]
        if tokens:
            pieces += ["Tokens, one outer step swapped (all | varied half):", _tokens(tokens)]
        verdicts = [row for row in found if row["kind"] == "verdict"]
        if verdicts:
            pieces += ["Images:", _images(found, verdicts)]
    return "\n\n".join(pieces) + "\n"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = ["---" if i == 0 else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def _reference(rows: Rows) -> list[str]:
    scores = rows.find(part="R", kind="images")
    if not scores:
        return []
    q = {row["place"]: row["outcome"]["q"] for row in rows.find(part="R", kind="yardstick")}
    lines = [
        [row["place"], *_figures(row["outcome"]), _number(q.get(row["place"]))] for row in scores
    ]
    head = ("seed", "N", METRIC, "precision", "recall", "class agreement", "q")
    return [table(head, lines)]


def _figures(outcome: Row) -> list[str]:
    return [
        f"{outcome['count']:,}",
        f"{outcome[METRIC]:.3f}",
        *(f"{outcome[name]:.3f}" for name in ("precision", "recall", "class_agreement")),
    ]


def _tokens(rows: list[Row]) -> str:
    head = (
        "candidate",
        "outer step",
        "T",
        "ED / floor",
        "mean shift / sd",
        "variance ratio",
        "correlation kept",
        "W1 / floor",
        "passes",
    )
    return table(head, [_token_line(row) for row in rows])


def _token_line(row: Row) -> list[str]:
    subsets = [row["outcome"].get(name) for name in ("all", "varied")]
    first = [row["candidate"], row["place"], str(row["diffusion_steps"])]
    if subsets[0].get("diverged"):
        return [*first, "diverged", "", "", "", "", "no"]
    shown = [metrics for metrics in subsets if metrics is not None]
    cells = [
        _both(shown, "ratio", 2),
        _both(shown, "mean_shift", 3),
        _both(shown, "variance_ratio", 3),
        _both(shown, "correlation_kept", 2),
        " | ".join(f"{m['sliced_w1'] / m['sliced_w1_floor']:.2f}" for m in shown),
    ]
    cells = [cell.replace(" | ", " \\| ") for cell in cells]
    return [*first, *cells, "yes" if subsets[0]["passes"] else "no"]


def _both(metrics: Sequence[Row], name: str, digits: int) -> str:
    return " | ".join("-" if m[name] is None else f"{m[name]:.{digits}f}" for m in metrics)


def _images(rows: list[Row], verdicts: list[Row]) -> str:
    head = ("candidate", "calls", "seed", "N", METRIC, "precision", "recall", "class agreement")
    lines = []
    for verdict in verdicts:
        scores = [
            row
            for row in rows
            if row["kind"] == "images" and row["candidate"] == verdict["candidate"]
        ]
        scores.sort(key=lambda row: (row["place"] == POOLED, row["place"]))
        for row in scores:
            name, calls = row["candidate"], str(row["head_calls"])
            lines.append([name, calls, row["place"], *_figures(row["outcome"]), ""])
        lines[-1][-1] = _verdict(verdict["outcome"])
    return table((*head, "equal to R"), lines)


def _verdict(outcome: Row) -> str:
    if outcome["equal"]:
        return "**yes**"
    worse = "not worse: " if outcome["not_worse"] else ""
    return f"no, {worse}" + "; ".join(outcome["failed"])


def _diagnostic(row: Row) -> str:
    """Outcomes are {place: figure}, {place: [figures]} or {place: {name: figure}}."""
    outcome = row["outcome"]
    lines = []
    for place, value in outcome.items():
        if isinstance(value, Mapping):
            text = ", ".join(f"{name} {_number(x)}" for name, x in value.items())
        elif isinstance(value, list):
            text = ", ".join(map(_number, value))
        else:
            text = _number(value)
        lines.append([place, text])
    return f"{row['place']}:\n\n" + table(("at", "found"), lines)


def _number(value: Any) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{k} {_number(v)}" for k, v in value.items()) + ")"
    if isinstance(value, list):
        return "(" + ", ".join(map(_number, value)) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
