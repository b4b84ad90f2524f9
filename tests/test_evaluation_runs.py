"""The models of a training run side by side, and samples drawn by several processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from idx import write_fashion_mnist
from tiny_run import TINY_FASHION, tiny_data, tiny_recipe

from fastfar import cli
from fastfar.data import load_fashion_mnist
from fastfar.evaluation import FashionClassifier, save_classifier
from fastfar.evaluation.runs import run_pipelines
from fastfar.training import Trainer


def test_raw_and_averaged_weights(tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(steps=3), tiny_data(), tmp_path / "run")
    assert trainer.run() == "finished"
    pipelines = run_pipelines(tmp_path / "run", "both")
    assert list(pipelines) == ["ema", "raw"]
    for name, parameter in trainer.model.named_parameters():
        raw = pipelines["raw"].model.get_parameter(name)
        average = pipelines["ema"].model.get_parameter(name)
        assert torch.equal(raw, parameter)
        assert torch.equal(average, trainer.ema.average[name])
    assert not torch.equal(raw, average)
    for pipeline in pipelines.values():
        assert pipeline.tokenizer == trainer.tokenizer and not pipeline.model.training
        assert pipeline.class_names == trainer.data.class_names
        images = pipeline([0, 3], generator=0, output_type="pt", diffusion_steps=2).images
        assert isinstance(images, torch.Tensor) and images.shape == (2, 1, 8, 8)
    assert list(run_pipelines(tmp_path / "run", "raw")) == ["raw"]
    with pytest.raises(ValueError, match="weights='old'"):
        run_pipelines(tmp_path / "run", "old")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`fastfar eval` of a run of a few steps on synthetic data of Fashion-MNIST's kind."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "data").mkdir()
    write_fashion_mnist(folder / "data", train=80, test=80)
    torch.manual_seed(0)
    save_classifier(FashionClassifier((8, 8, 8, 16)), folder / "evaluator", {})
    recipe = tiny_recipe(steps=4, lr=0.05, warmup_steps=1, model=TINY_FASHION)
    Trainer(recipe, load_fashion_mnist("train", folder / "data"), folder / "run").run()
    return [
        "eval",
        *("--checkpoint", str(folder / "run"), "--data", str(folder / "data")),
        *("--evaluator", str(folder / "evaluator"), "--samples", "30", "--batch-size", "4"),
        *("--diffusion-steps", "1", "--backend", "torch"),
    ]


def test_command_compares_raw_and_averaged_weights(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*command, "--weights", "both", "--work", str(tmp_path / "work"), "--json"]
    assert cli.main(command) == 0
    result = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in result["rows"]]
    assert names[:2] == ["run ema", "run raw"] and names[2] == "train split"
    assert list(result["fd_over_floor"]) == names[:2]
    runs = result["run"]
    assert runs["run ema"]["weights"] != runs["run raw"]["weights"]
    first, second = (
        np.load(tmp_path / "work" / name / "000000-000004.npy") for name in ("ema", "raw")
    )
    assert first.shape == (4, 32, 32) and not np.array_equal(first, second)


def test_weights_are_those_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--weights", "raw"]) == 2
    assert "demo is no folder of a training run" in capsys.readouterr().err


def test_processes_of_torchrun_share_the_samples(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two processes finish what one began, and give what one gives; the first one judges."""
    work = tmp_path / "work"
    command = [*command, "--work", str(work), "--json"]
    assert cli.main(command) == 0
    alone = json.loads(capsys.readouterr().out)
    files = sorted(work.glob("*.npy"))
    whole = {file.name: file.read_bytes() for file in files}
    for file in files[2:]:
        file.unlink()

    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(command) == 0
    assert capsys.readouterr().out == ""
    assert {file.name: file.read_bytes() for file in work.glob("*.npy")} == whole
    files[0].unlink()
    monkeypatch.setenv("RANK", "0")
    assert cli.main(command) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["rows"] == alone["rows"] and len(files) == 8
    run = both["run"]["run ema"]
    assert (run["processes"], run["new_samples"]) == (2, 4)
