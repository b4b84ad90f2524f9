"""A training run as data: everything that decides what comes out, in one JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastfar._recipes import recipe_names, recipe_text
from fastfar.config import FARConfig
from fastfar.training.loss import LEVEL_WEIGHTS, MASK_RULES, TARGETS, check_ladder


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of a training run.

    The learning rate rises over `warmup_steps`, stays, and falls linearly to zero over the last
    `decay_share` of the steps.

    Attributes:
        model: preset name or the entries of a FARConfig.
        init: checkpoint whose weights the run starts from (a folder, "demo", or a hub name), of the
            same sizes; None starts from random ones.
        data: "fashion_mnist", or what else `fastfar.data.open_data` opens.
        steps, batch_size, batch_multiplier: optimiser steps, images of one step (of all processes
            and micro-batches together) and head rows per token.
        accumulate: micro-batches of a step on each process, whose gradients are added up: less
            memory, the same step. With the number of processes it must divide batch_size.
        flip: mirror every other image, at random.
        lr, betas, weight_decay, clip: AdamW and gradient clipping (norm); biases, norms and the
            head are not decayed.
        mask_rule, level_per_image, levels, target, level_weight, label_dropout: see `sample_draws`
            and `diffusion_loss`.
        ema_decay: with warm-up min(decay, (1 + n) / (10 + n)).
        ema_device: "same" as the weights, or "cpu", which frees 4 bytes a parameter of a GPU.
        dtype: "auto" (bfloat16 autocast where the machine has it), "bfloat16" or "float32".
        backend: "native" (the CPU kernels' forward and backward), "triton" (those of a GPU),
            "torch", or "auto": on a CPU "torch", which was measured to be a little faster on the
            demo, else as in sampling. It may change within a run.
        optimizer: "torch" (torch.optim.AdamW, fused), or "apex" (apex.optimizers.FusedAdam, on a
            GPU). It may change within a run.
        grad_checkpointing: compute every block again in the backward instead of keeping its
            activations: less memory, the same gradients, about a third more time.
        parallel: on several processes, "ddp" (each holds all of the model) or "fsdp" (FSDP2: each
            holds its shard). It may change within a run, and so may the number of processes.
        seed: with the step number it decides every draw, so a resumed run repeats nothing.

    Raises:
        ValueError: an entry is unknown or out of range.

    Source: FAR, arXiv 2503.05305, section 4.1, for the defaults.
    """

    model: str | dict[str, Any] = "demo"
    init: str | None = None
    data: str = "fashion_mnist"
    steps: int = 20000
    batch_size: int = 64
    batch_multiplier: int = 4
    accumulate: int = 1
    flip: bool = False
    lr: float = 1e-4
    warmup_steps: int = 500
    decay_share: float = 0.2
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.02
    clip: float = 3.0
    mask_rule: str | None = "paper"
    level_per_image: bool = True
    levels: tuple[int, ...] | None = None
    target: str = "clean"
    level_weight: str | None = None
    label_dropout: float = 0.1
    ema_decay: float = 0.9999
    ema_device: str = "same"
    dtype: str = "auto"
    backend: str = "auto"
    compile: bool = False
    optimizer: str = "torch"
    grad_checkpointing: bool = False
    parallel: str = "ddp"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", _pair("betas", self.betas))
        whole = ("steps", "batch_size", "batch_multiplier", "accumulate", "warmup_steps", "seed")
        for name in whole:
            _whole(name, getattr(self, name), 0 if name in ("warmup_steps", "seed") else 1)
        for name in ("lr", "clip", "weight_decay"):
            value = _number(name, getattr(self, name))
            if value < 0 or (value == 0 and name != "weight_decay"):
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("decay_share", "label_dropout", "ema_decay"):
            if not 0.0 <= _number(name, getattr(self, name)) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        choices: dict[str, tuple[Any, ...]] = {
            "mask_rule": (*MASK_RULES, None),
            "level_weight": (*LEVEL_WEIGHTS, None),
            "target": TARGETS,
            "dtype": ("auto", "bfloat16", "float32"),
            "backend": ("auto", "native", "torch", "triton"),
            "level_per_image": (True, False),
            "flip": (True, False),
            "ema_device": ("same", "cpu"),
            "parallel": ("ddp", "fsdp"),
            "compile": (True, False),
            "optimizer": ("torch", "apex"),
            "grad_checkpointing": (True, False),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.init is not None and (not isinstance(self.init, str) or not self.init):
            raise ValueError(f"init must be None or name a checkpoint, got {self.init!r}")
        if not isinstance(self.data, str) or not self.data:
            raise ValueError(f"data must name a data set, got {self.data!r}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must be a multiple of accumulate, got {self.batch_size} images in "
                f"{self.accumulate} micro-batches"
            )
        if not isinstance(self.model, str | dict):
            raise ValueError(f"model must be a preset or its entries, got {self.model!r}")
        try:
            config = self.config
        except TypeError as error:
            raise ValueError(f"model: an entry is of a wrong type ({error})") from error
        if self.levels is not None:
            object.__setattr__(self, "levels", check_ladder(self.levels, config.num_levels))

    @property
    def config(self) -> FARConfig:
        """The model's sizes."""
        if isinstance(self.model, str):
            return FARConfig.preset(self.model)
        return FARConfig.from_dict(self.model)

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimiser step `step` (0-based)."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        decay_steps = max(round(self.steps * self.decay_share), 1)
        cool = min(1.0, (self.steps - step) / decay_steps) if self.decay_share > 0 else 1.0
        return self.lr * warm * max(cool, 0.0)

    def with_changes(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with other entries; an unknown name is a ValueError."""
        return self.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_dict`; an unknown name is a ValueError."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown recipe entries {unknown}; known are {sorted(known)}")
        return cls(**values)

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """A committed recipe by name ("demo"), or a JSON file by path.

        Raises:
            ValueError: no such name; the file is not JSON or not a recipe.
            FileNotFoundError: no such file.
        """
        path = Path(name_or_path)
        if path.suffix == ".json":
            if not path.is_file():
                raise FileNotFoundError(f"there is no recipe {path}")
            text = path.read_text(encoding="utf-8")
        else:
            names = recipe_names()
            if str(name_or_path) not in names:
                raise ValueError(
                    f"no recipe {str(name_or_path)!r}; there are {names}, or give a .json file"
                )
            text = recipe_text(str(name_or_path))
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} is no recipe: it must hold one JSON object")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _whole(name: str, value: Any, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value < 2**31:
        raise ValueError(f"{name} must be a whole number of at least {lowest}, got {value!r}")


def _pair(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{name} must be two numbers, got {value!r}")
    first, second = (_number(name, each) for each in value)
    if not (0.0 <= first < 1.0 and 0.0 <= second < 1.0):
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
    return first, second
