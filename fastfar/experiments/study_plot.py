"""A plot of a study from its rows alone: a panel for each figure, a dot for every seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfar import backend
from fastfar._files import atomic_write
from fastfar.bench.plots import BLUE, GREY, ORANGE, STYLE, WIDTH
from fastfar.evaluation import METRIC
from fastfar.experiments.base import Rows
from fastfar.experiments.paper import Study
from fastfar.experiments.study_report import Scores, scores_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = (METRIC, "precision", "recall")


def plot_reason() -> str | None:
    """Why plots cannot be made here; None if they can."""
    return backend.package_reason("matplotlib")


def save_plot(path: Path, study: Study, rows: Rows) -> None:
    """Write a PNG: curves over `Variant.x` where the study has an axis, else a line per variant.

    Raises:
        ValueError: there is nothing to draw, or no matplotlib (`plot_reason`).
        OSError: the place cannot be written.
    """
    found = {name: scores for name, scores in scores_of(study, rows).items() if scores}
    if not found:
        raise ValueError(f"{study.name} has no rows to draw")
    if (reason := plot_reason()) is not None:
        raise ValueError(f"plots need matplotlib: {reason}")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        height = 2.6 if study.axis else 0.24 * len(found) + 1.1
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        panels = figure.subplots(1, len(PANELS), sharey=not study.axis, squeeze=False)[0]
        for axes, panel in zip(panels, PANELS, strict=True):
            if study.axis:
                _curve(axes, study, found, panel)
            else:
                _lines(axes, study, found, panel)
        figure.suptitle(f"{study.name}: {study.question}", fontsize=10)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png")


def _curve(axes: Axes, study: Study, found: Mapping[str, Scores], panel: str) -> None:
    places = {variant.name: variant.x or 0.0 for variant in study.variants}
    axes.plot([places[name] for name in found], _means(found, panel), color=BLUE, linewidth=1.2)
    for name, scores in found.items():
        _dots(axes, [places[name]] * len(scores), _values(scores, panel), name == study.base)
    axes.set(xlabel=study.axis, ylabel=_title(panel), xticks=[places[name] for name in found])
    axes.grid(axis="y")


def _lines(axes: Axes, study: Study, found: Mapping[str, Scores], panel: str) -> None:
    places = range(len(found))
    for y, mean, (name, scores) in zip(places, _means(found, panel), found.items(), strict=True):
        _dots(axes, _values(scores, panel), [y] * len(scores), name == study.base)
        axes.plot([mean], [y], marker="|", markersize=12, color=GREY)
    axes.set(xlabel=_title(panel), yticks=list(places), yticklabels=list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)  # the first on top
    axes.grid(axis="x")


def _dots(axes: Axes, x: Sequence[Any], y: Sequence[Any], base: bool) -> None:
    axes.plot(x, y, "o", markersize=4, alpha=0.8, color=ORANGE if base else BLUE)


def _values(scores: Scores, panel: str) -> list[float]:
    return [score[panel] for score in scores.values()]


def _means(found: Mapping[str, Scores], panel: str) -> list[float]:
    return [statistics.fmean(_values(scores, panel)) for scores in found.values()]


def _title(panel: str) -> str:
    return f"{panel} (lower is better)" if panel == METRIC else panel
