"""Images in memory, and what every kind of training data gives: `Examples`.

Legend: B image, C channel, H height, W width of an image (pixels), M images of a data set.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fastfar.tokenizer import KLVAE, PixelTokenizer


class Examples(Protocol):
    """What a training run takes: numbered images, or latents of images, with class labels.

    `take` may be called from worker processes, so an object of this kind can be pickled.
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in label order."""
        ...

    @property
    def labels(self) -> Tensor:
        """int64 (M,)."""
        ...

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of what `take` gives."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the contents, ready for JSON: equal for equal data, else different."""
        ...

    @property
    def tokenizer(self) -> PixelTokenizer | KLVAE | None:
        """What made the latents that `take` gives; None where it gives images in [-1, 1]."""
        ...

    def __len__(self) -> int:
        """M."""
        ...

    def take(
        self, rows_B: Tensor, flip_B: Tensor | None = None, seed_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1] or scaled latents, float32 (B, C, H, W), and labels int64 (B,).

        Args:
            rows_B: int64 row numbers.
            flip_B: bool, which of them are mirrored left to right; None means none.
            seed_B: int64, seeds of what is random in an example, which is the draw from a latent's
                posterior; None takes the posterior's mean. Images have nothing random.
        """
        ...

    def pixel_statistics(self) -> tuple[float, float]:
        """Mean and standard deviation of all pixels that `take` gives.

        Raises:
            ValueError: it gives latents.
        """
        ...


@dataclass(frozen=True)
class ImageDataset:
    """``images`` uint8 (B, H, W) or (B, C, H, W), ``labels`` int64 (B,), ``class_names`` in label
    order."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    tokenizer: ClassVar[None] = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        shape = tuple(self.images.shape[1:])
        return shape if len(shape) == 3 else (1, *shape)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Number and shape of the images and a SHA-256 of images and labels (12 digits)."""
        digest = hashlib.sha256(self.images.contiguous().numpy().tobytes())
        digest.update(self.labels.contiguous().numpy().tobytes())
        return {
            "type": "images",
            "count": len(self),
            "shape": list(self.image_shape),
            "classes": self.num_classes,
            "digest": digest.hexdigest()[:12],
        }

    def take(
        self, rows_B: Tensor, flip_B: Tensor | None = None, seed_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) as float32 x / 127.5 - 1, in [-1, 1], and labels (B,) of rows."""
        images = self.images[rows_B].view(-1, *self.image_shape)
        return to_unit(mirror(images, flip_B)), self.labels[rows_B]

    def pixel_statistics(self) -> tuple[float, float]:
        """Mean and standard deviation of all pixels as ``take`` gives them, in float64.

        Counts the 256 values, so that no copy of the images in floating point is made.
        """
        return byte_statistics(torch.bincount(self.images.flatten(), minlength=256))

    def balanced_rows(self, count: int, seed: int = 0) -> Tensor:
        """Row numbers (count,) of random images, none twice, as equally many per class as can be.

        Deterministic in ``seed``.  Raises ValueError where a class has too few images.
        """
        labels = balanced_labels(count, self.num_classes)
        wanted = torch.bincount(labels, minlength=self.num_classes)
        generator = torch.Generator().manual_seed(seed)
        picked = []
        for label, number in enumerate(wanted.tolist()):
            rows = torch.nonzero(self.labels == label).flatten()
            if len(rows) < number:
                raise ValueError(
                    f"{count} class-balanced images need {number} of class {label} "
                    f"({self.class_names[label]!r}), but there are {len(rows)}: ask for fewer"
                )
            picked.append(rows[torch.randperm(len(rows), generator=generator)[:number]])
        return torch.cat(picked)

    def balanced(self, count: int, seed: int = 0) -> ImageDataset:
        """The images of ``balanced_rows``."""
        rows = self.balanced_rows(count, seed)
        return ImageDataset(self.images[rows], self.labels[rows], self.class_names)


def balanced_labels(count: int, num_classes: int = 10) -> Tensor:
    """Labels 0, 1, ..., num_classes - 1, 0, 1, ... of length ``count``; int64 (count,)."""
    if count < 1:
        raise ValueError(f"the number of images is {count}: it must be at least 1")
    return torch.arange(count, dtype=torch.int64) % num_classes


def mirror(images_BCHW: Tensor, flip_B: Tensor | None) -> Tensor:
    """The images, those of ``flip_B`` (bool) mirrored left to right; None means none."""
    if flip_B is None:
        return images_BCHW
    return torch.where(flip_B[:, None, None, None], images_BCHW.flip(-1), images_BCHW)


def in_batches(rows_M: Tensor, size: int) -> list[Tensor]:
    """Consecutive parts of `size` rows, the last one perhaps shorter."""
    if size < 1:
        raise ValueError(f"the batch size must be at least 1, got {size}")
    return [rows_M[first : first + size] for first in range(0, len(rows_M), size)]


def to_unit(images: Tensor) -> Tensor:
    """Bytes 0..255 -> float32 in [-1, 1]: x / 127.5 - 1, same shape."""
    return images.float() / 127.5 - 1.0


def to_bytes(images: Tensor) -> Tensor:
    """Inverse of `to_unit`: uint8 round((x + 1) * 127.5), clamped, same shape."""
    return images.float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def byte_statistics(counts_V: Tensor) -> tuple[float, float]:
    """Mean and standard deviation, in float64, of x / 127.5 - 1 from the counts (256,) of bytes."""
    count_V = counts_V.double()
    value_V = to_unit(torch.arange(256)).double()
    number = count_V.sum()
    mean = (count_V * value_V).sum() / number
    variance = (count_V * (value_V - mean).square()).sum() / (number - 1)
    return float(mean), float(variance.sqrt())


def to_float(images_BHW: Tensor) -> Tensor:
    """uint8 (B, H, W) -> float32 (B, 1, H, W) in [-1, 1]: x / 127.5 - 1."""
    if images_BHW.dtype != torch.uint8 or images_BHW.ndim != 3:
        raise ValueError(
            f"images must be uint8 of shape (B, H, W), got {images_BHW.dtype} "
            f"{tuple(images_BHW.shape)}"
        )
    return to_unit(images_BHW[:, None])


def to_uint8(images_B1HW: Tensor) -> Tensor:
    """float (B, 1, H, W) in [-1, 1] -> uint8 (B, H, W): round((x + 1) * 127.5), clamped.

    Raises ValueError for another shape, NaN or infinity.
    """
    if images_B1HW.ndim != 4 or images_B1HW.shape[1] != 1:
        raise ValueError(f"images must have shape (B, 1, H, W), got {tuple(images_B1HW.shape)}")
    if not bool(torch.isfinite(images_B1HW).all()):
        raise ValueError("images hold NaN or infinity: the model that made them diverged")
    return to_bytes(images_B1HW[:, 0])
