"""One run on one process or on many: same losses, same files, nothing lost when a process dies."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from idx import write_fashion_mnist
from processes import SECONDS, on_processes
from tiny_run import TINY_FASHION, TINY_MODEL, tiny_data, tiny_recipe

from fastfar import cli
from fastfar.training import Trainer, checkpoints
from fastfar.training.checkpoints import latest
from fastfar.training.distributed import World, own, whole
from fastfar.training.draws import draws_of_images
from fastfar.training.loop import check_data
from fastfar.training.state import read_log, read_run, read_state

ROOT = Path(__file__).resolve().parents[1]
# Dropout is drawn per process: without it, any number of processes trains the same.
MODEL = {**TINY_MODEL, "dropout": 0.0}

Curve = list[tuple[float, float]]


def trainer(folder: Path, **changes: Any) -> Trainer:
    recipe = tiny_recipe(**{"model": MODEL, "level_weight": "sine", "flip": True, **changes})
    return Trainer(recipe, tiny_data(), folder)


def train(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Losses and gradient norms of a run, and what it averaged to."""
    run = trainer(folder, **changes)
    curve: Curve = []
    outcome = run.run(
        log_every=3,
        save_every=2,
        probe_every=3,
        on_step=lambda record: curve.append((record["loss"], record["grad_norm"])),
    )
    weights = torch.cat([p.detach().flatten() for p in run.averaged_model().parameters()])
    return {"outcome": outcome, "curve": curve, "weights": weights}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Six steps of one process."""
    folder = tmp_path_factory.mktemp("alone")
    return train(folder, {}), folder


def assert_same_run(found: dict[str, Any], expected: dict[str, Any], first: int = 0) -> None:
    """The same to rounding, from step `first` on."""
    assert found["outcome"] == "finished"
    curves = torch.tensor(found["curve"]), torch.tensor(expected["curve"][first:])
    torch.testing.assert_close(*curves, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (1, {"accumulate": 2, "ema_device": "cpu"}),
        (4, {"parallel": "ddp", "accumulate": 2}),
        (2, {"parallel": "fsdp", "accumulate": 2}),
        (4, {"parallel": "fsdp", "grad_checkpointing": True, "ema_device": "cpu"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_any_number_of_processes_trains_the_same(
    tmp_path: Path, alone: tuple[dict[str, Any], Path], size: int, changes: dict[str, Any]
) -> None:
    expected, folder = alone
    run = tmp_path / "run"
    results = on_processes(size, train, tmp_path, run, changes)
    for found in results:
        assert_same_run(found, expected)
        assert found["curve"] == results[0]["curve"]
    assert read_run(run)["processes"] == size
    assert read_run(run)["optimizer_steps"] == read_run(folder)["optimizer_steps"]
    logs = [read_log(each) for each in (folder, run)]
    assert len(logs[1]) == len(logs[0]) == 2
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys() and "loss_level_0" in one and "eps_rmse_t999" in one
        for name in one:
            if name.startswith(("loss", "eps")):
                assert other[name] == pytest.approx(one[name], rel=2e-4), name


def test_two_processes_where_a_parameter_has_no_gradient(tmp_path: Path) -> None:
    changes = {"mask_rule": None, "label_dropout": 0.0, "steps": 3}  # the mask token, and no class
    expected = train(tmp_path / "alone", changes)
    for parallel in ("ddp", "fsdp"):
        folder = tmp_path / parallel
        results = on_processes(2, train, tmp_path, folder, {**changes, "parallel": parallel})
        assert_same_run(results[0], expected)
        steps = read_run(folder)["optimizer_steps"]
        assert "mask_token" not in steps and steps["z_proj.weight"] == 3


@pytest.mark.parametrize("changes", [{}, {"level_per_image": False, "target": "next_level"}])
def test_an_image_draws_the_same_in_any_part_of_the_batch(changes: dict[str, Any]) -> None:
    recipe = tiny_recipe(**changes)
    together = draws_of_images(recipe, 3, range(8))
    apart = [draws_of_images(recipe, 3, part) for part in (range(3), range(3, 8))]
    rows = [draws.noise.view(2, -1, 16, 4) for draws in (*apart, together)]
    assert torch.equal(torch.cat(rows[:2], dim=1), rows[2])
    times = [draws.timestep.view(2, -1, 16) for draws in (*apart, together)]
    assert torch.equal(torch.cat(times[:2], dim=1), times[2])
    for name in ("level", "mask", "dropped", *(["target_level"] if changes else [])):
        parts = [getattr(draws, name) for draws in apart]
        assert torch.equal(torch.cat(parts), getattr(together, name)), name
    assert (len(set(together.level.tolist())) == 1) == bool(changes)
    assert not torch.equal(together.noise, draws_of_images(recipe, 4, range(8)).noise)
    assert len(together.noise.unique()) > 0.99 * together.noise.numel()


# --- going on, on another number of processes -------------------------------------------------


def state_is_the_saved_one(folder: Path, changes: dict[str, Any]) -> bool:
    """Whether a trainer holds, bit for bit, what the folder holds."""
    run = trainer(folder, **changes)
    saved = read_state(folder)
    live = {name: whole(value).clone() for name, value in run._tensors().items()}
    names = {f"{part}.{name}" for part in ("model", "ema", "optimizer") for name in saved[part]}
    same = [
        torch.equal(value, saved[name.split(".")[0]][name.split(".", 1)[1]])
        for name, value in live.items()
    ]
    return all(same) and names == {*live, "ema.updates"} and run.step == saved["step"]


def test_four_processes_then_one_then_two(tmp_path: Path) -> None:
    run = tmp_path / "run"
    # The learning rate must not know that the first parts end early.
    constant = {"decay_share": 0.0}
    whole_run = train(tmp_path / "whole", constant)
    parts = [
        *on_processes(4, train, tmp_path, run, {**constant, "steps": 2, "parallel": "fsdp"})[:1],
        train(run, {**constant, "steps": 4}),
    ]
    found = on_processes(2, state_is_the_saved_one, tmp_path, run, {"parallel": "fsdp"})
    assert found == [True, True]
    parts += on_processes(2, train, tmp_path, run, {**constant, "parallel": "fsdp"})[:1]
    curve = [step for part in parts for step in part["curve"]]
    assert_same_run({**parts[-1], "curve": curve}, whole_run)
    assert [len(part["curve"]) for part in parts] == [2, 2, 2]


# --- things that go wrong ---------------------------------------------------------------------


def train_with_one_bad_loss(folder: Path, parallel: str) -> dict[str, Any]:
    """Step 1 is not finite on the last process."""
    run = trainer(folder, parallel=parallel)
    plain = run.loss

    def loss(*arguments: Any) -> torch.Tensor:
        bad = run.step == 1 and run.world.rank == run.world.size - 1
        value: torch.Tensor = plain(*arguments) * (math.inf if bad else 1.0)
        return value

    run.loss = loss
    records = [run.train_step() for _ in range(2)]
    kept = [own(p.detach()).clone() for p in run.model.parameters()]
    records.append(run.train_step())
    moved = [
        not torch.equal(own(p), k) for p, k in zip(run.model.parameters(), kept, strict=True)
    ]
    updates = run.ema.updates
    entry = run.meter.means(8, 16)
    return {
        "skipped": [record["skipped"] for record in records],
        "moved": any(moved),
        "updates": updates,
        "levels_are_finite": all(
            math.isfinite(v) for k, v in entry.items() if k.startswith("loss")
        ),
    }


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_bad_gradient_is_skipped_by_all(tmp_path: Path, parallel: str) -> None:
    results = on_processes(2, train_with_one_bad_loss, tmp_path, tmp_path / "run", parallel)
    for found in results:
        assert found["skipped"] == [0.0, 1.0, 0.0] and found["moved"]
        assert found["updates"] == 2 and found["levels_are_finite"]


def train_and_signal_one(folder: Path) -> tuple[str, int]:
    run = trainer(folder, steps=1000)

    def on_step(record: dict[str, float]) -> None:
        if run.step == 2 and run.world.rank == 1:
            signal.raise_signal(signal.SIGTERM)

    return run.run(on_step=on_step), run.step


def test_a_signal_to_one_process_stops_all(tmp_path: Path) -> None:
    results = on_processes(2, train_and_signal_one, tmp_path, tmp_path / "run")
    assert results == [("interrupted", 2)] * 2
    assert read_run(tmp_path / "run")["step"] == 2


def train_and_die_in_a_save(folder: Path) -> None:
    """Killed while step 4 is being written, in the background; steps go on meanwhile."""
    run = trainer(folder)
    finish = checkpoints._Writer.finish

    def die(self: Any, metadata: Any, results: Any) -> None:
        if Path(self.path).name == "step-000004":
            os.kill(os.getpid(), signal.SIGKILL)
        finish(self, metadata, results)

    checkpoints._Writer.finish = die  # type: ignore[method-assign]
    run.run(save_every=2)


def test_a_save_that_was_killed_is_never_taken(
    tmp_path: Path, alone: tuple[dict[str, Any], Path]
) -> None:
    run = tmp_path / "run"
    for size in (1, 2):
        assert on_processes(size, train_and_die_in_a_save, tmp_path, run)[0] is None
        assert (run / "checkpoints" / "step-000004").is_dir()
        path = latest(run)
        assert path is not None and path.name == "step-000002"
    found = train(run, {})
    assert_same_run(found, alone[0], first=2)


def train_with_a_full_disk(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """The disk of the last process is full at step 2."""
    write, warned = checkpoints._Writer.write_data, []

    def full(self: Any, plan: Any, planner: Any) -> Any:
        if Path(self.path).name == "step-000002" and torch.distributed.get_rank() == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, plan, planner)

    checkpoints._Writer.write_data = full  # type: ignore[method-assign]
    logging.getLogger("fastfar").addFilter(lambda record: not warned.append(record.getMessage()))
    found = train(folder, {})
    return warned, found


def test_a_save_that_fails_on_one_process_fails_on_all(
    tmp_path: Path, alone: tuple[dict[str, Any], Path]
) -> None:
    run = tmp_path / "run"
    for warned, found in on_processes(2, train_with_a_full_disk, tmp_path, run):
        assert len(warned) == 1 and "No space left on device" in warned[0]
        assert_same_run(found, alone[0])
    path = latest(run)
    assert path is not None and path.name == "step-000006"


def test_a_batch_that_cannot_be_shared(tmp_path: Path) -> None:
    world = World(torch.device("cpu"), rank=0, size=4)
    with pytest.raises(ValueError, match="choose a multiple of 16"):
        check_data(tiny_recipe(accumulate=4), tiny_data(40), world)


# --- the command ------------------------------------------------------------------------------


def children(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(word) for word in text.split()]


def test_torchrun_and_a_process_that_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("it finds the processes in /proc")
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    write_fashion_mnist(data)
    values = {"model": TINY_FASHION, "steps": 100_000, "batch_size": 8, "dtype": "float32"}
    (tmp_path / "tiny.json").write_text(json.dumps(values))
    train = ["train", "--output", str(run), "--data", str(data), "--quiet", "--json"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "fastfar", *train]
    command += ["--recipe", str(tmp_path / "tiny.json"), "--set", "parallel=fsdp"]
    process = subprocess.Popen(
        [*command, "--save-every", "2", "--log-every", "1", "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    try:
        end = time.monotonic() + SECONDS
        while latest(run) is None:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end, "nothing was saved"
            time.sleep(0.2)
        workers = children(process.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=SECONDS)
    finally:
        left = children(process.pid) if process.poll() is None else []
        process.kill()
        for worker in left:  # each in a session of its own: they would go on
            os.kill(worker, signal.SIGKILL)
    assert process.returncode != 0, errors
    assert "2 processes (fsdp)" in errors and "Signal 9 (SIGKILL)" in errors
    saved = read_run(run)["step"]
    assert saved >= 2 and saved % 2 == 0
    assert cli.main([*train, "--set", f"steps={saved + 1}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["outcome"] == "finished" and found["step"] == saved + 1
    steps = [entry["step"] for entry in read_log(run)]
    assert steps[:saved] == list(range(1, saved + 1)) and steps[saved:] == [saved + 1]
