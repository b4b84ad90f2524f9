"""`bench_native.py op`: every op of `cases.py`, native beside PyTorch, in bfloat16 and float32."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

import peak
import torch
from cases import CASES, Case, as_float
from timing import (
    NOT_AVAILABLE,
    Variant,
    alternate,
    figures,
    gate,
    ratio,
    relative,
)
from torch.utils._pytree import tree_map

from fastfar import FARConfig
from fastfar.config import PRESETS
from fastfar.costs.rows import duration, share, table

FACTOR = 2.0
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-3}
LENGTHS = (64, 128, 256, 320, 576)  # positions of the attention sweep
HEADS = {64: 12, 80: 16}  # width of a head -> heads: FAR-B and FAR-H
SHORT = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def problems(options: argparse.Namespace) -> Iterator[tuple[Case, str, FARConfig]]:
    """Each case at each size: its own at the presets, attention at more lengths too."""
    for name in options.ops:
        case = CASES[name]
        for preset in options.presets:
            yield case, preset, FARConfig.preset(preset)
        if name == "attention":
            for width, heads in HEADS.items():
                for length in options.lengths:
                    config = dataclasses.replace(
                        FARConfig(), width=heads * width, num_heads=heads, latent_size=1,
                        buffer_size=length - 1,
                    )
                    yield case, f"S {length}, {heads} x {width}", config


@cache
def _bandwidth() -> float | None:
    return None if peak.reason() is not None else peak.bandwidth()


def measure(case: Case, config: FARConfig, repeats: int) -> tuple[list[Variant], int]:
    """Gated and timed variants of one case; the bytes that one call has to move, in float32."""
    op = case.op
    inputs = case.inputs(config, 1, torch.float32)
    args, kwargs = inputs
    doubles = tree_map(lambda x: as_float(x, torch.float64), args)
    with torch.inference_mode():
        truth = case.reference(*doubles, **kwargs)
    variants = []
    for dtype in (torch.bfloat16, torch.float32):
        plain = tuple(as_float(x, dtype) for x in args)
        with torch.inference_mode():
            limit = FACTOR * relative(case.reference(*plain, **kwargs), truth) + FLOOR[dtype]
        for back_end in ("torch", "native"):
            flops = case.executed_flops(config, 1)
            variant = Variant(f"{back_end} {SHORT[dtype]}", dtype, None, flops)
            variants.append(variant)
            launch = op.implementations.get(back_end)
            if launch is None:
                variant.note = "no native implementation registered"
                continue
            try:
                given = (plain, kwargs)
                if back_end == "native":
                    given = case.native_inputs(config, 1, dtype)
            except (RuntimeError, TypeError, ValueError, OSError) as error:
                variant.give_up(error)
                continue
            variant.run = lambda launch=launch, given=given: launch(*given[0], **given[1])
            gate(variant, variant.run, truth, limit)
    with torch.inference_mode():
        alternate(variants, repeats)
    return variants, case.bytes_moved(inputs, truth.float())


def bench(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a table per op; returns the rows."""
    rows: list[dict[str, Any]] = []
    header = ["op and path", "size", "time", "TFLOP/s", "of peak", "best", "GB/s", "of memory",
              "error", "/ torch"]
    lines: list[list[str]] = []
    for case, size, config in problems(options):
        variants, in_float32 = measure(case, config, options.repeats)
        baseline = {v.dtype: v for v in variants if v.name.startswith("torch")}
        for variant in variants:
            label = f"{case.name} {variant.name}"
            if not variant.samples:
                lines.append([label, size, NOT_AVAILABLE, variant.note])
                continue
            # Weights and activations of half the width are half the traffic.
            moved = in_float32 * (2 if variant.dtype is torch.bfloat16 else 4) // 4
            row = figures(variant, case.flops(config, 1))
            row["bytes"] = moved
            row["bytes_per_s"] = moved / variant.median
            memory = _bandwidth()
            row["share_of_bandwidth"] = None if memory is None else row["bytes_per_s"] / memory
            versus = ratio(variant, baseline[variant.dtype])
            lines.append([
                label,
                size,
                duration(variant.median),
                f"{row['executed_flops_per_s'] / 1e12:.3f}" if variant.executed else "-",
                share(row.get("share_of_peak")),
                share(row.get("best_share_of_best_peak")),
                f"{row['bytes_per_s'] / 1e9:.1f}",
                share(row["share_of_bandwidth"]),
                f"{variant.error:.1e}",
                versus,
            ])
            rows.append({
                "op": case.name,
                "backend": variant.name.split()[0],
                "dtype": SHORT[variant.dtype],
                "shape": size,
                **row,
                "bandwidth": memory,
                "ratio_to_torch": versus,
            })
    print(table(header, lines))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `op`."""
    native = sorted(name for name, case in CASES.items() if "native" in case.op.implementations)
    parser.add_argument("--ops", nargs="+", choices=native, default=native)
    sizes = ["far_base", "far_huge", "demo"]
    parser.add_argument("--presets", nargs="*", choices=sorted(PRESETS), default=sizes)
    parser.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS),
                        help="positions of the sweep of attention")
