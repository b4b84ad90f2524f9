"""Solvers: timesteps, coefficients against closed forms for Gaussian tokens, errors."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastfar import SamplingPlan, Solver
from fastfar.diffusion import cosine_alpha_bar, diffusion_tables
from fastfar.solver import COLUMNS, Moments, schedule, shaped

P = 2


def columns(solver: Solver, steps: int, temperature: float = 1.0) -> list[dict[str, float]]:
    table = schedule(solver, steps, 1000, temperature).table
    return [dict(zip(COLUMNS, row, strict=True)) for row in table.tolist()]


def gaussian_moments(
    solver: Solver,
    steps: int,
    mean: Tensor,
    covariance: Tensor,
    *,
    temperature: float = 1.0,
    moments: Moments | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the samples for x_0 ~ N(mean, covariance) and the exact E[x_0 | x_t].

    All is linear in (x, x0_previous) and noise, so the two moments are followed exactly: no draws.
    """
    steps_ = schedule(solver, steps, 1000, temperature)
    zeros, unit = torch.zeros(1, P).double(), torch.eye(P).double()
    # What `shaped` does to the start and to the noise, from its values at unit vectors.
    offset, _ = shaped(
        solver, steps_, zeros, torch.zeros(steps, 1, P).double(), temperature, moments
    )
    starts, noises = [], []
    for axis in unit:
        noise = axis.expand(steps, 1, P)
        start, shaped_noise = shaped(solver, steps_, axis[None], noise, temperature, moments)
        starts.append((start - offset)[0])
        noises.append(shaped_noise[:, 0])
    start_PP, noise_TPP = torch.stack(starts, dim=1), torch.stack(noises, dim=2)
    # State: (x, x0_previous); S: its covariance.
    m = torch.cat([offset[0], torch.zeros(P).double()])
    s = torch.zeros(2 * P, 2 * P).double()
    s[:P, :P] = start_PP @ start_PP.mT
    for i, c in enumerate(columns(solver, steps, temperature)):
        alpha_bar = float(steps_.alpha_bar[i])
        a = math.sqrt(alpha_bar)
        gain = a * covariance @ torch.linalg.inv(alpha_bar * covariance + (1 - alpha_bar) * unit)
        shift = mean - gain @ (a * mean)  # E[x_0 | x] = gain x + shift
        move = torch.zeros(2 * P, 2 * P).double()
        move[:P, :P] = c["x"] * unit + c["x0"] * gain
        move[:P, P:] = c["x0_previous"] * unit
        move[P:, :P] = gain
        m = move @ m + torch.cat([c["x0"] * shift, shift])
        s = move @ s @ move.mT
        if c["noise"]:
            variance = 1.0
            if solver.variance in ("log", "clamped_log", "linear"):
                # f = V / s^2 of an isotropic token: what a perfect network says.
                fraction = float(covariance[0, 0] / (alpha_bar * covariance[0, 0] + 1 - alpha_bar))
                mixed = fraction * c["high"] + (1 - fraction) * c["low"]
                variance = mixed if c["linear"] else math.exp(mixed)
            root = c["noise"] * math.sqrt(variance) * noise_TPP[i]
            s[:P, :P] += root @ root.mT
    return m[:P], s[:P, :P]


def isotropic(variance: float) -> tuple[Tensor, Tensor]:
    return torch.tensor([0.7, -0.4]).double(), variance * torch.eye(P).double()


@pytest.mark.parametrize("steps", [2, 4, 8, 40])
@pytest.mark.parametrize("variance", [0.3, 0.03])
def test_linear_rule_keeps_mean_and_variance_of_a_gaussian_token(steps, variance):
    mean, covariance = isotropic(variance)
    got_mean, got = gaussian_moments(Solver(variance="linear"), steps, mean, covariance)
    torch.testing.assert_close(got_mean, mean, rtol=0, atol=2e-4)
    torch.testing.assert_close(got, covariance, rtol=2e-3, atol=1e-9)


# Variance kept of a token of variance 0.1, research/fewstep.md section 2.2 (uniform timesteps from
# 0 to 999), rounded there to two digits.
@pytest.mark.parametrize(
    ("solver", "kept"),
    [
        (Solver(), {100: 1.00, 40: 0.99, 20: 0.94, 10: 0.74, 8: 0.62, 4: 0.21}),
        (Solver(method="ddim"), {100: 0.96, 40: 0.90, 20: 0.80, 10: 0.62, 8: 0.53, 4: 0.21}),
    ],
)
def test_variance_that_the_log_rule_and_ddim_lose(solver, kept):
    for steps, expected in kept.items():
        _, got = gaussian_moments(solver, steps, *isotropic(0.1))
        assert float(got[0, 0]) / 0.1 == pytest.approx(expected, abs=0.011), steps


CORRELATED = torch.tensor([[0.1, 0.06], [0.06, 0.1]]).double()


def eigen_moments(mean: Tensor, covariance: Tensor) -> Moments:
    values, vectors = torch.linalg.eigh(covariance)
    return Moments(mean[None], values[None], vectors)


@pytest.mark.parametrize("start", ["normal", "moments"])
def test_closure_in_the_eigenbasis_keeps_correlations_a_diagonal_rule_loses(start):
    mean, _ = isotropic(1.0)
    moments = eigen_moments(mean, CORRELATED)
    first = 900 if start == "moments" else None
    solver = Solver(variance="closure", start=start, first_timestep=first)
    got_mean, got = gaussian_moments(solver, 4, mean, CORRELATED, moments=moments)
    torch.testing.assert_close(got, CORRELATED, rtol=2e-3, atol=1e-9)
    torch.testing.assert_close(got_mean, mean, rtol=0, atol=2e-4)
    _, diagonal = gaussian_moments(Solver(variance="linear"), 4, mean, CORRELATED)
    assert float(diagonal[0, 1] / diagonal[0, 0]) < 0.5 * 0.6


def test_variance_table_of_the_true_fractions_is_exact_and_per_channel():
    mean = torch.tensor([0.2, 0.1]).double()
    covariance = torch.diag(torch.tensor([0.3, 0.02])).double()
    alpha_bar = diffusion_tables(5).signal.flip(0) ** 2
    variances = covariance.diagonal()
    fractions = variances / (alpha_bar[:, None] * variances + 1 - alpha_bar[:, None])
    table = tuple(tuple(row) for row in fractions.tolist())
    _, got = gaussian_moments(Solver(variance="table", variance_table=table), 5, mean, covariance)
    torch.testing.assert_close(got, covariance, rtol=3e-3, atol=1e-9)


@pytest.mark.parametrize("method", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("spacing", ["time", "log_snr"])
def test_other_solvers_converge_to_the_token(method, spacing):
    solver = Solver(method=method, spacing=spacing, first_timestep=980)
    mean, covariance = isotropic(0.1)
    errors = []
    for steps in (10, 20, 40):
        _, got = gaussian_moments(solver, steps, mean, covariance)
        errors.append(abs(float(got[0, 0]) / 0.1 - 1.0))
    assert errors[2] < 0.6 * errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.12


def test_sde_converges_where_steps_are_even_in_log_snr():
    solver = Solver(method="sde_dpmpp_2m", spacing="log_snr", first_timestep=980)
    _, got = gaussian_moments(solver, 40, *isotropic(0.1))
    assert float(got[0, 0]) / 0.1 == pytest.approx(1.0, abs=0.035)


def test_second_order_beats_first_order():
    mean, covariance = isotropic(0.1)
    errors = {}
    for method in ("ddim", "dpmpp_2m"):
        solver = Solver(method=method, spacing="log_snr", first_timestep=900, start="moments")
        moments = eigen_moments(mean, covariance)
        _, got = gaussian_moments(solver, 8, mean, covariance, moments=moments)
        errors[method] = abs(float(got[0, 0]) / 0.1 - 1.0)
    assert errors["dpmpp_2m"] < 0.2 * errors["ddim"]


@pytest.mark.parametrize(
    "solver",
    [
        Solver(variance="linear"),
        Solver(method="ddim", first_timestep=980),
        Solver(method="dpmpp_2m", spacing="log_snr", first_timestep=980),
        Solver(variance="closure", start="moments", first_timestep=900),
        Solver(method="dpmpp_2m", start="moments", first_timestep=900),
    ],
)
def test_temperature_squares_into_the_variance(solver):
    mean, covariance = isotropic(0.1)
    moments = eigen_moments(mean, covariance)
    _, warm = gaussian_moments(solver, 8, mean, covariance, moments=moments)
    _, cool = gaussian_moments(solver, 8, mean, covariance, temperature=0.8, moments=moments)
    # The published kind of start is not scaled, but at t = 999 nothing of it is left.
    assert float(cool[0, 0] / warm[0, 0]) == pytest.approx(0.64, abs=0.005)


# --- timesteps -------------------------------------------------------------------------------


def test_published_solver_is_the_published_table():
    tables = diffusion_tables(16)
    steps = schedule(Solver(), 16, 1000, 0.9)
    assert steps.timesteps == tuple(tables.timestep.flip(0).tolist())
    named = dict(zip(COLUMNS, steps.table.T, strict=True))
    assert torch.equal(named["x0"], tables.mean_x0.flip(0))
    assert torch.equal(named["low"], tables.log_posterior.flip(0))
    assert named["noise"].tolist() == [0.9] * 15 + [0.0]
    assert not named["x0_previous"].any() and not named["linear"].any()


def test_log_snr_spacing_is_even_in_log_snr():
    steps = schedule(Solver(method="ddim", spacing="log_snr", first_timestep=900), 4)
    alpha_bar = cosine_alpha_bar()
    log_snr = 0.5 * (alpha_bar / (1 - alpha_bar)).log()
    gaps = log_snr[list(steps.timesteps)].diff()
    assert steps.timesteps[0] == 900
    assert float(gaps.max() / gaps.min()) < 1.15
    end = log_snr[0] - log_snr[steps.timesteps[-1]]
    assert float(end) == pytest.approx(float(gaps.mean()), rel=0.15)


def test_log_snr_spacing_begins_where_lambda_runs_away():
    alpha_bar = cosine_alpha_bar()
    log_snr = 0.5 * (alpha_bar / (1 - alpha_bar)).log()
    first = schedule(Solver(spacing="log_snr"), 9).timesteps[0]
    assert float(log_snr[first]) >= -5.1 > float(log_snr[first + 1])


@pytest.mark.parametrize("steps", [1, 2, 7, 16, 40])
def test_timesteps_descend_strictly(steps):
    for spacing in ("time", "log_snr"):
        chosen = schedule(Solver(spacing=spacing, first_timestep=950), steps).timesteps
        assert len(chosen) == steps and chosen[0] == 950
        assert all(a > b for a, b in pairwise(chosen)) and chosen[-1] >= 0


def test_guidance_range_makes_segments_without_history_across_them():
    solver = Solver(
        method="dpmpp_2m", timesteps=(900, 700, 500, 300, 100), guidance_range=(250, 750)
    )
    steps = schedule(solver, 5)
    assert steps.segments == ((0, 1, False), (1, 4, True), (4, 5, False))
    previous = steps.table[:, COLUMNS.index("x0_previous")]
    assert (previous != 0).tolist() == [False, False, True, True, False]


# --- as data, and errors ---------------------------------------------------------------------


def test_plan_with_solvers_survives_json():
    solvers = tuple(
        Solver(method="dpmpp_2m", timesteps=(800, 400, 20)) if k % 2 else Solver(variance="linear")
        for k in range(10)
    )
    plan = SamplingPlan.official(diffusion_steps=3).with_changes(solvers=solvers)
    assert SamplingPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert "solvers" not in SamplingPlan.official().to_dict()
    assert SamplingPlan.official().with_changes(solvers=Solver(method="ddim")).solvers == (
        (Solver(method="ddim"),) * 10
    )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"method": "euler"}, "method must be one of"),
        ({"variance": "small"}, "variance must be one of"),
        ({"method": "ddim", "variance": "linear"}, "belongs to method 'ddpm'"),
        ({"timesteps": (3, 5)}, "strictly descending"),
        ({"timesteps": (5, 3), "spacing": "log_snr"}, "leave first_timestep and spacing out"),
        ({"first_timestep": -1}, "first_timestep must be"),
        ({"guidance_range": (5, 3)}, "guidance_range must be"),
        ({"variance": "table"}, "go together"),
        ({"variance": "table", "variance_table": ((math.nan,),)}, "finite numbers"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        Solver(**fields)


def test_wrong_step_counts_are_refused():
    for solver, steps, says in (
        (Solver(timesteps=(5, 3)), 3, "2 timesteps are given for 3"),
        (Solver(variance="table", variance_table=((0.5,),)), 2, "1 rows for 2"),
        (Solver(method="moments"), 2, "one call"),
        (Solver(first_timestep=3), 5, "do not fit below"),
        (Solver(timesteps=(1000,)), 1, "beyond the model's"),
        (Solver(spacing="log_snr"), 900, "too many for spacing"),
    ):
        with pytest.raises(ValueError, match=says):
            schedule(solver, steps)
    with pytest.raises(ValueError, match="2 timesteps are given for 100"):
        SamplingPlan.official().with_changes(solvers=Solver(timesteps=(5, 3)))
    with pytest.raises(ValueError, match="solvers has 2 entries"):
        SamplingPlan.official().with_changes(solvers=(Solver(), Solver(method="ddim")))
    with pytest.raises(ValueError, match="unknown Solver entries"):
        Solver.from_dict({"order": 2})


def test_solver_that_needs_moments_says_so():
    solver = Solver(start="moments")
    x = torch.zeros(3, P)
    with pytest.raises(ValueError, match="moments of a moment head"):
        shaped(solver, schedule(solver, 2), x, x.expand(2, 3, P), 1.0)
    assert {s.needs_moments for s in (Solver(), Solver(method="ddim"))} == {False}
    assert dataclasses.replace(solver, start="normal") == Solver()
