"""`fastfar bench`: how fast it is here, or what the cost model expects of a GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

# PyTorch and the model are imported in `run`: --help and a wrong argument need not wait for them.
if TYPE_CHECKING:
    from fastfar.costs.variants import Subject, Variant

_GPUS = ("h100", "h200", "h20", "a100", "b200", "rtx4090")
_PRESETS = ("demo", "far_base", "far_huge", "far_large")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_VARIANTS = ("reference", "autocast", "torch", "compile", "native", "eager", "triton")

_DESCRIPTION = """\
Measure whole images on this machine: first each path's error against the reference (one that is
wrong gets no speed-up), then all paths in turn, from a class label to pixels, noise drawn ahead.
With --predict, expect instead of measuring: FLOPs, bytes, kernels and time by the cost model, for a
GPU that need not be here."""

_EPILOG = """paths: reference (published loop, float32), autocast (the same in 16 bits: as usual),
  torch (exact algebra on PyTorch), compile (published networks and loop, torch.compile),
  native (C++), eager (Triton, one launch at a time), triton (Triton, a CUDA graph)

examples:
  fastfar bench                                             # the embedded demo on the CPU
  fastfar bench --device cuda --preset far_huge --batch 1 64 --save bench.jsonl
  fastfar bench --device cuda --preset far_base --head-depth 3 --diffusion-steps 40
  fastfar bench --predict h100 --preset far_huge
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `fastfar`."""
    parser = subparsers.add_parser(
        "bench",
        help="measure, or predict, the time of an image",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--predict", metavar="GPU", choices=_GPUS, help=f"expect: {', '.join(_GPUS)}")
    add("--device", metavar="NAME", default="cpu", help="cpu, cuda, cuda:1 (%(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--preset", choices=_PRESETS, help="random weights of this size (--predict: far_huge)"
    )
    which.add_argument("--checkpoint", metavar="CHECKPOINT", help="folder or hub name (demo)")
    add("--mode", choices=("nomask", "mask"), default="nomask", help="published plan of a preset")
    add("--diffusion-steps", metavar="T", type=int, help="of every outer step (100)")
    add("--guidance-scale", metavar="S", type=float, help="(that of the plan)")
    add("--head-depth", metavar="D", type=int, help="of a preset's head")
    add("--batch", metavar="N", type=int, nargs="+", default=[1], help="images per run (1)")
    add("--backends", metavar="PATH", nargs="+", choices=_VARIANTS, help="which paths (all)")
    add("--dtype", choices=_DTYPES, default="auto", help="of all paths but reference (best)")
    add("--repeats", metavar="N", type=int, default=5, help="runs of every path (%(default)s)")
    add("--cold", action="store_true", help="time the head's kernels with an empty L2 cache")
    add("--save", metavar="FILE", type=Path, help="append rows to a JSONL file")
    add("--trace", metavar="FILE", type=Path, help="Chrome trace of one run of the last path")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Predict or measure. Returns 0, or 1 where a path's result is wrong."""
    for name in ("repeats", "diffusion_steps", "head_depth"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if min(args.batch) < 1:
        raise ValueError(f"--batch must be at least 1, got {min(args.batch)}")
    if args.head_depth is not None and not (args.preset or args.predict):
        raise ValueError("--head-depth belongs to a --preset: a checkpoint's head is what it is")
    return _predict(args) if args.predict else _measure(args)


def _predict(args: argparse.Namespace) -> int:
    import torch

    from fastfar.costs import gpus, image, published, report, variants
    from fastfar.kl_vae import KLVAE
    from fastfar.plan import SamplingPlan

    if args.checkpoint is not None:
        raise ValueError("--predict takes sizes, not weights: give --preset instead")
    if len(args.batch) > 1:
        raise ValueError(f"--predict takes one --batch, got {args.batch}")
    preset, (batch,) = args.preset or "far_huge", args.batch
    config, gpu = variants.sized(preset, args.head_depth), gpus.find(args.predict)
    plan = SamplingPlan.official(args.mode).with_changes(
        diffusion_steps=args.diffusion_steps, guidance_scale=args.guidance_scale
    )
    with torch.device("meta"):
        vae = KLVAE() if config.latent_channels == 16 else None
    dtype = torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
    prediction = image.predict(config, plan, gpu, batch, dtype, vae)
    way = published.published(config, plan, gpu, batch)
    if args.json:
        print(json.dumps(report.as_data(prediction, way, config), indent=2))
        return 0
    steps = sorted(set(plan.diffusion_steps))
    print(
        f"expected, not measured: {preset} with head depth {config.head_depth}, {args.mode}, "
        f"{len(plan)} outer steps, T = {steps[0] if len(steps) == 1 else steps}, batch {batch}, "
        f"{str(dtype).removeprefix('torch.')} on {gpu.title}\n"
    )
    print(report.as_text(prediction, way, config))
    return 0


def _measure(args: argparse.Namespace) -> int:
    import torch

    from fastfar import backend as backends
    from fastfar.costs import measure, report, variants

    device = torch.device(args.device)
    backends.resolve("torch", device)  # says why where there is no such device
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    paths = variants.chosen(args.backends, device, dtype)
    subject = variants.subject(
        args.preset,
        args.checkpoint,
        device,
        args.mode,
        args.diffusion_steps,
        args.head_depth,
        args.guidance_scale,
    )
    samplers = measure.prepare(paths, subject)
    rows: list[dict[str, Any]] = []
    texts: list[str] = []
    for batch in args.batch:
        drawing = measure.alternate(paths, samplers, subject, batch, args.repeats)
        rows += measure.rows(paths, subject, batch, drawing)
        what = "latency of one image" if batch == 1 else f"throughput, {batch} images"
        texts.append(
            f"{what} (drawing the noise takes {drawing:.3g} s more)\n"
            + report.variants_text(paths, batch)
        )
    extras = _details(args, paths, samplers, subject)
    for row in rows:
        row.update(extras["data"])
    if args.save is not None:
        measure.save(args.save, rows)
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        print(_title(subject, rows))
        print("\n\n".join(["", *texts, *extras["texts"]]))
        if args.save is not None:
            print(f"\n{len(rows)} rows added to {args.save}")
    return int(any(path.error is not None and not path.green for path in paths))


def _title(subject: Subject, rows: list[dict[str, Any]]) -> str:
    plan = subject.plan
    here = rows[0] if rows else {}
    gpu = here.get("gpu") or {}
    return (
        f"{subject.name}: {len(plan)} outer steps, {plan.head_calls} head calls; "
        f"{gpu.get('name') or here.get('cpu')}, {here.get('threads')} threads, "
        f"torch {here.get('torch')}, {here.get('commit')}"
    )


def _details(
    args: argparse.Namespace, paths: list[Variant], samplers: dict[str, Any], subject: Subject
) -> dict[str, Any]:
    """Stages and kernels of the last path that runs; a graph is taken apart for it."""
    from fastfar import graphs, profiling
    from fastfar.costs import head_kernels, measure, report

    running = [path for path in paths if str(path) in samplers]
    if not running:
        return {"data": {}, "texts": []}
    last, batch = running[-1], args.batch[0]
    sampler = samplers[str(last)]
    peak = measure.peak(subject.device, last.dtype)
    with graphs.disabled():
        profile = measure.profile(last, sampler, subject, batch)
    data: dict[str, Any] = {
        "peak_flops_per_s": peak,
        "profiled": str(last),
        "stages_s": profile.stages,
    }
    texts = [
        f"{last}, batch {batch}; peak of this run: {peak / 1e12:.3g} TFLOP/s\n"
        + report.profile_text(profile)
    ]
    if profile.kernels:
        calls = sum(count for count, _ in profile.kernels.values())
        data["kernels_per_step"] = calls / subject.plan.head_calls
        texts.append(f"kernels per diffusion step, all stages: {data['kernels_per_step']:.1f}")
    if subject.device.type == "cuda" and last.name in ("eager", "triton"):
        times = head_kernels.head_kernels(subject, batch, last.dtype, args.cold)
        data["head_kernels"] = [vars(time) for time in times]
        texts.append(report.kernels_text(times, peak))
    if args.trace is not None:
        labels_B, noise = measure.labels_of(subject, batch), measure.drawn(subject, batch)
        with profiling.trace(args.trace):
            sampler(labels_B, noise)
        texts.append(f"trace of one run of {last}: {args.trace}")
    return {"data": data, "texts": texts}
