"""Labels beside the points of a picture, without covering anything."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def place_labels(axes: Axes, labels: dict[str, tuple[float, float]]) -> None:
    """Each label beside its point, where it covers neither mark, line nor label; else further off.

    Tried are sixteen directions at growing distance; from the third distance on a thin line leads
    to the label, which should cross no label either. What finds no room is put right of its point.

    Args:
        axes: with everything else drawn; its limits must not change any more.
        labels: text -> point, in data.
    """
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # settles the layout
    legend = axes.get_legend()
    placed = [text.get_window_extent() for text in axes.texts]  # words, in pixels
    placed += [legend.get_window_extent()] if legend is not None else []
    marks = []
    for line in axes.lines:
        corners = axes.transData.transform(line.get_xydata())
        half = line.get_markersize() * 0.7 if line.get_marker() not in ("None", "", None) else 1.0
        for start, end in itertools.pairwise([*corners, corners[-1]]):
            marks += _along(start, end, half)
    area = axes.get_window_extent()
    around = [(1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)]
    around += [(x, y) for y in (0.7, -0.7, 0.4, -0.4, 1, -1) for x in (0.7, -0.7)]
    places = [(d * x, d * y) for d in (7, 13, 20, 28, 38, 50, 64, 80, 100, 120) for x, y in around]
    for name, point in sorted(labels.items(), key=lambda item: -item[1][1]):
        probe = axes.text(*point, name, fontsize=8)
        words = probe.get_window_extent()
        probe.remove()
        x, y = axes.transData.transform(point)
        # How bad a place is -> the first such place.
        found: dict[int, tuple[float, float, Any, list[Any]]] = {}
        for dx, dy in places:
            # The label begins, is centred or ends at the offset, which is in points.
            to_x, to_y = x + dx * figure.dpi / 72, y + dy * figure.dpi / 72
            left = to_x - words.width * (0.5 - 0.5 * ((dx > 0) - (dx < 0)))
            bottom = to_y - words.height * (0.5 - 0.5 * ((dy > 0) - (dy < 0)))
            box = Bbox.from_bounds(left, bottom, words.width, words.height)
            leader = _along((x, y), (to_x, to_y), 1.0) if max(abs(dx), abs(dy)) > 13 else []
            inside = area.x0 < box.x0 and box.x1 < area.x1 and area.y0 < box.y0 and box.y1 < area.y1
            covers = any(box.overlaps(each) for each in [*placed, *marks])
            crosses = any(part.overlaps(each) for part in leader for each in placed)
            found.setdefault(2 * (covers or not inside) + crosses, (dx, dy, box, leader))
            if 0 in found:
                break
        dx, dy, box, leader = found[min(found)]
        placed.append(box)
        marks += leader
        look = {"arrowstyle": "-", "color": "#b0b0b0", "linewidth": 0.6, "shrinkB": 3}
        axes.annotate(
            name, point, xytext=(dx, dy), textcoords="offset points", fontsize=8,
            ha=("center", "left", "right")[(dx > 0) - (dx < 0)],
            va=("center", "bottom", "top")[(dy > 0) - (dy < 0)],
            arrowprops=look if leader else None,
        ).set_in_layout(False)  # fmt: skip


def _along(start: Sequence[float], end: Sequence[float], half: float) -> list[Any]:
    """Squares of 2 `half` pixels along a line, four pixels apart."""
    from matplotlib.transforms import Bbox

    (x0, y0), (x1, y1) = start, end
    parts = max(1, round(max(abs(x1 - x0), abs(y1 - y0)) / 4))
    centres = [(x0 + (x1 - x0) * i / parts, y0 + (y1 - y0) * i / parts) for i in range(parts)]
    return [Bbox.from_bounds(x - half, y - half, 2 * half, 2 * half) for x, y in centres]
