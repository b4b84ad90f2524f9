"""Existing images to be judged, from files.

Images are uint8, (B, H, W) in grey and (B, 3, H, W) in colour.

Legend: B image, H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from fastfar.data import CLASS_NAMES, PADDING, RAW_SIZE
from fastfar.evaluation.samples import unit_to_uint8


def load_images(source: str | os.PathLike[str]) -> tuple[Tensor, Tensor | None]:
    """Images of Fashion-MNIST's kind: uint8 (B, H, W), and labels int64 (B,) where they are known.

    ``source`` is an .npy file (uint8, or float in [0, 1]; the labels are those of a file of the
    same name ending in .labels.npy, if there is one), or a folder of pictures (.png; one folder
    per class, named by its number or name, gives the labels).  28x28 pixels are padded to 32x32.
    """
    path = Path(source)
    if path.is_file():
        images_BHW = next(image_batches(path))
        label_file = path.with_suffix(".labels.npy")
        labels_B = None
        if label_file.is_file():
            labels_B = check_labels(np.load(label_file, allow_pickle=False), len(images_BHW))
        return _padded(images_BHW), labels_B
    images_BHW = torch.cat(list(image_batches(path, channels=1)))
    classes = [_class_of(file.parent.name) for file in _pictures(path)]
    known = [c for c in classes if c is not None]
    return _padded(images_BHW), torch.tensor(known) if len(known) == len(classes) else None


def image_batches(
    source: str | os.PathLike[str], *, channels: int | None = None, size: int = 500
) -> Iterator[Tensor]:
    """The images of a file, all at once, or of a folder's pictures (.png), ``size`` at a time.

    A file is .npy, (B, H, W) or (B, C, H, W), uint8 or float in [0, 1]; or .npz with ``arr_0``,
    uint8 (B, H, W, 3), as guided-diffusion stores samples.  ``channels`` of pictures: 1 makes them
    grey, 3 colour.

    Raises FileNotFoundError where there is nothing, ValueError for files that are damaged or of
    another kind, and for pictures of several sizes.
    """
    path = Path(source)
    if path.is_file():
        try:
            yield unit_to_uint8(_array(path))
        except (ValueError, EOFError, KeyError) as error:
            raise ValueError(f"{path}: {error}") from error
        return
    if not path.is_dir():
        raise FileNotFoundError(f"no images: {path} is neither an .npy file nor a folder")
    files = _pictures(path)
    if not files:
        raise ValueError(f"{path} holds no .png files")
    shape: tuple[int, ...] | None = None
    for start in range(0, len(files), size):
        arrays = []
        for file in files[start : start + size]:
            with Image.open(file) as image:
                array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
            shape = shape or array.shape
            if array.shape != shape:
                raise ValueError(f"{path}: pictures of several sizes; give samples, not grids")
            arrays.append(array if channels == 1 else array.transpose(2, 0, 1))
        yield torch.from_numpy(np.stack(arrays))


def check_labels(labels: Any, count: int) -> Tensor:
    """int64 (count,) in 0..9; ValueError for another number, type or range."""
    labels_B = torch.as_tensor(labels)
    if labels_B.is_floating_point() or tuple(labels_B.shape) != (count,):
        raise ValueError(
            f"labels are {labels_B.dtype} {tuple(labels_B.shape)}, expected {count} whole numbers"
        )
    if count and not (int(labels_B.min()) >= 0 and int(labels_B.max()) < len(CLASS_NAMES)):
        raise ValueError(f"labels must lie in 0..{len(CLASS_NAMES) - 1}")
    return labels_B.long()


def _array(path: Path) -> npt.NDArray[Any]:
    if path.suffix != ".npz":
        array: npt.NDArray[Any] = np.load(path, allow_pickle=False)
        return array
    with np.load(path, allow_pickle=False) as found:
        if "arr_0" not in found:
            raise ValueError(f"no images in it (arr_0), only {sorted(found)}")
        images_BHWC: npt.NDArray[Any] = found["arr_0"]
    if images_BHWC.ndim != 4 or images_BHWC.shape[-1] != 3:
        raise ValueError(f"arr_0 has shape {images_BHWC.shape}, expected (B, H, W, 3)")
    return np.moveaxis(images_BHWC, -1, 1)


def _pictures(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.png"))


def _padded(images_BHW: Tensor) -> Tensor:
    if tuple(images_BHW.shape[1:]) != (RAW_SIZE, RAW_SIZE):
        return images_BHW
    return torch.nn.functional.pad(images_BHW, (PADDING,) * 4)


def _class_of(name: str) -> int | None:
    names = {text.replace("/", "-").replace(" ", "-"): i for i, text in enumerate(CLASS_NAMES)}
    names |= {str(i): i for i in range(len(CLASS_NAMES))}
    return names.get(name.lower().replace(" ", "-"))
