"""Measurements on the machine at hand: right before fast, variants in turn, rows for a file.

Whole images are timed by the clock on the wall, with the device idle before and after and the noise
lying on it (its drawing is timed apart): what a user waits for. Kernels are timed by CUDA events.
A percentage is of the peak that a large torch.matmul reached in the same run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType

from fastfar import profiling
from fastfar.costs import counts
from fastfar.costs.rows import environment, matmul_peak, now, quantiles
from fastfar.costs.variants import Sampler, Subject, Variant
from fastfar.kl_vae import KLVAE
from fastfar.noise import TensorNoise, seeded_noise
from fastfar.plan import SamplingPlan
from fastfar.sampling import sample_latents

FACTOR = 2.0
FLOORS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-3, torch.float16: 1e-3}
FLOAT64_LIMIT = 50_000_000  # parameters of a model whose truth is computed in float64
SEED = 0
RANGES = ("encoder", "decoder", "head", "decode")


def labels_of(subject: Subject, batch: int) -> Tensor:
    """Classes 0, 1, 2, ..."""
    return torch.arange(batch) % subject.model.config.num_classes


def drawn(subject: Subject, batch: int) -> TensorNoise:
    """All noise of a run, on the device; a function of `SEED` alone."""
    config, plan = subject.model.config, subject.plan
    source = seeded_noise(SEED, batch, config.num_tokens, config.token_dim)
    device = subject.device
    return TensorNoise(
        [source.initial(k).to(device) for k in range(len(plan))],
        [source.steps(k, steps).to(device) for k, steps in enumerate(plan.diffusion_steps)],
        source.order().to(device),
    )


# --- right before fast -----------------------------------------------------------------------


def relative(out: Tensor, truth: Tensor) -> float:
    """||out - truth|| / ||truth||; infinite where the result is not finite."""
    out, truth = out.detach().cpu().double(), truth.detach().cpu().double()
    error = float((out - truth).norm() / truth.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def prepare(variants: Sequence[Variant], subject: Subject) -> dict[str, Sampler]:
    """Run every variant once on one image: its cold start, its error, and what is allowed.

    Truth is the reference in float64, for large models in float32. A variant may be `FACTOR` times
    as far from it as the reference is in the same dtype (16 bits: float32 weights under autocast),
    plus a floor. Those that raise get a note.

    Returns samplers of those that run, by name of the variant.
    """
    labels_B, noise = labels_of(subject, 1), drawn(subject, 1)
    small = sum(p.numel() for p in subject.model.parameters()) <= FLOAT64_LIMIT
    exact = torch.float64 if small else torch.float32
    truth = sample_latents(
        subject.model, labels_B, subject.plan, noise, backend="reference", dtype=exact
    )
    allowed: dict[torch.dtype, float] = {}
    samplers: dict[str, Sampler] = {}
    for variant in variants:
        if variant.note:
            continue
        try:
            if variant.dtype not in allowed:
                allowed[variant.dtype] = _yardstick(subject, variant.dtype, truth)
            start = now(subject.device)
            sampler = variant.sampler(subject)
            latent = sampler(labels_B, noise)
            variant.decode(subject, latent)
            variant.cold_s = now(subject.device) - start
        except (RuntimeError, TypeError, ValueError, OSError, ImportError) as error:
            variant.note = f"{type(error).__name__}: {error}"
            continue
        variant.error = relative(latent, truth)
        variant.limit = FACTOR * allowed[variant.dtype] + FLOORS[variant.dtype]
        samplers[str(variant)] = sampler
    return samplers


def _yardstick(subject: Subject, dtype: torch.dtype, truth: Tensor) -> float:
    """Error of the reference in a dtype."""
    name = "reference" if dtype in (torch.float32, torch.float64) else "autocast"
    latent = Variant(name, dtype).sampler(subject)(labels_of(subject, 1), drawn(subject, 1))
    return relative(latent, truth)


# --- whole images ----------------------------------------------------------------------------


def alternate(
    variants: Sequence[Variant],
    samplers: dict[str, Sampler],
    subject: Subject,
    batch: int,
    repeats: int,
) -> float:
    """Time every variant that runs, taking turns, into its `times` and `memory`.

    Returns seconds of drawing the noise, which is part of none of them.
    """
    device, labels_B = subject.device, labels_of(subject, batch)
    start = now(device)
    noise = drawn(subject, batch)
    drawing = now(device) - start
    for turn in range(repeats + 1):  # the first one warms up
        for variant in variants:
            if str(variant) not in samplers:
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            start = now(device)
            variant.decode(subject, samplers[str(variant)](labels_B, noise))
            seconds = now(device) - start
            if turn > 0:
                variant.times.setdefault(batch, []).append(seconds)
            if device.type == "cuda":
                # The largest of all turns: a replay alone does not show what its capture holds.
                peak = max(variant.memory.get(batch, 0), torch.cuda.max_memory_allocated(device))
                variant.memory[batch] = peak
    return drawing


# --- where the time goes ---------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """One run under PyTorch's profiler.

    Attributes:
        stages: seconds within each of `RANGES`; on a GPU of its kernels, without gaps.
        kernels: name -> (calls, seconds); on a CPU none.
    """

    stages: dict[str, float]
    kernels: dict[str, tuple[int, float]]


def profile(variant: Variant, sampler: Sampler, subject: Subject, batch: int) -> Profile:
    """Stages and kernels of a variant; it must not run as a graph, which has no ranges."""
    labels_B, noise = labels_of(subject, batch), drawn(subject, batch)
    on_gpu = subject.device.type == "cuda"
    activities = torch.profiler.supported_activities()  # type: ignore[no-untyped-call]
    with profiling.ranges(), torch.profiler.profile(activities=activities) as profiled:
        variant.decode(subject, sampler(labels_B, noise))
        now(subject.device)
    stages = dict.fromkeys(RANGES, 0.0)
    kernels: dict[str, tuple[int, float]] = {}
    for event in profiled.events() or ():
        on_host = event.device_type == DeviceType.CPU
        if on_host and event.name in stages:
            taken = event.device_time_total if on_gpu else event.cpu_time_total
            stages[event.name] += taken * 1e-6
        elif not on_host and not getattr(event, "is_user_annotation", False):
            calls, seconds = kernels.get(event.name, (0, 0.0))
            kernels[event.name] = (calls + 1, seconds + event.time_range.elapsed_us() * 1e-6)
    return Profile(stages, kernels)


# --- rows ------------------------------------------------------------------------------------


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square torch.matmul now: 8192 on a GPU, 1024 on a CPU."""
    return matmul_peak(dtype, 8192 if device.type == "cuda" else 1024, device=device)


def plan_mode(plan: SamplingPlan) -> str:
    """"published", or which fields differ from the published plan of that kind."""
    kind = "nomask" if plan.mask_ratios is None else "mask"
    published = SamplingPlan.official(kind, plan.guidance_scale)
    names = [field.name for field in dataclasses.fields(plan)]
    changed = [n for n in names if getattr(plan, n) != getattr(published, n)]
    return "published" if not changed else "changed: " + ", ".join(changed)


def rows(
    variants: Sequence[Variant], subject: Subject, batch: int, drawing: float
) -> list[dict[str, Any]]:
    """One row per variant that was timed at this batch size; each stands alone."""
    here, config, plan = environment(subject.device), subject.model.config, subject.plan
    vae = subject.tokenizer if isinstance(subject.tokenizer, KLVAE) else None
    flops = batch * counts.reference_image_flops(config, plan, vae)
    timed = [variant for variant in variants if variant.times.get(batch)]
    result = []
    for variant in timed:
        figures = quantiles(variant.times[batch])
        median = figures["median_s"]
        ratios = {
            str(other): quantiles(other.times[batch])["median_s"] / median
            for other in timed
            if other is not variant
        }
        result.append(
            {
                "op": "image",
                "model": subject.name,
                "backend": variant.name,
                "dtype": str(variant.dtype).removeprefix("torch."),
                "mode": variant.mode,
                "plan_mode": plan_mode(plan),
                "shape": f"batch {batch}, {config.num_tokens} x {config.token_dim}",
                "batch": batch,
                **figures,
                "samples_s": variant.times[batch],
                "images_per_s": batch / median,
                "cold_start_s": variant.cold_s,
                "noise_s": drawing,
                "peak_memory_bytes": variant.memory.get(batch),
                "reference_flops": flops,
                "reference_flops_per_s": flops / median,
                "speed_up_over": ratios if variant.green else None,
                "error": variant.error,
                "error_limit": variant.limit,
                "gate": "green" if variant.green else "red",
                "head_calls": plan.head_calls,
                "plan": plan.to_dict(),
                **here,
            }
        )
    return result


def save(path: str | Path, found: Sequence[dict[str, Any]]) -> None:
    """Append rows to a JSONL file."""
    from fastfar.costs.rows import append

    append(Path(path), found)
