"""`fastfar stats`: the scale of latents, and how fast a data set can be read."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from fastfar.cli.cache import add_source_options, open_source

if TYPE_CHECKING:
    from fastfar.data import Examples

_DESCRIPTION = """\
Measure the latents of SOURCE (see `fastfar cache`; a cache will do): mean, standard deviation and
scale = 1 / std, over all numbers of all latents, with its standard error. KL-16's 0.2325 is this
for ImageNet's training pictures. Without --tokenizer it measures pixels in [-1, 1].
With --speed it measures instead how many images a second a training run can be given."""

_EPILOG = """examples:
  fastfar stats imagenet --tokenizer vae.safetensors --images 10000 --device cuda
  fastfar stats latents
  fastfar stats latents --speed --batch-size 256 --workers 4
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `fastfar`."""
    parser = subparsers.add_parser(
        "stats",
        help="measure the latents' scale, or the speed of reading",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="pictures, or a cache")
    add_source_options(parser)
    add("--images", metavar="N", type=int, help="at random (all)")
    add("--seed", metavar="S", type=int, default=0, help="decides which (%(default)s)")
    add("--speed", action="store_true", help="measure reading, as a training run does it")
    add("--steps", metavar="N", type=int, default=50, help="batches for --speed (%(default)s)")
    add("--quiet", action="store_true", help="no progress bar")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    data = open_source(args)
    found = _speed(args, data) if args.speed else _statistics(args, data)
    if args.json:
        print(json.dumps(found))
    else:
        print(_speed_report(found) if args.speed else _statistics_report(found))
    return 0


def _statistics(args: argparse.Namespace, data: Examples) -> dict[str, Any]:
    from tqdm import tqdm

    from fastfar.data import measure_statistics
    from fastfar.tokenizer import KLVAE

    tokenizer = None if args.tokenizer is None else KLVAE.load_official(args.tokenizer)
    with tqdm(unit="image", disable=args.quiet, file=sys.stderr) as bar:
        found = measure_statistics(
            data,
            tokenizer,
            images=args.images,
            batch_size=args.batch_size,
            workers=args.workers,
            device=args.device,
            seed=args.seed,
            progress=bar.update,
        )
    latents = tokenizer is not None or data.tokenizer is not None
    return {"of": "latents" if latents else "pixels", **dataclasses.asdict(found)}


def _speed(args: argparse.Namespace, data: Examples) -> dict[str, Any]:
    """Images a second of random batches with mirroring and draws, after the first one."""
    import torch

    from fastfar.data import Batches

    if args.tokenizer is not None:
        raise ValueError("--speed reads SOURCE as a training run does, without --tokenizer")
    if args.steps < 1 or args.batch_size < 1:
        raise ValueError("--steps and --batch-size must be at least 1")

    def rows_of(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(args.seed + step)
        rows_B = torch.randint(len(data), (args.batch_size,), generator=generator)
        return rows_B, torch.rand(args.batch_size, generator=generator) < 0.5, rows_B + step

    with Batches(data, rows_of, workers=args.workers) as batches:
        first, _ = next(batches)  # starts the workers
        start = time.perf_counter()
        for _ in range(args.steps):
            next(batches)
        seconds = time.perf_counter() - start
    return {
        "shape": list(first.shape[1:]),
        "batch_size": args.batch_size,
        "workers": args.workers,
        "steps": args.steps,
        "milliseconds_per_batch": 1e3 * seconds / args.steps,
        "images_per_second": args.batch_size * args.steps / seconds,
    }


def _statistics_report(found: dict[str, Any]) -> str:
    stds = found["channel_stds"]
    lines = [
        f"{found['of']} of {found['images']} images: mean {found['mean']:.4f}, std "
        f"{found['std']:.4f} (per channel {min(stds):.4f} to {max(stds):.4f})",
        f"scale = 1 / std = {found['scale']:.4f} +- {found['scale_error']:.4f} (standard error)",
    ]
    if found["of"] == "pixels":
        lines.append("a PixelTokenizer(mean, std) standardises them")
    return "\n".join(lines)


def _speed_report(found: dict[str, Any]) -> str:
    return (
        f"{found['images_per_second']:.0f} images/s of shape {tuple(found['shape'])}: "
        f"{found['milliseconds_per_batch']:.1f} ms per batch of {found['batch_size']}, "
        f"{found['workers']} workers"
    )
