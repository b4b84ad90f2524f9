"""`fastfar convert`: a published checkpoint becomes a folder of the package's own format."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastfar._weights import Weights, open_weights
from fastfar.checkpoint import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    build_model,
    infer_config,
    save_pretrained,
    save_tokenizer,
)
from fastfar.tokenizer import KLVAE

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_EPILOG = """examples:
  fastfar convert checkpoint-last.pth far_huge --dtype bfloat16
  fastfar convert kl16.ckpt far_huge            # adds the image decoder to that folder

then, in Python: fastfar.FARPipeline.from_pretrained("far_huge")
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `fastfar`."""
    parser = subparsers.add_parser(
        "convert",
        help="turn a published checkpoint into a folder of the package's own format",
        description="Read a published FAR checkpoint (.pth or .safetensors; the moving average by "
        "default) and write DEST/config.json and DEST/model.safetensors. A KL-16 autoencoder is "
        "added to a folder that was written so. No code in SOURCE is ever run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="the published file")
    parser.add_argument("dest", metavar="DEST", type=Path, help="the folder to write")
    parser.add_argument(
        "--no-ema",
        action="store_true",
        help="of a training checkpoint take the plain weights, not their moving average",
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help="of the stored weights (%(default)s)"
    )
    parser.add_argument(
        "--num-heads",
        metavar="N",
        type=int,
        help="attention heads, which the file does not tell (default: the published number of "
        "that width)",
    )
    parser.add_argument(
        "--kind", choices=("far", "kl16"), help="what SOURCE is (default: its keys tell)"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was found; 0. Errors are those of `fastfar.load_official`."""
    weights = open_weights(args.source, use_ema=not args.no_ema)
    kind = args.kind or ("kl16" if "post_quant_conv.weight" in weights.shapes else "far")
    convert = _convert_far if kind == "far" else _convert_kl16
    sizes, module = convert(weights, args)
    found: dict[str, Any] = {
        "source": str(args.source),
        "kind": kind,
        "moving_average": weights.ema,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "dtype": args.dtype,
        "sizes": sizes,
        "written": str(args.dest),
    }
    print(json.dumps(found) if args.json else _report(found))
    return 0


def _convert_far(weights: Weights, args: argparse.Namespace) -> tuple[dict[str, Any], nn.Module]:
    config = infer_config(weights, args.num_heads)
    model = build_model(weights, config, _DTYPES[args.dtype])
    kl16 = args.dest / TOKENIZER_FILE  # one that is there already stays
    vae = KLVAE.from_weights(open_weights(kl16), None) if kl16.is_file() else None
    save_pretrained(args.dest, model, vae)
    return config.to_dict(), model


def _convert_kl16(weights: Weights, args: argparse.Namespace) -> tuple[dict[str, Any], nn.Module]:
    if args.num_heads is not None:
        raise ValueError("--num-heads is for FAR models; KL-16 has one head")
    if not (args.dest / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{args.dest} holds no model yet: convert the FAR checkpoint into it first, then add "
            f"KL-16 ({TOKENIZER_FILE}) to it. KL-16 alone needs no conversion: "
            "fastfar.KLVAE.load_official reads the published file"
        )
    vae = KLVAE.from_weights(weights, _DTYPES[args.dtype])
    save_tokenizer(args.dest, vae)
    return vae.to_dict(), vae


def _report(found: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name} {value}" for name, value in found["sizes"].items())
    which = "moving average (EMA)" if found["moving_average"] else "plain weights"
    return (
        f"{found['source']}: {found['kind']}, {which}, {found['parameters'] / 1e6:.1f} M "
        f"parameters\n  {sizes}\n{found['written']}: written in {found['dtype']}"
    )
