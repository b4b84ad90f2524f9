"""``evaluate``: samples against real test images, with the floor and the ceilings beside them.

The distance is called **FD-fashion**: the Frechet distance on features of fastfar's Fashion-MNIST
classifier.  It is no FID (which means ImageNet Inception features) and compares only with figures
of the same extractor, reference and N, so every row carries all three.

* floor: as many class-balanced images of the train split as there are samples.  Nothing that
  models the data can be expected below it.  Its agreement is the classifier's accuracy there.
* ceilings: uniform noise, Gaussian noise with the data's mean and deviation, and the mean image
  of each class.  Whatever does no better has learnt nothing.  No figure is reported alone, since
  each can be fooled: the class-mean image has a class agreement of 0.6 here, noise a precision of
  0.06 to 0.22 (the balls of outlying test images are wide).

Legend: B image, H height, W width, F feature.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfar._version import __version__
from fastfar.data import ImageDataset, balanced_labels
from fastfar.evaluation.classifier import METRIC as METRIC
from fastfar.evaluation.classifier import FashionClassifier, extract
from fastfar.evaluation.metrics import (
    NEIGHBOURS,
    Array,
    FeatureStatistics,
    class_agreement,
    frechet_distance,
    precision_recall,
)

_FLOOR_SEED, _REFERENCE_SEED, _NOISE_SEED = 1, 2, 3


@dataclass(frozen=True)
class Row:
    """One judged set.  ``kind`` is "samples", "floor" or "ceiling"; ``count`` its N."""

    name: str
    kind: str
    count: int
    fd: float
    precision: float
    recall: float
    class_agreement: float | None
    extractor: str
    reference: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the distance stands under its full name."""
        values = dict(self.__dict__)
        return {METRIC if key == "fd" else key: value for key, value in values.items()}


class Judge:
    """Scores sets of images against the real images of ``reference``.

    FD-fashion uses all of ``reference``.  Precision and recall, whose k-NN radii depend on the
    number of points, use a fixed class-balanced part of it of the size of the judged set (all of it
    where the set is larger).

    `statistics`: mean and covariance of the real features.
    """

    def __init__(
        self, classifier: FashionClassifier, reference: ImageDataset, reference_name: str = "test"
    ) -> None:
        if classifier.fingerprint == "untrained":
            raise ValueError("the evaluator is untrained: use load_classifier()")
        self.classifier, self.reference = classifier, reference
        self.extractor = classifier.fingerprint
        self.reference_name = f"{reference_name} {len(reference)}"
        features_BF, self._classes_B = extract(classifier, reference.images)
        self._features: Array = features_BF.numpy().astype("float64")
        self.statistics = FeatureStatistics.of(self._features)

    @property
    def accuracy(self) -> float:
        """The classifier's accuracy on the reference: the class agreement of real images."""
        return class_agreement(self.reference.labels.numpy(), self._classes_B.numpy())

    def score(self, name: str, kind: str, images_BHW: Tensor, labels_B: Tensor | None) -> Row:
        """All figures of one set of uint8 images; without labels the agreement is None.

        Raises ValueError where there are no more images than neighbours (k = 3).
        """
        if len(images_BHW) <= NEIGHBOURS:
            raise ValueError(
                f"{len(images_BHW)} images are too few: precision and recall need more than "
                f"{NEIGHBOURS}, and {METRIC} means little below a few thousand"
            )
        features_BF, classes_B = extract(self.classifier, images_BHW)
        features: Array = features_BF.numpy().astype("float64")
        neighbours = self._neighbours(len(images_BHW))
        precision, recall = precision_recall(neighbours, features)
        agreement = None
        if labels_B is not None:
            agreement = class_agreement(labels_B.numpy(), classes_B.numpy())
        return Row(
            name=name,
            kind=kind,
            count=len(images_BHW),
            fd=frechet_distance(FeatureStatistics.of(features), self.statistics),
            precision=precision,
            recall=recall,
            class_agreement=agreement,
            extractor=self.extractor,
            reference=self.reference_name,
        )

    def _neighbours(self, count: int) -> Array:
        if count >= len(self.reference):
            return self._features
        rows: Array = self._features[self.reference.balanced_rows(count, _REFERENCE_SEED).numpy()]
        return rows


def comparisons(train: ImageDataset, count: int) -> dict[str, tuple[str, Tensor, Tensor]]:
    """The floor and the ceilings of ``count`` images: name -> (kind, uint8 images, labels).

    Deterministic; the train split gives the floor, the class means and the noise's mean and
    deviation.  ValueError where the split has too few images of a class.
    """
    floor = train.balanced(count, seed=_FLOOR_SEED)
    labels_B = balanced_labels(count, train.num_classes)
    shape = (count, *train.images.shape[1:])
    generator = torch.Generator().manual_seed(_NOISE_SEED)
    uniform = torch.randint(256, shape, generator=generator).to(torch.uint8)
    pixels = train.images.double()
    gaussian = torch.randn(shape, generator=generator) * float(pixels.std()) + float(pixels.mean())
    means = torch.stack([pixels[train.labels == c].mean(0) for c in range(train.num_classes)])
    return {
        "train split": ("floor", floor.images, floor.labels),
        "class-mean image": ("ceiling", means.round().to(torch.uint8)[labels_B], labels_B),
        "uniform noise": ("ceiling", uniform, labels_B),
        "Gaussian noise": ("ceiling", gaussian.round().clamp(0, 255).to(torch.uint8), labels_B),
    }


def evaluate(
    sets: Mapping[str, tuple[Tensor, Tensor | None]],
    *,
    train: ImageDataset,
    test: ImageDataset,
    classifier: FashionClassifier,
    on_row: Callable[[Row], None] | None = None,
) -> dict[str, Any]:
    """Judge sets of samples against the test split, with floor and ceilings of the same N.

    ``sets``: name -> (uint8 images (B, 32, 32), labels (B,) or None), of one N.  Returns a
    dictionary fit for JSON: ``metric``, ``extractor``, ``extractor_accuracy`` (on the test split),
    ``reference``, ``neighbours``, ``rows`` (see ``Row``), ``fd_over_floor`` and
    ``fd_over_class_mean`` (of each set), ``seconds``, ``fastfar``.  ``on_row`` sees each row as it
    is done.  The floor and the ceilings use as many images as there are samples, at most those of
    the train split.
    """
    start = time.perf_counter()
    judge = Judge(classifier, test)
    rows: list[Row] = []

    def add(name: str, kind: str, images_BHW: Tensor, labels_B: Tensor | None) -> None:
        rows.append(judge.score(name, kind, images_BHW, labels_B))
        if on_row is not None:
            on_row(rows[-1])

    for name, (images_BHW, labels_B) in sets.items():
        add(name, "samples", images_BHW, labels_B)
    smallest_class = int(torch.bincount(train.labels, minlength=train.num_classes).min())
    count = min(rows[0].count, smallest_class * train.num_classes)
    for name, (kind, other_BHW, other_B) in comparisons(train, count).items():
        add(name, kind, other_BHW, other_B)
    ours, by_name = rows[: len(sets)], {row.name: row for row in rows[len(sets) :]}
    return {
        "metric": METRIC,
        "extractor": judge.extractor,
        "extractor_accuracy": judge.accuracy,
        "reference": judge.reference_name,
        "neighbours": NEIGHBOURS,
        "rows": [row.to_dict() for row in rows],
        "fd_over_floor": {row.name: _ratio(row, by_name["train split"]) for row in ours},
        "fd_over_class_mean": {row.name: _ratio(row, by_name["class-mean image"]) for row in ours},
        "seconds": round(time.perf_counter() - start, 3),
        "fastfar": __version__,
    }


def _ratio(row: Row, other: Row) -> float | None:
    return row.fd / other.fd if other.fd > 0 else None
