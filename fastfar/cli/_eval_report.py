"""The tables of `fastfar eval`: every figure with its N, extractor and reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastfar.evaluation import METRIC

PUBLISHED_COUNT = 50_000


def fashion_report(result: dict[str, Any]) -> str:
    """Of `fastfar.evaluation.evaluate`."""
    head = ("set", "kind", "N", METRIC, "precision", "recall", "agreement")
    lines = []
    for row in result["rows"]:
        agreement = row["class_agreement"]
        lines.append(
            (
                row["name"],
                row["kind"],
                f"{row['count']:,}",
                f"{row[METRIC]:.4g}",
                f"{row['precision']:.3f}",
                f"{row['recall']:.3f}",
                "unknown" if agreement is None else f"{agreement:.3f}",
                row["extractor"],
                row["reference"],
            )
        )
    text = [_table((*head, "extractor", "reference"), lines, numbers=range(2, 7))]
    for name, floor in result["fd_over_floor"].items():
        mean = result["fd_over_class_mean"][name]
        if floor is not None and mean is not None:
            text.append(
                f"\n{METRIC} of {name} is {floor:.3g} x the floor and {mean:.3g} x the class-mean "
                "image's."
            )
    text.append(
        f"{METRIC} is no ImageNet FID: it compares only with the same extractor, reference and N. "
        f"The extractor's own accuracy on real test images is {result['extractor_accuracy']:.3f}."
    )
    return "\n".join(text)


def published_report(result: dict[str, Any]) -> str:
    """Of figures on Inception's features."""
    metric = result["metric"]
    head = ("set", "N", metric, "inception score", "precision", "recall", "extractor", "reference")
    lines = [
        (
            row["name"],
            f"{row['count']:,}",
            f"{row[metric]:.4g}",
            f"{row['inception_score']:.4g} +- {row['inception_score_deviation']:.2g}",
            "unknown" if row["precision"] is None else f"{row['precision']:.3f}",
            "unknown" if row["recall"] is None else f"{row['recall']:.3f}",
            row["extractor"],
            row["reference"],
        )
        for row in result["rows"]
    ]
    text = [_table(head, lines, numbers=range(1, 6)), ""]
    if any(row["precision"] is None for row in result["rows"]):
        text.append(
            "Precision and recall need real images, which this reference lacks: use the reference "
            "batch of guided-diffusion."
        )
    if any(row["count"] != PUBLISHED_COUNT for row in result["rows"]):
        text.append(
            f"Published figures are of {PUBLISHED_COUNT:,} samples; fewer give a higher {metric}."
        )
    if metric != "FID":
        text.append("These are not the published Inception weights: this is no FID.")
    return "\n".join(text).rstrip()


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], numbers: range) -> str:
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *lines)
    )
