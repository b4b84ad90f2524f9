"""Where pictures with class labels come from: folders, tar shards, Hugging Face's datasets.

Every source answers by row number, so the order in which a run sees its data is the run's own and
a resumed one can go on anywhere. Nothing is decoded before it is asked for.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastfar.data.images import byte_statistics, in_batches, mirror, to_unit
from fastfar.data.transform import Transform

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
CLASSES_FILE = "classes.txt"
STATISTICS_IMAGES = 20_000


class Source(Protocol):
    """Numbered pictures with labels; may be pickled."""

    class_names: tuple[str, ...]
    labels: Tensor
    identity: dict[str, Any]

    def open(self, row: int) -> Image.Image:
        """The picture, as it is stored."""
        ...

    def name(self, row: int) -> str:
        """What an error message calls it."""
        ...


class Pictures:
    """`Examples` of a source: its pictures after a transform, as images in [-1, 1]."""

    tokenizer: ClassVar[None] = None

    def __init__(self, source: Source, transform: Transform) -> None:
        self.source, self.transform = source, transform
        self.class_names, self.labels = source.class_names, source.labels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, size, size)."""
        return self.transform.channels, self.transform.size, self.transform.size

    @property
    def identity(self) -> dict[str, Any]:
        """That of the source, and the transform."""
        return {**self.source.identity, "transform": self.transform.to_dict()}

    def take(
        self, rows_B: Tensor, flip_B: Tensor | None = None, seed_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Examples.take`. Raises ValueError where a picture is damaged, and names it."""
        return to_unit(mirror(self.bytes(rows_B), flip_B)), self.labels[rows_B]

    def bytes(self, rows_B: Tensor) -> Tensor:
        """The transformed pictures, uint8 (B, C, H, W)."""
        return torch.stack([self._read(row) for row in rows_B.tolist()])

    def pixel_statistics(self) -> tuple[float, float]:
        """Mean and standard deviation of all pixels of 20,000 pictures, evenly spread (or all)."""
        count = min(len(self), STATISTICS_IMAGES)
        rows = torch.linspace(0, len(self) - 1, count, dtype=torch.float64).long()
        counts_V = torch.zeros(256, dtype=torch.int64)
        for rows_B in in_batches(rows, 64):
            counts_V += torch.bincount(self.bytes(rows_B).flatten(), minlength=256)
        return byte_statistics(counts_V)

    def _read(self, row: int) -> Tensor:
        try:
            with self.source.open(row) as picture:
                return self.transform(picture)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{self.source.name(row)} cannot be read as a picture ({error}): get it again, or "
                "remove it"
            ) from error


class ClassFolders:
    """One subfolder per class, with pictures in it or in folders below; classes and files by name.

    Args:
        folder: that has the subfolders.
        classes: those to take, in label order; None is all of them.

    Raises:
        ValueError: there is no picture, or a class without one.
    """

    def __init__(
        self, folder: str | os.PathLike[str], classes: Sequence[str] | None = None
    ) -> None:
        self.folder = Path(folder)
        digest = hashlib.sha256()
        names: list[bytes] = []
        labels: list[int] = []
        classes = class_folders(self.folder) if classes is None else list(classes)
        for label, name in enumerate(classes):
            for path, size in _pictures(self.folder / name, name):
                digest.update(f"{path}\0{size}\n".encode(errors="surrogateescape"))
                names.append(os.fsencode(path))
                labels.append(label)
        if not names:
            raise ValueError(f"{folder} has no class folders with pictures ({', '.join(SUFFIXES)})")
        used = set(labels)
        if empty := [name for label, name in enumerate(classes) if label not in used]:
            raise ValueError(
                f"{folder} has classes without a picture ({', '.join(SUFFIXES)}): {empty}; remove "
                "their folders"
            )
        # One array, not a million objects: forked workers would copy those as they count them.
        self._names = np.array(names)
        self.labels = torch.tensor(labels)
        self.class_names = tuple(classes)
        self.identity = _identity("class folders", self, digest.hexdigest())

    def open(self, row: int) -> Image.Image:
        """See `Source`."""
        return Image.open(self.name(row))

    def name(self, row: int) -> str:
        """The path."""
        return str(self.folder / os.fsdecode(bytes(self._names[row])))


class Shards:
    """WebDataset shards: tar files in which files that share a name up to the first dot are one
    sample, with a picture (`.jpg`, `.png`, ...) and a label (`.cls`, a number in text, or `.json`
    with an entry "label").

    The headers are read once, to know where every picture lies. Class names are the lines of
    `classes.txt` beside the first shard; without it, the numbers.

    Raises:
        ValueError: a file is no uncompressed tar file, a sample lacks a label or a picture, a label
            has no name, or there is no sample.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        self.paths = [Path(path) for path in paths]
        digest = hashlib.sha256()
        places: list[tuple[int, int, int]] = []
        labels: list[int] = []
        for number, path in enumerate(self.paths):
            digest.update(f"{path.name}\0".encode())
            for key, offset, size, label in _samples(path):
                digest.update(f"{key}\0{size}\0{label}\n".encode(errors="surrogateescape"))
                places.append((number, offset, size))
                labels.append(label)
        if not places:
            raise ValueError(f"there is no sample in {', '.join(map(str, self.paths))}")
        self._places = np.array(places, dtype=np.int64)
        self.labels = torch.tensor(labels)
        self.class_names = _shard_classes(self.paths[0].with_name(CLASSES_FILE), max(labels) + 1)
        self.identity = _identity("webdataset", self, digest.hexdigest())

    def open(self, row: int) -> Image.Image:
        """See `Source`."""
        number, offset, size = self._places[row].tolist()
        # Opened anew each time: processes that share an open file share its position.
        with self.paths[number].open("rb") as file:
            file.seek(offset)
            return Image.open(io.BytesIO(file.read(size)))

    def name(self, row: int) -> str:
        """The shard, and where in it."""
        number, offset, _ = self._places[row].tolist()
        return f"the picture at byte {offset} of {self.paths[number]}"


class SavedDataset:
    """A folder that `datasets.Dataset.save_to_disk` wrote, or one split of a `DatasetDict`.

    The picture is its first column of type `Image`; the label its first `ClassLabel`, else the
    whole numbers of a column "label".

    Raises:
        ImportError: the package `datasets` is not installed.
        ValueError: there is no such split or column, or a label is missing.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str = "train") -> None:
        try:
            from datasets import load_from_disk
        except ImportError as error:
            raise ImportError(
                f"{folder} was saved by Hugging Face's datasets: pip install 'fastfar[data]' to "
                "read it"
            ) from error
        self.folder = Path(folder)
        data = load_from_disk(str(folder))
        if not hasattr(data, "features"):
            if split not in data:
                raise ValueError(f"{folder} has the splits {sorted(data)}, not {split!r}")
            data = data[split]
        kinds = {name: type(feature).__name__ for name, feature in data.features.items()}
        self._column = next((name for name, kind in kinds.items() if kind == "Image"), None)
        label = next((name for name, kind in kinds.items() if kind == "ClassLabel"), "label")
        if self._column is None or label not in kinds:
            raise ValueError(
                f"{folder} needs a column of type Image and one of type ClassLabel (or named "
                f"'label'); it has {kinds}"
            )
        self._data = data
        values = data[label][:]
        if not all(isinstance(value, int) and value >= 0 for value in values):
            raise ValueError(f"{folder}: the labels in {label!r} must be whole numbers from 0")
        self.labels = torch.tensor(values, dtype=torch.int64)
        names = getattr(data.features[label], "names", None)
        self.class_names = tuple(names or map(str, range(max(values, default=-1) + 1)))
        self.identity = _identity("datasets", self, str(data._fingerprint))

    def open(self, row: int) -> Image.Image:
        """See `Source`."""
        picture: Image.Image = self._data[row][self._column]
        return picture

    def name(self, row: int) -> str:
        """The row and the folder."""
        return f"row {row} of {self.folder}"


def class_folders(folder: Path) -> list[str]:
    """Names of the subfolders, sorted; hidden ones left out."""
    with os.scandir(folder) as entries:
        found = [entry.name for entry in entries if entry.is_dir()]
    return sorted(name for name in found if not name.startswith("."))


def _pictures(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    """(path that begins with prefix, bytes) of every picture in a folder and below, by name."""
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        path = f"{prefix}/{entry.name}"
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _pictures(folder / entry.name, path)
        elif entry.name.lower().endswith(SUFFIXES):
            yield path, entry.stat().st_size


def _samples(path: Path) -> Iterator[tuple[str, int, int, int]]:
    """(key, offset and bytes of the picture, label) of the samples of one shard, in its order."""
    try:
        with tarfile.open(path, "r:") as archive:
            key, place, label = "", None, None
            for member in archive:
                if not member.isfile():
                    continue
                found, suffix = _split_name(member.name)
                if found != key:
                    if key:
                        yield _sample(path, key, place, label)
                    key, place, label = found, None, None
                if suffix.endswith(SUFFIXES):
                    place = (member.offset_data, member.size)
                elif suffix in (".cls", ".json"):
                    content = archive.extractfile(member)
                    assert content is not None  # it is a file
                    label = _label(path, member.name, content.read())
            if key:
                yield _sample(path, key, place, label)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{path} is not a whole, uncompressed tar file ({error}): get it again, or unpack it"
        ) from error


def _split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: everything up to the first dot of the last part of the path is the key."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{suffix}".lower()


def _sample(
    path: Path, key: str, place: tuple[int, int] | None, label: int | None
) -> tuple[str, int, int, int]:
    if place is None or label is None:
        lacks = "picture" if place is None else "label (.cls, or .json with an entry 'label')"
        raise ValueError(f"{path}: the sample {key!r} has no {lacks}")
    return key, *place, label


def _label(path: Path, name: str, content: bytes) -> int | None:
    """None where a .json has no "label": it may hold something else."""
    try:
        value = json.loads(content)
        if isinstance(value, dict):
            return None if "label" not in value else int(value["label"])
        if isinstance(value, int) and value >= 0:
            return value
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{path}: {name} holds {content[:20]!r}, not a class number")


def _shard_classes(path: Path, count: int) -> tuple[str, ...]:
    if not path.is_file():
        return tuple(map(str, range(count)))
    names = tuple(path.read_text(encoding="utf-8").splitlines())
    if len(names) < count:
        raise ValueError(f"{path} names {len(names)} classes, but there is a label {count - 1}")
    return names


def _identity(kind: str, source: Any, digest: str) -> dict[str, Any]:
    return {
        "type": kind,
        "count": len(source.labels),
        "classes": len(source.class_names),
        "digest": digest[:12],
    }
