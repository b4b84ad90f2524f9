"""Latents made once: a folder of shards instead of pictures and a tokenizer at every step.

As MAR does and the published FAR runs did, it holds what the tokenizer says of every picture as it
is and mirrored: mean and standard deviation of the posterior, not one draw from it, so that every
epoch draws anew. Training from it is training from the pictures, up to the stored precision.

    OUTPUT/header.json                  what was cached and how, and a hash of that
    OUTPUT/tokenizer.safetensors        the tokenizer's weights, if it has any
    OUTPUT/latents-000000.safetensors   mean, std (n, 2, C, h, w), the second one mirrored; labels
    OUTPUT/verified.json                which shards were found whole (size and time of change)

Legend: n pictures of a shard, B of a batch, C channels, h height, w width of a latent.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastfar._files import atomic_write
from fastfar._weights import open_weights
from fastfar.tokenizer import KLVAE, PixelTokenizer, tokenizer_from_dict

FORMAT = 1
HEADER_FILE = "header.json"
TOKENIZER_FILE = "tokenizer.safetensors"
VERIFIED_FILE = "verified.json"


class LatentCache:
    """`Examples` of a folder that `build_cache` wrote; shards are mapped into memory, not read.

    Every shard's checksum is verified when a copy of the cache is first opened; which ones were is
    kept in verified.json, by size and time of change, where the folder can be written.

    Raises:
        FileNotFoundError: there is no header, or a shard is missing (the cache is not finished).
        ValueError: the header or a shard is damaged, or a shard belongs to another cache.
    """

    def __init__(self, folder: str | os.PathLike[str], verify: bool = True) -> None:
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        if verify:
            _verify(self.folder, self.header)
        self._shards: dict[int, dict[str, Tensor]] = {}
        labels = [self._shard(number)["labels"] for number in range(shard_count(self.header))]
        self.labels = torch.cat(labels).clone()
        self.class_names = tuple(self.header["class_names"])

    def __reduce__(self) -> tuple[type[LatentCache], tuple[Path, bool]]:
        return LatentCache, (self.folder, False)  # a worker maps the files itself

    def __len__(self) -> int:
        return int(self.header["count"])

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, h, w)."""
        return tuple(self.header["shape"])

    @property
    def identity(self) -> dict[str, Any]:
        """Hash of the header: of source, transform, tokenizer, scale and stored precision."""
        return {"type": "latents", "count": len(self), "digest": self.header["digest"]}

    @functools.cached_property
    def tokenizer(self) -> PixelTokenizer | KLVAE:
        """What made the latents."""
        file = self.folder / TOKENIZER_FILE
        weights = open_weights(file) if file.is_file() else None
        return tokenizer_from_dict(self.header["tokenizer"], weights)

    def take(
        self, rows_B: Tensor, flip_B: Tensor | None = None, seed_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """scale * (mean + std * noise), the noise of `seed_B`, or scale * mean; and labels."""
        mean_BChw, std_BChw = self.posterior(rows_B, flip_B)
        if std_BChw is not None and seed_B is not None:
            generator = torch.Generator()
            noise = [
                torch.randn(self.image_shape, generator=generator.manual_seed(seed))
                for seed in seed_B.tolist()
            ]
            mean_BChw = torch.addcmul(mean_BChw, std_BChw, torch.stack(noise))
        return mean_BChw * self.header["scale"], self.labels[rows_B]

    def posterior(
        self, rows_B: Tensor, flip_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation of the unscaled latents, float32 (B, C, h, w).

        The second is None where the tokenizer has nothing random.
        """
        flips = torch.zeros_like(rows_B) if flip_B is None else flip_B.long()
        found: dict[str, list[Tensor]] = {"mean": [], "std": []}
        size = self.header["shard_size"]
        for row, flip in zip(rows_B.tolist(), flips.tolist(), strict=True):
            shard = self._shard(row // size)
            for name in found.keys() & shard.keys():
                found[name].append(shard[name][row % size, flip])
        std = torch.stack(found["std"]).float() if found["std"] else None
        return torch.stack(found["mean"]).float(), std

    def pixel_statistics(self) -> tuple[float, float]:
        """Refused: these are latents, with a tokenizer of their own."""
        raise ValueError(f"{self.folder} holds latents, which their own tokenizer scales")

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            self._shards[number] = _map_shard(self.folder, number, self.header)
        return self._shards[number]


def encode(tokenizer: PixelTokenizer | KLVAE, images_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean and standard deviation (B, C, h, w) of the unscaled latents of images in [-1, 1].

    Pixels are standardised, so their scale is 1, and have no deviation: None.
    """
    if isinstance(tokenizer, PixelTokenizer):
        return tokenizer.to_latents(images_BCHW), None
    with torch.no_grad():
        posterior = tokenizer.encode(images_BCHW)
    return posterior.mean, posterior.std


def scale_of(tokenizer: PixelTokenizer | KLVAE) -> float:
    """Factor from unscaled latents to those that a model is trained on."""
    return tokenizer.scale if isinstance(tokenizer, KLVAE) else 1.0


def header_digest(values: Mapping[str, Any]) -> str:
    """Hash of a header without its own entry "digest": 16 hexadecimal digits of a SHA-256."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no latent cache: there is no {HEADER_FILE} in it")
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        digest = values.pop("digest")
    except (ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: make the cache again") from error
    if values.get("format") != FORMAT or digest != header_digest(values):
        raise ValueError(
            f"{path} was changed after it was written, or is of another version (format "
            f"{values.get('format')!r}, known is {FORMAT}): make the cache again"
        )
    return {**values, "digest": digest}


def shard_count(header: Mapping[str, Any]) -> int:
    return -(-int(header["count"]) // int(header["shard_size"]))


def shard_rows(number: int, header: Mapping[str, Any]) -> Tensor:
    size = header["shard_size"]
    return torch.arange(number * size, min((number + 1) * size, header["count"]))


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"latents-{number:06d}.safetensors"


def has_shard(folder: Path, number: int, header: Mapping[str, Any]) -> bool:
    """Whether a shard is there; ValueError if it is not of this cache."""
    return shard_path(folder, number).is_file() and bool(_map_shard(folder, number, header))


def _map_shard(folder: Path, number: int, header: Mapping[str, Any]) -> dict[str, Tensor]:
    return _open_shard(folder, number, header)[0]


def _open_shard(
    folder: Path, number: int, header: Mapping[str, Any]
) -> tuple[dict[str, Tensor], str]:
    """The mapped tensors of a shard, and the checksum that it names."""
    path = shard_path(folder, number)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: the cache is not finished; run `fastfar cache` again as before"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(_damaged(path, str(error))) from error
    if metadata.get("header") != header["digest"]:
        raise ValueError(_damaged(path, "it belongs to another cache"))
    rows = len(shard_rows(number, header))
    wanted = (rows, 2, *header["shape"])
    if tuple(tensors["mean"].shape) != wanted or len(tensors["labels"]) != rows:
        raise ValueError(_damaged(path, f"its latents are not of shape {wanted}"))
    return tensors, metadata.get("sha256", "")


def _verify(folder: Path, header: Mapping[str, Any]) -> None:
    """Check the checksum of every shard that was not found whole before."""
    marker = folder / VERIFIED_FILE
    try:
        known = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    found = {}
    for number in range(shard_count(header)):
        path = shard_path(folder, number)
        tensors, expected = _open_shard(folder, number, header)
        state = path.stat()
        found[path.name] = [header["digest"], state.st_size, state.st_mtime_ns]
        if known.get(path.name) != found[path.name] and checksum(tensors) != expected:
            raise ValueError(_damaged(path, "its checksum is wrong"))
    if found != known:
        try:
            with atomic_write(marker) as temporary:
                temporary.write_text(json.dumps(found), encoding="utf-8")
        except OSError:
            pass  # a read-only copy is verified every time


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        content = tensors[name].contiguous().flatten().view(torch.uint8).numpy()
        digest.update(content.data)
    return digest.hexdigest()


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged ({why}): delete it and run `fastfar cache` again as before"
