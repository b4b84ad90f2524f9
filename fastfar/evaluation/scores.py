"""Figures of one set of images on the features of any extractor, against any reference.

They are those of the papers on ImageNet: FID of 50,000 samples against statistics of the training
images, inception score, precision and recall against 10,000 real images (Dhariwal and Nichol 2021).
No figure stands without its N, extractor and reference: none of them compares otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastfar.evaluation.extractors import Extractor, Features
from fastfar.evaluation.metrics import (
    FeatureStatistics,
    frechet_distance,
    inception_score,
    precision_recall,
)
from fastfar.evaluation.reference import Reference

SPLITS = 10


@dataclass(frozen=True)
class Scores:
    """One judged set.

    Attributes:
        name, count: of the set; N.
        metric, distance: name and value of the Frechet distance.
        inception_score, inception_score_deviation: over 10 parts, of the extractor's own classes.
        precision, recall: k = 3; None where the reference has no images.
        extractor, reference: what it was taken with.
    """

    name: str
    count: int
    metric: str
    distance: float
    inception_score: float
    inception_score_deviation: float
    precision: float | None
    recall: float | None
    extractor: str
    reference: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the distance stands under its name."""
        values = dict(self.__dict__)
        metric, distance = values.pop("metric"), values.pop("distance")
        return {**values, metric: distance}


def score(name: str, features: Features, extractor: Extractor, reference: Reference) -> Scores:
    """All figures of a set.

    Raises:
        ValueError: no more images than 10 (the parts of the inception score), features that are
            not finite or of another width than the reference's.
    """
    if len(features) <= SPLITS:
        raise ValueError(
            f"{len(features)} images are too few for {extractor.metric}: give more than {SPLITS}; "
            "published figures are of 50,000"
        )
    distance = frechet_distance(FeatureStatistics.of(features.features), reference.statistics)
    mean, deviation = inception_score(features.logits, SPLITS)
    precision = recall = None
    if reference.features is not None:
        precision, recall = precision_recall(reference.features, features.features)
    return Scores(
        name=name,
        count=len(features),
        metric=extractor.metric,
        distance=distance,
        inception_score=mean,
        inception_score_deviation=deviation,
        precision=precision,
        recall=recall,
        extractor=extractor.fingerprint,
        reference=str(reference),
    )
