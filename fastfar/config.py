"""Sizes of a FAR model, as data.

Dimension letters used in the names of tensors all over the package (`x_BLD`, `noise_NP`):

=== ========================================== === =======================================
B   images in the batch                        L   tokens per image (grid_size ** 2)
C   channels of the latent                     H   height and width of the latent
P   numbers per token (C * patch_size ** 2)    D   width of the transformer
W   width of the denoising MLP ("head")        N   rows of the head (B * L)
S   outer (frequency) steps of a sampling run  T   diffusion steps of one outer step
K   frequency levels (num_levels)              E   width of one attention head
=== ========================================== === =======================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FILTERS = ("area_bicubic", "fourier")


@dataclass(frozen=True)
class FARConfig:
    """Everything that fixes the shape and the meaning of a FAR model's parameters.

    Attributes:
        width: D, width of the encoder and decoder.
        encoder_depth, decoder_depth: number of transformer blocks in each.
        num_heads: attention heads; divides `width`.
        head_depth, head_width: residual blocks and width W of the denoising MLP.
        latent_channels, latent_size: C and H of the (C, H, H) latent.
        patch_size: p; the token grid has (H / p) ** 2 tokens of C * p * p numbers.
        buffer_size: class-filled positions in front of the tokens.
        num_classes: rows of the class table (1000 in every published file).
        num_levels: K, the number of frequency levels; level K is the unfiltered latent.
        filter: low-pass rule, "area_bicubic" (published) or "fourier" (the paper's second one).
        mlp_ratio: hidden width of the transformer MLP over `width`.
        dropout: probability after attention and projections, in training only.
        num_timesteps: diffusion steps of the training schedule.

    Raises:
        ValueError: a size is not positive, or two sizes do not fit each other.

    Source: FAR, arXiv 2503.05305, section 4.1; key layout of the published checkpoints.
    """

    width: int = 768
    encoder_depth: int = 12
    decoder_depth: int = 12
    num_heads: int = 12
    head_depth: int = 6
    head_width: int = 1024
    latent_channels: int = 16
    latent_size: int = 16
    patch_size: int = 1
    buffer_size: int = 64
    num_classes: int = 1000
    num_levels: int = 16
    filter: str = "area_bicubic"
    mlp_ratio: int = 4
    dropout: float = 0.1
    num_timesteps: int = 1000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                if isinstance(value, bool) or not isinstance(value, int):
                    raise TypeError(f"{field.name} must be an int, got {value!r}")
                if value < (0 if field.name == "buffer_size" else 1):
                    raise ValueError(f"{field.name} must be positive, got {value}")
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} is not a multiple of num_heads {self.num_heads}; "
                "choose a head count that divides the width"
            )
        if self.latent_size % self.patch_size:
            raise ValueError(
                f"latent_size {self.latent_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.filter not in FILTERS:
            raise ValueError(f"filter must be one of {FILTERS}, got {self.filter!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    @property
    def grid_size(self) -> int:
        """Tokens along one side of the image."""
        return self.latent_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """L, tokens per image."""
        return self.grid_size**2

    @property
    def token_dim(self) -> int:
        """P, numbers per token."""
        return self.latent_channels * self.patch_size**2

    @classmethod
    def preset(cls, name: str) -> FARConfig:
        """The configuration called `name`; ValueError lists the names that exist."""
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; there are {sorted(PRESETS)}")
        return PRESETS[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FARConfig:
        """Inverse of `to_dict`; an unknown name is a ValueError."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown FARConfig entries {unknown}; known are {sorted(known)}")
        return cls(**values)


PRESETS: dict[str, FARConfig] = {
    # The published runs: FACTS of the state dicts, not of the paper's table.
    "far_base": FARConfig(),
    "far_large": FARConfig(
        width=1024, encoder_depth=16, decoder_depth=16, num_heads=16, head_depth=3
    ),
    "far_huge": FARConfig(
        width=1280, encoder_depth=20, decoder_depth=20, num_heads=16, head_depth=3
    ),
    # Fashion-MNIST, 32x32 pixels as an 8x8 grid of 4x4-pixel tokens.
    "demo": FARConfig(
        width=192,
        encoder_depth=4,
        decoder_depth=4,
        num_heads=6,
        head_depth=3,
        head_width=320,
        latent_channels=1,
        latent_size=32,
        patch_size=4,
        buffer_size=8,
        num_classes=10,
        dropout=0.0,
    ),
}
