"""Pictures made from rows alone (matplotlib, the extra `bench`).

    latency    one image, a bar per subject, logarithmic
    roofline   every op: FLOP/s over FLOP per byte, below the peak and the bandwidth of its run
    stages     what share of an image each stage takes
    quality    a figure of merit over latency, for rows that have one

Colours are Okabe and Ito's, which the colour-blind tell apart; shade and fill repeat what colour
says, so that a grey print still reads. Labels stand beside what they name.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfar import backend
from fastfar.bench._labels import place_labels
from fastfar.bench.report import anchor as anchor_of
from fastfar.bench.report import heading, over
from fastfar.bench.rows import Row, quantiles
from fastfar.bench.tables import duration, rate, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, PALE = "#222222", "#767676", "#e4e4e4"
BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
)  # fmt: skip
FAMILIES = {"far": ORANGE, "demo": ORANGE, "var": BLUE, "mar": GREEN, "llamagen": PURPLE}
STAGES = {"transformer": BLUE, "encoder": BLUE, "decoder": SKY, "head": ORANGE, "decode": GREEN,
          "filter": PURPLE, "noise": YELLOW}  # fmt: skip
STYLE: Any = {  # matplotlib types the names of its settings, from some version on
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": INK,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "savefig.dpi": 200,
    "savefig.facecolor": "white",
    "svg.hashsalt": "fastfar",
}
WIDTH = 7.6  # inches
LOOKS = {"native": ("o", ORANGE), "triton": ("o", ORANGE), "torch": ("s", BLUE),
         "autocast": ("^", GREEN), "compile": ("D", PURPLE), "reference": ("v", GREY)}  # fmt: skip


def colour(row: Row) -> str:
    """Of the family of its model."""
    return FAMILIES.get(row.model.split("_")[0], GREY)


def save_all(rows: Sequence[Row], folder: str | Path, suffix: str = "png") -> list[Path]:
    """Every picture that these rows (of one run) have data for, as <name>.<suffix>.

    Returns the files. Raises:
        ValueError: matplotlib is not installed, or there is nothing to draw.
        OSError: the folder cannot be written.
    """
    backend.require_package("matplotlib", "--plots")
    import matplotlib

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    with matplotlib.rc_context(STYLE):
        for name, draw in PICTURES.items():
            figure = draw(rows)
            if figure is not None:
                path = folder / f"{name}.{suffix}"
                dated = {"Date": None} if suffix == "svg" else None  # the same rows, the same file
                figure.savefig(path, bbox_inches="tight", pad_inches=0.12, metadata=dated)
                found.append(path)
    if not found:
        raise ValueError("these rows hold nothing to draw: neither images at batch 1 nor ops")
    return found


def latency(rows: Sequence[Row]) -> Figure | None:
    """Median seconds of one image: a bar per subject, from slow to fast, logarithmic."""
    rows = [row for row in rows if _one_image(row) and row.gate != "red"]
    if not rows:
        return None
    rows.sort(key=lambda row: -(row.median_s or 0.0))
    base = anchor_of(rows)
    figure, (axes,) = _figure(0.31 * len(rows) + 1.15)
    left = min(row.median_s or 1.0 for row in rows) / 2.5
    for y, row in enumerate(rows):
        seconds, figures = row.median_s or 0.0, quantiles(row.samples_s)
        pale = row.mode == "as published"
        axes.barh(y, seconds - left, left=left, height=0.66, linewidth=0, edgecolor="white",
                  color=_pale(colour(row)) if pale else colour(row),
                  hatch="////" if row.extrapolation else None)  # fmt: skip
        axes.plot([figures["p5_s"], figures["p95_s"]], [y, y], color=INK, linewidth=1.0)
        weight = "bold" if row is base else "normal"
        after = (figures["p95_s"], y)
        axes.annotate(duration(seconds), after, xytext=(6, 0), textcoords="offset points",
                      va="center", fontweight=weight)  # fmt: skip
        axes.annotate(times(over(row, base)), after, xytext=(82, 0), textcoords="offset points",
                      va="center", ha="right", fontweight=weight, color=GREY)  # fmt: skip
    _names(axes, rows, base)
    _log_seconds(axes, left, max(max(row.samples_s) for row in rows) * 4)
    axes.grid(axis="x")
    modes = dict.fromkeys(row.mode for row in rows if row.mode != "as published")
    note = ["pale: as published"] if len(modes) < len({row.mode for row in rows}) else []
    note += [f"full: {' or '.join(modes)}"] if modes else []
    note += ["hatched: extrapolated"] if any(row.extrapolation for row in rows) else []
    note += ["line: 5 to 95 %"] + ([f"x: over {base.title}"] if base is not None else [])
    _title(figure, "From a class label to pixels, one image", rows, "; ".join(note))
    return figure


def stages(rows: Sequence[Row]) -> Figure | None:
    """Share of each stage in one image, with its seconds; a bar per subject."""
    rows = [row for row in rows if _one_image(row) and sum(row.stages_s.values()) > 0]
    if not rows:
        return None
    # Those that can be seen.
    names = list(
        dict.fromkeys(
            name
            for row in rows
            for name, seconds in row.stages_s.items()
            if seconds > 0.002 * sum(row.stages_s.values())
        )
    )
    known = [name for name in STAGES if name in names]
    names = known + [name for name in names if name not in known]
    figure, (axes,) = _figure(0.31 * len(rows) + 1.2)
    for y, row in enumerate(rows):
        whole, start = sum(row.stages_s.values()), 0.0
        for name in names:
            part = row.stages_s.get(name, 0.0) / whole
            axes.barh(y, part, left=start, height=0.72, color=STAGES.get(name, GREY),
                      edgecolor="white", linewidth=0.8)  # fmt: skip
            if part > 0.07:
                axes.text(start + part / 2, y, f"{100 * part:.0f} %", ha="center", va="center",
                          color="white", fontsize=8)  # fmt: skip
            start += part
        axes.text(1.012, y, duration(whole), va="center")
    _names(axes, rows, anchor_of(rows))
    axes.set_xlim(0, 1)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    handles = [_swatch(STAGES.get(name, GREY)) for name in names]
    axes.legend(handles, names, ncols=len(names), frameon=False, loc="upper left",
                bbox_to_anchor=(-0.01, 0.0), handlelength=0.9, handletextpad=0.5, borderpad=0.2,
                columnspacing=1.4)  # fmt: skip
    _title(figure, "Where the time of one image goes", rows, "")
    return figure


def roofline(rows: Sequence[Row]) -> Figure | None:
    """FLOP/s of every op over its FLOP per byte, below min(peak, intensity * bandwidth).

    A panel per dtype; a grey line joins the forms of an op at one shape.
    """
    rows = [row for row in rows if row.op != "image" and row.bytes and row.bandwidth
            and row.median_s and row.executed_flops and row.gate != "red"]  # fmt: skip
    if not rows:
        return None
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    forms = list(dict.fromkeys(row.form for row in rows))
    looks = {form: LOOKS.get(form, ("P", YELLOW)) for form in forms}
    bandwidth = statistics.median(row.bandwidth or 0.0 for row in rows)
    figure, panels = _figure(0.9 + 3.7 * len(dtypes), len(dtypes))
    for axes, dtype in zip(panels, dtypes, strict=True):
        _roof(axes, [row for row in rows if row.dtype == dtype], bandwidth, dtype, looks)
    handles = [_dot(*looks[form]) for form in forms]
    panels[0].legend(handles, forms, frameon=False, loc="lower right", handletextpad=0.2)
    panels[-1].set_xlabel("FLOP/byte")
    slope = f"slope: {rate(bandwidth)}B/s, streamed in the same run; grey lines join an op's forms"
    _title(figure, "Ops under the roof of this machine", rows, slope)
    for axes, dtype in zip(panels, dtypes, strict=True):
        labels: dict[str, tuple[float, float]] = {}  # the fastest of each op
        for row in (row for row in rows if row.dtype == dtype):
            labels[row.op] = max(labels.get(row.op, (0.0, 0.0)), _point(row), key=lambda xy: xy[1])
        place_labels(axes, labels)
    return figure


def _roof(
    axes: Axes,
    rows: Sequence[Row],
    bandwidth: float,
    dtype: str,
    looks: dict[str, tuple[str, str]],
) -> None:
    """One panel: the roof, and a mark per row."""
    points = [_point(row) for row in rows]
    peak = statistics.median(
        itertools.chain.from_iterable(row.peak_flops_per_s or (0.0,) for row in rows)
    )
    top = peak or max(y for _, y in points)
    low = min(top / bandwidth, *(x for x, _ in points)) / 3
    high = max(top / bandwidth, *(x for x, _ in points)) * 4
    bottom, ceiling = min(y for _, y in points) / 3, max(top, *(y for _, y in points)) * 2.5
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, ceiling))
    axes.plot([low, top / bandwidth, high], [low * bandwidth, top, top], color=INK, linewidth=1.2)
    if peak:
        axes.annotate(f"{dtype} peak, {rate(peak)}FLOP/s", (high, peak), xytext=(-2, 4),
                      textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row, point in zip(rows, points, strict=True):
        groups.setdefault((row.op, row.shape), []).append(point)
        mark, shade = looks[row.form]
        axes.plot(*point, mark, color=shade, markersize=5.5, zorder=3)
    for group in groups.values():
        axes.plot(*zip(*sorted(group), strict=True), color="#b0b0b0", linewidth=0.8, zorder=2)
    for axis in (axes.xaxis, axes.yaxis):
        _decades(axis)
    axes.set_ylabel("FLOP/s")
    axes.grid(which="major")


def _point(row: Row) -> tuple[float, float]:
    flops, seconds = row.executed_flops or 0, row.median_s or 1.0
    return flops / (row.bytes or 1), flops / seconds


def quality(rows: Sequence[Row]) -> Figure | None:
    """Every figure of merit that all rows have, over the seconds of one image."""
    rows = [row for row in rows if _one_image(row) and row.quality and row.gate != "red"]
    if not rows:
        return None
    metrics = [m for m in rows[0].quality or {} if all(m in (row.quality or {}) for row in rows)]
    names = [row.plan_name or row.title for row in rows]
    if len(set(names)) < len(names):
        names = [row.title for row in rows]
    figure, panels = _figure(1.0 + 2.4 * len(metrics), len(metrics))
    for axes, metric in zip(panels, metrics, strict=True):
        points = [(row.median_s or 0.0, (row.quality or {})[metric]) for row in rows]
        _log_seconds(axes, min(x for x, _ in points) / 1.6, max(x for x, _ in points) * 2)
        highest = max(y for _, y in points)
        spread = highest - min(y for _, y in points) or highest or 1.0
        axes.set_ylim(max(0.0, highest - 2.0 * spread), highest + 0.5 * spread)
        for row, (x, y) in zip(rows, points, strict=True):
            figures, shade = quantiles(row.samples_s), colour(row)
            axes.plot([figures["p5_s"], figures["p95_s"]], [y, y], color=shade, linewidth=1.0)
            fill = "white" if row.mode == "approximate" else shade
            axes.plot(x, y, "o", color=shade, markersize=6, markerfacecolor=fill)
        axes.set_ylabel(metric)
        axes.grid(axis="both")
        place_labels(axes, dict(zip(names, points, strict=True)))
    hollow = any(row.mode == "approximate" for row in rows)
    note = ("full: exact; hollow: approximate; " if hollow else "") + "line: 5 to 95 %"
    _title(figure, "Quality over latency", rows, note)
    return figure


PICTURES: dict[str, Callable[[Sequence[Row]], Any]] = {
    "latency": latency,
    "stages": stages,
    "roofline": roofline,
    "quality": quality,
}


# --- parts -----------------------------------------------------------------------------------


def _one_image(row: Row) -> bool:
    return row.op == "image" and row.batch == 1 and bool(row.samples_s)


def _figure(height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Panels below each other; without pyplot: no window system, no state between pictures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(panels, squeeze=False)[:, 0])


def _title(figure: Figure, text: str, rows: Sequence[Row], note: str) -> None:
    """Title, what the marks mean, and the machine, from the left edge of the picture."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold")
    lines = [line for line in (note, heading(rows).split("\n")[0]) if line]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7, color=GREY)


def _names(axes: Axes, rows: Sequence[Row], strong: Row | None) -> None:
    """Titles of the rows at the left of their bars, the first on top."""
    axes.set_yticks(range(len(rows)), [row.title for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row is strong else "normal")
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _pale(shade: str) -> Any:
    """Two fifths of a colour on white: no grid shines through it."""
    from matplotlib.colors import to_rgb

    return tuple(1 - 0.4 * (1 - part) for part in to_rgb(shade))


def _log_seconds(axes: Axes, low: float, high: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(low, high)
    span = high / low
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 100 else (1, 3)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _seconds(value)))
    axes.tick_params(axis="x", length=2)


def _seconds(value: float) -> str:
    unit, factor = next(
        ((u, f) for u, f in (("s", 1.0), ("ms", 1e3), ("us", 1e6)) if value * f >= 0.999),
        ("ns", 1e9),
    )
    return f"{value * factor:g} {unit}"


def _decades(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _prefixed(value)))
    axis.set_tick_params(length=2)


def _prefixed(value: float) -> str:
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.999 * factor:
            return f"{value / factor:g}{prefix}"
    return f"{value:g}"


def _swatch(shade: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((0, 0), 1, 1, color=shade)


def _dot(mark: str, shade: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker=mark, color=shade, linestyle="none", markersize=5.5)
