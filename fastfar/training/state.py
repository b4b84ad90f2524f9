"""What can be read of a training run's folder, and log.jsonl."""

from __future__ import annotations

import json
import logging
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastfar._files import atomic_write
from fastfar.training.checkpoints import latest, read_facts, read_tensors
from fastfar.training.recipe import Recipe

STATE_FILE = "state.pt"  # the whole state, in one file, of earlier versions
LOG_FILE = "log.jsonl"
PARTS = ("model", "ema", "optimizer")
# A run with another one of these is another run; the model is compared by its sizes, the data by
# what they hold.
FIXED = ("seed", "batch_size")

_log = logging.getLogger("fastfar")


def has_run(folder: Path) -> bool:
    """Whether the folder holds a training run that was saved."""
    return latest(folder) is not None or (folder / STATE_FILE).is_file()


def read_run(folder: Path) -> dict[str, Any]:
    """Facts of a run's last save: "step", "recipe", "tokenizer", "class_names" and others.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    return read_state(folder, ())


def read_state(folder: Path, parts: tuple[str, ...] = PARTS) -> dict[str, Any]:
    """`read_run` and tensors of a run's last save, whole and on the CPU, in one process.

    Args:
        folder: of the run.
        parts: of "model" (weights by name), "ema" (averages by name, and "updates") and
            "optimizer" (moments by name). No code in the files is run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or no training state.
    """
    path = latest(folder)
    if path is None:
        return _read_old_state(folder)
    state = read_facts(path)
    tensors = read_tensors(path, *(f"{part}." for part in parts)) if parts else {}
    for part in parts:
        found = {name: value for name, value in tensors.items() if name.startswith(f"{part}.")}
        state[part] = {name.removeprefix(f"{part}."): value for name, value in found.items()}
    if "ema" in parts:
        state["ema"]["updates"] = state["ema_updates"]
    return state


def _read_old_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no training run: nothing was saved in it")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or no training state ({first_line})") from error
    needed = ("model", "ema", "step", "recipe")
    missing = [name for name in needed if not isinstance(state, dict) or name not in state]
    if missing:
        raise ValueError(f"{path} is no training state: it lacks {missing}")
    return dict(state)


def recipe_changes(before: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """Entries of a recipe that are not those the run was started with: name -> (before, now).

    Raises:
        ValueError: one of them cannot change within a run: the model, the seed, the batch
            size.
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
