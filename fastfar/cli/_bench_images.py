"""`fastfar bench latency | throughput | table3`: whole images, from label to pixels."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from fastfar.bench import run as runs
from fastfar.bench import subjects
from fastfar.bench.run import Options, Outcome
from fastfar.bench.subjects import Choice, Recipe
from fastfar.cli._bench_report import show as show_rows

# Of the paper's Table 3, slowest first; FAR as published, exact, and exact with the paper's T.
BASELINES = ("mar_huge", "llamagen_xl", "var_d24")
SWEEP = (1, 4, 16)


def latency(args: argparse.Namespace) -> int:
    """One image at a time, unless --batch says otherwise."""
    batches = tuple(args.batch or (1,))
    return measure(args, recipes(args), Options("latency", batches, args.repeats or 5))


def throughput(args: argparse.Namespace) -> int:
    """Images per second by batch size."""
    batches = tuple(args.batch or SWEEP)
    return measure(args, recipes(args), Options("throughput", batches, args.repeats or 5))


def table3(args: argparse.Namespace) -> int:
    """MAR-H, LlamaGen-XL, VAR-d24 and FAR-H, each as published and as it can be run."""
    if args.subjects or args.preset or args.checkpoint or args.backends:
        raise ValueError("table3 has its own subjects; leave --subjects, --preset, --checkpoint "
                         "and --backends out, or use latency")  # fmt: skip
    if args.batch not in (None, [1]):
        raise ValueError(f"table3 is about one image at a time, got --batch {args.batch}")
    device = torch.device(args.device)
    fast = "triton" if device.type == "cuda" else "native"
    plans = ("", "/fast", "/paper")
    selectors = [*BASELINES, "far_huge/autocast", *(f"far_huge/{fast}{plan}" for plan in plans)]
    found = subjects.select(selectors, device, choice(args))
    return measure(args, found, Options("table3", (1,), args.repeats or 3), anchor=found[-1])


def choice(args: argparse.Namespace) -> Choice:
    """The options of a FAR model, and how many of MAR's steps are run."""
    on_gpu = torch.device(args.device).type == "cuda"
    return Choice(
        checkpoint=args.checkpoint,
        mode=args.mode,
        diffusion_steps=args.diffusion_steps,
        head_depth=args.head_depth,
        guidance_scale=args.guidance_scale,
        dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
        timed_steps=args.timed_steps or (2 if args.quick else 16 if on_gpu else 8),
    )


def recipes(args: argparse.Namespace) -> list[Recipe]:
    """Of --subjects, or of --preset, --checkpoint and --backends."""
    device = torch.device(args.device)
    if args.subjects:
        return subjects.select(args.subjects, device, choice(args))
    return subjects.far_recipes(args.preset, args.backends, device, choice(args))


def measure(
    args: argparse.Namespace,
    found: Sequence[Recipe],
    options: Options,
    anchor: Recipe | None = None,
) -> int:
    """Run, then show; 1 where a result is wrong."""
    repeats = 1 if args.quick and args.repeats is None else options.repeats
    options = Options(
        options.mode,
        options.batches,
        repeats,
        save=args.save,
        resume=args.resume,
        trace=args.trace,
        nvtx=args.nvtx,
        kernels=options.mode == "latency",
        cold_kernels=args.cold,
    )
    outcome = runs.run(found, options, args.device, say, anchor)
    show(args, outcome)
    return int(bool(outcome.red))


def say(line: str) -> None:
    """To the user, beside what is printed as the result."""
    print(line, file=sys.stderr, flush=True)


def show(args: argparse.Namespace, outcome: Outcome) -> None:
    """Tables, or JSON."""
    if args.json:
        print(json.dumps([row.to_dict() for row in outcome.rows], indent=2))
        return
    if outcome.rows:
        show_rows(outcome.rows)
    for key, reason in outcome.skipped.items():
        print(f"{key}: not available: {reason}")
    if args.save is not None:
        print(f"\n{len(outcome.rows)} rows in {args.save}")
