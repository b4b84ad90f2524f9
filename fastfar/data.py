"""Fashion-MNIST from its four IDX files, padded to 32x32.

Nothing is ever downloaded: the files come from the Debian/Ubuntu package
``dataset-fashion-mnist`` or from a folder of the user's.  The IDX format: two zero bytes, one byte
for the element type (0x08 = uint8), one for the number of dimensions, every dimension as a
big-endian uint32, then the elements in C order.

Legend: B image, H height, W width of an image (pixels).
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DEFAULT_ROOTS = (Path("/usr/share/datasets/fashion-mnist"),)
CLASS_NAMES = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
RAW_SIZE, PADDING = 28, 2
IMAGE_SIZE = RAW_SIZE + 2 * PADDING
_PREFIXES = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class ImageDataset:
    """``images`` uint8 (B, H, W) or (B, C, H, W), ``labels`` int64 (B,), ``class_names`` in label
    order."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

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

    def take(self, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) as float32 x / 127.5 - 1, in [-1, 1], and labels (B,) of rows."""
        images = self.images[rows_B].view(-1, *self.image_shape)
        return images.float() / 127.5 - 1.0, self.labels[rows_B]

    def pixel_statistics(self) -> tuple[float, float]:
        """Mean and standard deviation of all pixels as ``take`` gives them, in float64.

        Counts the 256 values, so that no copy of the images in floating point is made.
        """
        count = torch.bincount(self.images.flatten(), minlength=256).double()
        value = torch.arange(256, dtype=torch.float64) / 127.5 - 1.0
        number = count.sum()
        mean = (count * value).sum() / number
        variance = (count * (value - mean).square()).sum() / (number - 1)
        return float(mean), float(variance.sqrt())

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


def balanced_labels(count: int, num_classes: int = len(CLASS_NAMES)) -> Tensor:
    """Labels 0, 1, ..., num_classes - 1, 0, 1, ... of length ``count``; int64 (count,)."""
    if count < 1:
        raise ValueError(f"the number of images is {count}: it must be at least 1")
    return torch.arange(count, dtype=torch.int64) % num_classes


def load_fashion_mnist(split: str, root: str | os.PathLike[str] | None = None) -> ImageDataset:
    """Fashion-MNIST's ``"train"`` (60,000) or ``"test"`` (10,000) split.

    The 28x28 images are padded by two rows and columns of 0 on each side: uint8 (B, 32, 32), black
    is 0.  ``root`` is a folder with the IDX files, ``.gz`` or plain; None means the folder of the
    distribution's package.

    Raises ValueError for an unknown split and for corrupt, truncated or mismatched files,
    FileNotFoundError (which says what was looked for and how to get it) where there are none.
    """
    if split not in _PREFIXES:
        raise ValueError(f"unknown split {split!r}: choose from {sorted(_PREFIXES)}")
    prefix = _PREFIXES[split]
    image_file = _find(f"{prefix}-images-idx3-ubyte", root)
    label_file = _find(f"{prefix}-labels-idx1-ubyte", root)
    images_BHW = read_idx(image_file, dims=3)
    labels_B = read_idx(label_file, dims=1).long()
    if tuple(images_BHW.shape[1:]) != (RAW_SIZE, RAW_SIZE):
        raise ValueError(
            f"{image_file}: images of {tuple(images_BHW.shape[1:])} pixels, expected "
            f"{(RAW_SIZE, RAW_SIZE)}"
        )
    if len(images_BHW) != len(labels_B):
        raise ValueError(
            f"{image_file} holds {len(images_BHW)} images but {label_file} {len(labels_B)} "
            "labels: the two files do not belong together"
        )
    if len(labels_B) == 0:
        raise ValueError(f"{image_file} holds no images")
    if int(labels_B.max()) >= len(CLASS_NAMES):
        raise ValueError(
            f"{label_file}: label {int(labels_B.max())}, expected 0..{len(CLASS_NAMES) - 1}"
        )
    padded = torch.nn.functional.pad(images_BHW, (PADDING,) * 4)
    return ImageDataset(padded, labels_B, CLASS_NAMES)


def to_float(images_BHW: Tensor) -> Tensor:
    """uint8 (B, H, W) -> float32 (B, 1, H, W) in [-1, 1]: x / 127.5 - 1."""
    if images_BHW.dtype != torch.uint8 or images_BHW.ndim != 3:
        raise ValueError(
            f"images must be uint8 of shape (B, H, W), got {images_BHW.dtype} "
            f"{tuple(images_BHW.shape)}"
        )
    return images_BHW[:, None].float().div_(127.5).sub_(1.0)


def to_uint8(images_B1HW: Tensor) -> Tensor:
    """float (B, 1, H, W) in [-1, 1] -> uint8 (B, H, W): round((x + 1) * 127.5), clamped.

    Raises ValueError for another shape, NaN or infinity.
    """
    if images_B1HW.ndim != 4 or images_B1HW.shape[1] != 1:
        raise ValueError(f"images must have shape (B, 1, H, W), got {tuple(images_B1HW.shape)}")
    if not bool(torch.isfinite(images_B1HW).all()):
        raise ValueError("images hold NaN or infinity: the model that made them diverged")
    return images_B1HW[:, 0].float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def read_idx(path: str | os.PathLike[str], dims: int) -> Tensor:
    """One IDX file of unsigned bytes with ``dims`` dimensions -> uint8 tensor.

    It is gzip-compressed where its name ends in ``.gz``.  Raises ValueError where the header is not
    that of such a file or the data are cut short or too long.
    """
    path = Path(path)
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path}: damaged or truncated gzip file ({error}): get it again"
            ) from error
    head = 4 + 4 * dims
    if len(raw) < head or raw[:4] != bytes((0, 0, 8, dims)):
        raise ValueError(
            f"{path}: not an IDX file of unsigned bytes with {dims} dimension(s): it starts with "
            f"{raw[:4].hex(' ') or 'nothing'}, expected {bytes((0, 0, 8, dims)).hex(' ')}"
        )
    shape = struct.unpack(f">{dims}I", raw[4:head])
    if len(raw) - head != math.prod(shape):
        raise ValueError(
            f"{path}: the header says {shape} = {math.prod(shape)} bytes of data, the file holds "
            f"{len(raw) - head}: truncated or damaged, get it again"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=head).reshape(shape).copy())


def _find(name: str, root: str | os.PathLike[str] | None) -> Path:
    roots = DEFAULT_ROOTS if root is None else (Path(root),)
    for folder in roots:
        for candidate in (folder / f"{name}.gz", folder / name):
            if candidate.is_file():
                return candidate
    folders = " or ".join(str(folder) for folder in roots)
    raise FileNotFoundError(
        f"no {name}.gz or {name} in {folders}: install Fashion-MNIST with "
        "`apt-get install dataset-fashion-mnist` (Debian, Ubuntu), or name a folder that holds its "
        "four IDX files with `--data FOLDER`"
    )
