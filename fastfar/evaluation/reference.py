"""What samples are compared with: published statistics of real images, or real images themselves.

Legend: N images, C channels, H height, W width, F feature.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfar._files import atomic_write
from fastfar.data import Examples
from fastfar.data.images import to_bytes
from fastfar.evaluation.extractors import Extractor, Floats, embed_all
from fastfar.evaluation.files import image_batches
from fastfar.evaluation.metrics import Array, FeatureStatistics, RunningStatistics

PART = 2_000  # images whose features are counted at once
NEAREST_AMONG = 10_000  # real images of precision and recall, as in Dhariwal and Nichol 2021


@dataclass(frozen=True)
class Reference:
    """Real images as an extractor sees them.

    Attributes:
        name: printed beside every figure.
        statistics: mean and covariance of their features.
        features: (N, F) of real images, for precision and recall; None where there are none. They
            may be fewer than those of the statistics.
    """

    name: str
    statistics: FeatureStatistics
    features: Floats | None

    def __str__(self) -> str:
        count, images = self.statistics.count, self.features
        of = "" if count is None else f" {count}"
        few = "" if images is None or len(images) == count else f" ({len(images)} for P, R)"
        return f"{self.name}{of}{few}"


def reference_of(name: str, extractor: Extractor, images: Iterable[Tensor]) -> Reference:
    """The reference that batches of uint8 images are: statistics of all of them, and for precision
    and recall, whose cost grows with the square, 10,000 at random, always the same.

    No more than those are kept in memory, however many images there are.
    """
    running, kept = RunningStatistics(), _Sample(NEAREST_AMONG)
    for group in _at_least(PART, (embed_all(extractor, [batch]).features for batch in images)):
        features_NF = np.concatenate(group)
        running.add(features_NF)
        kept.add(features_NF)
    return Reference(name, running.statistics(), kept.rows)


def _at_least(count: int, parts: Iterable[Floats]) -> Iterator[list[Floats]]:
    """Groups of so many rows, for which statistics cost a product of matrices each."""
    group: list[Floats] = []
    for part in parts:
        group.append(part)
        if sum(map(len, group)) >= count:
            yield group
            group = []
    if group:
        yield group


class _Sample:
    """`size` random rows of all that were added (reservoir sampling, Vitter 1985, algorithm R)."""

    def __init__(self, size: int) -> None:
        self.size, self._seen = size, 0
        self._generator = np.random.default_rng(0)
        self._first: list[Floats] = []  # the first `size` rows, of which later ones take the place

    @property
    def rows(self) -> Floats:
        """Those that are kept, as one array, which further ones may be written into."""
        if len(self._first) > 1:
            self._first = [np.concatenate(self._first)]
        return self._first[0]

    def add(self, rows_NF: Floats) -> None:
        """Row i of all takes the place of a kept one with probability size / i."""
        free = max(0, self.size - self._seen)
        if free:
            self._first.append(rows_NF[:free].copy())
        first, self._seen = self._seen + free, self._seen + len(rows_NF)
        if first < self._seen:
            place = self._generator.integers(0, np.arange(first, self._seen) + 1)
            taken = place < self.size
            self.rows[place[taken]] = rows_NF[free:][taken]


def read_reference(path: str | os.PathLike[str], extractor: Extractor) -> Reference:
    """The reference that an .npz file holds, for one extractor.

    Files that are known:

    * ``mu`` (F,) and ``sigma`` (F, F): statistics alone, as MAR has them (adm_in256_stats.npz).
    * with ``arr_0``, uint8 (N, H, W, 3), besides: a reference batch of guided-diffusion
      (VIRTUAL_imagenet256_labeled.npz). ADM's precision and recall are taken against these images,
      its FID against the statistics, which are of more.
    * ``arr_0`` alone: images, which give both.
    * what `write_reference` wrote.

    Published statistics do not say of which network they are: only use them with the published
    Inception weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another kind, or of another extractor.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no reference: {path} is missing. For ImageNet at 256 pixels get "
            "VIRTUAL_imagenet256_labeled.npz of github.com/openai/guided-diffusion (evaluations); "
            "for other images make one with --reference FOLDER --save-reference FILE.npz"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in _ENTRIES if name in file}
            entries = sorted(file)
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or no .npz file: {error}") from error
    made_for = str(found.get("extractor", extractor.fingerprint))
    if made_for != extractor.fingerprint:
        raise ValueError(
            f"{path} holds features of {made_for!r}, the samples would be judged by "
            f"{extractor.fingerprint!r}: make it anew with that one"
        )
    features = found.get("features")
    if "arr_0" in entries:
        features = embed_all(extractor, image_batches(path)).features
    if "mu" in found and "sigma" in found:
        count = int(found["count"]) if "count" in found else None
        statistics = _statistics(path, found["mu"], found["sigma"], count)
    elif features is not None:
        statistics = FeatureStatistics.of(features)
    else:
        raise ValueError(f"{path} holds {entries}: expected mu and sigma, or images as arr_0")
    return Reference(path.name, statistics, features)


def data_batches(data: Examples, size: int = 100) -> Iterator[Tensor]:
    """All images of a data set as uint8 (B, C, H, W), in order.

    Raises ValueError for a latent cache, which has no images.
    """
    if data.tokenizer is not None:
        raise ValueError("a latent cache has no images to compare with: give what it was made from")
    for rows_B in torch.split(torch.arange(len(data)), size):
        images_BCHW, _ = data.take(rows_B)
        yield to_bytes(images_BCHW)


def write_reference(
    path: str | os.PathLike[str], reference: Reference, extractor: Extractor
) -> None:
    """Store it for `read_reference`, atomically."""
    entries: dict[str, Any] = {
        "mu": reference.statistics.mean,
        "sigma": reference.statistics.covariance,
        "extractor": np.array(extractor.fingerprint),
    }
    if reference.statistics.count is not None:
        entries["count"] = np.array(reference.statistics.count)
    if reference.features is not None:
        entries["features"] = reference.features
    with atomic_write(path) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, **entries)


_ENTRIES = ("mu", "sigma", "count", "features", "extractor")


def _statistics(path: Path, mean: Array, covariance: Array, count: int | None) -> FeatureStatistics:
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{path}: mu has shape {mean.shape} and sigma {covariance.shape}, expected (F,) and "
            "(F, F)"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path}: mu or sigma hold NaN or infinity")
    return FeatureStatistics(mean, covariance, count)
