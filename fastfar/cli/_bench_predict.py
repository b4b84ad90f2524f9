"""`fastfar bench --predict`: what the cost model expects of a GPU, as text or as plain data."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import torch

from fastfar.bench import tables
from fastfar.bench.far import sized
from fastfar.bench.tables import Table, duration, share
from fastfar.config import FARConfig
from fastfar.costs import gpus, image
from fastfar.costs import published as published_way
from fastfar.costs.image import Prediction
from fastfar.costs.published import Published
from fastfar.kl_vae import KLVAE
from fastfar.plan import SamplingPlan

# (width of the transformer, depth of the head, T) -> seconds of an image on H100, batch 1.
BARS = {(1280, 3, 100): 55e-3, (768, 3, 40): 20e-3}
ROOFLINE_BAR = 0.6
LAUNCH_BAR = 8.0  # kernels of a diffusion step at head depth 3

def predict(args: argparse.Namespace) -> int:
    """Print what is expected of a preset on a GPU."""
    if args.checkpoint is not None:
        raise ValueError("--predict takes sizes, not weights: give --preset instead")
    batches = args.batch or [1]
    if len(batches) > 1:
        raise ValueError(f"--predict takes one --batch, got {batches}")
    preset, (batch,) = args.preset or "far_huge", batches
    config, gpu = sized(preset, args.head_depth), gpus.find(args.predict)
    plan = SamplingPlan.official(args.mode).with_changes(
        diffusion_steps=args.diffusion_steps, guidance_scale=args.guidance_scale
    )
    with torch.device("meta"):
        vae = KLVAE() if config.latent_channels == 16 else None
    dtype = torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
    prediction = image.predict(config, plan, gpu, batch, dtype, vae)
    way = published_way.published(config, plan, gpu, batch)
    if args.json:
        print(json.dumps(as_data(prediction, way, config), indent=2))
        return 0
    steps = sorted(set(plan.diffusion_steps))
    print(
        f"expected, not measured: {preset} with head depth {config.head_depth}, {args.mode}, "
        f"{len(plan)} outer steps, T = {steps[0] if len(steps) == 1 else steps}, batch {batch}, "
        f"{str(dtype).removeprefix('torch.')} on {gpu.title}\n"
    )
    print(as_text(prediction, way, config))
    return 0


@dataclasses.dataclass(frozen=True)
class Bar:
    """A target, what is expected, and whether that is enough."""

    name: str
    target: str
    expected: str
    reached: bool


def bars(prediction: Prediction, config: FARConfig) -> list[Bar]:
    """The targets that apply to this GPU, model and plan."""
    found = []
    steps = {head.steps for head in prediction.heads}
    key = (config.width, config.head_depth, max(steps))
    on_h100 = prediction.gpu.name == "h100" and prediction.batch == 1 and len(steps) == 1
    if on_h100 and key in BARS:
        limit = BARS[key]
        found.append(
            Bar("image", f"<= {duration(limit)}", duration(prediction.seconds),
                prediction.seconds <= limit)
        )  # fmt: skip
    roofline = prediction.head_roofline
    found.append(
        Bar("head, of its roofline", f">= {share(ROOFLINE_BAR)}", share(roofline),
            roofline >= ROOFLINE_BAR)
    )  # fmt: skip
    if config.head_depth == 3:
        launches = prediction.launches_per_step
        found.append(
            Bar("kernels of a diffusion step", f"<= {LAUNCH_BAR:.0f}", f"{launches:.2f}",
                launches <= LAUNCH_BAR)
        )  # fmt: skip
    return found


def as_data(prediction: Prediction, published: Published, config: FARConfig) -> dict[str, Any]:
    """A prediction, ready for JSON."""
    stages = {
        name: {**dataclasses.asdict(total), "bound": total.bound}
        for name, total in prediction.stages.items()
    }
    gpu = published.gpu
    return {
        "gpu": dataclasses.asdict(prediction.gpu),
        "batch": prediction.batch,
        "expected": True,  # nothing here was measured
        "stages": stages,
        "seconds": prediction.seconds,
        "images_per_s": prediction.batch / prediction.seconds,
        "head_s": prediction.head,
        "head_roofline": prediction.head_roofline,
        "steps_ahead": [head.chunk for head in prediction.heads],
        "launches_per_step": prediction.launches_per_step,
        "launches": prediction.total.launches,
        "reference_flops": prediction.reference_flops,
        "executed_flops": prediction.total.flops,
        "published": {
            "launches_per_step": published.step.kernels.launches,
            "copies_per_step": published.step.copies,
            "launches": published.image.kernels.launches,
            "copies": published.image.copies,
            "step_s": published.step.seconds(gpu),
            "seconds_without_decoding": published.seconds,
        },
        "bars": [dataclasses.asdict(bar) for bar in bars(prediction, config)],
    }


def as_text(prediction: Prediction, published: Published, config: FARConfig) -> str:
    """A prediction as tables."""
    p, gpu = prediction, published.gpu
    stages = Table(
        "Stages",
        ("stage", "kernels", "TFLOP", "GB of L2", "GB of memory", "time", "bound"),
        tuple(
            (name, f"{t.launches:.0f}", f"{t.flops / 1e12:.2f}", f"{t.moved / 1e9:.1f}",
             f"{t.memory / 1e9:.2f}", duration(t.seconds), t.bound)
            for name, t in p.stages.items()
            if t.launches
        ),
    )  # fmt: skip
    step, image = published.step, published.image
    ways = Table(
        "Ways",
        ("way", "kernels a step", "copies a step", "kernels", "step", "without decoding"),
        (
            ("published", f"{step.kernels.launches:.0f}", f"{step.copies:.0f}",
             f"{image.kernels.launches:.0f}", duration(step.seconds(gpu)),
             duration(published.seconds)),
            ("fastfar", f"{p.launches_per_step:.2f}", "0", f"{p.total.launches:.0f}",
             duration(p.head / sum(h.steps for h in p.heads)),
             duration(p.seconds - p.stages["decode"].seconds)),
        ),
    )  # fmt: skip
    reached = Table(
        "Bars",
        ("bar", "target", "expected", ""),
        tuple(
            (bar.name, bar.target, bar.expected, "reached" if bar.reached else "missed")
            for bar in bars(p, config)
        ),
    )
    chunks = " or ".join(str(chunk) for chunk in sorted({h.chunk for h in p.heads}))
    summary = (
        f"image{'' if p.batch == 1 else 's'}: {duration(p.seconds)}, "
        f"{p.batch / p.seconds:.1f} images/s; published FLOPs {p.reference_flops / 1e12:.1f} T, "
        f"executed {p.total.flops / 1e12:.1f} T with padding"
    )
    modulations = f"modulations of {chunks} diffusion steps at once"
    parts: list[str | Table] = [stages, "", modulations, "", ways, "", summary, reached]
    return "\n".join(part if isinstance(part, str) else tables.as_text(part) for part in parts)
