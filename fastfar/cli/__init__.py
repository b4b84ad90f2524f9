"""The command `fastfar`; each subcommand is a module with `add_parser` and `run`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from fastfar._version import __version__

COMMANDS = {
    "sample": "sample images from a checkpoint",
    "train": "train a model",
    "plan": "memory and time of a training run, expected",
    "eval": "measure the quality of a checkpoint's samples",
    "cache": "write the latents of a data set",
    "stats": "measure the latents' scale, or the speed of reading",
    "bench": "measure, or predict, the time of an image",
    "experiment": "run an experiment of the project again",
    "convert": "convert a published checkpoint",
    "doctor": "show hardware, back ends and optional packages",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns its exit status: 2 for a user's error, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser(arguments).parse_args(arguments, argparse.Namespace(arguments=arguments))
    try:
        return int(args.run(args))
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"fastfar {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastfar {args.command}: interrupted", file=sys.stderr)
        return 130


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, in which only the subcommand that is asked for is imported."""
    parser = argparse.ArgumentParser(
        prog="fastfar",
        description="Frequency-autoregressive image generation.",
        epilog="example: fastfar sample --classes 0,1,2 --output outputs/images.png",
    )
    parser.add_argument("-V", "--version", action="version", version=f"fastfar {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    asked = next((word for word in arguments if not word.startswith("-")), None)
    for name, text in COMMANDS.items():
        if name == asked:
            importlib.import_module(f"fastfar.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=text)
    return parser
