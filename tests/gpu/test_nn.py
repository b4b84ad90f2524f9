"""fastfar.nn and training with it on a GPU; on a CPU Triton's interpreter runs the same kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from nn_cases import CASES, assert_right
from tiny_run import TINY_MODEL, tiny_data, tiny_recipe
from tolerances import relative

from fastfar import FAR, FARConfig, backend, diffusion_loss
from fastfar.ops import use_backend
from fastfar.training import Trainer
from fastfar.training.loss import sample_draws

F32 = torch.float32
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_modules(name: str, dtype: torch.dtype) -> None:
    """By "auto", which is Triton's kernels there; tests/test_nn.py has the interpreter."""
    assert backend.by_device()["cuda"] == "triton"
    assert_right(name, dtype, LIMITS[dtype], "cuda")


def trainer(folder: Path, device: torch.device | str, **changes: Any) -> Trainer:
    # Dropout draws other numbers on a GPU. Four tokens, for the interpreter.
    model = {**TINY_MODEL, "dropout": 0.0, "patch_size": 4, "head_depth": 1}
    options = {"batch_size": 2, "batch_multiplier": 1, **changes}
    run = Trainer(tiny_recipe(model=model, **options), tiny_data(), folder, device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # zero gates would hide most of the model
        for parameter in run.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(device)
    return run


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.detach().flatten().cpu() for x in tensors])


def test_a_training_step(device: torch.device, tmp_path: Path) -> None:
    """The same draws, loss and gradients as PyTorch on a CPU."""
    runs = [
        trainer(tmp_path / "torch", "cpu", backend="torch"),
        trainer(tmp_path / "triton", device, backend="triton"),
    ]
    expected, found = (run.train_step() for run in runs)
    assert found == pytest.approx(expected, rel=1e-3)
    # After one step the first moment is a tenth of the gradient.
    states = [run.optimizer.state_dict()["state"].values() for run in runs]
    moments = [flat(state["exp_avg"] for state in each) for each in states]
    assert relative(moments[1], moments[0]) < 1e-3


@pytest.mark.gpu
def test_a_run_moves_between_devices(tmp_path: Path) -> None:
    run = trainer(tmp_path, "cuda")
    run.train_step()
    assert "eps_rmse_t999" in run.probe()
    run.save()
    run.checkpoints.wait()
    resumed = Trainer(run.recipe, tiny_data(), tmp_path, "cpu")
    assert resumed.step == 1
    assert torch.equal(flat(resumed.model.parameters()), flat(run.model.parameters()))
    assert resumed.train_step()["skipped"] == 0.0


@pytest.mark.gpu
def test_apex(tmp_path: Path) -> None:
    """The real package, where it is installed."""
    if (reason := backend.optional_packages()["apex"]) is not None:
        pytest.skip(f"apex: {reason}")
    stock, fused = (trainer(tmp_path / name, "cuda", optimizer=name) for name in ("torch", "apex"))
    for _ in range(3):
        assert fused.train_step() == pytest.approx(stock.train_step(), rel=1e-3)
    assert relative(flat(fused.model.parameters()), flat(stock.model.parameters())) < 1e-3
    assert_right("Block", torch.float32, 1e-4, "cuda", norm="apex")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_loss_under_autocast(compiled: bool) -> None:
    """bfloat16 products: value and gradients near float32's, eager and compiled for CUDA."""
    config = dataclasses.replace(FARConfig(**TINY_MODEL), dropout=0.0)
    model = FAR(config).to("cuda")
    torch.manual_seed(0)
    with torch.no_grad():  # zero gates would hide most of the model
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape).to("cuda")
    size = config.latent_size
    latents = torch.randn(4, config.latent_channels, size, size).to("cuda")
    labels = torch.arange(4, device="cuda") % config.num_classes
    draws = sample_draws(config, 4, generator=torch.Generator().manual_seed(1))

    def run(loss: Any, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        with use_backend("triton"), torch.autocast("cuda", dtype, enabled=dtype is not F32):
            value = loss(model, latents, labels, draws)
        value.backward()
        return float(value.detach()), flat(p.grad for p in model.parameters() if p.grad is not None)

    expected = run(diffusion_loss, F32)
    loss = torch.compile(diffusion_loss, fullgraph=True) if compiled else diffusion_loss
    found = run(loss, torch.bfloat16)
    assert found[0] == pytest.approx(expected[0], rel=3e-2)
    assert relative(found[1], expected[1]) < 8e-2
