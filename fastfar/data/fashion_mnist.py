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
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastfar.data.images import ImageDataset

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
