"""From a picture of any size to the square that a model is trained on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MODES = {"RGB": 3, "L": 1}


@dataclass(frozen=True)
class Transform:
    """Centre crop to size x size pixels; mirroring is left to `Examples.take`.

    The picture is halved by box averages while its shorter side is at least 2 * size, then scaled
    (bicubic) so that the shorter side is `size`, and the middle is cut out; smaller ones grow. That
    is the preparation of the published models and of their reference statistics.

    Attributes:
        size: pixels along a side.
        mode: "RGB" or "L" (grey); pictures of other kinds are converted.

    Raises:
        ValueError: size is not positive or the mode is unknown.

    Source: Dhariwal and Nichol, arXiv 2105.05233 (guided diffusion); MAR, arXiv 2406.11838.
    """

    size: int
    mode: str = "RGB"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {self.size}")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {tuple(MODES)}, got {self.mode!r}")

    @property
    def channels(self) -> int:
        """3 for "RGB", 1 for "L"."""
        return MODES[self.mode]

    def __call__(self, picture: Image.Image) -> Tensor:
        """uint8 (C, size, size)."""
        picture = picture.convert(self.mode)
        while min(picture.size) >= 2 * self.size:
            picture = picture.resize(
                (picture.width // 2, picture.height // 2), Image.Resampling.BOX
            )
        scale = self.size / min(picture.size)
        width, height = (max(round(side * scale), self.size) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        pixels = np.array(picture)[top : top + self.size, left : left + self.size]
        pixels_HWC = torch.from_numpy(pixels.copy()).reshape(self.size, self.size, -1)
        return pixels_HWC.permute(2, 0, 1).contiguous()

    def to_dict(self) -> dict[str, Any]:
        """{"crop": "centre", "size": ..., "mode": ...}."""
        return {"crop": "centre", **dataclasses.asdict(self)}
