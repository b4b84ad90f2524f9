"""The optimizers of training: PyTorch's AdamW and apex's FusedAdam, one going on for the other."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from stand_in_apex import apex as apex
from tiny_run import tiny_data, tiny_recipe
from tolerances import relative

from fastfar.training import Trainer, optimizer
from fastfar.training.optimizer import optimizer_steps, prepare_optimizer
from fastfar.training.state import read_run


def trainer(folder: Path, **changes: Any) -> Trainer:
    return Trainer(tiny_recipe(**changes), tiny_data(), folder)


@pytest.fixture
def on_the_cpu(apex: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "APEX_DEVICES", ("cuda", "cpu"))


def weights(run: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def test_one_goes_on_for_the_other(tmp_path: Path, on_the_cpu: None) -> None:
    """Without masks one parameter has no gradient, and so no state."""
    options = {"mask_rule": None, "weight_decay": 0.5, "lr": 1e-2}
    start, ends = None, {}
    for first in ("torch", "apex"):
        run = trainer(tmp_path / first, optimizer=first, **options)
        start = weights(run)
        for _ in range(3):
            run.train_step()
        run.save()
        run.checkpoints.wait()
        for second in ("torch", "apex"):
            shutil.copytree(tmp_path / first, tmp_path / f"{first}-{second}")
            rest = trainer(tmp_path / f"{first}-{second}", optimizer=second, **options)
            assert rest.changes == ({} if first == second else {"optimizer": (first, second)})
            assert rest.step == 3 and rest.run() == "finished"
            ends[first, second] = weights(rest) - start
    for names, moved in ends.items():  # eps is added in another order
        assert relative(moved, ends["torch", "torch"]) < 1e-3, names


def test_states_of_the_two(tmp_path: Path, on_the_cpu: None) -> None:
    run = trainer(tmp_path, optimizer="apex")
    run.train_step()
    run.train_step()
    run.save()
    run.checkpoints.wait()
    steps = read_run(tmp_path)["optimizer_steps"]
    assert set(steps.values()) == {2} and set(steps) == set(run.ema.average)
    torch_run = trainer(tmp_path)
    assert {float(each["step"]) for each in torch_run.optimizer.state.values()} == {2.0}
    assert all("step" not in group for group in torch_run.optimizer.param_groups)
    assert [group["weight_decay"] for group in torch_run.optimizer.param_groups] == [0.02, 0.0]


def test_steps_that_differ_are_refused(tmp_path: Path, on_the_cpu: None) -> None:
    run = trainer(tmp_path)
    run.train_step()
    steps = optimizer_steps(run.model, run.optimizer)
    fused = trainer(tmp_path / "other", optimizer="apex")
    with pytest.raises(ValueError, match=r"parameters of one have 1 to 5\. Use optimizer='torch'"):
        prepare_optimizer(fused.model, fused.optimizer, {**steps, "z_proj.weight": 5})


def test_apex_that_cannot_be_used(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with pytest.raises(ValueError, match=r"optimizer='apex' cannot be used: .*optimizer='torch'"):
        trainer(tmp_path, optimizer="apex")
    request.getfixturevalue("apex")
    with pytest.raises(ValueError, match="run on CUDA, the model is on cpu"):
        trainer(tmp_path, optimizer="apex")


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="device 'cuda' cannot be used: no CUDA device"):
        Trainer(tiny_recipe(), tiny_data(), tmp_path, device="cuda")
    with pytest.raises(ValueError, match="device 'gpu' is not known"):
        Trainer(tiny_recipe(), tiny_data(), tmp_path, device="gpu")
    assert not list(tmp_path.iterdir())


def test_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    """Dropout draws the same numbers in the second forward."""
    plain = trainer(tmp_path / "plain")
    saving = trainer(tmp_path / "saving", grad_checkpointing=True)
    for _ in range(2):
        assert plain.train_step() == saving.train_step()
    assert torch.equal(weights(plain), weights(saving))
    assert saving.model.head.grad_checkpointing and not plain.model.grad_checkpointing
