"""A tiny pipeline, and a training run of a few seconds on images whose classes differ."""

from __future__ import annotations

from typing import Any

import torch
from formula import fill_by_formula

from fastfar.config import FARConfig
from fastfar.data import ImageDataset
from fastfar.model import FAR
from fastfar.pipeline import FARPipeline
from fastfar.plan import SamplingPlan, cosine_mask_ratios
from fastfar.tokenizer import PixelTokenizer
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


def flat(value: Any) -> dict[str, Any]:
    """Nested dictionaries and lists with one key per leaf."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    result: dict[str, Any] = {}
    for key, entry in items:
        if isinstance(entry, dict | list | tuple):
            result |= {f"{key}.{name}": leaf for name, leaf in flat(entry).items()}
        else:
            result[str(key)] = entry
    return result


def tiny_pipeline(channels: int = 1) -> FARPipeline:
    """Three masked outer steps of two diffusion steps each; images of 8 x 8 pixels."""
    model = FAR(FARConfig.from_dict({**TINY_MODEL, "latent_channels": channels})).eval()
    fill_by_formula(model)
    with torch.no_grad():  # a variance channel far outside [-1, 1] would overflow
        model.head.final_layer.linear.weight *= 0.2
    tokenizer = PixelTokenizer(-0.25, 0.5)
    plan = SamplingPlan(
        levels=(0, 3, 10),
        input_levels=(None, 3, 10),
        guidance_scale=2.0,
        guidance_ramp=(0.0, 0.5, 1.0),
        temperatures=(0.9, 0.9, 1.0),
        diffusion_steps=(2, 2, 2),
        mask_ratios=cosine_mask_ratios(3),
        x0_range=tokenizer.x0_range,
    )
    return FARPipeline(model, tokenizer, plan, ("bottom", "top", "right", "left side"))
