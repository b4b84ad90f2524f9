"""The training loop: resumable to the step, atomic checkpoints, a JSONL log always.

Every draw of step n (which images, levels, masks, timesteps, noise, dropped labels) is a function
of (seed, n) alone, so a resumed run continues exactly where the interrupted one stood.
"""

from __future__ import annotations

import copy
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastfar import backend
from fastfar.data import ImageDataset
from fastfar.levels import patchify
from fastfar.model import FAR
from fastfar.ops import add_noise, filter_mask_patchify, use_backend
from fastfar.tokenizer import PixelTokenizer
from fastfar.training.ema import EMA
from fastfar.training.loss import diffusion_loss, sample_draws
from fastfar.training.optimizer import load_optimizer_state, make_optimizer
from fastfar.training.recipe import Recipe
from fastfar.training.state import (
    STATE_FILE,
    append_log,
    read_state,
    recipe_changes,
    trim_log,
    write_state,
)

PROBE_TIMESTEPS = (999, 990, 900, 500, 50)
MAX_SKIPPED = 50  # steps in a row without a finite gradient, after which a run has diverged

Outcome = Literal["finished", "interrupted", "out of time"]
Record = dict[str, float]

_log = logging.getLogger("fastfar")


def pixel_tokenizer(data: ImageDataset) -> PixelTokenizer:
    """Standardisation by a data set's own mean and standard deviation, to six decimals."""
    mean, std = data.pixel_statistics()
    return PixelTokenizer(round(mean, 6), round(std, 6))


def batch_rows(count: int, step: int, size: int, seed: int) -> Tensor:
    """(size,) rows of optimiser step `step`: each epoch is one permutation of `count` images.

    The images that are left over at the end of an epoch, fewer than a batch, are not used in it.
    """
    epoch, position = divmod(step, count // size)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count, generator=generator)
    return order[position * size : (position + 1) * size]


class Trainer:
    """One training run in one folder.

    The folder holds state.pt (weights, EMA, optimiser, step, recipe, tokenizer, class names),
    log.jsonl and recipe.json. A folder that already has a state.pt is resumed, and may go on with
    another recipe as long as model, data, seed and batch size stay: `changes` says what is new.

    Args:
        recipe: what to train.
        data: images (M, H, W) or (M, C, H, W) and labels.
        folder: where everything is written.
        device: where to train; the draws are the same on every device.

    Raises:
        ValueError: the folder belongs to another recipe or holds a damaged state, the data does
            not fit the model, or device, back end or optimizer cannot be used.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: ImageDataset,
        folder: Path,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_data(recipe, data)
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            known = "give cpu, cuda or cuda:1"
            raise ValueError(f"device {device!r} is not known; {known}") from error
        plain = recipe.backend == "auto" and self.device.type == "cpu"
        self.backend = backend.resolve("torch" if plain else recipe.backend, self.device)
        self.recipe, self.data, self.folder = recipe, data, folder
        self.tokenizer = pixel_tokenizer(data)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model = FAR(recipe.config).train().to(self.device)
        self.model.set_grad_checkpointing(recipe.grad_checkpointing)
        self.ema = EMA(self.model, recipe.ema_decay)
        self.optimizer = make_optimizer(self.model, recipe)
        self.step = 0
        self.changes: dict[str, tuple[Any, Any]] = {}
        self._saved_step = -1
        self._skipped_in_a_row = 0
        folder.mkdir(parents=True, exist_ok=True)
        if self.state_path.exists():
            self._load()
        trim_log(folder, self.step)
        self.dtype = torch.float32 if recipe.dtype == "float32" else torch.bfloat16
        if recipe.dtype == "auto":
            self.dtype = backend.best_dtype(self.backend, self.device)
        self.loss = torch.compile(diffusion_loss) if recipe.compile else diffusion_loss

    @property
    def state_path(self) -> Path:
        return self.folder / STATE_FILE

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Images (size, C, H, W) in [-1, 1] and labels (size,) of one optimiser step."""
        images, labels = self.data.take(batch_rows(len(self.data), step, size, seed))
        return images.to(self.device), labels.to(self.device)

    def train_step(self) -> Record:
        """One optimiser step; a step whose gradient is not finite changes nothing and says so.

        Returns:
            "loss", "grad_norm" (before clipping), "lr", and "skipped" (1 or 0).

        Raises:
            ValueError: that has happened in `MAX_SKIPPED` steps in a row.
        """
        recipe = self.recipe
        images, labels = self.batch(self.step, recipe.batch_size, recipe.seed)
        generator = torch.Generator().manual_seed(recipe.seed * 7_919 + self.step + 1)
        draws = sample_draws(
            self.model.config,
            len(images),
            mask_rule=recipe.mask_rule,
            batch_multiplier=recipe.batch_multiplier,
            label_dropout=recipe.label_dropout,
            level_per_image=recipe.level_per_image,
            levels=recipe.levels,
            target=recipe.target,
            generator=generator,
        )
        lr = recipe.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Dropout draws from PyTorch's own generator: what ran before must not matter to it, nor
        # the step to what runs after. The offset keeps it apart from the draws above.
        gpus = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus):
            torch.manual_seed(2**40 + recipe.seed * 104_729 + self.step)
            half = self.dtype is not torch.float32
            autocast = torch.autocast(self.device.type, self.dtype, enabled=half)
            with autocast, use_backend(self.backend):
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
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= MAX_SKIPPED:
            raise ValueError(
                f"no gradient was finite in the last {MAX_SKIPPED} steps: the run has diverged at "
                f"step {self.step - MAX_SKIPPED}. Start again with a lower lr or clip"
            )
        return {
            "loss": float(loss.detach()),
            "grad_norm": float(norm),
            "lr": lr,
            "skipped": float(not finite),
        }

    @torch.no_grad()
    def probe(self, level: int = 8, images: int = 64) -> Record:
        """Root mean square error of eps at fixed timesteps and one level, on fixed images.

        The values near t = 999 decide whether unbounded sampling diverges: sigma / alpha is
        20,300 there, so an error of 0.01 in eps is one of 200 in x_0.
        """
        config = self.model.config
        generator = torch.Generator().manual_seed(0)
        pictures, labels = self.batch(0, min(images, len(self.data)), seed=1)
        latents = self.tokenizer.to_latents(pictures)
        level = min(level, config.num_levels)
        tokens = filter_mask_patchify(
            latents,
            torch.full((len(latents),), level, device=self.device),
            patch_size=config.patch_size,
            num_levels=config.num_levels,
            kind=config.filter,
        )
        self.model.eval()
        z_ND = self.model(tokens, self.model.class_embedding(labels)).flatten(0, 1)
        target_NP = patchify(latents, config.patch_size).flatten(0, 1)
        rows = target_NP.shape[:1]
        noise_NP = torch.randn(target_NP.shape, generator=generator).to(self.device)
        level_N = torch.full(rows, float(level), device=self.device)
        errors = {}
        for t in PROBE_TIMESTEPS:
            timestep_N = torch.full(rows, min(t, config.num_timesteps - 1), device=self.device)
            noised_NP = add_noise(
                target_NP, noise_NP, timestep_N, num_timesteps=config.num_timesteps
            )
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
        on_step: Callable[[Record], None] | None = None,
        on_log: Callable[[dict[str, Any]], None] | None = None,
        minutes: float | None = None,
    ) -> Outcome:
        """Train to the recipe's last step, or to the end of `minutes`, or until Ctrl-C.

        SIGINT or SIGTERM finishes the step at hand and saves; a second Ctrl-C stops at once and
        loses what came after the last save. The log gets an entry every `log_every` steps and
        wherever `probe_every` asks for a probe. If a save on the way fails (a full disk), that is
        a warning, and the next one tries again; at the end it is an OSError.

        Returns:
            "finished", "interrupted" or "out of time".
        """
        start, window = time.monotonic(), _Window()
        outcome: Outcome = "finished"
        with _stop_flag() as stop:
            while self.step < self.recipe.steps:
                if stop.is_set():
                    outcome = "interrupted"
                    break
                if minutes is not None and time.monotonic() - start >= 60 * minutes:
                    outcome = "out of time"
                    break
                begun = time.monotonic()
                record = self.train_step()
                window.add(record, time.monotonic() - begun)
                if on_step is not None:
                    on_step(record)
                probed = self.step % probe_every == 0
                if probed or self.step % log_every == 0 or self.step == self.recipe.steps:
                    entry = {"step": self.step, **record, **window.means(self.recipe.batch_size)}
                    entry |= {"time": time.time(), **(self.probe() if probed else {})}
                    append_log(self.folder, entry)
                    if on_log is not None:
                        on_log(entry)
                    window = _Window()
                if self.step % save_every == 0 and self.step < self.recipe.steps:
                    try:
                        self.save()
                    except OSError as error:
                        _log.warning("step %d was not saved: %s", self.step, error)
            if self._saved_step != self.step:
                self.save()
        return outcome

    def averaged_model(self) -> FAR:
        """A copy of the model in eval mode with the averaged weights."""
        model = copy.deepcopy(self.model).eval()
        self.ema.copy_to(model)
        return model

    def save(self) -> None:
        """Write state.pt and recipe.json, atomically; OSError as `write_state`."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "recipe": self.recipe.to_dict(),
            "tokenizer": self.tokenizer.to_dict(),
            "class_names": list(self.data.class_names),
        }
        write_state(self.folder, state)
        self._saved_step = self.step

    def _load(self) -> None:
        state = read_state(self.folder)
        self.changes = recipe_changes(Recipe.from_dict(state["recipe"]), self.recipe)
        for name, (before, now) in self.changes.items():
            _log.warning("going on with %s = %r, which was %r so far", name, now, before)
        known = state.get("tokenizer", self.tokenizer.to_dict())
        if known != self.tokenizer.to_dict():
            raise ValueError(
                f"the run in {self.folder} was started with other images (then {known}, now "
                f"{self.tokenizer.to_dict()}); choose another folder, or give the same data"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            load_optimizer_state(self.optimizer, state["optimizer"])
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{self.state_path} does not fit its own recipe: {error}") from error
        self.step = self._saved_step = int(state["step"])


class _Window:
    """Means since the last entry of the log."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.steps = 0
        self.seconds = 0.0

    def add(self, record: Record, seconds: float) -> None:
        self.steps += 1
        self.seconds += seconds
        if not record["skipped"]:
            self.losses.append(record["loss"])

    def means(self, batch_size: int) -> Record:
        """Mean loss of the steps that were not skipped, skipped steps, training speed."""
        return {
            "loss": sum(self.losses) / len(self.losses) if self.losses else math.nan,
            "skipped": float(self.steps - len(self.losses)),
            "images_per_second": self.steps * batch_size / max(self.seconds, 1e-9),
        }


def _check_data(recipe: Recipe, data: ImageDataset) -> None:
    config = recipe.config
    expected = (config.latent_channels, config.latent_size, config.latent_size)
    if data.image_shape != expected:
        raise ValueError(f"the data's images are {data.image_shape}, the model takes {expected}")
    if len(data) < recipe.batch_size:
        raise ValueError(
            f"the data has {len(data)} images, fewer than one batch of {recipe.batch_size}"
        )
    labels = data.labels
    if len(labels) != len(data) or int(labels.min()) < 0 or int(labels.max()) >= config.num_classes:
        raise ValueError(
            f"the data has {len(labels)} labels from {int(labels.min())} to {int(labels.max())} "
            f"for {len(data)} images; the model has the classes 0..{config.num_classes - 1}"
        )


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
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
