"""What the log says of the steps since its last entry: losses, speed, where the time went."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastfar.training.distributed import World

PARTS = ("data", "forward", "backward", "optimizer")


class Stopwatch:
    """Seconds that a device was busy with, or waited in, each part of the steps.

    On a GPU by events in its stream, so that nothing waits for it before `seconds` is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: list[tuple[str, torch.cuda.Event | float, torch.cuda.Event | float]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside as `name`."""
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """Of each part, since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        totals = dict.fromkeys(PARTS, 0.0)
        for name, start, end in self._spans:
            if isinstance(start, float) or isinstance(end, float):
                totals[name] += float(end) - float(start)  # type: ignore[arg-type]
            else:
                totals[name] += start.elapsed_time(end) / 1000.0
        self._spans = []
        return totals

    def _now(self) -> torch.cuda.Event | float:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event


class Meter:
    """Sums since the last entry of the log, of this process; `means` are those of all.

    Args:
        world: the processes of the run.
        num_levels: K.
    """

    def __init__(self, world: World, num_levels: int) -> None:
        self.world, self.num_levels = world, num_levels
        self.watch = Stopwatch(world.device)
        self._start_anew()

    def _start_anew(self) -> None:
        self.steps = self.skipped = 0
        self.loss = self.wall = 0.0
        # Losses of each level, and how many images had it.
        self.levels_2K = torch.zeros(2, self.num_levels, dtype=torch.float64)

    def add_step(self, loss: float, finite: bool, wall: float) -> None:
        """Count one optimiser step of `wall` seconds; only finite ones have a loss."""
        self.steps += 1
        self.wall += wall
        self.skipped += not finite
        self.loss += loss if finite else 0.0

    def add_levels(self, level_B: Tensor, loss_B: Tensor) -> None:
        """Count the losses of images at their levels."""
        level_B = level_B.cpu()
        self.levels_2K[0].index_add_(0, level_B, loss_B.cpu().double())
        self.levels_2K[1].index_add_(0, level_B, torch.ones(len(level_B), dtype=torch.float64))

    def means(self, batch_size: int, num_tokens: int) -> dict[str, float]:
        """An entry of the log; starts anew. All processes must call it.

        Returns:
            "loss" (mean over the steps that were not skipped, with level weights), "skipped"
            (steps), "images_per_second", "tokens_per_second", "share_<part>" of the time of the
            steps for the `PARTS`, and "loss_level_<i>" (mean over the images trained at level i,
            without level weights) for the levels that occurred.
        """
        parts = self.watch.seconds()
        local = [self.wall, *parts.values(), *self.levels_2K.flatten().tolist()]
        wall, *rest = self.world.mean(local)
        wall, images = max(wall, 1e-9), self.steps * batch_size
        kept = self.steps - self.skipped
        entry = {
            "loss": self.loss / kept if kept else math.nan,
            "skipped": float(self.skipped),
            "images_per_second": images / wall,
            "tokens_per_second": images * num_tokens / wall,
        }
        entry |= {f"share_{name}": rest[i] / wall for i, name in enumerate(PARTS)}
        sums, counts = torch.tensor(rest[len(PARTS) :]).view(2, -1).tolist()
        for level, (total, count) in enumerate(zip(sums, counts, strict=True)):
            if count:
                entry[f"loss_level_{level}"] = total / count
        self._start_anew()
        return entry
