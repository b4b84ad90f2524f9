"""Models of the experiments: trained where they are not there yet, read where they are.

A run's folder is named by what was trained, not by the experiment, so experiments share it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastfar.data import load_fashion_mnist
from fastfar.evaluation.samples import digest
from fastfar.experiments.base import Row, Tell
from fastfar.training import Recipe, Trainer, export_model
from fastfar.training.state import read_log


def run_key(recipe: Recipe) -> str:
    """Name of the folder of a run: 12 hexadecimal digits of what its recipe does not leave open."""
    return digest(told(recipe))


def told(recipe: Recipe) -> dict[str, Any]:
    """The entries of a recipe that are not the defaults."""
    defaults = Recipe().to_dict()
    return {name: value for name, value in recipe.to_dict().items() if value != defaults[name]}


def is_trained(folder: Path) -> bool:
    """Whether a run's folder holds its exported model."""
    export = folder / "export"
    return (export / "config.json").is_file() and (export / "model.safetensors").is_file()


def train(recipe: Recipe, folder: Path, data: Path | None, tell: Tell) -> None:
    """Train into `folder` and export, or go on where it was stopped.

    Raises:
        KeyboardInterrupt: Ctrl-C; the run is saved.
        ValueError, OSError: as `Trainer` and `export_model`.
    """
    trainer = Trainer(recipe, load_fashion_mnist("train", data), folder)
    outcome = trainer.run(
        save_every=max(recipe.steps // 3, 1),
        probe_every=recipe.steps + 1,  # none
        on_log=lambda entry: tell(f"{folder.name}: step {entry['step']} of {recipe.steps}"),
    )
    if outcome != "finished":
        raise KeyboardInterrupt
    names = trainer.data.class_names
    export_model(folder / "export", trainer.averaged_model(), recipe, trainer.tokenizer, names)


def training_facts(recipe: Recipe, folder: Path) -> Row:
    """What a finished run cost and reached: images seen, seconds of its steps, its last loss."""
    seconds, before, loss = 0.0, 0, None
    for entry in read_log(folder):
        if entry.get("images_per_second"):
            images = (entry["step"] - before) * recipe.batch_size
            seconds += images / entry["images_per_second"]
        before, loss = entry["step"], entry.get("loss")
    return {
        "images": recipe.steps * recipe.batch_size,
        "seconds": round(seconds, 1),
        "loss": None if loss is None else round(loss, 4),
    }
