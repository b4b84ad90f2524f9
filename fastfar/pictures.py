"""Grids, strips and animations of sampled images, and writing them to files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from PIL import Image
from torch import Tensor

from fastfar._files import atomic_write

if TYPE_CHECKING:
    from fastfar.pipeline import FARPipeline

RESAMPLING = {"nearest": Image.Resampling.NEAREST, "bicubic": Image.Resampling.BICUBIC}
_ANIMATED = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG", ".apng": "PNG"}


def make_grid(
    rows: Sequence[Sequence[Image.Image]],
    *,
    scale: int = 1,
    resample: str = "nearest",
    gap: int = 2,
    labels: Sequence[str] | None = None,
) -> Image.Image:
    """One picture of rows of equally large images, on white.

    Args:
        rows: images, row by row; a short row leaves its end white.
        scale: whole number of pixels per pixel, in both directions.
        resample: "nearest" (square pixels) or "bicubic".
        gap: white pixels between images, at the final size.
        labels: one text per row, written to its left.

    Returns:
        grey if every image is, else RGB; C columns of width w make C * w * scale + (C - 1) * gap.

    Raises:
        ValueError: no images, images of several sizes, a wrong scale, gap, resample or number of
            labels.
    """
    images = [image for row in rows for image in row]
    if not images:
        raise ValueError("there are no images to put into a grid")
    if len(sizes := {image.size for image in images}) > 1:
        raise ValueError(f"the images of a grid must have one size, got {sorted(sizes)}")
    if scale < 1 or gap < 0:
        raise ValueError(f"scale must be at least 1 and gap at least 0, got {scale} and {gap}")
    if resample not in RESAMPLING:
        raise ValueError(f"resample must be one of {sorted(RESAMPLING)}, got {resample!r}")
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"got {len(labels)} labels for {len(rows)} rows")
    mode = "L" if all(image.mode in ("L", "1") for image in images) else "RGB"
    width, height = (side * scale for side in images[0].size)
    columns = max(len(row) for row in rows)
    size = (columns * (width + gap) - gap, len(rows) * (height + gap) - gap)
    grid = Image.new(mode, size, "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            cell = image.convert(mode).resize((width, height), RESAMPLING[resample])
            grid.paste(cell, (x * (width + gap), y * (height + gap)))
    return grid if labels is None else _with_labels(grid, labels, height, gap)


def _with_labels(
    grid: Image.Image, labels: Sequence[str], height: int, gap: int
) -> Image.Image:
    """The grid with a white margin on its left that holds one text per row."""
    from PIL import ImageDraw, ImageFont  # not needed, and not loaded, for a plain grid

    size = min(max(height // 4, 10), 24)
    try:
        font = ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size only
        font = ImageFont.load_default()
    margin = round(max(font.getbbox(text)[2] for text in labels)) + 2 * size // 2
    labelled = Image.new(grid.mode, (grid.width + margin, grid.height), "white")
    labelled.paste(grid, (margin, 0))
    draw = ImageDraw.Draw(labelled)
    for row, text in enumerate(labels):
        left, top, right, bottom = font.getbbox(text)
        y = row * (height + gap) + (height - (top + bottom)) / 2
        draw.text((margin - size // 2 - (right - left), y), text, fill=0, font=font)
    return labelled


def decode_levels(pipe: FARPipeline, latents: Iterable[Tensor]) -> list[list[Image.Image]]:
    """The images of the latents (B, C, H, H) of all outer steps: entry [step][image]."""
    return [cast("list[Image.Image]", pipe.decode(latent)) for latent in latents]


def level_strip(
    levels: Sequence[Sequence[Image.Image]],
    *,
    scale: int = 1,
    resample: str = "nearest",
    gap: int = 2,
    labels: Sequence[str] | None = None,
) -> Image.Image:
    """How images come into being: a row per image, a column per outer step, from first to last.

    Args:
        levels: entry [step][image], as `decode_levels` gives it.
        scale, resample, gap, labels: see `make_grid`.

    Raises:
        ValueError: no steps, or not the same number of images at every step; else as `make_grid`.
    """
    if len(counts := {len(images) for images in levels}) > 1:
        raise ValueError(f"every outer step must hold the same images, got {sorted(counts)} images")
    rows = list(zip(*levels, strict=True))
    return make_grid(rows, scale=scale, resample=resample, gap=gap, labels=labels)


def save_png(path: str | os.PathLike[str], image: Image.Image) -> None:
    """Write a PNG file, atomically; makes the folder.

    Raises:
        OSError: the disk is full or the place cannot be written; an old file is intact.
    """
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")


def save_animation(
    path: str | os.PathLike[str],
    frames: Sequence[Image.Image],
    *,
    seconds: float = 0.3,
    last_seconds: float = 1.5,
) -> None:
    """Write an endless animation, atomically: .gif, .webp, or .png / .apng (animated PNG).

    Args:
        path: its suffix says the format.
        frames: images of one size, in order.
        seconds, last_seconds: how long every frame, and the last one, stays.

    Raises:
        ValueError: no frames, frames of several sizes, a duration that is not positive, or a
            suffix of another format.
        OSError: as `save_png`; also where Pillow was built without the format.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _ANIMATED:
        raise ValueError(f"an animation is one of {sorted(_ANIMATED)}, got {os.fspath(path)!r}")
    if not frames:
        raise ValueError("there are no frames to animate")
    if len(sizes := {frame.size for frame in frames}) > 1:
        raise ValueError(f"the frames of an animation must have one size, got {sorted(sizes)}")
    if not (seconds > 0 and last_seconds > 0):
        raise ValueError(f"durations must be positive, got {seconds} and {last_seconds}")
    durations = [round(1000 * seconds)] * (len(frames) - 1) + [round(1000 * last_seconds)]
    first, *others = frames
    with atomic_write(path) as temporary:
        first.save(
            temporary,
            format=_ANIMATED[suffix],
            save_all=True,
            append_images=others,
            duration=durations,
            loop=0,
        )
