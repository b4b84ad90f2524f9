"""A training run of a few seconds: a tiny model, and images whose classes differ."""

from __future__ import annotations

from typing import Any

import torch

from fastfar.data import ImageDataset
from fastfar.training import Recipe

TINY_MODEL = {
    "width": 32,
    "encoder_depth": 1,
    "decoder_depth": 1,
    "num_heads": 2,
    "head_depth": 2,
    "head_width": 32,
    "latent_channels": 1,
    "latent_size": 8,
    "patch_size": 2,
    "buffer_size": 2,
    "num_classes": 4,
    "dropout": 0.1,  # its draws, too, must repeat after a resume
}
# The size of Fashion-MNIST's padded images, for the command.
TINY_FASHION = {**TINY_MODEL, "latent_size": 32, "patch_size": 8, "num_classes": 10}


def tiny_recipe(**changes: Any) -> Recipe:
    """Six steps of eight images, float32."""
    values: dict[str, Any] = {
        "model": TINY_MODEL,
        "steps": 6,
        "batch_size": 8,
        "batch_multiplier": 2,
        "lr": 1e-3,
        "warmup_steps": 2,
        "dtype": "float32",
    }
    return Recipe(**{**values, **changes})


def tiny_data(count: int = 20, channels: int | None = None) -> ImageDataset:
    """Images (count, 8, 8), or (count, channels, 8, 8): a bright half that tells the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    images = torch.randint(0, 60, (count, 8, 8), generator=generator, dtype=torch.uint8)
    for row, label in enumerate(labels.tolist()):
        half = images[row] if label < 2 else images[row].T
        half[:4] += 180 if label % 2 else 0
        half[4:] += 0 if label % 2 else 180
    if channels is not None:
        images = images[:, None].expand(-1, channels, -1, -1).contiguous()
    return ImageDataset(images, labels, ("bottom", "top", "right", "left"))
