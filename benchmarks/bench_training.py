"""Time of one training step (loss and gradients) of the demo beside the reference, in one process.

    python benchmarks/bench_training.py --repeats 7 --threads 2 --save

The paths take turns, so that a machine that slows down slows all of them. All run under bfloat16
autocast, on the same draws: one level per image, the same number of masked tokens in every image,
as the reference needs it. Every path first has to pass the gate: its gradient, as one long vector,
is at most twice as far from the float64 reference as the reference's under autocast is, plus 0.001.
No ratio is printed for one that does not. The optimiser's step, the same in all, is timed apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rows import RESULTS, append, environment, quantiles
from torch import Tensor

from fastfar import FAR, diffusion_loss, reference
from fastfar.ops import use_backend
from fastfar.training import EMA, Recipe, TrainingDraws, sample_draws
from fastfar.training.loop import _adamw

FACTOR, FLOOR = 2.0, 1e-3
BASELINE = "reference + compile"
PATHS = ("reference", BASELINE, "torch", "torch + compile", "native", "native + compile")


class Step:
    """A model with one batch and its draws."""

    def __init__(self, recipe: Recipe, batch: int, masked: float) -> None:
        config = recipe.config
        torch.manual_seed(0)
        self.recipe, self.model = recipe, FAR(config).train()
        with torch.no_grad():  # the zero gates are opened, so that no gradient is trivial
            for name, parameter in self.model.head.named_parameters():
                if parameter.ndim == 2 and ("adaLN" in name or name.startswith("final_layer")):
                    parameter.normal_(std=0.1 * parameter.shape[1] ** -0.5)
        size = config.latent_size
        self.latents = torch.randn(batch, config.latent_channels, size, size)
        self.labels = torch.arange(batch) % config.num_classes
        draws = sample_draws(config, batch, batch_multiplier=recipe.batch_multiplier)
        rank_BL = torch.rand(batch, config.num_tokens).argsort(dim=1).argsort(dim=1)
        mask_BL = rank_BL < round(masked * config.num_tokens)
        # The likelihood at t = 0 divides by tiny variances: any path's rounding shows there.
        timestep = draws.timestep.clamp(min=1)
        self.draws = dataclasses.replace(draws, mask=mask_BL, timestep=timestep)

    def reference_loss(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The loss as `fastfar.reference` writes it."""
        config, draws = self.model.config, self.draws
        parameters = {name: x.to(dtype) for name, x in self.model.named_parameters()}
        return reference.training_loss(
            parameters,
            self.latents.to(dtype),
            self.labels,
            draws.level,
            draws.timestep,
            draws.noise.to(dtype),
            draws.mask,
            num_heads=config.num_heads,
            patch_size=config.patch_size,
            num_levels=config.num_levels,
            kind=config.filter,
            num_timesteps=config.num_timesteps,
        )

    def paths(self) -> dict[str, Callable[[], Tensor]]:
        """The loss by every path of `PATHS`."""
        compiled = {name: torch.compile(diffusion_loss) for name in ("torch", "native")}

        def production(backend: str, function: Callable[..., Tensor]) -> Callable[[], Tensor]:
            def loss() -> Tensor:
                draws: TrainingDraws = self.draws
                with use_backend(backend):
                    return function(self.model, self.latents, self.labels, draws, None)

            return loss

        return {
            "reference": self.reference_loss,
            BASELINE: torch.compile(self.reference_loss),
            "torch": production("torch", diffusion_loss),
            "torch + compile": production("torch", compiled["torch"]),
            "native": production("native", diffusion_loss),
            "native + compile": production("native", compiled["native"]),
        }

    def gradient(self) -> Tensor:
        """All gradients as one vector, which are then forgotten."""
        found = [
            torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
            for p in self.model.parameters()
        ]
        self.model.zero_grad()
        return torch.cat(found).double()


def run(loss: Callable[[], Tensor]) -> None:
    """Forward and backward under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        value = loss()
    value.backward()  # type: ignore[no-untyped-call]


def gates(step: Step, paths: dict[str, Callable[[], Tensor]]) -> dict[str, tuple[float, bool]]:
    """Relative error of each path's gradient, and whether it is small enough. Also warms up."""
    step.reference_loss(torch.float64).backward()  # type: ignore[no-untyped-call]
    truth, errors = step.gradient(), {}
    for name, loss in paths.items():
        for _ in range(2):  # the second run is the compiled one where shapes became dynamic
            step.model.zero_grad()
            run(loss)
        errors[name] = float((step.gradient() - truth).norm() / truth.norm())
    limit = FACTOR * errors["reference"] + FLOOR if "reference" in errors else 0.05
    return {name: (error, error <= limit) for name, error in errors.items()}


def measure(
    step: Step, paths: dict[str, Callable[[], Tensor]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of every run; the paths take turns."""
    times: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(repeats):
        for name, loss in paths.items():
            step.model.zero_grad()
            start = time.perf_counter()
            run(loss)
            times[name].append(time.perf_counter() - start)
    return times


def optimiser_seconds(step: Step, repeats: int) -> float:
    """Median of clipping, AdamW and EMA, which all paths share."""
    optimizer, ema = _adamw(step.model, step.recipe), EMA(step.model, 0.999)
    times = []
    for _ in range(repeats + 1):
        for p in step.model.parameters():
            p.grad = torch.zeros_like(p)
        start = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(step.model.parameters(), step.recipe.clip)
        optimizer.step()
        ema.update(step.model)
        times.append(time.perf_counter() - start)
    median: float = quantiles(times[1:])["median_s"]
    return median


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--recipe", default="demo", help="name or file (%(default)s)")
    parser.add_argument("--batch", type=int, help="images of a step; the recipe's if left out")
    parser.add_argument("--masked", type=float, default=0.4, help="share of masked tokens")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--repeats", type=int, default=7, help="runs of every path")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--save", action="store_true", help=f"append to {RESULTS.name}/")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    recipe = Recipe.load(options.recipe)
    batch = options.batch or recipe.batch_size
    step = Step(recipe, batch, options.masked)
    paths = {name: loss for name, loss in step.paths().items() if name in options.paths}
    states = gates(step, paths)
    times = measure(step, paths, options.repeats)
    here, shared = environment(), optimiser_seconds(step, options.repeats)
    print(f"{options.recipe}: batch {batch} x {recipe.batch_multiplier}; {here['cpu']}, "
          f"{here['threads']} threads, torch {here['torch']}, {here['commit']}; "
          f"optimiser and EMA {1e3 * shared:.0f} ms more")
    print(f"{'path':<20} {'median ms':>9} {'p10':>7} {'p90':>7} {'error':>8}  over {BASELINE}")
    rows: list[dict[str, Any]] = []
    base = quantiles(times[BASELINE])["median_s"] if BASELINE in times else None
    for name in paths:
        figures, (error, good) = quantiles(times[name]), states[name]
        ratio = base / figures["median_s"] if base is not None and good else None
        told = "-" if base is None else "gate is red: wrong gradient"
        print(f"{name:<20} {1e3 * figures['median_s']:>9.1f} {1e3 * figures['p10_s']:>7.1f} "
              f"{1e3 * figures['p90_s']:>7.1f} {error:>8.1e}  "
              f"{told if ratio is None else f'{ratio:.2f} x'}")
        rows.append({
            "op": "training_step",
            "model": options.recipe,
            "backend": name,
            "dtype": "bfloat16 autocast",
            "shape": f"batch {batch}, multiplier {recipe.batch_multiplier}",
            "batch": batch,
            **figures,
            "images_per_s": batch / figures["median_s"],
            "speed_up_over": {BASELINE: ratio} if ratio is not None else None,
            "error": error,
            "gate": "green" if good else "red",
            "optimiser_s": shared,
            "masked": options.masked,
            **here,
        })
    if options.save:
        path = RESULTS / "training.jsonl"
        append(path, rows)
        print(f"{len(rows)} rows added to {path}")


if __name__ == "__main__":
    main()
