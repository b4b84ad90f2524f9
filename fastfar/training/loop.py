"""The training loop: resumable to the step, atomic checkpoints, a JSONL log always.

Every draw of step n (which images, levels, masks, timesteps, noise, dropped labels) is a function
of (seed, n) alone, so a resumed run continues exactly where the interrupted one stood.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfar import backend
from fastfar._files import atomic_write
from fastfar.diffusion import add_noise
from fastfar.levels import patchify
from fastfar.model import FAR
from fastfar.ops import filter_mask_patchify
from fastfar.tokenizer import PixelTokenizer
from fastfar.training.ema import EMA
from fastfar.training.loss import diffusion_loss, sample_draws
from fastfar.training.recipe import Recipe

PROBE_TIMESTEPS = (999, 990, 900, 500, 50)


@dataclass
class TrainingData:
    """Images of one data set, in memory.

    Attributes:
        images: (M, C, H, W) uint8.
        labels: (M,) int64.
        class_names: one per label.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def tokenizer(self) -> PixelTokenizer:
        """Standardisation by this data set's own mean and standard deviation."""
        pixels = self.images.double() / 127.5 - 1.0
        return PixelTokenizer(round(float(pixels.mean()), 6), round(float(pixels.std()), 6))

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1] and labels of optimiser step `step`: each epoch is a permutation."""
        per_epoch = max(len(self.labels) // size, 1)
        epoch, position = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.labels), generator=generator)
        rows = order[position * size : (position + 1) * size]
        return self.images[rows].float() / 127.5 - 1.0, self.labels[rows]


class Trainer:
    """One training run in one folder.

    The folder holds state.pt (weights, EMA, optimiser, step, recipe), log.jsonl and recipe.json.
    A folder that already has a state.pt is resumed.

    Args:
        recipe: what to train.
        data: images and labels.
        folder: where everything is written.

    Raises:
        ValueError: the folder belongs to another recipe, or the data does not fit the model.
    """

    def __init__(self, recipe: Recipe, data: TrainingData, folder: Path) -> None:
        config = recipe.config
        expected = (config.latent_channels, config.latent_size, config.latent_size)
        if tuple(data.images.shape[1:]) != expected:
            raise ValueError(
                f"the data's images are {tuple(data.images.shape[1:])}, the model takes {expected}"
            )
        if int(data.labels.max()) >= config.num_classes:
            raise ValueError(
                f"label {int(data.labels.max())} in the data, the model has "
                f"{config.num_classes} classes"
            )
        torch.manual_seed(recipe.seed)
        self.recipe, self.data, self.folder = recipe, data, folder
        self.tokenizer = data.tokenizer()
        self.model = FAR(config).train()
        self.ema = EMA(self.model, recipe.ema_decay)
        self.optimizer = _adamw(self.model, recipe)
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)
        if self.state_path.exists():
            self._load()
        dtype = torch.float32 if recipe.dtype == "float32" else torch.bfloat16
        if recipe.dtype == "auto":
            dtype = backend.best_dtype("torch", torch.device("cpu"))
        self.dtype = dtype
        self.loss = torch.compile(diffusion_loss) if recipe.compile else diffusion_loss

    @property
    def state_path(self) -> Path:
        return self.folder / "state.pt"

    def train_step(self) -> dict[str, float]:
        """One optimiser step; a step whose gradient is not finite changes nothing and says so."""
        recipe = self.recipe
        images, labels = self.data.batch(self.step, recipe.batch_size, recipe.seed)
        generator = torch.Generator().manual_seed(recipe.seed * 7_919 + self.step + 1)
        draws = sample_draws(
            self.model.config,
            len(images),
            mask_rule=recipe.mask_rule,
            batch_multiplier=recipe.batch_multiplier,
            label_dropout=recipe.label_dropout,
            level_per_image=recipe.level_per_image,
            generator=generator,
        )
        # Dropout, if any, must not depend on what ran before either.
        torch.manual_seed(recipe.seed * 104_729 + self.step + 1)
        lr = recipe.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not torch.float32):
            latents = self.tokenizer.to_latents(images)
            loss = self.loss(self.model, latents, labels, draws, recipe.level_weight)
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizer.step()
            self.ema.update(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {
            "loss": float(loss.detach()),
            "grad_norm": float(norm),
            "lr": lr,
            "skipped": float(not finite),
        }

    @torch.no_grad()
    def probe(self, level: int = 8, images: int = 64) -> dict[str, float]:
        """Root mean square error of eps at fixed timesteps and one level, on fixed images.

        The values near t = 999 decide whether unbounded sampling diverges: sigma / alpha is
        20,300 there, so an error of 0.01 in eps is one of 200 in x_0.
        """
        config = self.model.config
        generator = torch.Generator().manual_seed(0)
        pictures, labels = self.data.batch(0, images, seed=1)
        latents = self.tokenizer.to_latents(pictures)
        level_B = torch.full((len(latents),), min(level, config.num_levels))
        self.model.eval()
        tokens = filter_mask_patchify(
            latents,
            level_B,
            patch_size=config.patch_size,
            num_levels=config.num_levels,
            kind=config.filter,
        )
        z_ND = self.model(tokens, self.model.class_embedding(labels)).flatten(0, 1)
        target_NP = patchify(latents, config.patch_size).flatten(0, 1)
        noise_NP = torch.randn(target_NP.shape, generator=generator)
        level_N = torch.full((len(target_NP),), float(level))
        errors = {}
        for t in PROBE_TIMESTEPS:
            timestep_N = torch.full((len(target_NP),), t)
            noised_NP = add_noise(target_NP, noise_NP, timestep_N, config.num_timesteps)
            output = self.model.head(noised_NP, timestep_N, z_ND, level_N)
            eps_NP = output[:, : config.token_dim]
            errors[f"eps_rmse_t{t}"] = float((eps_NP - noise_NP).square().mean().sqrt())
        self.model.train()
        return errors

    def run(
        self,
        *,
        log_every: int = 50,
        save_every: int = 500,
        probe_every: int = 1000,
        on_log: Callable[[dict[str, Any]], None] | None = None,
        minutes: float | None = None,
    ) -> bool:
        """Train to the recipe's last step; True if it was reached.

        Ctrl-C (SIGINT) or SIGTERM finishes the step at hand, saves and returns False; so does the
        end of `minutes`.
        """
        clock = start = time.monotonic()
        losses: list[float] = []
        skipped = 0.0
        with _stop_flag() as stop:
            while self.step < self.recipe.steps and not stop.is_set():
                record = self.train_step()
                losses.append(record["loss"])
                skipped += record["skipped"]
                if self.step % log_every == 0 or self.step == self.recipe.steps:
                    now = time.monotonic()
                    entry: dict[str, Any] = {
                        "step": self.step,
                        **record,
                        "loss": sum(losses) / len(losses),
                        "skipped": skipped,
                        "images_per_second": len(losses) * self.recipe.batch_size / (now - clock),
                        "time": time.time(),
                    }
                    if self.step % probe_every == 0:
                        entry |= self.probe()
                    self._log(entry)
                    if on_log is not None:
                        on_log(entry)
                    clock, losses, skipped = time.monotonic(), [], 0.0
                if self.step % save_every == 0:
                    self.save()
                if minutes is not None and time.monotonic() - start > 60 * minutes:
                    break
            self.save()
        return self.step >= self.recipe.steps

    def averaged_model(self) -> FAR:
        """A copy of the model in eval mode with the averaged weights."""
        model = FAR(self.model.config)
        self.ema.copy_to(model)
        return model.eval()

    def save(self) -> None:
        """Write state.pt and recipe.json, atomically."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "recipe": self.recipe.to_dict(),
        }
        with atomic_write(self.state_path) as temporary:
            torch.save(state, temporary)
        with atomic_write(self.folder / "recipe.json") as temporary:
            temporary.write_text(json.dumps(self.recipe.to_dict(), indent=2) + "\n")

    def _load(self) -> None:
        state = torch.load(self.state_path, map_location="cpu", weights_only=True)
        before = Recipe.from_dict(state["recipe"])
        if before.config != self.recipe.config:
            raise ValueError(
                f"{self.folder} holds a run of another model ({before.config}); choose an empty "
                "folder, or the recipe that this run was started with"
            )
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])
        self._trim_log()

    def _trim_log(self) -> None:
        """Drop what a killed run logged after its last save: those steps come again."""
        path = self.folder / "log.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= self.step:
                    kept.append(line)
            except json.JSONDecodeError:  # the line that was being written when the run died
                continue
        with atomic_write(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))

    def _log(self, entry: dict[str, Any]) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _adamw(model: FAR, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW without weight decay on biases, norms, embeddings of one row and the head."""
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or name.startswith("diffloss.") or name.endswith(".bias")
        (free if plain else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)


@contextmanager
def _stop_flag() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second SIGINT interrupts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
