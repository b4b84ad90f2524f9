"""`fastfar bench ops | scaling`: single ops, and images along an axis."""

from __future__ import annotations

import argparse
import datetime
import json
import secrets
from collections.abc import Iterator
from contextlib import nullcontext

import torch

from fastfar import profiling
from fastfar.bench import decoder, rows
from fastfar.bench import ops as single
from fastfar.bench import scaling as axes
from fastfar.bench.cases import CASES
from fastfar.bench.far import sized
from fastfar.bench.rows import Row
from fastfar.bench.run import Options
from fastfar.bench.tables import duration
from fastfar.cli import _bench_report
from fastfar.cli._bench_images import choice, say
from fastfar.config import FARConfig

EXTRAS = (decoder.OP, single.PEAK)  # beside the ops of the model
SIZE = "far_huge"
SUBJECTS = {"cpu": "far_base/native", "cuda": "far_base/triton"}


def ops(args: argparse.Namespace) -> int:
    """Every op by every path (--backends), in every dtype; 1 where a result is wrong."""
    if args.subjects or args.checkpoint:
        raise ValueError("ops have sizes, not weights: give --preset instead of --subjects and "
                         "--checkpoint")  # fmt: skip
    if args.resume:
        raise ValueError("ops take minutes at most and are not resumed: leave --resume out, or "
                         "name the --ops that are missing")  # fmt: skip
    name = f"ops-{datetime.datetime.now(datetime.timezone.utc):%Y%m%dT%H%M%S}"
    options = single.Options(
        run=f"{name}-{secrets.token_hex(2)}",
        device=args.device,
        paths=None if args.backends is None else tuple(args.backends),
        dtypes=single.DTYPES if args.dtype == "auto" else (getattr(torch, args.dtype),),
        repeats=args.repeats or (1 if args.quick else 5),
        cold=args.cold,
    )
    nvtx = profiling.ranges() if args.nvtx else nullcontext()
    with nvtx, profiling.trace(args.trace):
        found = list(_written(args, options))
    if args.json:
        print(json.dumps([row.to_dict() for row in found], indent=2))
    else:
        _show(found)
        if args.save is not None:
            print(f"\n{len(found)} rows in {args.save}")
    return int(any(row.gate == "red" for row in found))


def scaling(args: argparse.Namespace) -> int:
    """Subjects along --axis; 1 where a result is wrong."""
    device = torch.device(args.device)
    if args.preset or args.checkpoint or args.backends:
        raise ValueError("scaling takes --subjects MODEL[/FORM]; leave --preset, --checkpoint and "
                         "--backends out")  # fmt: skip
    if args.batch is not None and (args.axis == "batch" or len(args.batch) > 1):
        raise ValueError("one --batch for all values; along the batch give --values instead")
    options = Options(
        batches=tuple(args.batch or (1,)),
        repeats=args.repeats or (1 if args.quick else 5),
        save=args.save,
        resume=args.resume,
        trace=args.trace,
        nvtx=args.nvtx,
        stages=False,
    )
    selectors = args.subjects or [SUBJECTS[device.type]]
    outcome = axes.sweep(args.axis, args.values, selectors, options, device, choice(args), say)
    if args.json:
        print(json.dumps([row.to_dict() for row in outcome.rows], indent=2))
    else:
        _bench_report.show_tables([axes.table(args.axis, outcome.rows)])
        for key, reason in outcome.skipped.items():
            print(f"{key}: not available: {reason}")
    return int(bool(outcome.red))


def _written(args: argparse.Namespace, options: single.Options) -> Iterator[Row]:
    """Rows, each told and saved as soon as it is there."""
    for row in _measured(args, options):
        if args.save is not None:
            rows.append(args.save, [row])
        time = "" if row.median_s is None else f": {duration(row.median_s)}"
        say(f"{row.subject}, {row.shape}{time}{row.note and ': ' + row.note}")
        yield row


def _measured(args: argparse.Namespace, options: single.Options) -> Iterator[Row]:
    """Rows of what --ops asks for; in the order in which they are ready."""
    config = sized(args.preset or SIZE, args.head_depth)
    batches = args.batch or [1]
    asked = args.ops or [*CASES, *(EXTRAS if config.latent_channels == 16 else ())]
    names = [name for name in asked if name not in EXTRAS]
    if single.PEAK in asked:
        yield from single.yardsticks(options)
    if names:
        sizes: dict[str, FARConfig] = {args.preset or SIZE: config}
        yield from single.bench(single.problems(names, sizes, batches, args.lengths or ()), options)
    if decoder.OP in asked:
        for batch in batches:
            yield from decoder.measure(options, batch, config.latent_size)


def _show(found: list[Row]) -> None:
    yardsticks = [row for row in found if row.op == single.PEAK]
    timed = [row for row in found if row.op != single.PEAK and row.samples_s]
    if timed:
        _bench_report.show(timed)
    if yardsticks:
        _bench_report.show_tables([single.yardstick_table(yardsticks)])
