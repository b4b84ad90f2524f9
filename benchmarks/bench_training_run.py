"""Steps of a whole training run on random latents, beside what `fastfar plan` expects of them.

    python benchmarks/bench_training_run.py far_base far_large far_huge --batch 64 --device cuda
    python benchmarks/bench_training_run.py far_huge --batch 64 --set compile=true parallel=fsdp

Each recipe is trained by `fastfar.training.Trainer`, with its own data feed, clipping, optimiser
and averaged weights; only the images are random numbers, so that nothing has to be downloaded. The
first steps (autotuning, compilation, allocator) are not counted. Speed comes from the run's log,
memory from PyTorch's allocator: its peak of reserved bytes, to which CUDA's own context comes.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfar.bench import rows, tables
from fastfar.bench.rows import Row
from fastfar.bench.run import new_id
from fastfar.cli.train import read_recipe
from fastfar.config import FARConfig
from fastfar.costs import training as costs
from fastfar.costs import training_machines
from fastfar.tokenizer import PixelTokenizer
from fastfar.training import Recipe, Trainer
from fastfar.training.meter import PARTS


class RandomLatents:
    """Examples that are random numbers, of which there are as many as an epoch could ask for."""

    def __init__(self, config: FARConfig, count: int) -> None:
        size = config.latent_size
        self.image_shape = (config.latent_channels, size, size)
        self.labels = torch.arange(count) % config.num_classes
        self.class_names = tuple(str(label) for label in range(config.num_classes))
        self.identity: dict[str, Any] = {"random": count}
        self.tokenizer = PixelTokenizer(0.0, 1.0)
        self.pool = torch.randn(256, *self.image_shape)

    def __len__(self) -> int:
        return len(self.labels)

    def take(
        self, rows_B: Tensor, flip_B: Tensor | None = None, seed_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.pool[rows_B % len(self.pool)], self.labels[rows_B]

    def pixel_statistics(self) -> tuple[float, float]:
        raise ValueError("these are latents")


def measure(recipe: Recipe, options: argparse.Namespace) -> Row:
    """Train for a while in an empty folder; the row has the log's entry of the steps that count."""
    device = torch.device(options.device)
    samples: list[float] = []
    data = RandomLatents(recipe.config, 4 * recipe.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        run = Trainer(recipe, data, Path(folder), device)
        begun = time.perf_counter()
        for _ in range(options.warmup):
            run.train_step()
        run.meter.means(recipe.batch_size, recipe.config.num_tokens)
        cold = time.perf_counter() - begun
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(options.steps):
            start = time.perf_counter()
            run.train_step()  # waits for the norm of the gradients
            samples.append(time.perf_counter() - start)
        log = run.meter.means(recipe.batch_size, recipe.config.num_tokens)
        run.close()
    memory = torch.cuda.max_memory_reserved() if device.type == "cuda" else None
    return Row(
        op="training_run",
        subject=f"{options.name}/{recipe.batch_size}/{'/'.join(options.set)}",
        title=f"training of {options.name}, {recipe.batch_size} images a step",
        model=options.name,
        form=run.backend + (" + compile" if recipe.compile else ""),
        mode="exact",
        dtype=str(run.dtype).removeprefix("torch."),
        batch=recipe.batch_size,
        shape=f"{recipe.config.num_tokens} tokens, {recipe.batch_multiplier} head rows each",
        samples_s=tuple(samples),
        cold_s=cold,
        random_weights=True,
        peak_memory_bytes=memory,
        memory_note="" if memory is None else "reserved by PyTorch's allocator",
        run=options.run,
        environment=rows.environment(),
        extra={"log": log, "recipe": recipe.to_dict()},
    )


def expected(recipe: Recipe, gpu: str) -> costs.Estimate:
    """By the cost model, on one GPU."""
    return costs.estimate(
        costs.Run(
            recipe.config,
            training_machines.find(f"1x{gpu}"),
            batch=recipe.batch_size,
            multiplier=recipe.batch_multiplier,
            accumulate=recipe.accumulate,
            grad_checkpointing=recipe.grad_checkpointing,
            ema=recipe.ema_device,
        )
    )


def line(row: Row, estimate: costs.Estimate | None) -> tuple[str, ...]:
    """Of the table."""
    log = row.extra["log"]
    found = [row.subject, tables.duration(row.median_s), f"{row.batch / row.median_s:,.0f}"]
    found.append(tables.size(row.peak_memory_bytes))
    found.append(" ".join(f"{100 * log['share_' + part]:.0f}" for part in PARTS))
    if estimate is not None:
        found += [tables.duration(estimate.seconds), tables.size(estimate.bytes)]
    return tuple(found)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="names or files")
    parser.add_argument("--batch", type=int, help="images of a step; the recipe's if left out")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="recipe entries")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpu", help="also what the cost model expects of one, for example h100")
    parser.add_argument("--warmup", type=int, default=5, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=20, help="steps that are")
    parser.add_argument("--save", metavar="FILE", type=Path, help="append the rows")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    options.run = new_id("training-run")
    lines = []
    for name in options.recipes:
        options.name = name
        recipe = read_recipe(name, options.set, Path("nowhere"))
        batch = options.batch or recipe.batch_size
        recipe = dataclasses.replace(recipe, init=None, accumulate=1, batch_size=batch)
        row = measure(recipe, options)
        lines.append(line(row, expected(recipe, options.gpu) if options.gpu else None))
        print(*lines[-1], flush=True)
        if options.save:
            rows.append(options.save, [row])
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()
    header = ["run", "step", "images/s", "memory", "% " + ", ".join(PARTS)]
    header += ["expected", "memory"] if options.gpu else []
    print(tables.as_text(tables.Table("Training", tuple(header), tuple(lines))))


if __name__ == "__main__":
    main()
