"""The training loop: exact resuming, interruption, bad gradients, full disks, export."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import TINY_MODEL, flat, tiny_data, tiny_recipe

from fastfar.data import ImageDataset
from fastfar.model import FAR
from fastfar.pipeline import FARPipeline
from fastfar.plan import SamplingPlan
from fastfar.tokenizer import PixelTokenizer
from fastfar.training import (
    EMA,
    Recipe,
    Trainer,
    default_plan,
    export_model,
    export_run,
    loop,
)
from fastfar.training.draws import batch_rows
from fastfar.training.loop import tokenizer_of
from fastfar.training.state import read_log, read_run, read_state

ROOT = Path(__file__).resolve().parents[1]


def trainer(folder: Path, **changes: Any) -> Trainer:
    return Trainer(tiny_recipe(**changes), tiny_data(), folder)


def assert_same_state(one: Path, other: Path) -> None:
    """Bit-equal weights, averages, optimiser, step and recipe."""
    first, second = flat(read_state(one)), flat(read_state(other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(value, second[name]) if torch.is_tensor(value) else value == second[name]
        assert same, name


def is_time(name: str) -> bool:
    """Whether an entry of the log depends on how fast the machine was."""
    return name == "time" or name.endswith("_per_second") or name.startswith("share_")


# --- going on ---------------------------------------------------------------------------------


def test_three_and_three_steps_are_six(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    assert whole.run(log_every=1, probe_every=2) == "finished"

    stopping = trainer(tmp_path / "parts")

    def stop_after_three(record: dict[str, float]) -> None:
        torch.rand(7)  # what others draw must not matter
        if stopping.step == 3:
            signal.raise_signal(signal.SIGINT)

    assert stopping.run(log_every=1, probe_every=2, on_step=stop_after_three) == "interrupted"
    assert stopping.step == 3 and read_run(tmp_path / "parts")["step"] == 3
    torch.manual_seed(1234)
    resumed = trainer(tmp_path / "parts")
    assert resumed.step == 3 and resumed.changes == {}
    assert resumed.run(log_every=1, probe_every=2) == "finished"

    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    logs = [
        [{k: v for k, v in entry.items() if not is_time(k)} for entry in read_log(tmp_path / name)]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    assert [entry["step"] for entry in logs[0]] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "grad_norm", "lr", "skipped"} <= logs[0][0].keys()
    assert "eps_rmse_t999" in logs[0][1] and "eps_rmse_t999" not in logs[0][0]


def test_a_step_leaves_the_random_numbers_of_others_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    run = trainer(tmp_path)
    run.train_step()
    run.probe()
    assert torch.equal(torch.rand(2), expected)


def test_the_end_of_the_time_is_an_end(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=1000)
    assert run.run(minutes=1e-9) == "out of time"
    assert read_run(tmp_path)["step"] == run.step < 1000


_SCRIPT = """
import sys
from pathlib import Path
import torch
from tiny_run import tiny_data, tiny_recipe
from fastfar.training import Trainer
torch.set_num_threads(1)
run = Trainer(tiny_recipe(steps=100000), tiny_data(), Path(sys.argv[1]))
print(run.run(log_every=1, on_log=lambda entry: print("step", flush=True)), run.step)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_from_outside_saves(tmp_path: Path, number: int) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None and process.stdout.readline() == "step\n"
    process.send_signal(number)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    outcome, step = output.splitlines()[-1].split()
    assert outcome == "interrupted" and read_run(tmp_path)["step"] == int(step) > 0
    resumed = trainer(tmp_path, steps=int(step) + 1)
    assert resumed.step == int(step) and resumed.run() == "finished"


def test_a_killed_run_logs_no_step_twice(tmp_path: Path) -> None:
    trainer(tmp_path, steps=4).run(log_every=1)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n[]\n{"step": 6, "lo')
    resumed = trainer(tmp_path)
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2, 3, 4]
    resumed.run(log_every=1)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_log_without_a_state_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    trainer(tmp_path)
    assert read_log(tmp_path) == []


def test_a_run_may_start_from_a_checkpoint(tmp_path: Path) -> None:
    first = trainer(tmp_path / "first", steps=2)
    first.run()
    model, export = first.averaged_model(), tmp_path / "export"
    names = first.data.class_names
    export_model(export, model, first.recipe, first.tokenizer, names, torch.float32)
    second = trainer(tmp_path / "second", steps=2, init=str(export), seed=1)
    for name, value in model.named_parameters():
        assert torch.equal(second.model.get_parameter(name), value), name
        assert torch.equal(second.ema.average[name], value), name
    assert second.model.training and second.step == 0
    second.train_step()
    second.save()
    second.checkpoints.wait()
    resumed = trainer(tmp_path / "second", steps=2, init=str(export), seed=1)
    assert resumed.step == 1
    for name, value in second.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), value), name
    wider = {**TINY_MODEL, "head_width": 48}
    with pytest.raises(ValueError, match=r"another model \(head_width 32 instead of 48\)"):
        trainer(tmp_path / "third", model=wider, init=str(export))


def test_a_folder_is_one_runs_alone(tmp_path: Path) -> None:
    def second(record: object) -> None:
        with pytest.raises(ValueError, match="another process is training in"):
            trainer(tmp_path).run()

    run = trainer(tmp_path, steps=2)
    assert run.run(on_step=second) == "finished"
    assert trainer(tmp_path, steps=3).run() == "finished"


# --- another recipe, other data, damaged files ------------------------------------------------


def test_a_recipe_may_change_in_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path).run()
    changes = {"steps": 9, "lr": 5e-4, "weight_decay": 0.5, "betas": (0.8, 0.9)}
    with caplog.at_level(logging.WARNING, "fastfar"):
        resumed = trainer(tmp_path, **changes)
    assert resumed.changes == {
        "steps": (6, 9),
        "lr": (1e-3, 5e-4),
        "weight_decay": (0.02, 0.5),
        "betas": ((0.9, 0.95), (0.8, 0.9)),
    }
    assert "weight_decay = 0.5, which was 0.02" in caplog.text
    decayed, free = resumed.optimizer.param_groups  # not the saved run's
    assert decayed["weight_decay"] == 0.5 and free["weight_decay"] == 0.0
    assert decayed["betas"] == (0.8, 0.9)
    assert resumed.run() == "finished" and resumed.step == 9
    assert json.loads((tmp_path / "recipe.json").read_text())["lr"] == 5e-4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed was 0"),
        ({"batch_size": 4}, "batch_size was 8"),
        ({"model": {**TINY_MODEL, "width": 64}}, "model was"),
    ],
)
def test_a_recipe_of_another_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    trainer(tmp_path, steps=1).run()
    with pytest.raises(ValueError, match=named):
        trainer(tmp_path, **changes)


def test_other_images_are_refused(tmp_path: Path) -> None:
    trainer(tmp_path, steps=1).run()
    data = tiny_data()
    with pytest.raises(ValueError, match="other images"):
        Trainer(tiny_recipe(), ImageDataset(data.images + 1, data.labels, ()), tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiny_data(4), "fewer than one batch"),
        (tiny_data(channels=3), r"\(3, 8, 8\)"),
        (ImageDataset(tiny_data().images, tiny_data().labels + 2, ()), r"classes 0\.\.3"),
        (ImageDataset(tiny_data().images, tiny_data().labels[:9], ()), "9 labels"),
    ],
)
def test_data_that_does_not_fit(tmp_path: Path, data: ImageDataset, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(tiny_recipe(), data, tmp_path)


# --- things that go wrong ---------------------------------------------------------------------


def with_bad_steps(run: Trainer, bad: Callable[[int], bool]) -> None:
    """Make the loss of some steps not finite, and its gradients with it."""
    plain = run.loss

    def loss(*arguments: Any) -> torch.Tensor:
        value: torch.Tensor = plain(*arguments)
        return value * math.inf if bad(run.step) else value

    run.loss = loss


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train_step()
    with_bad_steps(run, lambda step: step == 1)
    kept = {name: value.clone() for name, value in flat(run.model.state_dict()).items()}
    average = {name: value.clone() for name, value in run.ema.average.items()}
    record = run.train_step()
    assert record["skipped"] == 1.0 and run.step == 2
    assert all(torch.equal(run.model.state_dict()[name], value) for name, value in kept.items())
    assert all(torch.equal(run.ema.average[name], value) for name, value in average.items())
    assert run.ema.updates == 1
    assert int(run.optimizer.state_dict()["state"][0]["step"]) == 1
    assert run.train_step()["skipped"] == 0.0
    assert not torch.equal(run.model.z_proj.weight, kept["z_proj.weight"])


def test_the_log_stays_json_when_a_step_is_skipped(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=3)
    with_bad_steps(run, lambda step: step in (0, 2))
    run.run(log_every=2)
    text = (tmp_path / "log.jsonl").read_text()
    first, last = (json.loads(line, parse_constant=pytest.fail) for line in text.splitlines())
    assert first["skipped"] == 1.0 and math.isfinite(first["loss"])
    assert last["skipped"] == 1.0 and last["loss"] is None and last["grad_norm"] is None


def test_a_run_that_has_diverged_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "MAX_SKIPPED", 3)
    run = trainer(tmp_path, steps=100)
    with_bad_steps(run, lambda step: step == 1 or step > 3)
    with pytest.raises(ValueError, match="diverged at step 4"):
        run.run(save_every=2)
    assert read_run(tmp_path)["step"] == 6


# --- pieces -----------------------------------------------------------------------------------


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    losses: list[float] = []
    run = trainer(tmp_path, steps=120, lr=3e-3, warmup_steps=10, ema_decay=0.98)
    started = time.monotonic()
    run.run(on_step=lambda record: losses.append(record["loss"]))
    assert len(losses) == 120
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    assert last < 0.75 * first, (first, last, time.monotonic() - started)


def test_moving_average_warms_up() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    ema = EMA(model, 0.3)
    expected = 2.0
    for update, weight in enumerate([1.0, -3.0, 5.0, 0.5, 7.0]):
        decay = min(0.3, (1 + update) / (10 + update))
        assert ema.next_decay == pytest.approx(decay)
        with torch.no_grad():
            model.weight.fill_(weight)
        ema.update(model)
        expected = decay * expected + (1 - decay) * weight
        assert ema.average["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert ema.next_decay == 0.3  # warm-up is over: 6 / 15 is more
    other = EMA(torch.nn.Linear(1, 1, bias=False), 0.3)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 5 and torch.equal(other.average["weight"], ema.average["weight"])
    with pytest.raises(ValueError, match=r"another model.*bias"):
        EMA(torch.nn.Linear(1, 1), 0.3).load_state_dict(ema.state_dict())
    with pytest.raises(ValueError, match="decay"):
        EMA(model, 1.5)


def test_every_epoch_shows_every_image_once() -> None:
    epochs = [
        torch.cat([batch_rows(20, 5 * epoch + i, 4, seed=3) for i in range(5)]) for epoch in (0, 1)
    ]
    for rows in epochs:
        assert sorted(rows.tolist()) == list(range(20))
    assert not torch.equal(*epochs)
    assert len(batch_rows(22, 4, 4, seed=3)) == 4 and len(batch_rows(22, 5, 4, seed=3)) == 4


class Latents(ImageDataset):
    """Data that a tokenizer has gone over already, as those of a latent cache."""

    tokenizer = tokenizer_of(tiny_data())  # type: ignore[assignment]

    def take(self, *rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = super().take(*rows)
        return Latents.tokenizer.to_latents(images), labels


def test_latents_are_not_standardised_again(tmp_path: Path) -> None:
    data = tiny_data()
    latents = Latents(data.images, data.labels, data.class_names)
    run = Trainer(tiny_recipe(flip=True), latents, tmp_path / "latents")
    assert run.tokenizer == tokenizer_of(data) and len(run.data) == 20
    images = trainer(tmp_path / "images", flip=True)
    assert run.train_step() == images.train_step()
    assert run.probe() == images.probe()


@pytest.mark.parametrize("channels", [None, 2])
def test_pixel_statistics(channels: int | None) -> None:
    data = tiny_data(channels=channels)
    images, labels = data.take(torch.tensor([3, 0]))
    assert images.shape == (2, channels or 1, 8, 8) and labels.tolist() == [3, 0]
    assert torch.equal(images[0, 0], data.images[3].view(-1, 8, 8)[0] / 127.5 - 1.0)
    everything = data.take(torch.arange(len(data)))[0].double()
    tokenizer = tokenizer_of(data)
    assert tokenizer.mean == pytest.approx(float(everything.mean()), abs=1e-6)
    assert tokenizer.std == pytest.approx(float(everything.std()), abs=1e-6)


def test_averaged_model_and_export(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run")
    run.run()
    model = run.averaged_model()
    assert not model.training and run.model.training
    for name, value in model.named_parameters():
        assert torch.equal(value, run.ema.average[name])
    assert any(not torch.equal(p, q) for p, q in zip(
        model.parameters(), run.model.parameters(), strict=True))
    assert export_run(tmp_path / "run", tmp_path / "out", torch.float32) == 6
    pipe = FARPipeline.from_pretrained(tmp_path / "out")
    assert pipe.class_names == run.data.class_names and pipe.tokenizer == run.tokenizer
    assert pipe.plan == default_plan(run.recipe, run.tokenizer)
    for name, value in pipe.model.state_dict().items():
        assert torch.equal(value, run.ema.average[name]), name
    export_model(tmp_path / "half", model, run.recipe, run.tokenizer, run.data.class_names)
    stored = FAR.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}


def test_default_plan() -> None:
    tokenizer = PixelTokenizer(-0.5, 0.25)
    plan = default_plan(Recipe(), tokenizer)
    assert plan.levels[0] == 0 and list(plan.levels[1:]) == sorted(set(plan.levels[1:]))
    assert plan.input_levels[1:] == plan.levels[1:]
    assert plan.x0_range == tokenizer.x0_range == (-2.0, 6.0)
    assert plan.mask_ratios is not None and plan.mask_ratios[0] == 1.0
    assert SamplingPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    few = Recipe(model={"num_levels": 4})
    default_plan(few, tokenizer).check_fits(4)
    ladder = default_plan(Recipe(levels=(0, 4, 9), mask_rule=None), tokenizer)
    assert ladder.levels == (0, 4, 9) and ladder.mask_ratios is None
    steps = default_plan(Recipe(target="next_level"), tokenizer)
    assert steps.levels == tuple(range(16)) and set(steps.input_levels) == {None}
