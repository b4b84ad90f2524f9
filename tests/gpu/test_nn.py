"""fastfar.nn and training with it on a GPU; on a CPU Triton's interpreter runs the same kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nn_cases import CASES, assert_right
from tiny_run import TINY_MODEL, tiny_data, tiny_recipe
from tolerances import relative

from fastfar import backend
from fastfar.training import Trainer
from fastfar.training.state import read_state

LIMITS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_modules(name: str, dtype: torch.dtype) -> None:
    """By "auto", which is Triton's kernels there; tests/test_nn.py has the interpreter."""
    assert backend.by_device()["cuda"] == "triton"
    assert_right(name, dtype, LIMITS[dtype], "cuda")


def train(folder: Path, device: torch.device | str, **changes: Any) -> Trainer:
    # Dropout draws other numbers on a GPU. Four tokens, for the interpreter.
    model = {**TINY_MODEL, "dropout": 0.0, "patch_size": 4, "head_depth": 1}
    options = {"batch_size": 2, "batch_multiplier": 1, **changes}
    run = Trainer(tiny_recipe(model=model, **options), tiny_data(), folder, device)
    while run.step < 2:
        run.train_step()
    return run


def weights(run: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in run.model.parameters()])


def test_training_steps(device: torch.device, tmp_path: Path) -> None:
    """The same draws, and so nearly the same weights, as PyTorch on a CPU."""
    expected = train(tmp_path / "torch", "cpu", backend="torch")
    found = train(tmp_path / "triton", device, backend="triton")
    probes = [run.probe(images=1)["eps_rmse_t500"] for run in (found, expected)]
    assert probes[0] == pytest.approx(probes[1], rel=1e-3)
    # An optimizer's first steps are of the size of lr whatever the size of a gradient.
    start = Trainer(expected.recipe, tiny_data(), tmp_path / "start")
    assert relative(weights(found) - weights(start), weights(expected) - weights(start)) < 0.05


@pytest.mark.gpu
def test_a_run_moves_between_devices(tmp_path: Path) -> None:
    run = train(tmp_path, "cuda")
    run.save()
    assert read_state(tmp_path)["step"] == 2
    resumed = Trainer(run.recipe, tiny_data(), tmp_path, "cpu")
    assert resumed.step == 2 and torch.equal(weights(resumed), weights(run))
    assert resumed.train_step()["skipped"] == 0.0


@pytest.mark.gpu
def test_apex(tmp_path: Path) -> None:
    """The real package, where it is installed."""
    if (reason := backend.optional_packages()["apex"]) is not None:
        pytest.skip(f"apex: {reason}")
    stock = train(tmp_path / "torch", "cuda")
    fused = train(tmp_path / "apex", "cuda", optimizer="apex")
    assert relative(weights(fused), weights(stock)) < 1e-3
    assert_right("Block", torch.float32, 1e-4, "cuda", norm="apex")
