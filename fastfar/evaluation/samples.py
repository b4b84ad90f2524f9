"""Samples to be judged, drawn by a pipeline in resumable chunks, by any number of processes.

Images are uint8, (B, H, W) in grey and (B, C, H, W) otherwise, as `fastfar.data.ImageDataset` has
them.

Legend: B image, C channel, H height, W width.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastfar._files import atomic_write
from fastfar.data import CLASS_NAMES, balanced_labels

Progress = Callable[[int, int], None]
_CHUNK = re.compile(r"(\d{6,})-(\d{6,})\.npy")


class Pipeline(Protocol):
    """What evaluation asks of ``fastfar.FARPipeline``; the result's ``.images`` are in [0, 1]."""

    def __call__(
        self, class_labels: list[int], *, generator: list[torch.Generator], output_type: str
    ) -> Any: ...


class SampleStore:
    """A folder of finished samples: run.json and one .npy (uint8) per finished chunk.

    Chunks are written atomically and named by their range of image numbers, so an interrupted run
    keeps all it finished, the batch size and the number of processes may change in between, and
    processes on several machines may share the folder.  ``run`` says what is being drawn;
    ValueError where the folder holds samples of something else.
    """

    def __init__(self, folder: str | os.PathLike[str], run: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self._known: dict[str, tuple[int, ...]] = {}
        run = json.loads(json.dumps(run))
        marker = self.folder / "run.json"
        if marker.is_file():
            found = _read_json(marker)
            if found != run:
                differing = sorted(k for k in {*found, *run} if found.get(k) != run.get(k))
                raise ValueError(
                    f"{self.folder} holds samples of another run (different: "
                    f"{', '.join(differing)}); choose another --work folder or delete this one"
                )
        else:
            with atomic_write(marker) as temporary:
                temporary.write_text(json.dumps(run, indent=2) + "\n")

    def there(self, count: int) -> Tensor:
        """Which of the samples 0..count-1 are there, bool (count,), whoever wrote them."""
        there_B = torch.zeros(count, dtype=torch.bool)
        for start, stop, _ in _chunks(self.folder, count, self._known):
            there_B[start:stop] = True
        return there_B

    def write(self, start: int, images: Tensor) -> None:
        """Store samples ``start``.. atomically."""
        name = f"{start:06d}-{start + len(images):06d}.npy"
        with atomic_write(self.folder / name) as temporary, open(temporary, "wb") as stream:
            np.save(stream, images.numpy(), allow_pickle=False)

    def batches(self, count: int, size: int) -> Iterator[Tensor]:
        """Samples 0..count-1 in order, at most ``size`` at a time, one chunk in memory.

        Raises ValueError where some are missing.
        """
        reached = 0
        for start, stop, file in _chunks(self.folder, count, self._known):
            if start > reached:
                break
            if stop <= reached:
                continue  # another batch size once drew the same images
            chunk = np.load(file, allow_pickle=False)[reached - start : min(stop, count) - start]
            yield from torch.split(torch.from_numpy(chunk), size)
            reached = min(stop, count)
        if reached < count:
            raise ValueError(f"{self.folder} lacks image {reached} of {count}: draw them first")


def read_chunks(folder: str | os.PathLike[str], count: int) -> tuple[Tensor, Tensor]:
    """Samples 0..count-1 of a ``SampleStore``'s folder, and which are there, bool (count,).

    A damaged chunk counts as not there; what is not there is 0.
    """
    images = torch.zeros((count, 0, 0), dtype=torch.uint8)
    there_B = torch.zeros(count, dtype=torch.bool)
    for start, stop, file in _chunks(Path(folder), count):
        chunk = torch.from_numpy(np.load(file, allow_pickle=False))
        if images.numel() == 0:
            images = torch.zeros((count, *chunk.shape[1:]), dtype=torch.uint8)
        if chunk.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"{file} holds images of {tuple(chunk.shape[1:])}, others in its folder are "
                f"{tuple(images.shape[1:])}: they are of different runs"
            )
        stop = min(stop, count)
        images[start:stop] = chunk[: stop - start]
        there_B[start:stop] = True
    return images, there_B


def _chunks(
    folder: Path, count: int, known: dict[str, tuple[int, ...]] | None = None
) -> Iterator[tuple[int, int, Path]]:
    """(start, stop, file) of every whole chunk that holds an image below ``count``, by start.

    ``known``: shapes by name of chunks that were found whole before; they are not opened again.
    """
    known = {} if known is None else known
    found = []
    for file in folder.glob("*.npy"):
        match = _CHUNK.fullmatch(file.name)
        if match is None or int(match[1]) >= count:
            continue
        start, stop = int(match[1]), int(match[2])
        if file.name not in known and (shape := _shape(file)) is not None:
            known[file.name] = shape
        if known.get(file.name, (0,))[0] == stop - start:
            found.append((start, stop, file))
    yield from sorted(found)


def _shape(file: Path) -> tuple[int, ...] | None:
    """Of a file of uint8 images; None where it is damaged or holds something else."""
    try:
        # Mapping reads the header, and fails where the file is shorter than that says.
        chunk = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError):
        return None
    fits = chunk.dtype == np.uint8 and chunk.ndim in (3, 4)
    return tuple(chunk.shape) if fits else None


def fill(
    pipeline: Pipeline,
    count: int,
    store: SampleStore,
    *,
    batch_size: int = 64,
    seed: int = 0,
    num_classes: int = len(CLASS_NAMES),
    share: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
    **call: Any,
) -> int:
    """Draw those of ``count`` class-balanced samples that ``store`` lacks; how many were drawn.

    Image i has label i mod ``num_classes`` and its own generator, so it depends neither on the
    batch nor on the process that draws it.  Of n processes ``share`` = (r, n) draws every n-th
    batch; done with these, it draws what the others have left, so each returns when all samples are
    there, whether or not the others live.  Where what is left may be in their hands, it waits for
    them, up to twice the time that it took for a batch.

    Args:
        pipeline: is called with labels, generators, output_type="pt" and ``call``.
        batch_size: images per call, and per file.
        progress: called as progress(done, count) at the start and after each batch, with what all
            processes have done.

    Raises:
        ValueError: an argument out of range, or images that are not finite or not in [0, 1].
    """
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}: it must be at least 1")
    check_seed(seed)
    labels_B = balanced_labels(count, num_classes)
    there_B, new, slowest = store.there(count), 0, 0.0
    tell = progress or (lambda done, count: None)
    tell(int(there_B.sum()), count)
    for batch, own in _order(count, batch_size, *share):
        if share[1] > 1:
            there_B = store.there(count)
        if not own and int((~there_B).sum()) < share[1] * batch_size:
            there_B = _wait(store, batch, count, 2.0 * slowest)
        for rows in _runs([row for row in batch if not there_B[row]]):
            start = time.perf_counter()
            result = pipeline(
                labels_B[rows].tolist(),
                generator=[image_generator(seed, row) for row in rows],
                output_type="pt",
                **call,
            )
            images = unit_to_uint8(result.images)
            if len(images) != len(rows):
                raise ValueError(f"the pipeline made {len(images)} images for {len(rows)} labels")
            store.write(rows[0], images)
            slowest = max(slowest, time.perf_counter() - start)
            there_B[rows] = True
            new += len(rows)
            tell(int(there_B.sum()), count)
    if share[1] > 1:
        tell(count, count)  # the last batch may have been another's
    return new


def draw_samples(
    pipeline: Pipeline, count: int, store: SampleStore, **options: Any
) -> tuple[Tensor, Tensor, int]:
    """`fill`, and all samples in memory: images, labels int64 (count,), how many are new."""
    new = fill(pipeline, count, store, **options)
    images, _ = read_chunks(store.folder, count)
    num_classes = options.get("num_classes", len(CLASS_NAMES))
    return images, balanced_labels(count, num_classes), new


def _order(count: int, batch_size: int, rank: int, size: int) -> Iterator[tuple[range, bool]]:
    """All batches in the order of one process, and whether they are its own: these come first."""
    if not 0 <= rank < size:
        raise ValueError(f"share {rank} of {size}: it must lie in 0..{size - 1}")
    batches = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    yield from ((batch, True) for batch in batches[rank::size])
    others = [batch for i, batch in enumerate(batches) if i % size != rank]
    random.Random(rank).shuffle(others)  # two that help a third seldom take the same batch
    yield from ((batch, False) for batch in others)


def _wait(store: SampleStore, rows: range, count: int, seconds: float) -> Tensor:
    """`SampleStore.there` as soon as it has `rows`, or after that time."""
    end = time.monotonic() + seconds
    while True:
        there_B = store.there(count)
        if bool(there_B[rows.start : rows.stop].all()) or time.monotonic() >= end:
            return there_B
        time.sleep(min(1.0, seconds / 20))


def _runs(rows: list[int]) -> Iterator[list[int]]:
    """Ascending row numbers, cut where there is a gap."""
    start = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield rows[start:i]
            start = i


def check_seed(seed: int) -> None:
    """ValueError for a seed outside 0..2**31 - 1."""
    if not 0 <= seed < 2**31:
        raise ValueError(f"the seed is {seed}: it must lie in 0..{2**31 - 1}")


def image_generator(seed: int, image: int) -> torch.Generator:
    """The generator of one image; no two images share one below a million images per seed."""
    return torch.Generator().manual_seed((seed * 1_000_003 + image) % 2**32)


def unit_to_uint8(images: Tensor | npt.NDArray[Any]) -> Tensor:
    """Float images in [0, 1], (B, C, H, W) or (B, H, W), -> uint8: round(255 x).

    A channel axis of length 1 is dropped; uint8 input is else taken as it is.
    Raises ValueError for another shape or type, and for values that are not finite or not within
    [0, 1].
    """
    tensor = torch.as_tensor(images).detach().cpu()
    if tensor.ndim == 4 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    if tensor.ndim != 3 and (tensor.ndim != 4 or tensor.shape[1] != 3):
        raise ValueError(
            f"images have shape {tuple(tensor.shape)}, expected (B, H, W) or (B, 1, H, W) in grey, "
            "or (B, 3, H, W) in colour"
        )
    if tensor.is_floating_point():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError("images hold NaN or infinity: the model that made them diverged")
        if tensor.numel() and (float(tensor.min()) < -1e-3 or float(tensor.max()) > 1 + 1e-3):
            raise ValueError(
                f"float images must lie in [0, 1], these lie in [{float(tensor.min()):.3g}, "
                f"{float(tensor.max()):.3g}]"
            )
        tensor = tensor.float().mul(255.0).round_().clamp_(0, 255).to(torch.uint8)
    if tensor.dtype != torch.uint8:
        raise ValueError(f"images are {tensor.dtype}: give uint8, or floats in [0, 1]")
    return tensor


def digest(identity: Any) -> str:
    """12 hexadecimal digits that stand for plain values."""
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def weights_fingerprint(model: torch.nn.Module) -> str:
    """First 12 hexadecimal digits of a SHA-256 over the names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: delete its folder and run again") from error
    return value if isinstance(value, dict) else {}
