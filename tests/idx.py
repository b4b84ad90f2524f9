"""A tiny IDX writer, and a synthetic data set in Fashion-MNIST's files."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def write_idx(path: Path, array: npt.NDArray[Any]) -> None:
    """Unsigned bytes as IDX, compressed where the name ends in .gz."""
    head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    content = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion_mnist(
    folder: Path, train: int = 40, test: int = 40, compressed: bool = True
) -> dict[str, tuple[Bytes, Bytes]]:
    """The four files with random images whose labels are 0, 1, ..., 9, 0, ...

    Each class has a bright row of its own, so classes differ.
    """
    rng = np.random.default_rng(0)
    result: dict[str, tuple[Bytes, Bytes]] = {}
    suffix = ".gz" if compressed else ""
    for split, prefix, count in (("train", "train", train), ("test", "t10k", test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 100, (count, 28, 28)).astype(np.uint8)
        images[np.arange(count), 2 * labels + 3] = 250
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
        result[split] = images, labels
    return result
