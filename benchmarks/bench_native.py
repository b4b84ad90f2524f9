"""The native CPU kernels beside PyTorch, against the peak of this machine measured in the same run.

    python benchmarks/bench_native.py peak
    python benchmarks/bench_native.py head --steps 10
    python benchmarks/bench_native.py op --presets far_huge --ops attention layernorm_mlp_residual
    python benchmarks/bench_native.py image --preset far_base --extrapolate 4 12 --save

Variants take turns; none is compared whose result is wrong. See README.md for the columns.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import native_head
import native_image
import native_ops
import peak
import torch
from rows import RESULTS, append, environment

from fastfar.costs.rows import share, table


def bench_peak(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The yardstick alone, and how much it moves while nothing changes."""
    if (missing := peak.reason()) is not None:
        print(f"no yardstick: {missing}")
        return []
    rows, lines = [], []
    numbers: list[tuple[str, str, Callable[[], float]]] = []
    for dtype in (torch.bfloat16, torch.float32):
        what = f"products in {str(dtype).removeprefix('torch.')}"
        numbers.append((what, "TFLOP/s", partial(peak.peak_flops, dtype)))
    for level in peak.LEVELS:
        measure = partial(peak.bandwidth, level=level, repeats=1)
        numbers.append((f"reading from {level}", "GB/s", measure))
    for what, unit, measure in numbers:
        measure()
        samples = [measure() for _ in range(max(options.repeats, 2))]
        factor = 1e12 if unit == "TFLOP/s" else 1e9
        median = statistics.median(samples)
        spread = (max(samples) - min(samples)) / median
        lines.append([what, unit, f"{median / factor:.3g}", f"{max(samples) / factor:.3g}",
                      share(spread)])
        rows.append({"op": "peak", "backend": "native", "what": what, "per_s": samples,
                     "median_per_s": median})
    print(table(["what", "unit", "median", "best", "range"], lines))
    return rows


MODES = {
    "peak": (bench_peak, lambda parser: None),
    "head": (native_head.bench, native_head.add_arguments),
    "op": (native_ops.bench, native_ops.add_arguments),
    "image": (native_image.bench, native_image.add_arguments),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    for name, (function, add_arguments) in MODES.items():
        each = modes.add_parser(name, help=(function.__doc__ or "").splitlines()[0])
        add_arguments(each)
        each.add_argument("--repeats", type=int, default=5, help="samples of every variant")
        each.add_argument("--threads", type=int, help="CPU threads")
        each.add_argument("--save", action="store_true", help=f"append to {RESULTS.name}/")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    here = environment()
    print(f"{here['cpu']}, {here['threads']} threads, native {here['native_isa'] or 'off'}, torch "
          f"{here['torch']} ({here['isa']}), {here['commit']}")
    rows = [{**row, **here} for row in MODES[options.mode][0](options)]
    if options.save:
        path = RESULTS / "native.jsonl"
        append(path, rows)
        print(f"{len(rows)} rows added to {path}")


if __name__ == "__main__":
    main()
