"""The posterior of a variational autoencoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DiagonalGaussian:
    """The encoder's answer: an independent normal distribution for every latent number.

    mean and logvar are (B, C, h, w); logvar is clamped to [-30, 20].
    """

    mean: torch.Tensor
    logvar: torch.Tensor

    @property
    def std(self) -> torch.Tensor:
        """exp(logvar / 2), (B, C, h, w)."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """mean + std * normal noise, (B, C, h, w); drawn on the generator's device."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(
            self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype
        )
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> torch.Tensor:
        """The most likely latent: the mean."""
        return self.mean
