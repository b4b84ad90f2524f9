"""The command `fastfar eval`, with a stand-in for the pipeline and a synthetic data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from idx import write_fashion_mnist
from stand_in import StandIn

import fastfar
from fastfar import cli
from fastfar.data import load_fashion_mnist
from fastfar.evaluation import (
    METRIC,
    FashionClassifier,
    accuracy,
    load_classifier,
    save_classifier,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("idx")
    write_fashion_mnist(folder, train=320, test=80)
    return folder


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small evaluator with random weights."""
    folder = tmp_path_factory.mktemp("evaluator")
    torch.manual_seed(0)
    save_classifier(FashionClassifier((8, 8, 8, 16)), folder, {})
    return folder


def use(monkeypatch: pytest.MonkeyPatch, pipeline: StandIn) -> StandIn:
    monkeypatch.setattr(fastfar.FARPipeline, "from_pretrained", lambda name: pipeline)
    return pipeline


def test_command(
    files: Path,
    evaluator: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["eval", "--data", str(files), "--samples", "40", "--batch-size", "16"]
    command += ["--evaluator", str(evaluator)]
    command += [
        "--work",
        str(tmp_path / "work"),
        "--output",
        str(tmp_path / "out" / "results.jsonl"),
    ]
    command += ["--guidance-scale", "2", "--diffusion-steps", "5", "--checkpoint", "runs/mine"]

    use(monkeypatch, StandIn(limit=1))
    assert cli.main(command) == 130
    output = capsys.readouterr()
    assert "16 of 40 samples finished" in output.err and output.out == ""

    pipeline = use(monkeypatch, StandIn())
    assert cli.main(command) == 0
    assert pipeline.batches == [16, 8]
    call = pipeline.calls[0]
    assert call["backend"] == "auto" and call["plan"].guidance_scale == 2.0
    assert set(call["plan"].diffusion_steps) == {5}
    table = capsys.readouterr().out
    assert METRIC in table and "no ImageNet FID" in table and "test 80" in table
    assert table.splitlines()[1].startswith("mine ")

    pipeline = use(monkeypatch, StandIn(limit=0))
    assert cli.main([*command, "--json"]) == 0
    (printed,) = capsys.readouterr().out.splitlines()
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 2 and lines[1] == printed
    first, second = (json.loads(line) for line in lines)
    assert first["rows"] == second["rows"], "the figures do not repeat"
    run = first["run"]["mine"]
    assert run["new_samples"] == 24 and second["run"]["mine"]["new_samples"] == 0
    assert run["plan"]["guidance_scale"] == 2.0 and set(run["plan"]["diffusion_steps"]) == {5}

    assert cli.main([*command, "--seed", "1"]) == 2
    assert "samples of another run (different: seed)" in capsys.readouterr().err


def test_command_with_images(
    files: Path,
    evaluator: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    np.save(tmp_path / "made.npy", load_fashion_mnist("test", files).images.numpy())
    command = ["eval", "--data", str(files), "--evaluator", str(evaluator)]
    assert cli.main([*command, "--images", str(tmp_path / "made.npy")]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("made.npy") and "unknown" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "3"], "--samples 3"),
        (["--seed", "-1"], "seed is -1"),
        (["--evaluator", "nowhere"], "no evaluator"),
        (["--images", "nowhere.npy"], "no images"),
        (["--data", "nowhere"], "dataset-fashion-mnist"),
    ],
)
def test_command_errors_come_first(
    files: Path,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipeline = use(monkeypatch, StandIn())
    assert cli.main(["eval", "--data", str(files), *options]) == 2
    assert message in capsys.readouterr().err
    assert pipeline.batches == []


def test_command_that_trains_the_evaluator(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "train-classifier", "--to", str(tmp_path), "--data", str(files), "--json"]
    command += ["--epochs", "1", "--batch-size", "300", "--dtype", "float32"]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    stored = load_classifier(tmp_path)
    assert found["extractor"] == stored.fingerprint
    assert found["test_accuracy"] == accuracy(stored, load_fashion_mnist("test", files))
    training = json.loads((tmp_path / "config.json").read_text())["training"]
    assert training["epochs"] == 1 and len(training["loss_per_epoch"]) == 1
    assert training["test_accuracy"] == found["test_accuracy"]
