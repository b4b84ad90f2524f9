"""diffusion.py: tables and embeddings against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from fastfar import reference
from fastfar.diffusion import (
    cosine_alpha_bar,
    diffusion_tables,
    spaced_timesteps,
    timestep_embedding,
)

FIELDS = {  # ours -> the reference's
    "recip": "x0_from_x",
    "recip_m1": "x0_from_eps",
    "mean_x0": "mean_from_x0",
    "mean_xt": "mean_from_x",
    "log_beta": "log_beta",
    "log_posterior": "posterior_log_variance",
}
CASES = [
    *[(1000, steps) for steps in (1, 2, 3, 8, 25, 40, 55, 70, 100, 999, 1000)],
    (1, 1),
    (37, 5),
    (50, 50),
]


@pytest.mark.parametrize("num_timesteps, steps", CASES)
def test_tables(num_timesteps: int, steps: int) -> None:
    ours = diffusion_tables(steps, num_timesteps)
    theirs = reference.make_schedule(num_timesteps, steps)
    assert len(ours) == steps
    assert torch.equal(ours.timestep, theirs.timestep)
    for name, other in FIELDS.items():
        values, expected = getattr(ours, name), getattr(theirs, other)
        assert values.dtype is torch.float64 and values.isfinite().all()
        torch.testing.assert_close(values, expected, rtol=1e-8, atol=1e-14, msg=name)
    torch.testing.assert_close(ours.signal**2, theirs.alpha_bar, rtol=1e-8, atol=0)
    torch.testing.assert_close(ours.signal**2 + ours.sigma**2, torch.ones_like(ours.signal))


def test_spaced_timesteps() -> None:
    assert spaced_timesteps(1).tolist() == [0]
    assert spaced_timesteps(2).tolist() == [0, 999]
    assert spaced_timesteps(4, 10).tolist() == [0, 3, 6, 9]
    for steps in (3, 55, 777):
        assert spaced_timesteps(steps).tolist() == reference.space_timesteps(1000, steps)
    for steps in (0, -1, 1001):
        with pytest.raises(ValueError, match=r"1\.\.1000"):
            spaced_timesteps(steps)


def test_cosine_alpha_bar_by_hand() -> None:
    bar = cosine_alpha_bar(1000)

    def cosine(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    assert float(bar[499]) == pytest.approx(cosine(0.5) / cosine(0.0), rel=1e-9)
    assert 1e-9 < float(bar[-1]) < 4e-9 and (bar[1:] < bar[:-1]).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.float64, 1e-12)])
def test_timestep_embedding(dtype: torch.dtype, tolerance: float) -> None:
    timestep = torch.tensor([0, 1, 17, 500, 999])
    ours = timestep_embedding(timestep, 64, dtype)
    assert ours.dtype is dtype and ours.shape == (5, 64)
    exact = reference.timestep_embedding(timestep, 64, torch.float64)
    # float32 rounds the frequencies, and angles go up to 999.
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=tolerance)
    assert ours[0].tolist() == [1.0] * 32 + [0.0] * 32
    assert float(ours[1, 0]) == pytest.approx(math.cos(1.0)), "cosines come first"
