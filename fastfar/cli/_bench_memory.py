"""`fastfar bench memory`: the highest memory of every subject."""

from __future__ import annotations

import argparse

import torch

from fastfar.bench import memory as memories
from fastfar.bench import rows, run
from fastfar.bench.memory import Selection
from fastfar.bench.run import Outcome
from fastfar.cli._bench_images import choice, say, show


def memory(args: argparse.Namespace) -> int:
    """Measure each subject in a process of its own, then show."""
    selection = Selection(
        selectors=None if args.subjects is None else tuple(args.subjects),
        preset=args.preset,
        forms=None if args.backends is None else tuple(args.backends),
        device=args.device,
        choice=choice(args),
        threads=torch.get_num_threads(),
    )
    found, skipped = memories.measure(selection, args.batch or [1], run.new_id("memory"), say)
    if args.save is not None:
        rows.append(args.save, found)
    show(args, Outcome(found, skipped))
    return 0
