"""The command `fastfar plan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Captured, fails

from fastfar import cli
from fastfar.training import Recipe


def test_the_command(capsys: Captured) -> None:
    arguments = ["plan", "--model", "far_huge", "--gpus", "8xH100", "--batch", "1024"]
    assert cli.main(arguments) == 1
    output, errors = capsys.readouterr()
    assert "expected, not measured" in output and "does not fit" in errors
    assert "fits with --accumulate 2" in errors
    assert cli.main([*arguments, "--accumulate", "2", "--explain"]) == 0
    output, errors = capsys.readouterr()
    assert not errors and "500,400 steps" in output
    for text in ("2 q", "4 N S D", "hidden layer before GELU", "share that a GPU keeps"):
        assert text in output


def test_the_command_as_data(capsys: Captured) -> None:
    arguments = ["plan", "--gpus", "8xA100:40", "--epochs", "2", "--images", "10240", "--json"]
    assert cli.main(arguments) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 20 and not found["fits"] and found["fits_with"]
    assert found["memory_bytes"] == pytest.approx(sum(found["memory"].values()))
    assert found["memory_bytes"] > found["memory_available"] == 40 * 2**30
    step_s = sum(stage["seconds"] for stage in found["stages"].values())
    assert found["step_s"] == pytest.approx(step_s)
    assert found["tokens_per_s"] == pytest.approx(1024 * 256 / step_s)
    assert found["days"] == pytest.approx(20 * step_s / 86400)


def test_the_command_on_a_recipe(capsys: Captured, tmp_path: Path) -> None:
    recipe = Recipe(model="demo", batch_size=32, batch_multiplier=2, steps=70)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.to_dict()))
    arguments = ["plan", "--model", str(path), "--gpus", "rtx4090", "--json"]
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batch"], found["batch_multiplier"], found["steps"]) == (32, 2, 70)
    assert cli.main([*arguments, "--batch", "64", "--steps", "5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batch"], found["steps"]) == (64, 5)


def test_errors_of_the_command(capsys: Captured) -> None:
    assert "such as 8xH100" in fails(capsys, "plan", "--gpus", "8 of them")
    assert "give a multiple of 8" in fails(capsys, "plan", "--batch", "100")
    assert "--epochs must be positive" in fails(capsys, "plan", "--epochs", "0")
    assert "less than one batch" in fails(capsys, "plan", "--images", "10")
    assert "no preset" in fails(capsys, "plan", "--model", "far_giant")
