"""Making a latent cache: every picture of a source through a tokenizer, once.

Legend: B picture, C channels, H height, W width (h, w of a latent).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastfar._files import atomic_write
from fastfar._weights import open_weights, weights_digest
from fastfar.data.batches import read
from fastfar.data.images import Examples, in_batches
from fastfar.data.latents import (
    FORMAT,
    HEADER_FILE,
    TOKENIZER_FILE,
    checksum,
    encode,
    has_shard,
    header_digest,
    read_header,
    scale_of,
    shard_count,
    shard_path,
    shard_rows,
)
from fastfar.tokenizer import KLVAE, PixelTokenizer

DTYPES = {"float16": torch.float16, "float32": torch.float32}


def build_cache(
    source: Examples,
    tokenizer: PixelTokenizer | KLVAE,
    folder: str | os.PathLike[str],
    *,
    shard_size: int = 4096,
    dtype: str = "float16",
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the latents of all pictures; the number of shards that are still missing.

    Finished shards are kept, so that an interrupted run goes on, with any batch size or device.
    Several processes share the work if each does one `part`, (i, n): shards i, i + n, i + 2n, ...

    Args:
        source: pictures.
        tokenizer: what makes latents of them. It is moved to the device.
        folder: where to write.
        shard_size: pictures per file: a 16 x 16 x 16 latent takes 32 KiB with mean and deviation,
            both flips, in float16.
        dtype: stored precision, "float16" or "float32".
        batch_size, workers: pictures at a time, and processes that read ahead.
        device: where the tokenizer runs.
        part: (i, n) with 0 <= i < n.
        progress: told after every batch how many pictures are done, and how many there are to do
            (in this call: finished shards are not counted).

    Raises:
        ValueError: a wrong argument, a source of latents, or a folder with another cache.
        OSError: the disk is full; finished shards are whole.
    """
    header = _header(source, tokenizer, shard_size, dtype)
    folder = Path(folder)
    index, count = part
    if not 0 <= index < count:
        raise ValueError(f"part must be i of n with 0 <= i < n, got {index} of {count}")
    _start(folder, header, tokenizer)
    if isinstance(tokenizer, KLVAE):
        tokenizer = tokenizer.to(device)
    missing = [n for n in range(shard_count(header)) if not has_shard(folder, n, header)]
    mine = [number for number in missing if number % count == index]
    plan = {number: in_batches(shard_rows(number, header), batch_size) for number in mine}
    batches = list(itertools.chain.from_iterable(plan.values()))
    done, total = 0, sum(map(len, batches))
    with contextlib.closing(read(source, batches, workers)) as loaded:
        for number, its_batches in plan.items():
            encoded = []
            for rows_B in its_batches:
                encoded.append(_encode_both(next(loaded), tokenizer, device))
                done += len(rows_B)
                if progress is not None:
                    progress(done, total)
            _write_shard(folder, number, header, encoded)
    return sum(not has_shard(folder, number, header) for number in missing)


def _encode_both(
    batch: tuple[Tensor, Tensor], tokenizer: PixelTokenizer | KLVAE, device: torch.device | str
) -> dict[str, Tensor]:
    """Labels, and the latents of the images as they are and mirrored, on the CPU."""
    images_BCHW, labels_B = batch
    plain, mirrored = (encode(tokenizer, x.to(device)) for x in (images_BCHW, images_BCHW.flip(-1)))
    tensors = {"labels": labels_B, "mean": torch.stack((plain[0], mirrored[0]), 1).cpu()}
    if plain[1] is not None and mirrored[1] is not None:
        tensors["std"] = torch.stack((plain[1], mirrored[1]), 1).cpu()
    return tensors


def _write_shard(
    folder: Path, number: int, header: Mapping[str, Any], batches: list[dict[str, Tensor]]
) -> None:
    dtype = DTYPES[header["dtype"]]
    tensors = {}
    for name in batches[0]:
        whole = torch.cat([batch[name] for batch in batches])
        tensors[name] = whole if name == "labels" else whole.to(dtype)
        if not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(
                f"the {name} of a latent in shard {number} is not finite in {header['dtype']}: "
                "use float32, and look at the tokenizer and the pictures"
            )
    metadata = {"header": header["digest"], "sha256": checksum(tensors)}
    with atomic_write(shard_path(folder, number)) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _header(
    source: Examples, tokenizer: PixelTokenizer | KLVAE, shard_size: int, dtype: str
) -> dict[str, Any]:
    if source.tokenizer is not None:
        raise ValueError("the source holds latents already: cache the pictures they were made of")
    if shard_size < 1 or dtype not in DTYPES:
        raise ValueError(
            f"shard_size must be positive and dtype one of {tuple(DTYPES)}, got {shard_size} and "
            f"{dtype!r}"
        )
    blank = torch.zeros(1, *source.image_shape)
    values: dict[str, Any] = {
        "format": FORMAT,
        "source": source.identity,  # and the transform, where there is one
        "tokenizer": tokenizer.to_dict(),
        "scale": scale_of(tokenizer),
        "shape": list(encode(tokenizer, blank.to(_device(tokenizer)))[0].shape[1:]),
        "count": len(source),
        "class_names": list(source.class_names),
        "flips": 2,
        "shard_size": shard_size,
        "dtype": dtype,
    }
    if isinstance(tokenizer, KLVAE):
        values["tokenizer_weights"] = weights_digest(open_weights(tokenizer.state_dict()))
    values = json.loads(json.dumps(values))  # as it will be read: tuples become lists
    return {**values, "digest": header_digest(values)}


def _device(tokenizer: PixelTokenizer | KLVAE) -> torch.device:
    parameters = tokenizer.parameters() if isinstance(tokenizer, KLVAE) else ()
    return next((each.device for each in parameters), torch.device("cpu"))


def _start(folder: Path, header: dict[str, Any], tokenizer: PixelTokenizer | KLVAE) -> None:
    """Write header and tokenizer, or see that the folder's are the same."""
    if (folder / HEADER_FILE).is_file():
        found = read_header(folder)
        differing = [name for name in header if found.get(name) != header[name]]
        if differing:
            raise ValueError(
                f"{folder} holds another cache (different: {', '.join(sorted(differing))}): choose "
                "another folder, or delete it"
            )
        return
    if isinstance(tokenizer, KLVAE):
        weights = {name: each.cpu().contiguous() for name, each in tokenizer.state_dict().items()}
        with atomic_write(folder / TOKENIZER_FILE) as temporary:
            save_file(weights, temporary)
    with atomic_write(folder / HEADER_FILE) as temporary:
        temporary.write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
