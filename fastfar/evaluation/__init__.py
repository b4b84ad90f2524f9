"""Honest figures of quality: FD-fashion, precision, recall, class agreement, floor and ceilings."""

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
from fastfar.evaluation.metrics import (
    FeatureStatistics,
    class_agreement,
    frechet_distance,
    precision_recall,
)
from fastfar.evaluation.samples import SampleStore, draw_samples, load_images
from fastfar.evaluation.tokens import TokenMetrics, token_metrics, token_report

__all__ = [
    "METRIC",
    "FashionClassifier",
    "FeatureStatistics",
    "Judge",
    "Row",
    "SampleStore",
    "TokenMetrics",
    "Verdict",
    "accuracy",
    "class_agreement",
    "comparisons",
    "decide",
    "draw_samples",
    "evaluate",
    "extract",
    "fd_spread",
    "frechet_distance",
    "load_classifier",
    "load_images",
    "precision_recall",
    "save_classifier",
    "token_metrics",
    "token_report",
    "train_classifier",
]
