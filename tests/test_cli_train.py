"""`fastfar train` on a tiny model and a synthetic data set."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Captured, fails, picture
from idx import write_fashion_mnist
from tiny_run import TINY_FASHION

from fastfar import cli
from fastfar.cli import train as train_command
from fastfar.pipeline import FARPipeline
from fastfar.training.state import has_run, read_log, read_run, read_state


@pytest.fixture
def data(tmp_path: Path) -> str:
    folder = tmp_path / "data"
    folder.mkdir()
    write_fashion_mnist(folder)
    return str(folder)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.json"
    values = {"model": TINY_FASHION, "steps": 4, "batch_size": 8, "dtype": "float32"}
    path.write_text(json.dumps(values))
    return str(path)


def test_train_resume_export_sample(
    tmp_path: Path, data: str, recipe: str, capsys: Captured
) -> None:
    run = tmp_path / "run"
    train = ["train", "--output", str(run), "--data", data, "--log-every", "1"]
    assert cli.main([*train, "--recipe", recipe, "--set", "lr=0.002", "steps=3"]) == 0
    output, errors = capsys.readouterr()
    assert "finished at step 3 of 3, loss " in output and f"fastfar sample {run}" in output
    assert "step 0 of 3" in errors and "step 3/3" in errors and "lr=" in errors
    assert cli.main([*train, "--set", "steps=5", "--json", "--quiet"]) == 0  # its own recipe
    found = json.loads(capsys.readouterr().out)
    assert found["outcome"] == "finished" and found["step"] == found["steps"] == 5
    assert found["loss"] == read_log(run)[-1]["loss"] and found["seconds"] > 0
    assert [entry["step"] for entry in read_log(run)] == [1, 2, 3, 4, 5]
    state = read_state(run)
    assert state["recipe"]["lr"] == 0.002 and state["recipe"]["steps"] == 5
    pipe = FARPipeline.from_pretrained(found["export"])
    assert {p.dtype for p in pipe.model.parameters()} == {torch.bfloat16}
    assert pipe.class_names is not None and pipe.class_names[9] == "ankle boot"
    output_file = str(tmp_path / "out.png")
    sample = ["sample", found["export"], "--classes", "bag", "--diffusion-steps", "1", "--quiet"]
    assert cli.main([*sample, "--output", output_file]) == 0
    assert picture(output_file).shape == (32, 32)
    capsys.readouterr()

    assert cli.main([*train, "--export-only", "--export-dtype", "float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"outcome": "exported", "step": 5, "export": str(run / "export")}
    pipe = FARPipeline.from_pretrained(found["export"])
    for name, value in pipe.model.state_dict().items():
        assert torch.equal(value, state["ema"][name])


def test_train_stops_and_says_how_to_go_on(
    tmp_path: Path,
    data: str,
    recipe: str,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    plain = train_command._run_with_bar

    def interrupted(trainer: Any, *arguments: Any) -> Any:
        step = trainer.train_step

        def train_step() -> Any:
            if trainer.step == 1:
                signal.raise_signal(signal.SIGINT)
            return step()

        trainer.train_step = train_step
        return plain(trainer, *arguments)

    monkeypatch.setattr(train_command, "_run_with_bar", interrupted)
    train = ["train", "--output", str(run), "--data", data]
    assert cli.main([*train, "--recipe", recipe]) == 130
    text = capsys.readouterr().out
    assert "interrupted at step 2 of 4" in text
    assert f"to go on: fastfar train --output {run} --data {data}" in text
    assert read_run(run)["step"] == 2 and not (run / "export").exists()
    monkeypatch.undo()
    assert cli.main(train) == 0
    assert "finished at step 4 of 4" in capsys.readouterr().out


def test_the_end_of_the_time_exports(
    tmp_path: Path, data: str, recipe: str, capsys: Captured
) -> None:
    run = tmp_path / "run"
    arguments = ["--output", str(run), "--data", data, "--recipe", recipe, "--minutes", "1e-9"]
    assert cli.main(["train", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["outcome"] == "out of time" and found["step"] == 0 and found["loss"] is None
    assert found["resume"].startswith("fastfar train --output")
    assert (run / "export" / "model.safetensors").is_file()


def test_the_command_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*options: str) -> argparse.Namespace:
        words = ["train", "--output", "run", *options]
        return cli._parser(words).parse_args(words)

    args = parse("--data", "a b", "--workers", "2")
    assert train_command._resume(args) == "fastfar train --output run --data 'a b' --workers 2"
    args = parse("--device", "cuda", "--sync-save")
    rest = "-m fastfar train --output run --device cuda --sync-save"
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert train_command._resume(args) == f"torchrun --nproc-per-node 8 {rest}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert train_command._resume(args) == f"torchrun --nnodes 2 --nproc-per-node 4 {rest}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "imagenet"], "no recipe 'imagenet'"),
        (["--recipe", "missing.json"], "missing.json"),
        (["--set", "steps"], "KEY=VALUE"),
        (["--set", "=3"], "KEY=VALUE"),
        (["--set", "stepz=3"], "stepz"),
        (["--set", "steps=many"], "'many'"),
        (["--set", "dtype=float8"], "float8"),
        (["--minutes", "0"], "--minutes must be positive"),
        (["--threads", "-1"], "--threads must be positive"),
        (["--save-every", "0"], "--save-every must be positive"),
        (["--data", "nowhere"], "nowhere"),
        (["--workers", "-1"], "--workers must be at least 0"),
        (["--export-only"], "no training run"),
    ],
)
def test_wrong_arguments_of_train(
    tmp_path: Path, data: str, capsys: Captured, options: list[str], message: str
) -> None:
    arguments = ["train", "--output", str(tmp_path / "run"), "--data", data, *options]
    assert message in fails(capsys, *arguments)
    assert not has_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("option", "module", "extra"),
    [("--tensorboard", "torch.utils.tensorboard", "train"), ("--plot", "matplotlib", "bench")],
)
def test_what_is_not_installed_is_named(
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    module: str,
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    monkeypatch.delitem(sys.modules, f"{module}.figure", raising=False)
    errors = fails(capsys, "train", "--output", str(tmp_path / "run"), option)
    assert f"pip install 'fastfar[{extra}]'" in errors
    assert not (tmp_path / "run").exists()


def test_the_loss_curve(tmp_path: Path, data: str, recipe: str, capsys: Captured) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run = tmp_path / "run"
    arguments = ["--output", str(run), "--data", data, "--recipe", recipe, "--log-every", "1"]
    assert cli.main(["train", *arguments, "--plot", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plot"] == str(run / "loss.png") and picture(found["plot"]).std() > 1


def test_tensorboard_gets_the_log(
    tmp_path: Path, data: str, recipe: str, capsys: Captured
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run = tmp_path / "run"
    arguments = ["--output", str(run), "--data", data, "--recipe", recipe, "--tensorboard"]
    assert cli.main(["train", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "finished"
    assert [file.stat().st_size > 100 for file in (run / "tensorboard").iterdir()] == [True]
