"""`fastfar eval`: how good the samples are, next to what is best and what is worthless."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastfar import backend
from fastfar._version import __version__
from fastfar.backend import BACKENDS
from fastfar.cli._eval_judging import ByFashion, ByInception, Judging
from fastfar.cli._eval_samples import draw, image_shape, pipelines_of
from fastfar.cli._plans import HELP, PLANS
from fastfar.data import load_fashion_mnist
from fastfar.evaluation import (
    METRIC,
    FashionClassifier,
    accuracy,
    load_classifier,
    save_classifier,
    train_classifier,
)
from fastfar.evaluation.classifier import LEARNING_RATE, MAX_SHIFT, WEIGHT_DECAY
from fastfar.evaluation.metrics import NEIGHBOURS
from fastfar.evaluation.runs import WEIGHTS
from fastfar.evaluation.samples import check_seed
from fastfar.evaluation.scores import SPLITS

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_DESCRIPTION = f"""\
Draw class-balanced samples and judge them. Without --inception: against the test split of
Fashion-MNIST, by Frechet distance ({METRIC}: on features of fastfar's Fashion-MNIST classifier,
which is NOT ImageNet FID), precision, recall and class agreement; beside them the floor (as many
real training images) and the ceilings (noise, the class-mean image). With --inception and
--reference: FID, inception score, precision and recall, for any model. An interrupted run goes on
where it was when started again; several processes (torchrun, or RANK, WORLD_SIZE and LOCAL_RANK
set by hand) that have one --work folder share the sampling."""

_EPILOG = """examples:
  fastfar eval
  fastfar eval --checkpoint runs/mine --weights both      # a training run: average against raw
  fastfar eval --checkpoint runs/mine/export --samples 1000 --guidance-scale 2
  fastfar eval --images samples.npy                       # existing images
  fastfar eval train-classifier --to my-evaluator         # makes the classifier anew
  torchrun --nproc-per-node 8 -m fastfar eval --checkpoint far_huge --device cuda --work samples \\
      --inception weights-inception-2015-12-05-6726825d.pth \\
      --reference VIRTUAL_imagenet256_labeled.npz
"""

_TRAIN_EPILOG = """example:
  fastfar eval train-classifier --to fastfar/assets/evaluator
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `fastfar`."""
    parser = subparsers.add_parser(
        "eval",
        help="measure the quality of a checkpoint's samples",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", metavar="NAME", default="demo", help="name or folder (%(default)s)")
    add("--weights", choices=WEIGHTS, help="of the folder of a training run (ema)")
    add("--vae", metavar="FILE", type=Path, help="published KL-16, for what lacks it")
    add("--samples", metavar="N", type=int, help="how many (5000; with --inception 50000)")
    add("--batch-size", metavar="N", type=int, default=100, help="per batch (%(default)s)")
    add("--seed", metavar="N", type=int, default=0, help="of the samples (%(default)s)")
    add("--plan", choices=PLANS, help=HELP)
    add("--guidance-scale", metavar="S", type=float, help="in place of the checkpoint's")
    add("--diffusion-steps", metavar="T", type=int, help="in place of the checkpoint's")
    add("--backend", choices=("auto", *BACKENDS), default="auto", help="(%(default)s)")
    add("--device", metavar="NAME", default="cpu", help="cpu, cuda, cuda:1 (%(default)s)")
    add("--images", metavar="PATH", type=Path, help="judge this file or folder of .png files")
    add("--data", metavar="FOLDER", type=Path, help="of the four IDX files, if not installed")
    add("--evaluator", metavar="FOLDER", type=Path, help="another classifier than the embedded one")
    add(
        "--inception",
        metavar="FILE",
        type=Path,
        help="Inception weights of torch-fidelity (pip install 'fastfar[eval]')",
    )
    add(
        "--reference",
        metavar="PATH",
        help="with --inception: .npz of published statistics or images, or a data set of real "
        "images (folders, shards, ...)",
    )
    add("--save-reference", metavar="FILE", type=Path, help="keep that data set's features (.npz)")
    add("--work", metavar="FOLDER", type=Path, help="keep the samples here (~/.cache/fastfar/eval)")
    add("--output", metavar="FILE", type=Path, help="append the result to this JSONL file")
    add("--json", action="store_true", help="print one line of JSON")
    parser.set_defaults(run=run)

    actions = parser.add_subparsers(dest="action", metavar="[train-classifier]", required=False)
    train = actions.add_parser(
        "train-classifier",
        help="train the classifier whose features are compared",
        description="Train the classifier whose features are compared (about 4 minutes on two "
        "cores with bf16 units) and write config.json and model.safetensors. Figures of different "
        "classifiers do not compare.",
        epilog=_TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = train.add_argument
    add("--to", metavar="FOLDER", type=Path, required=True, help="where to write it")
    add("--epochs", metavar="N", type=int, default=7, help="(%(default)s)")
    add("--batch-size", metavar="N", type=int, default=128, help="(%(default)s)")
    add("--seed", metavar="N", type=int, default=0, help="(%(default)s)")
    add("--dtype", choices=_DTYPES, default="bfloat16", help="of autocast (%(default)s)")
    add("--data", metavar="FOLDER", type=Path, help="of the four IDX files, if not installed")
    add("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluate, or train the evaluator; 0, or 130 after Ctrl-C with what is finished kept."""
    return _train(args) if args.action == "train-classifier" else _evaluate(args)


def _evaluate(args: argparse.Namespace) -> int:
    # Everything that can be wrong is found before the first sample is drawn.
    if args.samples is None:
        args.samples = 5000 if args.inception is None else 50_000
    least = NEIGHBOURS if args.inception is None else SPLITS
    if args.samples <= least:
        raise ValueError(f"--samples {args.samples}: give at least {least + 1}, better 5000")
    check_seed(args.seed)
    judging: Judging | None = None
    if backend.launched().rank == 0:  # the first process judges, the others only draw
        judging = ByFashion(args) if args.inception is None else ByInception(args)
    drawn = []
    if args.images is None:
        pipelines = pipelines_of(args)
        for pipeline in pipelines.values():
            shape = image_shape(pipeline)
            if judging is not None:
                judging.check(shape)
        for name, pipeline in pipelines.items():
            samples = draw(args, name, pipeline)
            if samples is None:
                return 130
            drawn.append(samples)
    if judging is None:
        return 0
    drawn = drawn or [judging.found()]
    result = judging.judge(drawn)
    result |= {"run": {one.name: one.about for one in drawn}}
    result |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    line = json.dumps(result)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with args.output.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
    print(line if args.json else judging.report(result))
    return 0


def _train(args: argparse.Namespace) -> int:
    check_seed(args.seed)
    train, test = load_fashion_mnist("train", args.data), load_fashion_mnist("test", args.data)
    losses: list[float] = []

    def progress(batches: Iterator[Tensor], total: int) -> Iterator[Tensor]:
        return iter(tqdm(batches, total=total, desc=f"epoch {len(losses) + 1}/{args.epochs}"))

    start = time.perf_counter()
    try:
        model: FashionClassifier = train_classifier(
            train,
            epochs=args.epochs,
            batch_size=args.batch_size,
            seed=args.seed,
            dtype=_DTYPES[args.dtype],
            on_epoch=lambda epoch, loss: losses.append(round(loss, 4)),
            progress=progress,
        )
    except KeyboardInterrupt:
        print(f"stopped after {len(losses)} epochs; nothing was written", file=sys.stderr)
        return 130
    training = {
        "data": f"Fashion-MNIST, train split, {len(train)} images",
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "max_shift": MAX_SHIFT,
        "seed": args.seed,
        "dtype": args.dtype,
        "loss_per_epoch": losses,
        "seconds": round(time.perf_counter() - start, 1),
        "fastfar": __version__,
        "torch": torch.__version__,
    }
    save_classifier(model, args.to, training)
    stored = load_classifier(args.to)  # what is measured is what was stored
    training |= {"train_accuracy": accuracy(stored, train), "test_accuracy": accuracy(stored, test)}
    save_classifier(stored, args.to, training)
    found = {"written": str(args.to), "extractor": stored.fingerprint, **training}
    text = (
        f"{args.to}: test accuracy {training['test_accuracy']:.4f}, train accuracy "
        f"{training['train_accuracy']:.4f}, extractor {stored.fingerprint}"
    )
    print(json.dumps(found) if args.json else text)
    return 0
