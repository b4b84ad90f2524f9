"""`fastfar eval`: how good the samples are, next to what is best and what is worthless."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastfar._version import __version__
from fastfar.backend import BACKENDS
from fastfar.cli._plans import HELP, PLANS, plan_named
from fastfar.data import load_fashion_mnist
from fastfar.evaluation import (
    METRIC,
    FashionClassifier,
    SampleStore,
    accuracy,
    draw_samples,
    evaluate,
    load_classifier,
    load_images,
    save_classifier,
    train_classifier,
)
from fastfar.evaluation.classifier import LEARNING_RATE, MAX_SHIFT, WEIGHT_DECAY
from fastfar.evaluation.evaluate import NEIGHBOURS
from fastfar.evaluation.samples import check_seed, digest, weights_fingerprint

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_DESCRIPTION = f"""\
Draw class-balanced samples and compare them with the test split of Fashion-MNIST: Frechet distance
({METRIC}: on features of fastfar's Fashion-MNIST classifier, which is NOT ImageNet FID), precision,
recall and class agreement; beside them the floor (as many real training images) and the ceilings
(noise, the class-mean image). An interrupted run goes on where it was when started again."""

_EPILOG = """examples:
  fastfar eval
  fastfar eval --checkpoint runs/mine --samples 1000 --guidance-scale 2 --output results.jsonl
  fastfar eval --images samples.npy                # existing images
  fastfar eval train-classifier --to my-evaluator  # makes the classifier anew
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
    add("--samples", metavar="N", type=int, default=5000, help="how many (%(default)s)")
    add("--batch-size", metavar="N", type=int, default=100, help="per batch (%(default)s)")
    add("--seed", metavar="N", type=int, default=0, help="of the samples (%(default)s)")
    add("--plan", choices=PLANS, help=HELP)
    add("--guidance-scale", metavar="S", type=float, help="in place of the checkpoint's")
    add("--diffusion-steps", metavar="T", type=int, help="in place of the checkpoint's")
    add("--backend", choices=("auto", *BACKENDS), default="auto", help="(%(default)s)")
    add("--images", metavar="PATH", type=Path, help="judge this .npy file or folder of .png files")
    add("--data", metavar="FOLDER", type=Path, help="of the four IDX files, if not installed")
    add("--evaluator", metavar="FOLDER", type=Path, help="another classifier than the embedded one")
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
    if args.samples <= NEIGHBOURS:
        raise ValueError(f"--samples {args.samples}: give at least {NEIGHBOURS + 1}, better 5000")
    check_seed(args.seed)
    train, test = load_fashion_mnist("train", args.data), load_fashion_mnist("test", args.data)
    classifier = load_classifier(args.evaluator)
    if args.images is not None:
        images_BHW, labels_B = load_images(args.images)
        name, about = args.images.name, {"images": str(args.images)}
    else:
        drawn = _draw(args)
        if drawn is None:
            return 130
        images_BHW, labels_B, about = drawn
        name = Path(args.checkpoint).name
    with tqdm(total=5, desc="judging", unit="set", leave=False) as bar:
        result = evaluate(
            images_BHW,
            labels_B,
            train=train,
            test=test,
            classifier=classifier,
            name=name,
            on_row=lambda row: bar.update(),
        )
    result |= {"run": about, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    line = json.dumps(result)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with args.output.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
    print(line if args.json else report(result))
    return 0


def _draw(args: argparse.Namespace) -> tuple[Tensor, Tensor, dict[str, Any]] | None:
    """Samples, labels and what they are; None after Ctrl-C."""
    import fastfar  # the pipeline and the model are not needed to judge existing images

    pipeline = fastfar.FARPipeline.from_pretrained(args.checkpoint)
    changes = {"guidance_scale": args.guidance_scale, "diffusion_steps": args.diffusion_steps}
    plan = plan_named(args.plan, pipeline).with_changes(**changes)
    identity = {
        "weights": weights_fingerprint(pipeline.model),
        "plan": plan.to_dict(),
        "seed": args.seed,
        "backend": args.backend,
        "fastfar": __version__,
    }
    folder = args.work or Path.home() / ".cache" / "fastfar" / "eval" / digest(identity)
    store = SampleStore(folder, identity)
    print(f"samples are kept in {folder}", file=sys.stderr)
    start = time.perf_counter()
    with tqdm(total=args.samples, desc="sampling", unit="image") as bar:

        def progress(done: int, total: int) -> None:
            bar.update(done - bar.n)

        try:
            images_BHW, labels_B, new = draw_samples(
                pipeline,
                args.samples,
                store,
                batch_size=args.batch_size,
                seed=args.seed,
                progress=progress,
                backend=args.backend,
                plan=plan,
            )
        except KeyboardInterrupt:
            bar.close()
            print(
                f"stopped with {bar.n} of {args.samples} samples finished; they are kept in "
                f"{folder}, and the same command goes on from there",
                file=sys.stderr,
            )
            return None
    seconds = time.perf_counter() - start
    about = {"checkpoint": str(args.checkpoint), **identity, "batch_size": args.batch_size}
    about |= {
        "new_samples": new,
        "seconds_per_new_sample": round(seconds / new, 5) if new else None,
    }
    return images_BHW, labels_B, about


def report(result: dict[str, Any]) -> str:
    """The table for people: every figure with its N, extractor and reference."""
    head = (
        "set",
        "kind",
        "N",
        METRIC,
        "precision",
        "recall",
        "agreement",
        "extractor",
        "reference",
    )
    lines = [head]
    for row in result["rows"]:
        agreement = row["class_agreement"]
        lines.append(
            (
                row["name"],
                row["kind"],
                f"{row['count']:,}",
                f"{row[METRIC]:.4g}",
                f"{row['precision']:.3f}",
                f"{row['recall']:.3f}",
                "unknown" if agreement is None else f"{agreement:.3f}",
                row["extractor"],
                row["reference"],
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    table = [
        "  ".join(
            cell.rjust(width) if 2 <= i <= 6 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    floor, mean = result["fd_over_floor"], result["fd_over_class_mean"]
    if floor is not None and mean is not None:
        table.append(
            f"\n{METRIC} is {floor:.3g} x the floor and {mean:.3g} x the class-mean image's."
        )
    table.append(
        f"{METRIC} is no ImageNet FID: it compares only with the same extractor, reference and N. "
        f"The extractor's own accuracy on real test images is {result['extractor_accuracy']:.3f}."
    )
    return "\n".join(table)


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
