"""Grids, strips, animations and their files."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import tiny_pipeline

from fastfar.pictures import decode_levels, level_strip, make_grid, save_animation, save_png


def grey(value: int, size: tuple[int, int] = (3, 2)) -> Image.Image:
    return Image.new("L", size, value)


def test_a_grid_is_laid_out_by_rows() -> None:
    grid = make_grid([[grey(10), grey(20)], [grey(30)]], scale=2, gap=1)
    assert grid.mode == "L" and grid.size == (2 * 6 + 1, 2 * 4 + 1)
    pixels = np.asarray(grid)
    assert (pixels[:4, :6] == 10).all() and (pixels[:4, 7:] == 20).all()
    assert (pixels[5:, :6] == 30).all()
    assert (pixels[4] == 255).all() and (pixels[:, 6] == 255).all()  # the gaps
    assert (pixels[5:, 7:] == 255).all()  # the short row


def test_one_colour_image_makes_a_colour_grid() -> None:
    grid = make_grid([[grey(7), Image.new("RGB", (3, 2), (1, 2, 3))]], gap=0)
    assert grid.mode == "RGB" and grid.size == (6, 2)
    assert grid.getpixel((0, 0)) == (7, 7, 7) and grid.getpixel((5, 1)) == (1, 2, 3)


def test_nearest_keeps_pixels_square_and_bicubic_does_not() -> None:
    image = Image.fromarray(np.array([[0, 200]], dtype=np.uint8))
    nearest = np.asarray(make_grid([[image]], scale=4))
    assert nearest.tolist() == [[0] * 4 + [200] * 4] * 4
    bicubic = np.asarray(make_grid([[image]], scale=4, resample="bicubic"))
    assert bicubic.shape == nearest.shape and len(set(bicubic[0].tolist())) > 2


def test_labels_stand_beside_the_rows() -> None:
    rows = [[grey(0, (16, 16))], [grey(0, (16, 16))]]
    plain = make_grid(rows, scale=2)
    labelled = make_grid(rows, scale=2, labels=["", "ankle boot"])
    margin = labelled.width - plain.width
    assert margin > 20 and labelled.height == plain.height
    pixels = np.asarray(labelled)
    assert (pixels[:, margin:] == np.asarray(plain)).all()
    assert (pixels[:32, :margin] == 255).all() and (pixels[34:, :margin] < 128).any()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "no images"),
        ([[], []], {}, "no images"),
        ([[grey(0), grey(0, (2, 2))]], {}, "one size"),
        ([[grey(0)]], {"scale": 0}, "scale"),
        ([[grey(0)]], {"gap": -1}, "gap"),
        ([[grey(0)]], {"resample": "sharp"}, "resample"),
        ([[grey(0)]], {"labels": ["a", "b"]}, "2 labels for 1 rows"),
    ],
)
def test_wrong_grids(rows: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_grid(rows, **options)


def test_a_strip_goes_from_the_first_level_to_the_last() -> None:
    levels = [[grey(10), grey(11)], [grey(20), grey(21)], [grey(30), grey(31)]]
    pixels = np.asarray(level_strip(levels, gap=0))
    assert pixels[::2, ::3].tolist() == [[10, 20, 30], [11, 21, 31]]
    with pytest.raises(ValueError, match="same images"):
        level_strip([[grey(1)], [grey(1), grey(2)]])
    with pytest.raises(ValueError, match="no images"):
        level_strip([])


@pytest.mark.parametrize("channels", [1, 3])
def test_levels_are_decoded_by_the_pipeline(channels: int) -> None:
    pipe = tiny_pipeline(channels)
    latents = [torch.full((2, channels, 8, 8), value) for value in (-9.0, 0.5, 9.0)]
    levels = decode_levels(pipe, latents)
    assert [len(images) for images in levels] == [2, 2, 2]
    assert levels[0][1].mode == ("L" if channels == 1 else "RGB")
    values = [np.asarray(images[0]) for images in levels]
    assert (values[0] == 0).all() and (values[1] == 128).all() and (values[2] == 255).all()


def test_png_is_exact_and_makes_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.png"
    image = Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20))
    save_png(path, image)
    with Image.open(path) as stored:
        assert stored.format == "PNG" and (np.asarray(stored) == np.asarray(image)).all()
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_a_full_disk_keeps_the_old_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    save_png(path, grey(1))
    before = path.read_bytes()

    def full(self: Image.Image, file: Path, **_: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    for write in (
        lambda: save_png(path, grey(2)),
        lambda: save_animation(tmp_path / "a.gif", [grey(1), grey(2)]),
    ):
        with pytest.raises(OSError, match="No space left") as error:
            write()
        assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".apng", ".png"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_animations_show_every_level(tmp_path: Path, suffix: str, mode: str) -> None:
    frames = [grey(value, (8, 8)).convert(mode) for value in (0, 100, 250)]
    path = tmp_path / f"levels{suffix}"
    save_animation(path, frames, seconds=0.2, last_seconds=1.0)
    with Image.open(path) as stored:
        assert stored.n_frames == 3 and stored.size == (8, 8)
        shown, durations = [], []
        for number in range(3):
            stored.seek(number)
            stored.load()
            shown.append(np.asarray(stored.convert("L")).mean())
            durations.append(stored.info["duration"])
    assert shown == pytest.approx([0, 100, 250], abs=3)
    if suffix != ".webp":  # whose reader counts from the start
        assert durations == [200, 200, 1000]


@pytest.mark.parametrize(
    ("name", "frames", "options", "message"),
    [
        ("a.mp4", [grey(1)], {}, r"one of.*\.gif"),
        ("a.gif", [], {}, "no frames"),
        ("a.gif", [grey(1), grey(1, (9, 9))], {}, "one size"),
        ("a.gif", [grey(1)], {"seconds": 0.0}, "positive"),
    ],
)
def test_wrong_animations(
    tmp_path: Path, name: str, frames: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save_animation(tmp_path / name, frames, **options)
    assert list(tmp_path.iterdir()) == []
