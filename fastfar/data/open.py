"""One name for every kind of training data."""

from __future__ import annotations

import glob
import os
from contextlib import suppress
from pathlib import Path

from fastfar.data.fashion_mnist import load_fashion_mnist
from fastfar.data.images import Examples
from fastfar.data.latents import HEADER_FILE, LatentCache
from fastfar.data.sources import ClassFolders, Pictures, SavedDataset, Shards, Source, class_folders
from fastfar.data.transform import Transform

SPLITS = ("train", "val", "validation", "test")


def open_data(
    spec: str | os.PathLike[str],
    *,
    split: str = "train",
    size: int | None = None,
    mode: str = "RGB",
) -> Examples:
    """The data set that `spec` names; what it is, is seen from the files.

    - "fashion_mnist": the installed one (`load_fashion_mnist`).
    - A folder with IDX files: Fashion-MNIST from there.
    - A folder that `fastfar cache` wrote: `LatentCache`.
    - A folder that Hugging Face's `datasets` saved: `SavedDataset`.
    - A .tar file, a folder with some, or a pattern ("shards/train-*.tar"): `Shards`.
    - A folder with one subfolder per class: `ClassFolders`. One without subfolders is one class.
    The last two are looked for in the subfolder `split` first.

    Args:
        spec: name, path or pattern.
        split: "train", or what the data has.
        size: pixels along a side, for pictures (`Transform`); Fashion-MNIST has 32, and latents
            are as they were made.
        mode: "RGB" or "L", for pictures.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is none of these, pictures without a size, or what the kind of data says.
        ImportError: as `SavedDataset`.
    """
    if str(spec) == "fashion_mnist":
        return load_fashion_mnist(split)
    path = Path(spec)
    if (path / HEADER_FILE).is_file():
        return LatentCache(path)
    if any(path.glob("*-idx3-ubyte*")):
        return load_fashion_mnist(split, path)
    source = _pictures(path, split)
    if size is None:
        raise ValueError(f"{spec} holds pictures: say to which size, in pixels, to crop them")
    return Pictures(source, Transform(size, mode))


def _pictures(path: Path, split: str) -> Source:
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return SavedDataset(path, split)
    folder = path / split if (path / split).is_dir() else path
    if shards := _shards(folder):
        return Shards(shards)
    if not folder.exists():
        raise FileNotFoundError(f"there is no {path}: give a folder, or a pattern of .tar files")
    if folder.is_dir() and (names := class_folders(folder)):
        if set(names) <= set(SPLITS):
            raise ValueError(f"{path} has the splits {names}, not {split!r}")
        return ClassFolders(folder)
    if folder.is_dir():
        whole = folder.resolve()
        with suppress(ValueError):  # no pictures: said below
            return ClassFolders(whole.parent, [whole.name])
    raise ValueError(
        f"{path} is no data set that fastfar knows. It looked for IDX files, a latent cache "
        f"({HEADER_FILE}), a folder saved by Hugging Face's datasets, .tar shards, and one folder "
        "of pictures, or one per class"
    )


def _shards(path: Path) -> list[str]:
    """Sorted .tar files: the one that is named, those of a folder, or those of a pattern."""
    pattern = str(path / "*.tar") if path.is_dir() else str(path)
    return sorted(name for name in glob.glob(pattern) if name.endswith(".tar"))
