"""The training loop: resumable to the step, atomic checkpoints, a JSONL log always.

Every draw of step n (which images, levels, masks, timesteps, noise, dropped labels) is a function
of (seed, n, image) alone, so a resumed run continues exactly where the interrupted one stood, on
any number of processes. Dropout is drawn from (seed, n, process).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastfar import backend
from fastfar.data import Examples
from fastfar.model import FAR
from fastfar.ops import use_backend
from fastfar.tokenizer import KLVAE, PixelTokenizer
from fastfar.training.checkpoints import Checkpoints, latest, read_facts
from fastfar.training.distributed import World, spread, unreduced, whole
from fastfar.training.draws import Share, batch_rows, dropout_seed
from fastfar.training.ema import EMA
from fastfar.training.feed import Feed
from fastfar.training.loss import loss_per_image, mean_loss
from fastfar.training.meter import Meter
from fastfar.training.optimizer import (
    make_optimizer,
    optimizer_steps,
    optimizer_tensors,
    prepare_optimizer,
)
from fastfar.training.probe import eps_errors
from fastfar.training.recipe import Recipe
from fastfar.training.signals import stop_flag
from fastfar.training.start import first_model, new_model
from fastfar.training.state import STATE_FILE, append_log, recipe_changes, trim_log

LOCK_FILE = ".lock"
MAX_SKIPPED = 50  # steps in a row without a finite gradient, after which a run has diverged

Outcome = Literal["finished", "out of time", "interrupted"]
_OUTCOMES: tuple[Outcome, ...] = ("finished", "out of time", "interrupted")
Record = dict[str, float]

_log = logging.getLogger("fastfar")


def tokenizer_of(data: Examples) -> PixelTokenizer | KLVAE:
    """What made the latents of `data`; for images, standardisation by their own mean and standard
    deviation, to six decimals."""
    if data.tokenizer is not None:
        return data.tokenizer
    mean, std = data.pixel_statistics()
    return PixelTokenizer(round(mean, 6), round(std, 6))


class Trainer:
    """One training run in one folder, on one process or as one of many.

    The folder holds checkpoints/ (`Checkpoints`), log.jsonl and recipe.json. A folder that already
    has a checkpoint is resumed, and may go on with another recipe as long as model, data, seed and
    batch size stay, and on another number of processes: `changes` says what is new.

    All processes make one and call the same methods in the same order.

    Args:
        recipe: what to train.
        data: images, or latents of images, with labels.
        folder: where everything is written.
        device: where to train; the draws are the same on every device.
        async_save: write checkpoints in the background.
        workers: processes that read the data ahead.

    Raises:
        ValueError: the folder belongs to another recipe or holds a damaged state, the data or the
            weights to start from do not fit the model, the batch does not fit the processes, or
            device, back end or optimizer cannot be used.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Examples,
        folder: Path,
        device: torch.device | str = "cpu",
        *,
        async_save: bool = True,
        workers: int = 0,
    ) -> None:
        self.world = World.join(device)
        self.device = self.world.device
        check_data(recipe, data, self.world)
        plain = recipe.backend == "auto" and self.device.type == "cpu"
        self.backend = backend.resolve("torch" if plain else recipe.backend, self.device)
        self.dtype = torch.float32 if recipe.dtype == "float32" else torch.bfloat16
        if recipe.dtype == "auto":
            self.dtype = backend.best_dtype(self.backend, self.device)
        self.recipe, self.data, self.folder, self.workers = recipe, data, folder, workers
        self.tokenizer = tokenizer_of(data)
        model = new_model(recipe) if latest(folder) else first_model(recipe)
        self.model = model.train().to(self.device)
        self.model.set_grad_checkpointing(recipe.grad_checkpointing)
        fsdp = self.world.grouped and recipe.parallel == "fsdp"
        self.inside = spread(
            self.model,
            self.world,
            recipe.parallel,
            self.dtype,
            all_used=recipe.mask_rule is not None and recipe.label_dropout > 0,
            compiled=recipe.compile,
        )
        self.loss = torch.compile(loss_per_image) if recipe.compile and not fsdp else loss_per_image
        self.ema = EMA(
            self.model, recipe.ema_decay, "cpu" if recipe.ema_device == "cpu" else None
        )
        self.optimizer = make_optimizer(self.model, recipe)
        self.meter = Meter(self.world, self.model.config.num_levels)
        self.checkpoints = Checkpoints(folder, self.world, async_save)
        self.step = 0
        self.changes: dict[str, tuple[Any, Any]] = {}
        self._feed: Feed | None = None
        self._skipped_in_a_row = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._load()
        if self.world.main:
            trim_log(folder, self.step)

    def train_step(self) -> Record:
        """One optimiser step; a step whose gradient is not finite, in whichever process, changes
        nothing in any of them, and says so.

        Returns:
            "loss" (mean over the batch of all processes), "grad_norm" (before clipping), "lr", and
            "skipped" (1 or 0).

        Raises:
            ValueError: that has happened in `MAX_SKIPPED` steps in a row.
        """
        begun = time.monotonic()
        recipe, watch = self.recipe, self.meter.watch
        if self._feed is None:
            share = Share(recipe, len(self.data), self.world.rank, self.world.size)
            self._feed = Feed(self.data, share, self.step, self.device, self.workers)
        with watch.part("data"):
            batch = next(self._feed)
        losses = []
        # Dropout draws from PyTorch's own generator: what ran before must not matter to it, nor
        # the step to what runs after.
        gpus = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus):
            torch.manual_seed(dropout_seed(recipe, self.step, self.world.rank))
            for part in batch:
                with nullcontext() if part is batch[-1] else unreduced(self.inside):
                    with watch.part("forward"), self._precision():
                        latents = self._latents(part.images)
                        loss_B = self.inside(self.loss, latents, part.labels, part.draws)
                        level_B, levels = part.draws.level, self.model.config.num_levels
                        loss = mean_loss(loss_B, level_B, levels, recipe.level_weight)
                    with watch.part("backward"):
                        torch.autograd.backward(loss / len(batch))
                losses.append((level_B, loss_B.detach(), loss.detach()))
        lr = recipe.learning_rate(self.step)
        with watch.part("optimizer"):
            norm = self._update(lr)
        finite = bool(torch.isfinite(norm))
        (mean,) = self.world.mean([float(sum(each for _, _, each in losses)) / len(batch)])
        for level_B, loss_B, _ in losses if finite else ():
            self.meter.add_levels(level_B, loss_B)
        self.step += 1
        self.meter.add_step(mean, finite, time.monotonic() - begun)
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if not finite and self.world.main:
            _log.warning("step %d is skipped: the norm of its gradient is %s", self.step, norm)
        if self._skipped_in_a_row >= MAX_SKIPPED:
            raise ValueError(
                f"no gradient was finite in the last {MAX_SKIPPED} steps: the run has diverged at "
                f"step {self.step - MAX_SKIPPED}. Start again with a lower lr or clip"
            )
        return {"loss": mean, "grad_norm": float(norm), "lr": lr, "skipped": float(not finite)}

    def _update(self, lr: float) -> Tensor:
        """Take the step that the gradients ask for, if they are finite; their norm.

        The gradients, and so the norm, are those of all processes: all decide alike.
        """
        parameters = [each for each in self.model.parameters() if each.grad is not None]
        norm = whole(get_total_norm([each.grad for each in parameters if each.grad is not None]))
        if bool(torch.isfinite(norm)):
            clip_grads_with_norm_(parameters, self.recipe.clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.ema.update(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @contextmanager
    def _precision(self) -> Iterator[None]:
        half = self.dtype is not torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=half), use_backend(self.backend):
            yield

    def _latents(self, images: Tensor) -> Tensor:
        """Of what `Examples.take` gives."""
        return self.tokenizer.to_latents(images) if self.data.tokenizer is None else images

    def probe(self, level: int = 8, images: int = 64) -> Record:
        """`eps_errors` on fixed images of the data."""
        rows = batch_rows(len(self.data), 0, min(images, len(self.data)), seed=1)
        pictures, labels = (each.to(self.device) for each in self.data.take(rows))
        self.model.eval()
        with self._precision():
            errors: Record = self.inside(eps_errors, self._latents(pictures), labels, level)
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

        SIGINT or SIGTERM, to any of the processes, finishes the step at hand and saves; a second
        Ctrl-C stops at once and loses what came after the last save. The log gets an entry every
        `log_every` steps and wherever `probe_every` asks for a probe. If a save on the way fails
        (a full disk), that is a warning, and the next one tries again; at the end it is an OSError.
        The callbacks are called in every process, with the same numbers.

        Returns:
            "finished", "interrupted" or "out of time".

        Raises:
            ValueError: another process trains in the folder; or as `train_step`.
        """
        start, outcome = time.monotonic(), _OUTCOMES[0]
        with stop_flag() as stop, self._at_work():
            while self.step < self.recipe.steps:
                late = minutes is not None and time.monotonic() - start >= 60 * minutes
                if ending := self.world.highest(2 if stop.is_set() else int(late)):
                    outcome = _OUTCOMES[ending]
                    break
                record = self.train_step()
                if on_step is not None:
                    on_step(record)
                probed = self.step % probe_every == 0
                if probed or self.step % log_every == 0 or self.step == self.recipe.steps:
                    entry = {"step": self.step, **record, **self._means(), "time": time.time()}
                    entry |= self.probe() if probed else {}
                    if self.world.main:
                        append_log(self.folder, entry)
                    if on_log is not None:
                        on_log(entry)
                if self.step % save_every == 0 and self.step < self.recipe.steps:
                    self._save_on_the_way()
            if self.checkpoints.step != self.step:
                self.save()
                self.checkpoints.wait()
        return outcome

    def close(self) -> None:
        """Wait for a save in the background, and end what reads the data ahead.

        `run` does so by itself; a further step begins to read anew.
        """
        if self._feed is not None:
            self._feed.close()
            self._feed = None
        self._wait()

    def _means(self) -> Record:
        return self.meter.means(self.recipe.batch_size, self.model.config.num_tokens)

    def _save_on_the_way(self) -> None:
        self._wait()
        try:
            self.save()
        except OSError as error:
            _log.warning("step %d was not saved: %s", self.step, error)

    def _wait(self) -> None:
        """For the save in the background, whose failure is a warning."""
        try:
            self.checkpoints.wait()
        except OSError as error:
            _log.warning("a step was not saved: %s", error)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """The folder is this run's alone; however it is left, none of its threads or processes is
        at work afterwards."""
        lock, taken = FileLock(self.folder / LOCK_FILE, timeout=0), False
        try:
            if self.world.main:
                lock.acquire()
        except Timeout:
            taken = True
        if self.world.highest(taken):
            raise ValueError(
                f"another process is training in {self.folder}: wait for it, or choose another "
                "folder"
            )
        try:
            yield
        finally:
            lock.release()
            self.close()

    def averaged_model(self) -> FAR:
        """A model in eval mode with the averaged weights, whole, in every process."""
        model = new_model(self.recipe).to(self.device).eval()
        self.ema.copy_to(model)
        return model

    def save(self) -> None:
        """Save the present state, in the background if `async_save`; OSError as `Checkpoints`."""
        facts = {
            "step": self.step,
            "recipe": self.recipe.to_dict(),
            "tokenizer": self.tokenizer.to_dict(),
            "class_names": list(self.data.class_names),
            "data": self.data.identity,
            "processes": self.world.size,
            "ema_updates": self.ema.updates,
            "optimizer_steps": optimizer_steps(self.model, self.optimizer),
        }
        self.checkpoints.save(self.step, self._tensors(), facts)

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by name; not copies."""
        parts = {
            "model": self.model.state_dict(),
            "ema": self.ema.average,
            "optimizer": optimizer_tensors(self.model, self.optimizer),
        }
        return {f"{part}.{name}": t for part, each in parts.items() for name, t in each.items()}

    def _load(self) -> None:
        path = latest(self.folder)
        if path is None:
            if (self.folder / STATE_FILE).exists():
                raise ValueError(
                    f"{self.folder / STATE_FILE} is of an earlier version of fastfar, whose draws "
                    "were others: it can be exported (--export-only), but not go on. Choose "
                    "another folder"
                )
            return
        facts = read_facts(path)
        self.changes = recipe_changes(Recipe.from_dict(facts["recipe"]), self.recipe)
        for name, (before, now) in self.changes.items():
            _log.warning("going on with %s = %r, which was %r so far", name, now, before)
        identity = json.loads(json.dumps(self.data.identity))
        if facts["data"] != identity:
            raise ValueError(
                f"the run in {self.folder} was started with other images (then {facts['data']}, "
                f"now {identity}); choose another folder, or give the same data"
            )
        prepare_optimizer(self.model, self.optimizer, facts["optimizer_steps"])
        self.checkpoints.load(path, self._tensors())
        self.ema.updates = int(facts["ema_updates"])
        self.step = self.checkpoints.step = int(facts["step"])


def check_data(recipe: Recipe, data: Examples, world: World) -> None:
    """ValueError unless the data fit the model, and the batch the processes."""
    config = recipe.config
    expected = (config.latent_channels, config.latent_size, config.latent_size)
    if data.image_shape != expected:
        hint = ""
        if data.tokenizer is None and config.latent_channels not in (1, 3):
            hint = ": it takes latents; make them of pictures with `fastfar cache`"
        raise ValueError(
            f"the data's images are {data.image_shape}, the model takes {expected}{hint}"
        )
    if len(data) < recipe.batch_size:
        raise ValueError(
            f"the data has {len(data)} images, fewer than one batch of {recipe.batch_size}"
        )
    if recipe.batch_size % (world.size * recipe.accumulate):
        raise ValueError(
            f"{world.size} processes with {recipe.accumulate} micro-batches each cannot share a "
            f"batch of {recipe.batch_size} evenly: choose a multiple of "
            f"{world.size * recipe.accumulate}"
        )
    labels = data.labels
    if len(labels) != len(data) or int(labels.min()) < 0 or int(labels.max()) >= config.num_classes:
        raise ValueError(
            f"the data has {len(labels)} labels from {int(labels.min())} to {int(labels.max())} "
            f"for {len(data)} images; the model has the classes 0..{config.num_classes - 1}"
        )
