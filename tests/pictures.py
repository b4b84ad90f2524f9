"""Small colour pictures on disk, in every layout that fastfar.data reads."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def picture(number: int, width: int = 40, height: int = 30) -> Image.Image:
    """A picture whose colours tell its number, with something different left and right."""
    rng = np.random.default_rng(number)
    array = rng.integers(0, 256, (height // 5, width // 5, 3)).astype(np.uint8)
    return Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR)


def encoded(number: int) -> bytes:
    stream = io.BytesIO()
    picture(number).save(stream, "png")
    return stream.getvalue()


def write_class_folders(folder: Path, per_class: int = 3) -> None:
    """ant/0.png, ...: picture 3 k + i is number i of class k."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            (folder / name / f"{i}.png").write_bytes(encoded(per_class * label + i))


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_shards(folder: Path) -> None:
    """The pictures of `write_class_folders` in two shards, and the names of the classes."""
    for shard, numbers in enumerate((range(5), range(5, 9))):
        files = []
        for number in numbers:
            key = f"{number:04d}"
            files += [(f"{key}.png", encoded(number)), (f"{key}.cls", b"%d" % (number // 3))]
        write_tar(folder / f"part-{shard}.tar", files)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
