"""What turns images into the numbers that are compared: `Extractor`.

There are two: `FashionClassifier`, which comes with the package, and `Inception`, whose weights are
the user's.  Anything else with these members will do.

Legend: B images of a batch, N images of a set, C channels, H height, W width, F feature, K class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]


class Extractor(Protocol):
    """Features and class logits of images."""

    @property
    def fingerprint(self) -> str:
        """Names kind and weights; printed beside every figure, which compares with no other's."""
        ...

    @property
    def metric(self) -> str:
        """What the Frechet distance on these features is called."""
        ...

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, H, W) or (B, C, H, W) -> float32 features (B, F) and logits (B, K).

        Raises ValueError for images of another kind than it takes.
        """
        ...


@dataclass(frozen=True)
class Features:
    """Of a set of images: ``features`` (N, F) and ``logits`` (N, K), float32, on the CPU."""

    features: Floats
    logits: Floats

    def __len__(self) -> int:
        return len(self.features)


@torch.inference_mode()
def embed_all(extractor: Extractor, batches: Iterable[Tensor], size: int = 100) -> Features:
    """Features of all images of ``batches``, at most ``size`` images at a time.

    Raises ValueError where there are no images.
    """
    parts = [extractor.embed(part) for batch in batches for part in torch.split(batch, size)]
    if not parts:
        raise ValueError("there are no images")
    features, logits = (torch.cat(column).float().cpu() for column in zip(*parts, strict=True))
    return Features(features.numpy(), logits.numpy())
