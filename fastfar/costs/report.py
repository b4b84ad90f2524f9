"""Predictions and measurements as text and as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fastfar.config import FARConfig
from fastfar.costs.head_kernels import STEPS, KernelTime
from fastfar.costs.image import Prediction
from fastfar.costs.measure import Profile
from fastfar.costs.published import Published
from fastfar.costs.rows import duration, quantiles, share, table
from fastfar.costs.variants import Variant

# (width of the transformer, depth of the head, T) -> seconds of an image on H100, batch 1.
BARS = {(1280, 3, 100): 55e-3, (768, 3, 40): 20e-3}
ROOFLINE_BAR = 0.6
LAUNCH_BAR = 8.0  # kernels of a diffusion step at head depth 3


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
        "head_one_branch_s": prediction.head_one_branch,
        "head_two_branches_s": prediction.head_two_branches,
        "head_persistent_s": prediction.head_persistent,
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
    header = ("stage", "kernels", "TFLOP", "GB of L2", "GB of memory", "time", "bound")
    lines = [
        (name, f"{t.launches:.0f}", f"{t.flops / 1e12:.2f}", f"{t.moved / 1e9:.1f}",
         f"{t.memory / 1e9:.2f}", duration(t.seconds), t.bound)
        for name, t in prediction.stages.items()
        if t.launches
    ]  # fmt: skip
    p, gpu = prediction, published.gpu
    head = [
        ("one branch: modulations, then their steps", duration(p.head_one_branch)),
        ("two branches, sharing the GPU perfectly", duration(p.head_two_branches)),
        ("chain as one persistent kernel (not built)", duration(p.head_persistent)),
    ]
    step, image = published.step, published.image
    way = [
        ("published", f"{step.kernels.launches:.0f}", f"{step.copies:.0f}",
         f"{image.kernels.launches:.0f}", duration(step.seconds(gpu)), duration(published.seconds)),
        ("fastfar", f"{p.launches_per_step:.2f}", "0", f"{p.total.launches:.0f}",
         duration(p.head / sum(h.steps for h in p.heads)),
         duration(p.seconds - p.stages["decode"].seconds)),
    ]  # fmt: skip
    chunks = sorted({h.chunk for h in p.heads})
    parts = [
        table(header, lines),
        "",
        f"modulations of {' or '.join(map(str, chunks))} diffusion steps at once",
        table(("head", "time"), head),
        "",
        table(("way", "kernels a step", "copies a step", "kernels", "step", "without decoding"),
              way),
        "",
        f"image{'' if p.batch == 1 else 's'}: {duration(p.seconds)}, "
        f"{p.batch / p.seconds:.1f} images/s; published FLOPs {p.reference_flops / 1e12:.1f} T, "
        f"executed {p.total.flops / 1e12:.1f} T with padding",
        table(("bar", "target", "expected", ""),
              [(b.name, b.target, b.expected, "reached" if b.reached else "missed")
               for b in bars(prediction, config)]),
    ]  # fmt: skip
    return "\n".join(parts)


# --- measurements ----------------------------------------------------------------------------


def variants_text(variants: Sequence[Variant], batch: int) -> str:
    """Latency at batch 1, throughput otherwise; no ratio for a wrong result."""
    timed = [v for v in variants if v.times.get(batch)]
    base = quantiles(timed[0].times[batch])["median_s"] if timed else 0.0
    header = ("path", "median", "p5", "p95", "images/s", "memory", "cold start", "error",
              "speed-up")  # fmt: skip
    lines: list[tuple[str, ...]] = []
    for variant in variants:
        if variant not in timed:
            lines.append((str(variant), f"not available: {variant.note}"))
            continue
        q = quantiles(variant.times[batch])
        memory = variant.memory.get(batch)
        ratio = f"{base / q['median_s']:.2f} x" if variant.green else "gate is red: wrong result"
        lines.append(
            (str(variant), duration(q["median_s"]), duration(q["p5_s"]), duration(q["p95_s"]),
             f"{batch / q['median_s']:.2f}",
             "-" if memory is None else f"{memory / 2**30:.2f} GiB",
             "-" if variant.cold_s is None else duration(variant.cold_s),
             f"{variant.error:.1e}", ratio)
        )  # fmt: skip
    return table(header, lines)


def profile_text(profile: Profile, kernels_shown: int = 12) -> str:
    """Stages, then the kernels that take the most time."""
    whole = sum(profile.stages.values())
    lines = [
        (name, duration(seconds), share(seconds / whole if whole else None))
        for name, seconds in profile.stages.items()
        if seconds
    ]
    text = table(("stage", "time", "share"), lines)
    ranked = sorted(profile.kernels.items(), key=lambda item: -item[1][1])[:kernels_shown]
    if ranked:
        rows = [(name[:60], str(calls), duration(seconds)) for name, (calls, seconds) in ranked]
        text += "\n\n" + table(("kernel", "calls", "time"), rows)
    return text


def kernels_text(times: Sequence[KernelTime], peak: float) -> str:
    """Kernels of the head: per cent of the peak of this run, and of the model's time."""
    header = ("kernel of the head", "programs", f"in {STEPS} steps", "time", "of peak", "expected",
              "expected / time")  # fmt: skip
    lines = [
        (t.name, str(t.programs), str(t.count), duration(t.seconds),
         share(t.flops / t.seconds / peak if t.flops else None),
         "-" if t.expected is None else duration(t.expected),
         share(None if t.expected is None else t.expected / t.seconds))
        for t in times
    ]  # fmt: skip
    return table(header, lines)
