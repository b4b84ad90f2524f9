"""Token metrics against Gaussians whose figures are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastfar.evaluation.tokens import energy_distance, token_metrics, token_report

Z, N, P = 64, 128, 4


def draws(seed: int, count: int, mixing: Tensor | None = None) -> Tensor:
    """(Z, count, P) Gaussian tokens around means that differ by condition."""
    generator = torch.Generator().manual_seed(seed)
    centre_Z1P = torch.randn(Z, 1, P, generator=torch.Generator().manual_seed(99))
    noise_ZNP = torch.randn(Z, count, P, generator=generator)
    return centre_Z1P + noise_ZNP @ (torch.eye(P) if mixing is None else mixing)


def correlated(r: float) -> Tensor:
    """Mixing (right factor) with unit variances and correlation r between all numbers."""
    covariance = torch.full((P, P), r) + (1.0 - r) * torch.eye(P)
    return torch.linalg.cholesky(covariance).mT


def test_energy_distance_of_points_by_hand() -> None:
    x = torch.tensor([[[0.0], [2.0]]])
    y = torch.tensor([[[1.0], [5.0]]])
    # pairs: (1 + 5 + 1 + 3) / 4 = 2.5; x: (0 + 2 + 2 + 0) / 4 = 1; y: 2.
    assert energy_distance(x, y).tolist() == pytest.approx([2 * 2.5 - 1 - 2])
    assert energy_distance(x, x).tolist() == pytest.approx([0.0])


def test_energy_distance_does_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draws(0, 8), draws(1, 8)
    whole = energy_distance(x, y)
    monkeypatch.setattr("fastfar.evaluation.tokens._PAIRS", 3 * 64)
    torch.testing.assert_close(energy_distance(x, y), whole)


def test_the_teacher_itself_passes() -> None:
    metrics = token_metrics(draws(0, N), draws(1, N // 2))
    assert metrics.passes
    assert metrics.ratio == pytest.approx(1.0, abs=0.1)
    assert metrics.variance_ratio == pytest.approx(1.0, abs=0.03)
    assert metrics.sliced_w1 == pytest.approx(metrics.sliced_w1_floor, rel=0.1)
    assert (metrics.conditions, metrics.draws) == (Z, N // 2)


@pytest.mark.parametrize("shift", [0.2, 0.5])
def test_mean_shift_in_deviations(shift: float) -> None:
    metrics = token_metrics(3.0 * draws(0, N), 3.0 * (draws(1, N // 2) + shift))
    assert metrics.mean_shift == pytest.approx(shift, abs=0.02)
    assert 0.01 < metrics.mean_shift_noise < 0.1
    assert not metrics.passes


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.2])
def test_variance_ratio(factor: float) -> None:
    metrics = token_metrics(draws(0, N), draws(1, N // 2, math.sqrt(factor) * torch.eye(P)))
    assert metrics.variance_ratio == pytest.approx(factor, rel=0.04)
    assert not metrics.passes


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_correlation_kept(kept: float) -> None:
    teacher = draws(0, N, correlated(0.6))
    candidate = draws(1, N // 2, correlated(0.6 * kept))
    assert token_metrics(teacher, candidate).correlation_kept == pytest.approx(kept, abs=0.05)


def test_shape_alone_shows_in_the_projections() -> None:
    # Same mean and variance, two points instead of a bell.
    signs = torch.randn(Z, N // 2, P, generator=torch.Generator().manual_seed(5)).sign()
    teacher = draws(0, N)
    metrics = token_metrics(teacher, teacher.mean(dim=1, keepdim=True) + signs)
    assert metrics.sliced_w1 > 2 * metrics.sliced_w1_floor
    assert metrics.ratio > 1.5


def test_certain_tokens_cannot_hide_the_others() -> None:
    teacher, candidate = draws(0, N), draws(1, N // 2, 0.7 * torch.eye(P))
    quiet = torch.arange(Z) % 2 == 0
    teacher[quiet] = 0.01 * draws(2, N)[quiet]
    candidate[quiet] = 0.01 * draws(3, N // 2)[quiet]
    report = token_report(teacher, candidate)
    assert report["varied"].conditions == Z // 2
    assert report["varied"].energy > 1.9 * report["all"].energy


def test_what_does_not_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="half as many"):
        token_metrics(draws(0, N), draws(1, N))
    with pytest.raises(ValueError, match="candidate's draws hold NaN"):
        token_metrics(draws(0, N), draws(1, N // 2) * math.nan)
    with pytest.raises(ValueError, match="do not vary"):
        token_metrics(torch.ones(2, 8, P), torch.ones(2, 4, P))
