"""Pictures of made-up rows: what must be in them is, labels cover nothing, same rows same file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from command import Captured, fails
from example_rows import ops, row, table3
from PIL import Image

from fastfar import backend, cli
from fastfar.bench import plots, rows

pytest.importorskip("matplotlib", reason="needs matplotlib (the extra bench)")


def texts(figure: Any) -> list[str]:
    """All that is written in a picture."""
    figure.draw_without_rendering()
    found = [figure._suptitle.get_text(), figure._supxlabel.get_text()]
    for axes in figure.axes:
        found += [text.get_text() for text in axes.texts]
        found += [label.get_text() for label in axes.get_yticklabels()]
    return found


def test_latency() -> None:
    figure = plots.latency(table3())
    assert figure is not None
    (axes,) = figure.axes
    found = texts(figure)
    assert axes.get_xscale() == "log"
    bars = axes.patches
    ends = [bar.get_x() + bar.get_width() for bar in bars]
    assert ends == sorted(ends, reverse=True) and len(bars) == len(table3())
    assert ends == pytest.approx(sorted((row.median_s for row in table3()), reverse=True))
    for text in ("MAR-H as published", "175 s", "56.7 x", "1.00 x", "FAR-H native, T = 40..100"):
        assert text in found, text
    assert sum(bar.get_hatch() is not None for bar in bars) == 2  # MAR was extrapolated
    assert "x: over FAR-H native, T = 40..100" in found[1] and "Example CPU" in found[1]


def test_a_wrong_result_is_not_drawn() -> None:
    red = row("var_d24/published", title="VAR", error=0.5)
    assert plots.latency([red]) is None
    figure = plots.latency([red, row()])
    assert figure is not None and "VAR" not in texts(figure)


def test_stages() -> None:
    figure = plots.stages(table3())
    assert figure is not None
    found = texts(figure)
    assert "53 %" in found and "3.02 s" in found
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert sum(widths) == pytest.approx(len(table3()))


def test_roofline() -> None:
    float32 = [dataclasses.replace(each, dtype="float32") for each in ops()[:2]]
    figure = plots.roofline([*ops(), *float32])
    assert figure is not None
    assert len(figure.axes) == 2  # a panel per dtype
    found = texts(figure)
    for name in ("denoise_loop", "attention", "groupnorm_silu", "bfloat16 peak, 4.00 TFLOP/s"):
        assert name in found, name
    assert "22.0 GB/s" in found[1]
    roof = figure.axes[0].lines[0].get_xydata()
    assert roof[1] == pytest.approx((4e12 / 22e9, 4e12)) and roof[2][1] == 4e12
    # No label on another one.
    from matplotlib.text import Text

    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert not any(a.overlaps(b) for a, b in pairs)


def test_quality() -> None:
    found = [
        row(f"demo/native/{steps}", seconds, plan_name=f"T = {steps}", mode=mode,
            quality={"FD-fashion": distance, "recall": 1.0 / distance})
        for steps, seconds, mode, distance in (
            (4, 0.1, "approximate", 14.0), (16, 0.2, "exact", 3.3), (100, 1.2, "exact", 3.0)
        )
    ]  # fmt: skip
    figure = plots.quality([*found, row()])
    assert figure is not None
    seen = texts(figure)
    assert {"T = 4", "T = 16", "T = 100"} <= set(seen) and seen[0] == "Quality over latency"
    assert [axes.get_ylabel() for axes in figure.axes] == ["FD-fashion", "recall"]
    assert "hollow: approximate" in seen[1]


def test_files(tmp_path: Path) -> None:
    """Those that there are rows for; the same bytes from the same rows."""
    files = plots.save_all([*table3()[-2:], *ops()[:2]], tmp_path / "a")
    assert [path.name for path in files] == ["latency.png", "stages.png", "roofline.png"]
    for path in files:
        with Image.open(path) as image:
            assert image.width > 1200 and len(image.convert("RGB").getcolors(1 << 20) or ()) > 20
    (again,) = plots.save_all([row()], tmp_path / "b", "svg")
    first = again.read_bytes()
    plots.save_all([row()], tmp_path / "b", "svg")
    assert again.name == "latency.svg" and again.read_bytes() == first


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.save_all([row(batch=8)], tmp_path)
    path = tmp_path / "x.jsonl"
    rows.append(path, [row()])
    assert cli.main(["bench", "report", str(path), "--plots", str(tmp_path / "plots")]) == 0
    assert "latency.png" in capsys.readouterr().err
    monkeypatch.setattr(backend, "_package_reason", lambda name: f"{name} is not installed")
    message = fails(capsys, "bench", "report", str(path), "--plots", str(tmp_path))
    assert "--plots" in message and "not installed" in message
