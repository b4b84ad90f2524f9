"""Training of a moment head (`fastfar.moments`) on its teacher's own sampling runs.

    runs = sampled_runs(model, plan, labels, generators)       # or runs that were kept
    rows = MomentRows.write(model, plan, runs, "rows/000.npy")
    head = train_moments(model, plan, [rows, ...], "run", MomentRecipe())
    head.save("model_folder/moments.safetensors")              # FARPipeline loads it from there

A row holds the conditions and the token of one outer step (`moment_rows`). With r = U^T (x - m),
over temperature, the loss of a row is the mean over its P directions of

    r^2 / C_level + (ln C + sg(r)^2 / C) / 2

where sg stops the gradient: the variance does not excuse the mean. In the first steps the mean is
trained alone; what it leaves over then gives U and C_level of each level.

Source: fastfar's own; the loss is a Gaussian's negative log likelihood whose mean has fixed weights
(arXiv 2203.09168 says why).
"""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfar import backend as backends
from fastfar._files import atomic_write
from fastfar._weights import open_weights, weights_digest
from fastfar.model import FAR
from fastfar.moments import MIN_VARIANCE, MomentConfig, MomentHead, Trained
from fastfar.plan import SamplingPlan
from fastfar.training.ema import EMA
from fastfar.training.moment_rows import Batch, MomentData, MomentRows

STATE_FILE = "state.pt"
STATISTICS_ROWS = 2**15  # rows a level that its fixed tables are taken from


@dataclass(frozen=True)
class MomentRecipe:
    """How long and how fast. ValueError for a number out of range.

    Attributes:
        width, depth: of the head.
        steps: optimiser steps; the mean is trained alone in the first `mean_steps`.
        batch_size: rows a step and outer step of the plan.
        lr: highest learning rate: warm-up over `warmup` steps, then a cosine down to 0.
        weight_decay: AdamW's, of matrices. clip: of the gradient's norm.
        ema_decay: of the averaged weights, which are the result.
        validation: share of the rows that are kept out for the report.
        seed: of weights and draws.
    """

    width: int = 256
    depth: int = 2
    steps: int = 8000
    mean_steps: int = 1000
    batch_size: int = 256
    lr: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.02
    clip: float = 1.0
    ema_decay: float = 0.999
    validation: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.mean_steps < self.steps or self.batch_size < 1:
            raise ValueError(
                "give 0 < mean_steps < steps and a batch_size of at least 1, got "
                f"{self.mean_steps}, {self.steps} and {self.batch_size}"
            )
        if not 0 < self.lr < 1 or not 0 < self.validation < 1:
            raise ValueError(
                f"lr and validation must lie in (0, 1), got {self.lr} and {self.validation}"
            )

    def learning_rate(self, step: int) -> float:
        """Of optimiser step `step`."""
        warm = min(1.0, (step + 1) / self.warmup)
        return self.lr * warm * 0.5 * (1.0 + float(np.cos(np.pi * step / self.steps)))


class MomentTrainer:
    """One training run in a folder: state.pt, from which it goes on where it was stopped.

    Args:
        model: the teacher.
        plan: of its runs.
        rows: the rows of those runs.
        folder: of the run.
        recipe: how.

    Raises:
        ValueError: the folder holds a run with another recipe or teacher; no rows.
    """

    def __init__(
        self,
        model: FAR,
        plan: SamplingPlan,
        rows: Sequence[MomentRows],
        folder: str | os.PathLike[str],
        recipe: MomentRecipe,
    ) -> None:
        self.plan, self.recipe, self.path = plan, recipe, Path(folder) / STATE_FILE
        self.data = MomentData(rows, len(plan), recipe.validation)
        config = model.config
        sizes = (config.token_dim, config.width, config.num_levels, recipe.width, recipe.depth)
        teacher = weights_digest(open_weights(model.state_dict()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.head = MomentHead(MomentConfig(*sizes), Trained(teacher, plan))
        self.level_S = torch.tensor(plan.levels)
        self.scale_S11 = torch.tensor(plan.guidance_scales)[:, None, None]
        # Spread is proportional to temperature; where that is 0 there is none to learn from.
        self.temperature_S11 = torch.tensor(plan.temperatures)[:, None, None].clamp(min=1e-3)
        self.ema = EMA(self.head, recipe.ema_decay)
        plain = [p for p in self.head.parameters() if p.ndim < 2]
        matrices = [p for p in self.head.parameters() if p.ndim >= 2]
        groups = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.99), fused=True)
        self.dtype = backends.best_dtype("torch", torch.device("cpu"))
        self.step = 0
        if self.path.is_file():
            self._load(teacher)
        else:
            self._set_token_tables()

    def train_step(self) -> float:
        """One optimiser step; returns the loss."""
        recipe = self.recipe
        if self.step == recipe.mean_steps:
            self._set_residual_tables()
        generator = np.random.default_rng((recipe.seed, self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate(self.step)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not torch.float32):
            residual_SRP, variance_SRP = self._residual(
                self.head, self.data.batch(recipe.batch_size, generator)
            )
        mean_loss = (residual_SRP**2 / self._level_variance()).mean()
        loss = mean_loss
        if self.step >= recipe.mean_steps:
            ratio_SRP = residual_SRP.detach() ** 2 / variance_SRP
            loss = loss + 0.5 * (variance_SRP.log() + ratio_SRP).mean()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.head)
        self.step += 1
        return float(loss.detach())

    def averaged(self) -> MomentHead:
        """The head with the averaged weights, in eval mode."""
        head = copy.deepcopy(self.head)
        self.ema.copy_to(head)
        return head.eval().requires_grad_(False)

    @torch.no_grad()
    def report(self, rows: int = 4096) -> dict[str, Any]:
        """Of the averaged head on rows that it was not trained on, one number per outer step.

        explained: share of the tokens' variance that the mean explains. calibration: sum of
        (x - m)^2 over that of C, 1 is right. deviation: root of the mean C. nll: per number, less
        ln(2 pi) / 2.
        """
        batch = self.data.batch(rows, np.random.default_rng(0), kept_out=True)
        residual_SRP, variance_SRP = self._residual(self.averaged(), batch)
        ratio_SRP = residual_SRP**2 / variance_SRP
        x_SRP = batch.x_SRP / self.temperature_S11
        total_S = x_SRP.var(dim=1).sum(dim=-1)
        left_S = residual_SRP.square().mean(dim=1).sum(dim=-1)
        figures = {
            "explained": 1.0 - left_S / total_S,
            "calibration": left_S / variance_SRP.mean(dim=1).sum(dim=-1),
            "deviation": variance_SRP.mean(dim=(1, 2)).sqrt(),
            "nll": 0.5 * (variance_SRP.log() + ratio_SRP).mean(dim=(1, 2)),
        }
        rounded = {name: [round(v, 5) for v in each.tolist()] for name, each in figures.items()}
        return {"step": self.step, "rows": self.data.trained * len(self.plan), **rounded}

    def save(self) -> None:
        """Write state.pt, atomically."""
        state = {
            "head": self.head.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "recipe": dataclasses.asdict(self.recipe),
            "teacher": self.head.trained.teacher,
        }
        with atomic_write(self.path) as temporary:
            torch.save(state, temporary)

    def _load(self, teacher: str) -> None:
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        if state["recipe"] != dataclasses.asdict(self.recipe) or state["teacher"] != teacher:
            raise ValueError(
                f"{self.path} is of a run with another recipe or teacher ({state['recipe']}, "
                f"{state['teacher']}); choose another folder, or delete it"
            )
        self.head.load_state_dict(state["head"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])

    def _residual(self, head: MomentHead, batch: Batch) -> tuple[Tensor, Tensor]:
        """U^T (x - m) at temperature 1, and C: (S, R, P) both."""
        moments = head.moments(batch.z_c_SRD, batch.z_u_SRD, self.level_S, self.scale_S11)
        residual_SRP = (batch.x_SRP - moments.mean_NP) / self.temperature_S11
        return residual_SRP @ moments.basis_PP, moments.variance_NP

    def _level_variance(self) -> Tensor:
        return self.head.variance_KP[self.level_S].unsqueeze(1) + MIN_VARIANCE

    @torch.no_grad()
    def _set_token_tables(self) -> None:
        """Mean and principal axes of each level's tokens; they are the first U and C_level too."""
        x_SRP = self._statistics_batch().x_SRP
        mean_SP = x_SRP.mean(dim=1)
        variance_SP, axes_SPP = _axes(x_SRP - mean_SP[:, None])
        head, level_S = self.head, self.level_S
        head.mean_KP[level_S] = mean_SP
        head.map_KPP[level_S] = axes_SPP * variance_SP.sqrt()[:, None]
        head.basis_KPP[level_S], head.variance_KP[level_S] = axes_SPP, variance_SP

    @torch.no_grad()
    def _set_residual_tables(self) -> None:
        """U and C_level: axes and variances of what the mean leaves over."""
        batch, head = self._statistics_batch(), self.averaged()
        moments = head.moments(batch.z_c_SRD, batch.z_u_SRD, self.level_S, self.scale_S11)
        variance_SP, axes_SPP = _axes((batch.x_SRP - moments.mean_NP) / self.temperature_S11)
        self.head.basis_KPP[self.level_S] = axes_SPP
        self.head.variance_KP[self.level_S] = variance_SP

    def _statistics_batch(self) -> Batch:
        rows = min(STATISTICS_ROWS, self.data.trained)
        return self.data.batch(rows, np.random.default_rng((self.recipe.seed, 2**31)))


def _axes(residual_SRP: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (S, P) and eigenvectors (S, P, P), in columns, of E[r r^T]."""
    exact = residual_SRP.double()
    values_SP, axes_SPP = torch.linalg.eigh(exact.mT @ exact / exact.shape[1])
    return values_SP.clamp(min=MIN_VARIANCE).float(), axes_SPP.float()


def train_moments(
    model: FAR,
    plan: SamplingPlan,
    rows: Sequence[MomentRows],
    folder: str | os.PathLike[str],
    recipe: MomentRecipe | None = None,
    *,
    save_every: int = 500,
    on_log: Callable[[dict[str, Any]], object] | None = None,
) -> MomentHead:
    """Train a moment head for `model` and `plan`; goes on with the run that `folder` holds.

    Args:
        rows: of the model's own runs with this plan; the last ones are kept out for the report.
        save_every: steps between two saves, and two calls of `on_log` with the report.

    Returns:
        The head with averaged weights; `head.trained.report` says how well it fits.

    Raises:
        ValueError: see `MomentTrainer`.
    """
    trainer = MomentTrainer(model, plan, rows, folder, recipe or MomentRecipe())
    start, losses = time.monotonic(), []
    while trainer.step < trainer.recipe.steps:
        losses.append(trainer.train_step())
        if trainer.step % save_every == 0 or trainer.step == trainer.recipe.steps:
            trainer.save()
            if on_log is not None:
                seconds = round(time.monotonic() - start, 1)
                mean = sum(losses) / len(losses)
                on_log({**trainer.report(), "loss": mean, "seconds": seconds})
            losses = []
    head = trainer.averaged()
    head.trained = dataclasses.replace(head.trained, report=trainer.report())
    return head
