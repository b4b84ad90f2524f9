"""Where the images to be judged come from: a pipeline, drawn in resumable chunks, or files.

Legend: B image, H height, W width.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastfar._files import atomic_write
from fastfar.data import CLASS_NAMES, IMAGE_SIZE, PADDING, RAW_SIZE, balanced_labels

Progress = Callable[[int, int], None]
_CHUNK = re.compile(r"(\d{6})-(\d{6})\.npy")


class Pipeline(Protocol):
    """What evaluation asks of ``fastfar.FARPipeline``; the result's ``.images`` are in [0, 1]."""

    def __call__(
        self, class_labels: list[int], *, generator: list[torch.Generator], output_type: str
    ) -> Any: ...


class SampleStore:
    """A folder of finished samples: run.json and one .npy (uint8, (B, H, W)) per finished chunk.

    Chunks are written atomically and named by their range of image numbers, so an interrupted run
    keeps all it finished, and the batch size may change in between.  ``run`` says what is being
    drawn; ValueError where the folder holds samples of something else.
    """

    def __init__(self, folder: str | os.PathLike[str], run: dict[str, Any]) -> None:
        self.folder = Path(folder)
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

    def read(self, count: int) -> tuple[Tensor, Tensor]:
        """`read_chunks` of this folder."""
        return read_chunks(self.folder, count)

    def write(self, start: int, images_BHW: Tensor) -> None:
        """Store samples ``start``.. atomically."""
        name = f"{start:06d}-{start + len(images_BHW):06d}.npy"
        with atomic_write(self.folder / name) as temporary, open(temporary, "wb") as stream:
            np.save(stream, images_BHW.numpy(), allow_pickle=False)


def read_chunks(folder: str | os.PathLike[str], count: int) -> tuple[Tensor, Tensor]:
    """Samples 0..count-1, uint8 (count, H, W), and which of them are there, bool (count,).

    A damaged chunk counts as not there.
    """
    images_BHW = torch.zeros((count, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    there_B = torch.zeros(count, dtype=torch.bool)
    for file in sorted(Path(folder).glob("*.npy")):
        match = _CHUNK.fullmatch(file.name)
        if match is None or int(match[1]) >= count:
            continue
        start, stop = int(match[1]), int(match[2])
        try:
            chunk = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, OSError):
            continue
        if chunk.shape != (stop - start, IMAGE_SIZE, IMAGE_SIZE) or chunk.dtype != np.uint8:
            continue
        stop = min(stop, count)
        images_BHW[start:stop] = torch.from_numpy(chunk[: stop - start])
        there_B[start:stop] = True
    return images_BHW, there_B


def draw_samples(
    pipeline: Pipeline,
    count: int,
    store: SampleStore,
    *,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    **call: Any,
) -> tuple[Tensor, Tensor, int]:
    """``count`` class-balanced samples: uint8 (B, H, W), labels int64 (B,), how many are new.

    Image i has label i mod 10 and its own generator, so it does not depend on the batch it is drawn
    in.  Finished batches go to ``store``; what is there already is not drawn again.  ``call`` is
    passed on to the pipeline; ``progress(done, count)`` is called at the start and per batch.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}: it must be at least 1")
    check_seed(seed)
    labels_B = balanced_labels(count)
    images_BHW, there_B = store.read(count)
    missing = torch.nonzero(~there_B).flatten().tolist()
    if progress is not None:
        progress(count - len(missing), count)
    position = 0
    while position < len(missing):
        start = missing[position]
        block = missing[position : position + batch_size]
        rows = [row for offset, row in enumerate(block) if row == start + offset]  # no gap in it
        result = pipeline(
            labels_B[rows].tolist(),
            generator=[image_generator(seed, row) for row in rows],
            output_type="pt",
            **call,
        )
        chunk_BHW = unit_to_uint8(result.images)
        if len(chunk_BHW) != len(rows):
            raise ValueError(f"the pipeline made {len(chunk_BHW)} images for {len(rows)} labels")
        store.write(start, chunk_BHW)
        images_BHW[rows] = chunk_BHW
        position += len(rows)
        if progress is not None:
            progress(count - len(missing) + position, count)
    return images_BHW, labels_B, len(missing)


def check_seed(seed: int) -> None:
    """ValueError for a seed outside 0..2**31 - 1."""
    if not 0 <= seed < 2**31:
        raise ValueError(f"the seed is {seed}: it must lie in 0..{2**31 - 1}")


def image_generator(seed: int, image: int) -> torch.Generator:
    """The generator of one image; no two images share one below a million images per seed."""
    return torch.Generator().manual_seed((seed * 1_000_003 + image) % 2**32)


def unit_to_uint8(images: Tensor | np.ndarray[Any, Any]) -> Tensor:
    """Float images in [0, 1], (B, 1, H, W) or (B, H, W), -> uint8 (B, H, W): round(255 x).

    uint8 input is taken as it is.  28x28 images are padded by 2 black pixels on each side.
    Raises ValueError for another shape or type, and for values that are not finite or not within
    [0, 1].
    """
    tensor = torch.as_tensor(images).detach().cpu()
    if tensor.ndim == 4 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    if tensor.ndim != 3 or tuple(tensor.shape[1:]) not in {(IMAGE_SIZE,) * 2, (RAW_SIZE,) * 2}:
        raise ValueError(
            f"images have shape {tuple(tensor.shape)}, expected (B, H, W) or (B, 1, H, W) of "
            f"{IMAGE_SIZE}x{IMAGE_SIZE} or {RAW_SIZE}x{RAW_SIZE} pixels in grey"
        )
    if tensor.is_floating_point():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError("images hold NaN or infinity: the model that made them diverged")
        if len(tensor) and (float(tensor.min()) < -1e-3 or float(tensor.max()) > 1 + 1e-3):
            raise ValueError(
                f"float images must lie in [0, 1], these lie in [{float(tensor.min()):.3g}, "
                f"{float(tensor.max()):.3g}]"
            )
        tensor = tensor.float().mul(255.0).round_().clamp_(0, 255).to(torch.uint8)
    if tensor.dtype != torch.uint8:
        raise ValueError(f"images are {tensor.dtype}: give uint8, or floats in [0, 1]")
    if tensor.shape[1] == RAW_SIZE:
        tensor = torch.nn.functional.pad(tensor, (PADDING,) * 4)
    return tensor


def load_images(source: str | os.PathLike[str]) -> tuple[Tensor, Tensor | None]:
    """Existing samples: uint8 (B, 32, 32), and labels int64 (B,) where they are known.

    ``source`` is an .npy file (uint8, or float in [0, 1]; the labels are those of a file of the
    same name ending in .labels.npy, if there is one), or a folder of pictures (.png; one folder
    per class, named by its number or name, gives the labels).
    """
    path = Path(source)
    if path.is_file():
        try:
            images_BHW = unit_to_uint8(np.load(path, allow_pickle=False))
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: {error}") from error
        label_file = path.with_suffix(".labels.npy")
        if not label_file.is_file():
            return images_BHW, None
        return images_BHW, check_labels(np.load(label_file, allow_pickle=False), len(images_BHW))
    if not path.is_dir():
        raise FileNotFoundError(f"no images: {path} is neither an .npy file nor a folder")
    files = sorted(path.rglob("*.png"))
    if not files:
        raise ValueError(f"{path} holds no .png files")
    arrays = []
    for file in files:
        with Image.open(file) as image:
            arrays.append(np.asarray(image.convert("L")))
    if len({array.shape for array in arrays}) > 1:
        raise ValueError(f"{path}: pictures of several sizes; give samples, not grids")
    classes = [_class_of(file.parent.name) for file in files]
    known = [c for c in classes if c is not None]
    labels_B = torch.tensor(known) if len(known) == len(files) else None
    return unit_to_uint8(np.stack(arrays)), labels_B


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


def _class_of(name: str) -> int | None:
    names = {text.replace("/", "-").replace(" ", "-"): i for i, text in enumerate(CLASS_NAMES)}
    names |= {str(i): i for i in range(len(CLASS_NAMES))}
    return names.get(name.lower().replace(" ", "-"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: delete its folder and run again") from error
    return value if isinstance(value, dict) else {}
