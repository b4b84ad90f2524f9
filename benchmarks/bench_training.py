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
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastfar import FAR, diffusion_loss, reference
from fastfar.bench import peak, rows, tables
from fastfar.bench.rows import Row
from fastfar.bench.timing import Contender, Timer, alternate
from fastfar.ops import use_backend
from fastfar.training import EMA, Recipe, TrainingDraws, sample_draws
from fastfar.training.optimizer import make_optimizer

RESULTS = Path(__file__).parent / "results"
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


def contend(step: Step, paths: dict[str, Callable[[], Tensor]]) -> list[Contender]:
    """The paths with the relative error of their gradient and what is allowed, warmed up."""
    step.reference_loss(torch.float64).backward()  # type: ignore[no-untyped-call]
    truth, contenders = step.gradient(), []
    for name, loss in paths.items():

        def seconds(loss: Callable[[], Tensor] = loss) -> float:
            step.model.zero_grad()
            start = time.perf_counter()
            run(loss)
            return time.perf_counter() - start

        contender = Contender(name, torch.bfloat16, lambda: None, timer=Timer("wall", seconds))
        contender.cold_s = seconds()
        seconds()  # the second run is the compiled one where shapes became dynamic
        contender.error = float((step.gradient() - truth).norm() / truth.norm())
        contenders.append(contender)
    plain = next((each.error for each in contenders if each.name == "reference"), None)
    for contender in contenders:
        contender.limit = 0.05 if plain is None else FACTOR * plain + FLOOR
    return contenders


def optimiser_seconds(step: Step, repeats: int) -> float:
    """Median of clipping, AdamW and EMA, which all paths share."""
    optimizer, ema = make_optimizer(step.model, step.recipe), EMA(step.model, 0.999)
    times = []
    for _ in range(repeats + 1):
        for p in step.model.parameters():
            p.grad = torch.zeros_like(p)
        start = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(step.model.parameters(), step.recipe.clip)
        optimizer.step()
        ema.update(step.model)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


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


def row_of(contender: Contender, options: argparse.Namespace, batch: int, shared: float) -> Row:
    """Of one path; `shared` seconds of the optimiser come on top in all of them."""
    return Row(
        op="training_step",
        subject=f"{options.recipe}/{contender.name}",
        title=f"training step of {options.recipe}, {contender.name}",
        model=options.recipe,
        form=contender.name,
        mode="as published" if contender.name == "reference" else "exact",
        dtype="bfloat16",
        batch=batch,
        shape=f"{options.masked:g} of the tokens masked",
        samples_s=tuple(sample.seconds for sample in contender.samples),
        peak_flops_per_s=tuple(sample.peak for sample in contender.samples),
        peak_kind=peak.kind(torch.bfloat16),
        cold_s=contender.cold_s,
        error=contender.error,
        error_limit=contender.limit,
        gate_note="gradient against the float64 reference, twice the error under autocast",
        run=options.run,
        environment=rows.environment(),
        extra={"optimiser_s": shared},
    )


def table(found: Sequence[Row]) -> tables.Table:
    """Milliseconds of the paths, and how many times as fast as the compiled reference."""
    base = next((row for row in found if row.form == BASELINE), None)
    lines = []
    for row in found:
        figures = rows.quantiles(row.samples_s)
        ratio = None if base is None else base.median_s / row.median_s
        told = tables.times(ratio) if row.gate == "green" else "red: wrong gradient"
        spread = f"{tables.duration(figures['p10_s'])} to {tables.duration(figures['p90_s'])}"
        lines.append(
            (row.form, tables.duration(row.median_s), spread, f"{row.error:.1e}", told)
        )
    header = ("path", "median", "p10 to p90", "error", f"over {BASELINE}")
    return tables.Table("Training step", header, tuple(lines))


def main() -> None:
    options = parse()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.run = f"training-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}"
    recipe = Recipe.load(options.recipe)
    batch = options.batch or recipe.batch_size
    step = Step(recipe, batch, options.masked)
    paths = {name: loss for name, loss in step.paths().items() if name in options.paths}
    contenders = contend(step, paths)
    alternate(contenders, options.repeats)
    shared = optimiser_seconds(step, options.repeats)
    found = [row_of(each, options, batch, shared) for each in contenders]
    print(f"{options.recipe}: batch {batch} x {recipe.batch_multiplier}, {torch.get_num_threads()} "
          f"threads; optimiser and EMA {tables.duration(shared)} more")
    print(tables.as_text(table(found)))
    if options.save:
        path = RESULTS / "training.jsonl"
        rows.append(path, found)
        print(f"{len(found)} rows added to {path}")


if __name__ == "__main__":
    main()
