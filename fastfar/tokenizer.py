"""Images <-> the latents a FAR model works on.

A tokenizer has `to_latents`, `to_images` and `to_dict`; there are two: `KLVAE` (KL-16, the one of
the published models) and `PixelTokenizer` (standardised pixels, for small images).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from fastfar._weights import Weights
from fastfar.diagonal_gaussian import DiagonalGaussian
from fastfar.kl_vae import KLVAE, KLVAEConfig, load_kl_vae

__all__ = [
    "KLVAE",
    "DiagonalGaussian",
    "KLVAEConfig",
    "PixelTokenizer",
    "Tokenizer",
    "tokenizer_from_dict",
]


@runtime_checkable
class Tokenizer(Protocol):
    """What the pipeline and the training loop ask of a tokenizer."""

    def to_latents(
        self, images_BCHW: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Latents (B, C, h, w), scaled as FAR expects, of images (B, ., H, W) in [-1, 1]."""
        ...

    def to_images(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Images (B, ., H, W) in [-1, 1] of latents (B, C, h, w)."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain values from which `tokenizer_from_dict` makes the tokenizer again."""
        ...


@dataclass(frozen=True)
class PixelTokenizer:
    """Pixels themselves as latents, standardised: z = (x - mean) / std.

    Attributes:
        mean, std: of the training images in [-1, 1], all channels together.

    Raises:
        ValueError: not finite, or std is not positive.
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(
                f"mean must be finite and std positive, got mean={self.mean}, std={self.std}"
            )

    @property
    def x0_range(self) -> tuple[float, float]:
        """The latents of -1 and of 1: what `SamplingPlan.x0_range` should be."""
        return (-1.0 - self.mean) / self.std, (1.0 - self.mean) / self.std

    def to_latents(
        self, images_BCHW: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """(x - mean) / std, same shape and dtype; nothing is random here."""
        if not images_BCHW.is_floating_point():
            raise TypeError(
                f"images must be floating-point numbers, got {images_BCHW.dtype}; bytes become "
                "images in [-1, 1] by x / 127.5 - 1"
            )
        return (images_BCHW - self.mean) / self.std

    def to_images(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """z * std + mean, clamped to [-1, 1], same shape and dtype."""
        return (latents_BCHW * self.std + self.mean).clamp(-1.0, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """{"type": "pixel", "mean": ..., "std": ...}."""
        return {"type": "pixel", "mean": self.mean, "std": self.std}


def tokenizer_from_dict(
    values: Mapping[str, Any],
    weights: Weights | None = None,
    dtype: torch.dtype | None = None,
) -> PixelTokenizer | KLVAE:
    """Inverse of `to_dict`.

    Args:
        values: {"type": "pixel" | "kl_vae", ...}.
        weights: parameters of a "kl_vae", which a dictionary cannot hold.
        dtype: of those parameters; None keeps them as stored.

    Raises:
        ValueError: unknown type, wrong or missing entries, or a "kl_vae" without weights.
    """
    sizes = dict(values)
    kind = sizes.pop("type", None)
    try:
        if kind == "pixel":
            return PixelTokenizer(**sizes)
        if kind == "kl_vae" and weights is not None:
            return load_kl_vae(weights, KLVAEConfig(**sizes), dtype)
    except TypeError as error:
        raise ValueError(f"wrong entries for a {kind!r} tokenizer, {sizes}: {error}") from error
    if kind == "kl_vae":
        raise ValueError(
            "a 'kl_vae' tokenizer needs its weights: load it with KLVAE.load_official(source), or "
            "load the folder it was saved in"
        )
    raise ValueError(f"unknown tokenizer type {kind!r}; there are 'pixel' and 'kl_vae'")
