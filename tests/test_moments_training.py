"""Training of a moment head: the rows it sees, what it learns of known Gaussians, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import tiny_pipeline

from fastfar import FARPipeline
from fastfar.noise import seeded_noise
from fastfar.ops import denoise_loop
from fastfar.training.moment_rows import MomentData, MomentRows, sampled_runs
from fastfar.training.moments import MomentRecipe, MomentTrainer, train_moments

LABELS = torch.tensor([0, 3, 1, 3])
NUMBERS, WIDTH = 4, 32  # of the tiny pipeline


@pytest.fixture(scope="module")
def pipe() -> FARPipeline:
    return tiny_pipeline()


def test_rows_are_what_the_tokens_were_drawn_from(pipe: FARPipeline, tmp_path: Path) -> None:
    """The denoising MLP, given a row's conditions and the run's noise, makes the row's token."""
    config, plan = pipe.model.config, pipe.plan
    runs = sampled_runs(pipe.model, plan, LABELS, 7, "torch", torch.float32)
    file = tmp_path / "rows.npy"
    rows = MomentRows.write(pipe.model, plan, runs, file, "torch", torch.float32)
    noise = seeded_noise(7, len(LABELS), config.num_tokens, config.token_dim)
    assert len(rows) == len(LABELS) * config.num_tokens
    every = np.arange(len(rows))
    for k in range(len(plan)):
        z_c, z_u, x = rows.take(np.full_like(every, k), every).float().split(
            [WIDTH, WIDTH, NUMBERS], dim=1
        )
        assert torch.equal(z_c, z_u) == (plan.guidance_scales[k] == 1.0)
        with torch.no_grad():
            again = denoise_loop(
                pipe.model.head_weights,
                torch.cat([z_c, z_u]),
                plan.levels[k],
                noise.initial(k),
                noise.steps(k, plan.diffusion_steps[k]),
                guidance_scale=plan.guidance_scales[k],
                temperature=plan.temperatures[k],
                x0_range=plan.x0_range,
                num_timesteps=config.num_timesteps,
            )
        inside = (x > plan.x0_range[0]) & (x < plan.x0_range[1])  # type: ignore[index]
        assert inside.float().mean() > 0.1
        torch.testing.assert_close(again, x, atol=0.02, rtol=0.01)


def gaussian_rows(path: Path, count: int, seed: int = 0) -> MomentRows:
    """x = 2 z_c[0] + temperature V diag(1, .01, .01, .04)^(1/2) n for three outer steps.

    V is one rotation by 45 degrees; the deviation along its first axis is doubled where z_u[0] > 0.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, count, 2 * WIDTH + NUMBERS, generator=generator)
    z_c, z_u = rows[..., :WIDTH], rows[..., WIDTH : 2 * WIDTH]
    deviation = torch.tensor([1.0, 0.1, 0.1, 0.2]).expand(3, count, NUMBERS).clone()
    deviation[..., 0] *= 1.0 + (z_u[..., 0] > 0).float()
    temperature = torch.tensor([0.9, 0.9, 1.0])[:, None, None]
    spread = temperature * deviation * rows[..., 2 * WIDTH :]
    rows[..., 2 * WIDTH :] = 2 * z_c[..., :1] + spread @ ROTATION.T
    np.save(path, rows.half().numpy())
    return MomentRows(path, NUMBERS)


HALF = 0.5**0.5
ROTATION = torch.tensor(
    [[HALF, -HALF, 0.0, 0.0], [HALF, HALF, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
)


def recipe(**changes: Any) -> MomentRecipe:
    values: dict[str, Any] = {
        "width": 32, "depth": 1, "steps": 160, "mean_steps": 60, "batch_size": 128, "lr": 1e-2,
        "warmup": 10, "ema_decay": 0.9,
    }  # fmt: skip
    return MomentRecipe(**{**values, **changes})


def test_it_learns_a_known_gaussian(pipe: FARPipeline, tmp_path: Path) -> None:
    files = [gaussian_rows(tmp_path / f"{i}.npy", 6000, seed=i) for i in range(2)]
    logged: list[dict[str, Any]] = []
    head = train_moments(
        pipe.model, pipe.plan, files, tmp_path / "run", recipe(), save_every=160,
        on_log=logged.append,
    )  # fmt: skip
    assert len(logged) == 1 and logged[0]["step"] == 160
    # Half of the variance of the first two numbers is the mean's, nearly all of the others'.
    report = head.trained.report
    assert all(0.85 < value < 1.2 for value in report["calibration"])
    z_c, z_u = torch.randn(2, 2000, WIDTH)
    for k, level in enumerate(pipe.plan.levels):
        moments = head.moments(z_c, z_u, level, pipe.plan.guidance_scales[k])
        error = moments.mean_NP - 2 * z_c[:, :1]
        assert error.square().mean().sqrt() < 0.2  # of a deviation of 2
        # The axis of the largest variance is the rotation's first one, found at temperature 1.
        largest = int(moments.variance_NP.mean(dim=0).argmax())
        assert (moments.basis_PP[:, largest] @ ROTATION[:, 0]).abs() > 0.99
        variance = moments.variance_NP[:, largest]
        wide, narrow = variance[z_u[:, 0] > 0.5].mean(), variance[z_u[:, 0] < -0.5].mean()
        assert wide > 1.8 * narrow and 2.0 < (wide + narrow) / 2 < 3.0  # 4 and 1


def test_a_run_goes_on_where_it_stopped(pipe: FARPipeline, tmp_path: Path) -> None:
    rows = [gaussian_rows(tmp_path / "rows.npy", 300)]
    short = recipe(steps=8, mean_steps=3, batch_size=16)
    whole = train_moments(pipe.model, pipe.plan, rows, tmp_path / "whole", short)
    for steps in (2, 3, 3):  # stops before, at and after the tables change
        trainer = MomentTrainer(pipe.model, pipe.plan, rows, tmp_path / "parts", short)
        for _ in range(steps):
            trainer.train_step()
        trainer.save()
    parts = train_moments(pipe.model, pipe.plan, rows, tmp_path / "parts", short)
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value), name
    with pytest.raises(ValueError, match="another recipe or teacher"):
        train_moments(pipe.model, pipe.plan, rows, tmp_path / "parts", recipe())


def test_batches_come_from_all_files_and_leave_the_last_rows_out(tmp_path: Path) -> None:
    files = []
    for i in range(3):
        numbers = np.arange(10) + 10 * i + 100 * np.arange(2)[:, None]
        np.save(tmp_path / f"{i}.npy", np.repeat(numbers[..., None], 7, axis=-1).astype(np.float16))
        files.append(MomentRows(tmp_path / f"{i}.npy", token_dim=3))
    data = MomentData(files, steps=2, validation=0.1)
    generator = np.random.default_rng(0)
    batch = data.batch(500, generator)
    assert batch.z_c_SRD.shape == (2, 500, 2) and batch.x_SRP.shape == (2, 500, 3)
    for k in range(2):
        seen = {int(x) for x in batch.x_SRP[k, :, 0] - 100 * k}
        assert seen == set(range(27))
        assert torch.equal(batch.z_u_SRD[k, :, 1], batch.x_SRP[k, :, 2])
    kept_out = data.batch(100, generator, kept_out=True).x_SRP[0, :, 0]
    assert {int(x) for x in kept_out} == {27, 28, 29}


def test_bad_recipes_and_no_rows_are_refused(pipe: FARPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mean_steps < steps"):
        MomentRecipe(steps=100, mean_steps=100)
    with pytest.raises(ValueError, match="lr and validation"):
        MomentRecipe(lr=0.0)
    with pytest.raises(ValueError, match="at least one file"):
        MomentTrainer(pipe.model, pipe.plan, [], tmp_path, MomentRecipe())
