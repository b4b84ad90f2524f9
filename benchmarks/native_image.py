"""`bench_native.py image`: one image from label to pixels, native beside the reference.

FAR-B and FAR-H have random weights and a random KL-16 (their time does not depend on the numbers);
the demo has its own. The plan is the published one without masks: 10 outer steps, guidance 3.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import peak
import torch
from stages import StageClock
from timing import (
    NOT_AVAILABLE,
    Sample,
    Variant,
    alternate,
    figures,
    gate,
    ratio,
    relative,
)
from torch import Tensor

from fastfar import FAR, KLVAE, FARConfig, FARPipeline, SamplingPlan, reference
from fastfar.checkpoint import load_pretrained
from fastfar.config import PRESETS
from fastfar.costs.counts import (
    Head,
    Work,
    halves_of,
    native_work,
    reference_image_flops,
    transformer_flops,
)
from fastfar.costs.rows import duration, share, table
from fastfar.noise import seeded_noise
from fastfar.prepared import prepare_native
from fastfar.tokenizer import PixelTokenizer

AUTOCAST, FLOAT32 = "reference autocast", "reference float32"
TORCH, NATIVE = "torch bfloat16", "native bfloat16"
NAMES = (AUTOCAST, FLOAT32, TORCH, NATIVE)
FACTOR, FLOOR = 2.0, 1e-3
LABEL = 0  # the class of the image
SEED = 0  # of its noise

Tokenizer = PixelTokenizer | KLVAE
Sampler = Callable[[SamplingPlan], tuple[Tensor, Tensor]]  # plan -> latent, image in [0, 1]


@torch.no_grad()
def random_model(config: FARConfig) -> FAR:
    """Random weights without closed gates, made in place: a big model is held once."""
    with torch.device("meta"):
        model = FAR(config)
    model = model.to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if (parameter.ndim == 1 and "norm" in name) or name.endswith("_ln.weight"):
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(std=0.02 if "emb" in name else parameter.shape[-1] ** -0.5)
    # As after training, the variance channel stays near -1..1: outside, the noise explodes.
    model.head.final_layer.linear.weight.mul_(0.1)
    return model


def first_steps(plan: SamplingPlan, count: int | None) -> SamplingPlan:
    """The plan cut after `count` outer steps."""
    if count is None or count >= len(plan):
        return plan
    cut = {
        field.name: value[:count]
        for field in dataclasses.fields(plan)
        if field.name != "x0_range" and isinstance(value := getattr(plan, field.name), tuple)
    }
    return dataclasses.replace(plan, **cut)


def subject(options: argparse.Namespace) -> tuple[str, FAR, Tokenizer, SamplingPlan]:
    """Name, model, decoder and plan."""
    if options.preset == "demo":
        parts = load_pretrained("demo", dtype=torch.float32)
        tokenizer = parts.tokenizer or PixelTokenizer()
        name, model, plan = "demo", parts.model, parts.plan or SamplingPlan.official()
    else:
        name = f"{options.preset} (random weights)"
        model = random_model(FARConfig.preset(options.preset))
        torch.manual_seed(1)
        tokenizer = KLVAE().eval()
        # Bounded, as random weights would let the tokens grow without limit.
        plan = SamplingPlan.official().with_changes(x0_range=(-3.0, 3.0))
    plan = plan.with_changes(
        guidance_scale=options.guidance, diffusion_steps=options.diffusion_steps
    )
    return name, model, tokenizer, first_steps(plan, options.outer_steps)


def _reference(model: FAR, tokenizer: Tokenizer, autocast: bool) -> Sampler:
    """The published loop. Parameters, not a state dict: autocast keeps copies of leaves only."""
    config, parameters = model.config, dict(model.named_parameters())

    def sample(plan: SamplingPlan) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            latent = reference.sample_latents(
                parameters,
                torch.tensor([LABEL]),
                plan,
                seeded_noise(SEED, 1, config.num_tokens, config.token_dim),
                num_heads=config.num_heads,
                latent_size=config.latent_size,
                patch_size=config.patch_size,
                num_levels=config.num_levels,
                kind=config.filter,
                num_timesteps=config.num_timesteps,
            )
            image = tokenizer.to_images(latent).float()
        return latent, image.add(1.0).div(2.0).clamp(0.0, 1.0)

    return sample


def _pipeline(model: FAR, tokenizer: Tokenizer, backend: str) -> tuple[FARPipeline, Sampler]:
    """The user's pipeline on a back end, its weights converted once and for all."""
    if backend == "native":
        model = prepare_native(model, torch.bfloat16)
    else:
        model = copy.deepcopy(model).to(torch.bfloat16)
    # A tokenizer of its own, as one converted copy is kept of each.
    pipe = FARPipeline(model, copy.deepcopy(tokenizer))

    def sample(plan: SamplingPlan) -> tuple[Tensor, Tensor]:
        latents: list[Tensor] = []
        images = pipe(
            class_labels=[LABEL],
            generator=SEED,
            plan=plan,
            backend=backend,
            dtype=torch.bfloat16,
            output_type="pt",
            callback_on_level_end=lambda _, __, latent: latents.append(latent),
        ).images
        assert isinstance(images, Tensor)
        return latents[-1], images

    return pipe, sample


def executed(name: str, config: FARConfig, plan: SamplingPlan, works: dict[str, Work]) -> int:
    """FLOPs that a variant does for one image."""
    if name == NATIVE:
        return sum(work.flops for work in works.values())
    total = works["decode"].flops
    for k, steps in enumerate(plan.diffusion_steps):
        halves = halves_of(plan, k) if name == TORCH else 2
        head = Head.of(config, config.num_tokens, halves, steps)
        total += transformer_flops(config, halves)
        total += head.hoisted_flops() if name == TORCH else head.published_flops()
    return total


def joined(truth: tuple[Tensor, Tensor], given: tuple[Tensor, Tensor]) -> Tensor:
    """Latent and image in one row, each in units of its true norm."""
    parts = (x.float() / y.float().norm() for x, y in zip(given, truth, strict=True))
    return torch.cat([part.flatten() for part in parts])


def _extrapolated(variant: Variant, pair: tuple[Variant, Variant], steps: tuple[int, int],
                  plan: SamplingPlan) -> None:
    """Samples of `variant` from those of two T's: time = a + b T, T the mean of the plan's."""
    wanted = plan.head_calls / len(plan)
    for low, high in zip(pair[0].samples, pair[1].samples, strict=True):
        slope = (high.seconds - low.seconds) / (steps[1] - steps[0])
        known = [x for x in (low.peak, high.peak) if x is not None]
        seconds = low.seconds + slope * (wanted - steps[0])
        variant.samples.append(Sample(seconds, statistics.mean(known) if known else None))


def stage_table(
    pipe: FARPipeline, sample: Sampler, plan: SamplingPlan, works: dict[str, Work], runs: int
) -> list[dict[str, Any]]:
    """Where the native path's time goes, each stage against its own bound, in runs of their own."""
    taken: list[dict[str, float]] = []
    peaks: list[float] = []
    measurable = peak.reason() is None
    for _ in range(runs):
        clock = StageClock()
        with clock:
            decode = pipe.decode
            pipe.decode = clock.timed("decode", decode)  # type: ignore[method-assign]
            if measurable:
                peaks.append(peak.peak_flops(torch.bfloat16))
            start = time.perf_counter()
            sample(plan)
            whole = time.perf_counter() - start
            clock.seconds["rest"] = whole - sum(clock.seconds.values())
            if measurable:
                peaks.append(peak.peak_flops(torch.bfloat16))
            pipe.decode = decode  # type: ignore[method-assign]
        taken.append(clock.seconds)
    bandwidth = peak.bandwidth() if measurable else None
    names = sorted(taken[0], key=lambda name: -statistics.median(t.get(name, 0.0) for t in taken))
    rows, lines = [], []
    total = sum(statistics.median(t.get(name, 0.0) for t in taken) for name in names)
    for name in names:
        seconds = statistics.median(t.get(name, 0.0) for t in taken)
        work = works.get(name, Work(0, 0))
        bound = None
        if bandwidth is not None and work.flops:
            bound = work.bound(statistics.median(peaks), bandwidth)
        lines.append([
            name, duration(seconds), share(seconds / total),
            f"{work.flops / 1e12:.3f}" if work.flops else "-",
            f"{work.bytes / 1e9:.2f}" if work.flops else "-",
            "-" if bound is None else duration(bound),
            share(None if bound is None else bound / seconds),
        ])
        rows.append({"op": "stage", "stage": name, "median_s": seconds, "share": seconds / total,
                     "executed_flops": work.flops, "bytes": work.bytes, "bound_s": bound,
                     "peak_flops_per_s": peaks, "bandwidth": bandwidth})
    print(table(["native stage", "time", "share", "TFLOP", "GB", "bound", "of bound"], lines))
    return rows


def bench(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the images' and the stages' tables; returns their rows."""
    name, model, tokenizer, plan = subject(options)
    config = model.config
    vae = tokenizer if isinstance(tokenizer, KLVAE) else None
    works = native_work(config, plan, vae)
    chosen = options.variants or [
        *([FLOAT32] if options.preset == "demo" else []), AUTOCAST, NATIVE,
    ]

    # The gate: the first outer steps, few diffusion steps, against float32.
    short = first_steps(plan, options.gate_outer_steps).with_changes(
        diffusion_steps=options.gate_diffusion_steps
    )
    autocast, exact = (_reference(model, tokenizer, on) for on in (True, False))
    truth = exact(short)
    unit = joined(truth, truth)
    limit = FACTOR * relative(joined(truth, autocast(short)), unit) + FLOOR

    samplers: dict[str, Sampler] = {AUTOCAST: autocast, FLOAT32: exact}
    pipe: FARPipeline | None = None
    variants, timed, pairs = [], [], {}
    for each in chosen:
        dtype = torch.float32 if each == FLOAT32 else torch.bfloat16
        variant = Variant(each, dtype, None, executed(each, config, plan, works))
        variants.append(variant)
        if each in (TORCH, NATIVE):
            try:
                made, samplers[each] = _pipeline(model, tokenizer, each.split()[0])
                pipe = made if each == NATIVE else pipe
            except (RuntimeError, TypeError, ValueError, OSError) as error:
                variant.give_up(error)
                continue
        sample = samplers[each]
        variant.run = lambda sample=sample: sample(plan)
        gate(variant, lambda sample=sample: joined(truth, sample(short)), unit, limit)
        if options.extrapolate and each != NATIVE and variant.run is not None:
            pairs[each] = tuple(
                Variant(f"{each} T={steps}", dtype,
                        lambda sample=sample, steps=steps: sample(
                            plan.with_changes(diffusion_steps=steps)))
                for steps in options.extrapolate
            )
            timed += pairs[each]
        else:
            timed.append(variant)
    alternate(timed, options.repeats)
    for variant in variants:
        if variant.name in pairs:
            _extrapolated(variant, pairs[variant.name], tuple(options.extrapolate), plan)

    rows, lines = [], []
    baselines = [v for v in variants if v.name in (AUTOCAST, FLOAT32)]
    reference_flops = reference_image_flops(config, plan, vae)
    for variant in variants:
        if not variant.samples:
            lines.append([variant.name, NOT_AVAILABLE, variant.note])
            continue
        row = figures(variant, reference_flops)
        note = ""
        if variant.name in pairs:
            note = "extrapolated from T = {} and {}".format(*options.extrapolate)
        versus = {each.name: ratio(variant, each) for each in baselines}
        lines.append([
            variant.name, duration(variant.median),
            f"{row['reference_flops_per_s'] / 1e12:.3f}",
            f"{row['executed_flops_per_s'] / 1e12:.3f}",
            share(row.get("share_of_peak")), share(row.get("best_share_of_best_peak")),
            f"{variant.error:.1e}", *versus.values(), note,
        ])
        rows.append({
            "op": "image", "model": name, "backend": variant.name,
            "dtype": str(variant.dtype).removeprefix("torch."),
            "shape": f"batch 1, {config.num_tokens} x {config.token_dim}",
            **row, "extrapolated": note or None, "ratio_to": versus, "plan": plan.to_dict(),
        })
    print(f"{name}: {len(plan)} outer steps, {plan.head_calls} head calls, guidance "
          f"{plan.guidance_scale:g}, {'KL-16 decoding' if vae else 'no autoencoder'}")
    header = ["image", "time", "reference TFLOP/s", "executed TFLOP/s", "of peak", "best", "error",
              *(f"/ {each.name}" for each in baselines), ""]
    print(table(header, lines))
    native = [v for v in variants if v.name == NATIVE and v.samples]
    if native and pipe is not None:
        stages = stage_table(pipe, samplers[NATIVE], plan, works, min(options.repeats, 3))
        rows += [{**stage, "model": name, "backend": NATIVE} for stage in stages]
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `image`."""
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--diffusion-steps", type=int, help="T of each outer step")
    parser.add_argument("--outer-steps", type=int, help="only the first ones")
    parser.add_argument("--extrapolate", type=int, nargs=2, metavar="T",
                        help="time all but native at two T's and extend the line through them")
    parser.add_argument("--gate-outer-steps", type=int, default=2)
    parser.add_argument("--gate-diffusion-steps", type=int, default=20)
    parser.add_argument("--variants", nargs="+", choices=NAMES)
