"""Honest figures of quality: distances of features beside floor and ceilings, and FID.

`evaluate` and `Judge` are for Fashion-MNIST, with the classifier that comes with the package;
`score` is for any images, extractor and reference, `Inception` among them.
"""

from fastfar.evaluation.classifier import (
    FashionClassifier,
    accuracy,
    extract,
    load_classifier,
    save_classifier,
    train_classifier,
)
from fastfar.evaluation.equality import Verdict, decide, fd_spread
from fastfar.evaluation.evaluate import METRIC, Judge, Row, comparisons, evaluate
from fastfar.evaluation.extractors import Extractor, Features, embed_all
from fastfar.evaluation.files import load_images
from fastfar.evaluation.inception import Inception
from fastfar.evaluation.metrics import (
    FeatureStatistics,
    class_agreement,
    frechet_distance,
    inception_score,
    precision_recall,
)
from fastfar.evaluation.reference import Reference, read_reference, reference_of, write_reference
from fastfar.evaluation.samples import SampleStore, draw_samples, fill
from fastfar.evaluation.scores import Scores, score
from fastfar.evaluation.tokens import TokenMetrics, token_metrics, token_report

__all__ = [
    "METRIC",
    "Extractor",
    "FashionClassifier",
    "FeatureStatistics",
    "Features",
    "Inception",
    "Judge",
    "Reference",
    "Row",
    "SampleStore",
    "Scores",
    "TokenMetrics",
    "Verdict",
    "accuracy",
    "class_agreement",
    "comparisons",
    "decide",
    "draw_samples",
    "embed_all",
    "evaluate",
    "extract",
    "fd_spread",
    "fill",
    "frechet_distance",
    "inception_score",
    "load_classifier",
    "load_images",
    "precision_recall",
    "read_reference",
    "reference_of",
    "save_classifier",
    "score",
    "token_metrics",
    "token_report",
    "train_classifier",
    "write_reference",
]
