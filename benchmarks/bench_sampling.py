"""Time per image of the production path beside the reference, in one process.

    python benchmarks/bench_sampling.py --batch 1 64 --repeats 5
    python benchmarks/bench_sampling.py --preset far_base --diffusion-steps 10 --save

The variants take turns, so that a machine that slows down slows all of them. Every variant first
has to pass the gate: its error to the float64 reference is at most twice that of the reference in
the same dtype. No ratio is printed for one that does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from rows import RESULTS, append, environment, quantiles
from torch import Tensor

from fastfar import FAR, FARConfig, SamplingPlan, sample_latents
from fastfar.backend import best_dtype
from fastfar.checkpoint import load_pretrained
from fastfar.config import PRESETS

FACTOR, FLOOR = 2.0, 1e-4


@dataclasses.dataclass(frozen=True)
class Variant:
    """A back end in a dtype."""

    backend: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.backend} {str(self.dtype).removeprefix('torch.')}"

    def sample(self, model: FAR, plan: SamplingPlan, batch: int) -> Tensor:
        """Latents of classes 0, 1, 2, ... from a fixed seed."""
        labels = torch.arange(batch) % model.config.num_classes
        return sample_latents(
            model, labels, plan, generator=0, backend=self.backend, dtype=self.dtype
        )


BASELINE = Variant("reference", torch.float32)


def random_model(preset: str) -> FAR:
    """A preset with random weights; its zero gates are opened, so that nothing is trivial."""
    torch.manual_seed(0)
    model = FAR(FARConfig.preset(preset)).eval()
    with torch.no_grad():
        for parameter in model.head.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        # As after training, the variance channel stays near -1..1: outside, the noise explodes.
        model.head.final_layer.linear.weight.mul_(0.1)
    return model


def model_and_plan(options: argparse.Namespace) -> tuple[str, FAR, SamplingPlan]:
    """The embedded demo with its own plan, or a preset with the paper's."""
    if options.preset is None:
        parts = load_pretrained("demo")
        name, model, plan = "demo", parts.model, parts.plan or SamplingPlan.paper()
    else:
        name, model = f"{options.preset} (random weights)", random_model(options.preset)
        plan = SamplingPlan.paper().with_changes(x0_range=(-3.0, 3.0))
    return name, model, plan.with_changes(diffusion_steps=options.diffusion_steps)


def gate(variant: Variant, model: FAR, plan: SamplingPlan, truth: Tensor) -> tuple[float, bool]:
    """Relative error of one image to the float64 reference, and whether it is small enough."""

    def error(candidate: Variant) -> float:
        difference = candidate.sample(model, plan, 1).double() - truth
        return float(difference.norm() / truth.norm())

    ours = error(variant)
    return ours, ours <= FACTOR * error(Variant("reference", variant.dtype)) + FLOOR


def measure(
    variants: Sequence[Variant], model: FAR, plan: SamplingPlan, batch: int, repeats: int
) -> dict[Variant, list[float]]:
    """Seconds of every run; the variants take turns."""
    times: dict[Variant, list[float]] = {variant: [] for variant in variants}
    for _ in range(repeats):
        for variant in variants:
            start = time.perf_counter()
            variant.sample(model, plan, batch)
            times[variant].append(time.perf_counter() - start)
    return times


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="images per run")
    parser.add_argument("--repeats", type=int, default=5, help="runs of every variant")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="random weights of this size")
    parser.add_argument("--diffusion-steps", type=int, help="T of every outer step")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--save", action="store_true", help=f"append to {RESULTS.name}/")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    name, model, plan = model_and_plan(options)
    fast = Variant("torch", best_dtype("torch", "cpu"))
    variants = list(dict.fromkeys([BASELINE, Variant("torch", torch.float32), fast]))
    truth = Variant("reference", torch.float64).sample(model, plan, 1)
    gates = {variant: gate(variant, model, plan, truth) for variant in variants}  # also warms up
    here, rows = environment(), list[dict[str, Any]]()
    print(f"{name}: {len(plan)} outer steps, {plan.head_calls} head calls; {here['cpu']}, "
          f"{here['threads']} threads, torch {here['torch']}, {here['commit']}")
    print(f"{'batch':>5}  {'path':<20} {'median s':>9} {'images/s':>9} {'error':>8}  speed-up")
    for batch in options.batch:
        times = measure(variants, model, plan, batch, options.repeats)
        base = quantiles(times[BASELINE])["median_s"]
        for variant in variants:
            figures, (error, good) = quantiles(times[variant]), gates[variant]
            median = figures["median_s"]
            ratio = f"{base / median:.2f} x" if good else "gate is red: wrong result"
            print(f"{batch:>5}  {variant!s:<20} {median:>9.3f} {batch / median:>9.2f} "
                  f"{error:>8.1e}  {ratio}")
            rows.append({
                "op": "sample_latents",
                "model": name,
                "backend": variant.backend,
                "dtype": str(variant.dtype).removeprefix("torch."),
                "shape": f"batch {batch}, {model.config.num_tokens} x {model.config.token_dim}",
                "batch": batch,
                **figures,
                "images_per_s": batch / median,
                "speed_up_over": {str(BASELINE): base / median} if good else None,
                "error": error,
                "gate": "green" if good else "red",
                "head_calls": plan.head_calls,
                "plan": plan.to_dict(),
                **here,
            })
    if options.save:
        path = RESULTS / "sampling.jsonl"
        append(path, rows)
        print(f"{len(rows)} rows added to {path}")


if __name__ == "__main__":
    main()
