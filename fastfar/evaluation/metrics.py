"""How far a set of generated images is from a set of real ones, on features of both.

Everything is float64 numpy, and deterministic.  Feature arrays are (N, F), one row per image.

Legend: N and M images, F feature.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


NEIGHBOURS = 3  # k of precision and recall


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean (F,) and unbiased covariance (F, F) of ``count`` features (None: not known)."""

    mean: Array
    covariance: Array
    count: int | None

    @classmethod
    def of(cls, features_NF: npt.ArrayLike) -> FeatureStatistics:
        """Statistics of (N, F) features; ValueError for fewer than two rows, NaN or infinity."""
        running = RunningStatistics()
        running.add(features_NF)
        return running.statistics()


class RunningStatistics:
    """`FeatureStatistics` of features that arrive in parts, none of which is kept.

    A part of n rows with mean m and scatter S joins N rows with mean M:
    S' = S_N + S + N n / (N + n) (m - M)(m - M)^T, M' = M + n / (N + n) (m - M)
    (Chan, Golub and LeVeque 1983), which loses no digits where the mean is large.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Array = np.zeros(())
        self._scatter: Array = np.zeros(())

    def add(self, features_NF: npt.ArrayLike) -> None:
        """Count (N, F) features; ValueError for NaN or infinity."""
        rows = _checked(features_NF, "features")
        if not len(rows):
            return
        mean = rows.mean(axis=0)
        rows = rows - mean
        total = self.count + len(rows)
        shift = mean - self._mean
        scatter = rows.T @ rows
        if self.count:
            scatter += self._scatter + np.outer(shift, shift) * (self.count * len(rows) / total)
        self._scatter, self._mean = scatter, self._mean + shift * (len(rows) / total)
        self.count = total

    def statistics(self) -> FeatureStatistics:
        """Of all rows so far; ValueError for fewer than two."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return FeatureStatistics(self._mean, self._scatter / (self.count - 1), self.count)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared Frechet distance between two Gaussians, in squared feature units.

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1^1/2 S2 S1^1/2)^1/2), Dowson and Landau 1982; as a
    measure of generated images: Heusel et al. 2017.  Both roots are of symmetric positive
    semidefinite matrices and taken by eigendecomposition: no complex numbers, no added epsilon,
    singular covariances allowed.  It falls as N grows (Chong and Forsyth 2020): compare equal N.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"feature widths differ: {first.mean.shape[0]} and {second.mean.shape[0]}; both sets "
            "must come from one extractor"
        )
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    product = root @ second.covariance @ root
    overlap = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0.0)).sum()
    shift = first.mean - second.mean
    distance = shift @ shift + np.trace(first.covariance) + np.trace(second.covariance)
    return float(max(distance - 2.0 * overlap, 0.0))


def precision_recall(
    real_NF: npt.ArrayLike, generated_MF: npt.ArrayLike, k: int = NEIGHBOURS, chunk: int = 1000
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2).

    A set's manifold is the union of balls, one around each of its points, with the distance to the
    point's k-th nearest neighbour (itself not counted) as radius.  Precision is the share of
    generated points on the real manifold, recall the share of real points on the generated one.
    Memory is ``chunk`` x max(N, M) doubles.  Use equal N and M: radii shrink as a set grows.

    Raises ValueError where k < 1 or a set holds no more than k points.
    """
    real, generated = _checked(real_NF, "real"), _checked(generated_MF, "generated")
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"feature widths differ: {real.shape[1]} and {generated.shape[1]}")
    precision = _share_covered(generated, real, _knn_radius2(real, k, chunk), chunk)
    recall = _share_covered(real, generated, _knn_radius2(generated, k, chunk), chunk)
    return precision, recall


def inception_score(
    logits_NK: npt.ArrayLike, splits: int = 10, seed: int = 2020
) -> tuple[float, float]:
    """exp(mean KL(p(k|x) || p(k))): its mean over ``splits`` parts of a set, and their deviation.

    Salimans et al. 2016, with p(k) of the part.  Splits and seed are torch-fidelity's, which
    shuffles so first: the score depends on both.

    Raises ValueError for fewer images than parts, NaN or infinity.
    """
    logits = _checked(logits_NK, "logits")
    if not 1 <= splits <= len(logits):
        raise ValueError(f"{len(logits)} images in {splits} parts: give at least 1 image for each")
    logits = logits[np.random.RandomState(seed).permutation(len(logits))]
    scores = []
    for i in range(splits):
        part = logits[i * len(logits) // splits : (i + 1) * len(logits) // splits]
        part = part - part.max(axis=1, keepdims=True)
        log_p = part - np.log(np.exp(part).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        mean = p.mean(axis=0).clip(min=np.finfo(np.float64).tiny)  # a class that none shows
        divergence = (p * (log_p - np.log(mean))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores)), float(np.std(scores))


def class_agreement(labels_N: npt.ArrayLike, predicted_N: npt.ArrayLike) -> float:
    """Share of images that a classifier puts into the class they were made for."""
    labels, predicted = np.asarray(labels_N), np.asarray(predicted_N)
    if labels.shape != predicted.shape or labels.ndim != 1 or len(labels) == 0:
        raise ValueError(
            f"labels {labels.shape} and predictions {predicted.shape} must be two equally long, "
            "non-empty rows"
        )
    return float((labels == predicted).mean())


def _knn_radius2(points_NF: Array, k: int, chunk: int) -> Array:
    """Squared distance (N,) from each point to its k-th nearest neighbour, itself left out."""
    if not 1 <= k < len(points_NF):
        raise ValueError(
            f"k = {k} nearest neighbours of {len(points_NF)} images: k must be at least 1 and "
            "smaller than the number of images"
        )
    radius2 = np.empty(len(points_NF))
    for start in range(0, len(points_NF), chunk):
        rows = points_NF[start : start + chunk]
        distance2 = _squared_distance(rows, points_NF)
        distance2[np.arange(len(rows)), np.arange(start, start + len(rows))] = np.inf
        radius2[start : start + chunk] = np.partition(distance2, k - 1, axis=1)[:, k - 1]
    return radius2


def _share_covered(points_NF: Array, centres_MF: Array, radius2_M: Array, chunk: int) -> float:
    covered = 0
    for start in range(0, len(points_NF), chunk):
        distance2 = _squared_distance(points_NF[start : start + chunk], centres_MF)
        covered += int((distance2 <= radius2_M).any(axis=1).sum())
    return covered / len(points_NF)


def _squared_distance(a_NF: Array, b_MF: Array) -> Array:
    """|a - b|^2 (N, M), as |a|^2 + |b|^2 - 2ab; what is 0 but for rounding is made exactly 0."""
    squares = np.einsum("nf,nf->n", a_NF, a_NF)[:, None] + np.einsum("mf,mf->m", b_MF, b_MF)
    distance2: Array = squares - 2.0 * (a_NF @ b_MF.T)
    distance2[distance2 < 1e-12 * squares] = 0.0
    return distance2


def _checked(features_NF: npt.ArrayLike, name: str) -> Array:
    rows: Array = np.asarray(features_NF, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"{name} must have shape (images, features), got {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError(f"{name} hold NaN or infinity: the images are broken")
    return rows
