"""`fastfar cache`: the latents of a data set, made once."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported in `run`: --help need not wait for PyTorch
    from fastfar.data import Examples
    from fastfar.tokenizer import KLVAE, PixelTokenizer

_DESCRIPTION = """\
Write the latents of SOURCE into the folder OUTPUT, to train from them. SOURCE is a folder with one
subfolder of pictures per class, a pattern of WebDataset's .tar shards, a folder saved by Hugging
Face's datasets, or Fashion-MNIST ("fashion_mnist", or a folder with its IDX files). Every picture
is cropped to its centre and cached twice, as it is and mirrored, as mean and standard deviation of
the posterior: training draws from it anew in every epoch. The same command goes on where an
interrupted one stopped."""

_EPILOG = """examples:
  fastfar stats imagenet --tokenizer vae.safetensors --images 10000      # the scale, first
  fastfar cache imagenet latents --tokenizer vae.safetensors --device cuda --workers 8
  fastfar cache imagenet latents --tokenizer vae.safetensors --device cuda:1 --part 1/2
  fastfar cache --check latents
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `fastfar`."""
    parser = subparsers.add_parser(
        "cache",
        help="write the latents of a data set",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", nargs="?", help="the pictures")
    add("output", metavar="OUTPUT", type=Path, help="the folder of the cache")
    add_source_options(parser)
    add("--scale", metavar="S", type=float, help="of the latents, if not KL-16's 0.2325: 1 / std")
    add("--shard-size", metavar="N", type=int, default=4096, help="pictures (%(default)s)")
    add("--dtype", choices=("float16", "float32"), default="float16", help="(%(default)s)")
    add(
        "--part",
        metavar="I/N",
        type=_part,
        default=(0, 1),
        help="write every N-th shard from I (0-based) on, for N processes beside each other",
    )
    add("--check", action="store_true", help="verify all checksums of OUTPUT again, and no more")
    add("--quiet", action="store_true", help="no progress bar")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that reads pictures."""
    add = parser.add_argument
    add(
        "--tokenizer",
        metavar="FILE",
        type=Path,
        help="a KL-VAE, .safetensors or .pth; without it the latents are standardised pixels",
    )
    add("--size", metavar="PIXELS", type=int, help="to crop pictures to (256)")
    add("--grey", action="store_true", help="read pictures without colour")
    add("--split", metavar="NAME", default="train", help="(%(default)s)")
    add("--batch-size", metavar="N", type=int, default=32, help="(%(default)s)")
    add("--workers", metavar="N", type=int, default=0, help="processes that read (%(default)s)")
    add("--device", metavar="NAME", default="cpu", help="of the tokenizer (%(default)s)")


def open_source(args: argparse.Namespace) -> Examples:
    """The data set of SOURCE; ValueError where --size is not what it has."""
    from fastfar.data import open_data

    mode = "L" if args.grey else "RGB"
    data = open_data(args.source, split=args.split, size=args.size or 256, mode=mode)
    if args.size is not None and data.tokenizer is None and data.image_shape[-1] != args.size:
        raise ValueError(
            f"{args.source} has images of {data.image_shape[-1]} pixels, which are not cropped: "
            "leave --size out"
        )
    return data


def run(args: argparse.Namespace) -> int:
    """0, or 1 where parts of the cache are still missing."""
    if args.check:
        found = _check(args.output)
    elif args.source is None:
        raise ValueError("give SOURCE and OUTPUT: what to cache, and where; see --help")
    else:
        found = _build(args)
    print(json.dumps(found) if args.json else _report(found))
    return 1 if found["shards_missing"] else 0


def _build(args: argparse.Namespace) -> dict[str, Any]:
    from tqdm import tqdm

    from fastfar.data import build_cache

    source = open_source(args)
    start, pictures = time.perf_counter(), 0
    with tqdm(unit="picture", disable=args.quiet, file=sys.stderr) as bar:

        def on_batch(done: int, total: int) -> None:
            nonlocal pictures
            bar.total = total
            bar.update(done - pictures)
            pictures = done

        missing = build_cache(
            source,
            _tokenizer(args, source),
            args.output,
            shard_size=args.shard_size,
            dtype=args.dtype,
            batch_size=args.batch_size,
            workers=args.workers,
            device=args.device,
            part=args.part,
            progress=on_batch,
        )
    found = {"output": str(args.output), "pictures": pictures, "shards_missing": missing}
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def _tokenizer(args: argparse.Namespace, source: Examples) -> PixelTokenizer | KLVAE:
    from dataclasses import replace

    from fastfar.tokenizer import KLVAE
    from fastfar.training.loop import tokenizer_of

    if args.tokenizer is None:
        if args.scale is not None:
            raise ValueError("--scale is of a KL-VAE's latents: give --tokenizer, or leave it out")
        return tokenizer_of(source)
    vae = KLVAE.load_official(args.tokenizer)
    if args.scale is not None:
        vae.config = replace(vae.config, scale=args.scale)
    return vae


def _check(folder: Path) -> dict[str, Any]:
    from fastfar.data import LatentCache
    from fastfar.data.latents import VERIFIED_FILE

    (folder / VERIFIED_FILE).unlink(missing_ok=True)
    start = time.perf_counter()
    cache = LatentCache(folder)
    found = {"output": str(folder), "pictures": len(cache), "shards_missing": 0}
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def _part(text: str) -> tuple[int, int]:
    try:
        index, count = map(int, text.split("/"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"give I/N, such as 0/4, not {text!r}") from error
    return index, count


def _report(found: dict[str, Any]) -> str:
    text = f"{found['output']}: {found['pictures']} pictures in {found['seconds']} s"
    if found["shards_missing"]:
        return f"{text}; {found['shards_missing']} shards are still missing (other parts)"
    return f"{text}; the cache is complete"
