"""Token-level agreement of a sampler with its teacher: both draw often from the same conditions.

A head samples p(x | z) for every token on its own, so the smallest honest question about a sampler
is whether its draws given z are distributed as the teacher's given the same z.  Seconds of it
resolve what images show after hours, which makes it the gate before any run of images.

Legend: Z condition, N draw of the teacher, M draw of the candidate, P number of a token, D
direction.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The gate of `TokenMetrics.passes`.
MAX_RATIO, MAX_VARIANCE_ERROR, MAX_SHIFT = 3.0, 0.03, 0.02
RANDOM_DIRECTIONS, _SEED = 32, 0
_PAIRS = 2**24  # distances that are held at a time


@dataclass(frozen=True)
class TokenMetrics:
    """A candidate's draws against the teacher's; means over conditions.

    Attributes:
        energy: energy distance E_z[2 E|x-y| - E|x-x'| - E|y-y'|] over all pairs (V statistic: equal
            distributions do not give 0 but about `energy_floor`), in units of the tokens.
        energy_floor: the same of one half of the teacher's draws against the other.
        mean_shift: rms over conditions and numbers of the difference of means, less what the number
            of draws alone makes of it, in standard deviations of the teacher. 0 where nothing is
            left.
        mean_shift_noise: what equal means reach once in forty times, for want of draws.
        variance_ratio: candidate's mean variance over the teacher's.
        correlation_kept: slope of the candidate's covariances between different numbers of a token
            on the teacher's, over `variance_ratio`: 1 keeps the correlations, 0 loses them. NaN
            where the teacher shows none.
        sliced_w1: largest over fixed directions of the mean Wasserstein-1 distance of the
            projections, in standard deviations of the teacher.
        sliced_w1_floor: the same of one half of the teacher's draws against the other.
        conditions, draws: Z and M.
    """

    energy: float
    energy_floor: float
    mean_shift: float
    mean_shift_noise: float
    variance_ratio: float
    correlation_kept: float
    sliced_w1: float
    sliced_w1_floor: float
    conditions: int
    draws: int

    @property
    def ratio(self) -> float:
        """energy / energy_floor: 1 is as good as the teacher; it grows with the number of draws."""
        return self.energy / self.energy_floor

    @property
    def passes(self) -> bool:
        """Energy at most 3 floors, variance within 3 %, mean within 0.02 standard deviations (or
        what the number of draws can tell)."""
        return (
            self.ratio <= MAX_RATIO
            and abs(self.variance_ratio - 1.0) <= MAX_VARIANCE_ERROR
            and self.mean_shift <= max(MAX_SHIFT, self.mean_shift_noise)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with `ratio` and `passes`; None where there is no number."""
        values = {**dataclasses.asdict(self), "ratio": self.ratio, "passes": self.passes}
        return {name: None if value != value else value for name, value in values.items()}


def token_metrics(teacher_ZNP: Tensor, candidate_ZMP: Tensor) -> TokenMetrics:
    """All figures of one candidate at one level.

    Args:
        teacher_ZNP: N draws per condition, N even.
        candidate_ZMP: M = N / 2 draws of the candidate for the same conditions, in the same order.

    Every figure of the candidate is taken against both halves of the teacher's draws, so that it
    compares with the floor, which is one half against the other.  Arithmetic is float32.

    Raises:
        ValueError: shapes that do not fit, fewer than 4 draws, NaN or infinity.

    Source: energy distance, Szekely and Rizzo 2013; the rest is second moments.
    """
    _check(teacher_ZNP, candidate_ZMP)
    teacher_ZNP, candidate_ZMP = teacher_ZNP.float(), candidate_ZMP.float()
    first_ZMP, second_ZMP = teacher_ZNP.chunk(2, dim=1)
    floor = float(energy_distance(first_ZMP, second_ZMP).mean())
    halves = (first_ZMP, second_ZMP)
    energy = sum(float(energy_distance(half, candidate_ZMP).mean()) for half in halves) / 2.0
    variance = float(teacher_ZNP.var(dim=1).mean())
    if variance == 0.0 or floor == 0.0:
        raise ValueError("the teacher's draws do not vary: there is nothing to compare")
    variance_ratio = float(candidate_ZMP.var(dim=1).mean()) / variance
    w1_D = torch.stack([_sliced_w1(half, candidate_ZMP) for half in halves]).mean(dim=0)
    return TokenMetrics(
        energy=energy,
        energy_floor=floor,
        mean_shift=_mean_shift(teacher_ZNP, candidate_ZMP, variance),
        mean_shift_noise=_mean_shift_noise(teacher_ZNP, candidate_ZMP, variance),
        variance_ratio=variance_ratio,
        correlation_kept=_covariance_slope(first_ZMP, second_ZMP, candidate_ZMP) / variance_ratio,
        sliced_w1=float(w1_D.max()),
        sliced_w1_floor=float(_sliced_w1(first_ZMP, second_ZMP).max()),
        conditions=candidate_ZMP.shape[0],
        draws=candidate_ZMP.shape[1],
    )


def token_report(teacher_ZNP: Tensor, candidate_ZMP: Tensor) -> dict[str, TokenMetrics]:
    """`token_metrics` of "all" conditions, and of the "varied" half of them.

    "varied": those whose variance under the teacher lies above the median.  Background tokens are
    nearly certain; alone they would make any sampler look good.
    """
    _check(teacher_ZNP, candidate_ZMP)
    variance_Z = teacher_ZNP.float().var(dim=1).mean(dim=1)
    varied_Z = variance_Z > variance_Z.median()
    report = {"all": token_metrics(teacher_ZNP, candidate_ZMP)}
    if bool(varied_Z.any()):
        report["varied"] = token_metrics(teacher_ZNP[varied_Z], candidate_ZMP[varied_Z])
    return report


def energy_distance(x_ZNP: Tensor, y_ZMP: Tensor) -> Tensor:
    """(Z,) float32: 2 E|x-y| - E|x-x'| - E|y-y'| of every condition, over all pairs.

    Pairs of a draw with itself count as 0, so it is never negative.
    """
    piece = max(1, _PAIRS // max(x_ZNP.shape[1], y_ZMP.shape[1]) ** 2)
    pieces = []
    for start in range(0, len(x_ZNP), piece):
        x, y = (draws[start : start + piece].float() for draws in (x_ZNP, y_ZMP))
        pieces.append(2.0 * _distance(x, y) - _distance(x, x) - _distance(y, y))
    return torch.cat(pieces)


def _distance(x_ZNP: Tensor, y_ZMP: Tensor) -> Tensor:
    # Not by a product of matrices: the cancellation in |x|^2 + |y|^2 - 2xy is not worth the speed.
    distance_ZNM = torch.cdist(x_ZNP, y_ZMP, compute_mode="donot_use_mm_for_euclid_dist")
    return distance_ZNM.mean(dim=(1, 2))


def _mean_shift(teacher_ZNP: Tensor, candidate_ZMP: Tensor, variance: float) -> float:
    """sqrt(E|m_c - m_t|^2 - what equal means would give) / sd."""
    shift2 = (candidate_ZMP.mean(dim=1) - teacher_ZNP.mean(dim=1)).square().mean()
    expected = (
        candidate_ZMP.var(dim=1).mean() / candidate_ZMP.shape[1]
        + teacher_ZNP.var(dim=1).mean() / teacher_ZNP.shape[1]
    )
    return float(((shift2 - expected).clamp(min=0.0) / variance).sqrt())


def _mean_shift_noise(teacher_ZNP: Tensor, candidate_ZMP: Tensor, variance: float) -> float:
    """From the deviation of |m_c - m_t|^2 of Gaussian means: 2 tr(S^2) for every condition."""
    centred_ZNP = teacher_ZNP - teacher_ZNP.mean(dim=1, keepdim=True)
    covariance_ZPP = centred_ZNP.mT @ centred_ZNP / (teacher_ZNP.shape[1] - 1)
    of_means = 1.0 / candidate_ZMP.shape[1] + 1.0 / teacher_ZNP.shape[1]
    deviation = (2.0 * covariance_ZPP.square().sum()).sqrt() * of_means
    conditions, _, numbers = teacher_ZNP.shape
    return float((2.0 * deviation / (conditions * numbers) / variance).sqrt())


def _covariance_slope(first_ZMP: Tensor, second_ZMP: Tensor, candidate_ZMP: Tensor) -> float:
    """sum C_c C_t / sum C_t C_t over the pairs of different numbers.

    The teacher's covariances carry the noise of few draws, which would swell the sum of their
    squares; products of independent halves do not.
    """
    a, b, c = (_off_diagonal(x) for x in (first_ZMP, second_ZMP, candidate_ZMP))
    product = float((a * b).sum())
    return float((c * (a + b)).sum()) / 2.0 / product if product > 0 else float("nan")


def _off_diagonal(x_ZNP: Tensor) -> Tensor:
    """(Z, P, P) covariances, 0 on the diagonal."""
    centred_ZNP = x_ZNP - x_ZNP.mean(dim=1, keepdim=True)
    covariance_ZPP = centred_ZNP.mT @ centred_ZNP / (x_ZNP.shape[1] - 1)
    return covariance_ZPP - torch.diag_embed(covariance_ZPP.diagonal(dim1=1, dim2=2))


def _sliced_w1(teacher_ZMP: Tensor, candidate_ZMP: Tensor) -> Tensor:
    """(D,) mean W1 along each direction over the teacher's deviation along it."""
    numbers = teacher_ZMP.shape[-1]
    generator = torch.Generator().manual_seed(_SEED)
    random_PD = torch.randn(numbers, RANDOM_DIRECTIONS, generator=generator)
    directions_PD = torch.cat([torch.eye(numbers), random_PD / random_PD.norm(dim=0)], dim=1)
    x_ZMD = (teacher_ZMP @ directions_PD).sort(dim=1).values
    y_ZMD = (candidate_ZMP @ directions_PD).sort(dim=1).values
    deviation_D = x_ZMD.var(dim=1).mean(dim=0).sqrt().clamp(min=1e-12)
    return (x_ZMD - y_ZMD).abs().mean(dim=(0, 1)) / deviation_D


def _check(teacher_ZNP: Tensor, candidate_ZMP: Tensor) -> None:
    if teacher_ZNP.ndim != 3 or candidate_ZMP.ndim != 3:
        raise ValueError(
            f"draws must be (conditions, draws, numbers), got {tuple(teacher_ZNP.shape)} and "
            f"{tuple(candidate_ZMP.shape)}"
        )
    conditions, draws, numbers = teacher_ZNP.shape
    expected = (conditions, draws // 2, numbers)
    if conditions < 1 or draws < 4 or draws % 2 or tuple(candidate_ZMP.shape) != expected:
        raise ValueError(
            f"the teacher gave {tuple(teacher_ZNP.shape)} draws and the candidate "
            f"{tuple(candidate_ZMP.shape)}: give an even number of at least 4 per condition, and "
            "half as many of the candidate for the same conditions"
        )
    for name, draws_ZNP in (("teacher", teacher_ZNP), ("candidate", candidate_ZMP)):
        if not bool(torch.isfinite(draws_ZNP).all()):
            raise ValueError(f"the {name}'s draws hold NaN or infinity: that sampler diverged")
