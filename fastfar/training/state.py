"""What a training run keeps in its folder: state.pt, recipe.json and log.jsonl."""

from __future__ import annotations

import json
import logging
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastfar._files import atomic_write, atomic_writes
from fastfar.training.recipe import Recipe

STATE_FILE = "state.pt"
RECIPE_FILE = "recipe.json"
LOG_FILE = "log.jsonl"
ENTRIES = ("model", "ema", "optimizer", "step", "recipe")
# A run with another one of these is another run; the model is compared by its sizes.
FIXED = ("data", "seed", "batch_size")

_log = logging.getLogger("fastfar")


def read_state(folder: Path) -> dict[str, Any]:
    """The entries of state.pt: "model", "ema", "optimizer", "step", "recipe", and, in newer files,
    "tokenizer" and "class_names". No code in the file is ever run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or no training state.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no training run: there is no {STATE_FILE} in it")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is damaged or no training state ({first_line}); delete it to start the run "
            "anew, or choose another folder"
        ) from error
    missing = [name for name in ENTRIES if not isinstance(state, dict) or name not in state]
    if missing:
        raise ValueError(f"{path} is no training state: it lacks {missing}")
    return dict(state)


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write state.pt and, to be read by people, recipe.json: both or neither.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old files are intact.
    """
    text = json.dumps(state["recipe"], indent=2) + "\n"
    with atomic_writes(folder / STATE_FILE, folder / RECIPE_FILE) as (state_file, recipe_file):
        recipe_file.write_text(text, encoding="utf-8")
        with state_file.open("wb") as stream:
            try:
                torch.save(dict(state), stream)
            except RuntimeError as error:
                # PyTorch's writer turns a failed write into an error of its own.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise


def recipe_changes(before: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """Entries of a recipe that are not those the run was started with: name -> (before, now).

    Raises:
        ValueError: one of them cannot change within a run: the model, the data, the seed, the
            batch size.
    """
    old, new = before.to_dict(), now.to_dict()
    if before.config == now.config:  # a preset's name and its sizes are the same model
        old["model"] = new["model"]
    changes = {name: (old[name], new[name]) for name in new if old[name] != new[name]}
    if refused := [name for name in ("model", *FIXED) if name in changes]:
        told = "; ".join(f"{name} was {changes[name][0]!r}" for name in refused)
        raise ValueError(
            f"this folder holds a run in which {told}, and that cannot change within a run; choose "
            "another folder, or go on with the recipe in recipe.json"
        )
    return changes


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The entries of log.jsonl, without lines that a killed run left unfinished."""
    path = folder / LOG_FILE
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def trim_log(folder: Path, step: int) -> None:
    """Drop what a killed run logged after its last save: those steps come again."""
    if not (folder / LOG_FILE).is_file():
        return
    kept = [json.dumps(entry) + "\n" for entry in read_log(folder) if entry["step"] <= step]
    with atomic_write(folder / LOG_FILE) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def append_log(folder: Path, entry: Mapping[str, Any]) -> None:
    """Add one line; numbers that are not finite become null. A full disk is a warning."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in entry.items()
    }
    try:
        with (folder / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
    except OSError as error:
        _log.warning("step %s was not logged: %s", entry.get("step"), error)
