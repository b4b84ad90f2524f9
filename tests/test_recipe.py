"""Recipes: learning rate, what may change, files, mistakes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fastfar.config import FARConfig
from fastfar.training import Recipe
from fastfar.training.state import recipe_changes


def test_learning_rate_schedule() -> None:
    recipe = Recipe(steps=100, lr=0.8, warmup_steps=4, decay_share=0.2)
    rates = [recipe.learning_rate(step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert rates[80] == pytest.approx(0.8) and rates[90] == pytest.approx(0.4)
    assert rates[99] == pytest.approx(0.04)
    constant = Recipe(steps=10, lr=0.5, warmup_steps=0, decay_share=0.0)
    assert {constant.learning_rate(step) for step in range(10)} == {0.5}


def test_a_preset_and_its_entries_are_one_model() -> None:
    named = Recipe(model="demo")
    assert recipe_changes(named, Recipe(model=FARConfig.preset("demo").to_dict())) == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, "stepz"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"steps": 1.5}, "steps"),
        ({"steps": "many"}, "steps.*'many'"),
        ({"batch_size": True}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be a finite number"),
        ({"clip": "x"}, "clip"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"betas": [0.9]}, "betas must be two numbers"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"ema_decay": 1.5}, "ema_decay"),
        ({"label_dropout": -0.5}, "label_dropout"),
        ({"mask_rule": "diagonal"}, "mask_rule must be one of"),
        ({"level_weight": "cosine"}, "level_weight"),
        ({"dtype": "float8"}, "dtype"),
        ({"backend": "cuda"}, "backend"),
        ({"data": ""}, "data must name"),
        ({"data": 3}, "data must name"),
        ({"accumulate": 0}, "accumulate"),
        ({"batch_size": 8, "accumulate": 3}, "multiple of accumulate, got 8 images in 3"),
        ({"flip": 2}, "flip"),
        ({"ema_device": "cuda"}, "ema_device must be one of"),
        ({"parallel": "tensor"}, "parallel must be one of"),
        ({"compile": "yes"}, "compile"),
        ({"optimizer": "sgd"}, "optimizer must be one of"),
        ({"grad_checkpointing": 1.5}, "grad_checkpointing"),
        ({"model": "giant"}, "giant"),
        ({"model": {"widthh": 3}}, "widthh"),
        ({"model": {"width": "wide"}}, "model"),
        ({"model": 3}, "model must be"),
    ],
)
def test_wrong_recipes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(values)


def test_recipe_files(tmp_path: Path) -> None:
    demo = Recipe.load("demo")
    assert demo.config == FARConfig.preset("demo")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(demo.with_changes({"lr": 1e-5}).to_dict()))
    assert Recipe.load(path) == demo.with_changes({"lr": 1e-5}) != demo
    with pytest.raises(ValueError, match=r"there are.*demo"):
        Recipe.load("far")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        Recipe.load(tmp_path / "none.json")
    for text, message in (("{", "not valid JSON"), ("[]", "one JSON object"), ('{"a": 1}', "'a'")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            Recipe.load(path)
