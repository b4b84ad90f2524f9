"""`fastfar plan`: memory and time of a training run before anybody starts it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported in `run`: --help need not wait for PyTorch
    from fastfar.bench.tables import Table
    from fastfar.config import FARConfig
    from fastfar.costs.training import Estimate, Run

_DESCRIPTION = """\
Expected memory of each GPU, time of a step and days of a training run, from the cost model: nothing
is run. Exit status 1 where the run does not fit into memory, with what to change."""

_EPILOG = """examples:
  fastfar plan --model far_huge --gpus 8xH100 --batch 1024
  fastfar plan --model far_huge --gpus 8xH100 --batch 1024 --accumulate 2 --explain
  fastfar plan --model far_large --gpus 64xA100:40 --batch 2048 --parallel fsdp --json
  fastfar plan --model runs/mine/recipe.json --gpus rtx4090 --steps 20000
"""
IMAGENET = 1281167


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `fastfar`."""
    parser = subparsers.add_parser(
        "plan",
        help="memory and time of a training run, expected",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", metavar="NAME", default="far_huge",
        help="a preset, or a recipe's .json file (%(default)s)")  # fmt: skip
    add("--gpus", metavar="NxNAME", default="8xH100",
        help="number and kind, or 8xA100:40 with the GiB of each (%(default)s)")  # fmt: skip
    add("--batch", metavar="N", type=int, help="images of a step, all GPUs together (1024)")
    add("--batch-multiplier", metavar="M", type=int, help="head rows of a token (4)")
    add("--accumulate", metavar="N", type=int, help="micro-batches of a step (1)")
    add("--parallel", choices=("ddp", "fsdp"), help="fsdp shares out weights and state (ddp)")
    add("--grad-checkpointing", action="store_true", default=None,
        help="compute blocks again in the backward")  # fmt: skip
    add("--ema", choices=("same", "cpu"), help="where the averaged weights are (same)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", metavar="N", type=float, help="(400, or a recipe's steps)")
    length.add_argument("--steps", metavar="N", type=int, help="instead of epochs")
    add("--images", metavar="N", type=int, default=IMAGENET, help="of an epoch (%(default)s)")
    add("--explain", action="store_true", help="also every formula, and what its letters are")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the estimate; 0, or 1 where it does not fit."""
    from fastfar.costs import training, training_machines

    config, known = _model(args.model)
    options = {name: _first(getattr(args, name, None), known.get(name), default)
               for name, default in DEFAULTS.items()}  # fmt: skip
    options["ema"] = _first(args.ema, known.get("ema_device"), "same")
    asked = training.Run(
        config,
        training_machines.find(args.gpus),
        batch=_first(args.batch, known.get("batch_size"), 1024),
        multiplier=_first(args.batch_multiplier, known.get("batch_multiplier"), 4),
        **options,
    )
    steps = _steps(args, asked, known)
    found = training.estimate(asked)
    remedies = [] if found.fits else training.remedies(asked)
    if args.json:
        print(json.dumps(_as_data(args.model, found, steps, remedies), indent=2))
    else:
        _show(args, found, steps, remedies)
    return 0 if found.fits else 1


DEFAULTS: dict[str, Any] = {"accumulate": 1, "parallel": "ddp", "grad_checkpointing": False}


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _model(name: str) -> tuple[FARConfig, dict[str, Any]]:
    """The sizes of a preset or of a recipe, and the recipe's entries."""
    from fastfar.config import FARConfig
    from fastfar.training import Recipe

    if not name.endswith(".json"):
        return FARConfig.preset(name), {}
    recipe = Recipe.load(name)
    return recipe.config, recipe.to_dict()


def _steps(args: argparse.Namespace, asked: Run, known: dict[str, Any]) -> int:
    """Optimizer steps of the run: what is left of an epoch after its last whole batch is unused."""
    if args.steps is not None or (args.epochs is None and "steps" in known):
        steps = _first(args.steps, known.get("steps"))
    else:
        epochs = _first(args.epochs, 400.0)
        if not (math.isfinite(epochs) and epochs > 0):
            raise ValueError(f"--epochs must be positive, got {epochs}")
        if args.images < asked.batch:
            raise ValueError(f"--images {args.images} is less than one batch of {asked.batch}")
        steps = round(epochs * (args.images // asked.batch))
    if steps < 1:
        raise ValueError(f"the run must have at least one step, got {steps}")
    return int(steps)


# --- printing --------------------------------------------------------------------------------


def _days(seconds: float) -> str:
    if seconds < 7200:
        return f"{seconds / 60:.1f} minutes"
    days = seconds / 86400
    return f"{days:.1f} days" if days >= 2 else f"{seconds / 3600:.1f} hours"


def _flags(change: dict[str, Any]) -> str:
    """As they are given on the command line."""
    return " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in change.items()
    )


def _show(
    args: argparse.Namespace,
    found: Estimate,
    steps: int,
    remedies: list[tuple[dict[str, Any], Estimate]],
) -> None:
    from fastfar.cli._bench_report import show_tables

    asked, machine = found.run, found.run.machine
    cut = f" in {asked.accumulate} micro-batches" if asked.accumulate > 1 else ""
    how = ", blocks computed again" if asked.grad_checkpointing else ""
    print(
        f"expected, not measured: {args.model} on {machine.title}; {asked.batch} images a step, "
        f"{asked.images} on a GPU at once{cut}, {asked.parallel}, bfloat16 autocast{how}"
    )
    show_tables(_tables(found, args.explain))
    rate = asked.batch / found.seconds
    tokens = rate * asked.config.num_tokens
    print(
        f"step {found.seconds * 1e3:.0f} ms, {rate:,.0f} images/s, {tokens:,.0f} tokens/s, "
        f"{found.utilisation:.0%} of the bfloat16 peak; {steps:,} steps: "
        f"{_days(steps * found.seconds)}"
    )
    if found.host_bytes:
        print(f"the host keeps {found.host_bytes / 2**30:.1f} GiB of averaged weights per process")
    if found.tight:
        print("fits, but with so little to spare that a small error of this estimate matters")
    if found.fits:
        return
    print(f"does not fit: {found.bytes / 2**30:.1f} of {machine.memory / 2**30:.1f} GiB",
          file=sys.stderr)  # fmt: skip
    for change, other in remedies:
        print(
            f"  fits with {_flags(change)}: {other.bytes / 2**30:.1f} GiB, "
            f"step {other.seconds * 1e3:.0f} ms, {_days(steps * other.seconds)}",
            file=sys.stderr,
        )
    if not remedies:
        print("  no option makes it fit: take more GPUs, or such with more memory", file=sys.stderr)


def _tables(found: Estimate, explain: bool) -> list[Table]:
    from fastfar.bench.tables import Table, duration, share, size

    memory = [(each.name, size(each.bytes), each.formula) for each in found.memory]
    memory.append(("in all", size(found.bytes), f"of {size(found.run.machine.memory)}"))
    columns = 3 if explain else 2
    tables = [
        Table(
            "Memory of a GPU",
            ("component", "size", "formula")[:columns],
            tuple(line[:columns] for line in memory),
            words=frozenset({0, 2}),
            strong=frozenset({len(memory) - 1}),
        ),
        Table(
            "Time of a step",
            ("stage", "time", "share", "TFLOP", "GB"),
            tuple(
                (each.name, duration(each.seconds) if each.seconds else "hidden",
                 share(each.seconds / found.seconds), f"{each.flops / 1e12:.1f}",
                 f"{each.bytes / 1e9:.1f}")
                for each in found.stages
                if each.seconds or each.bytes
            ),
        ),
    ]  # fmt: skip
    return [*tables, *_explanations(found)] if explain else tables


def _explanations(found: Estimate) -> list[Table]:
    """What is kept and multiplied part by part, and the letters of the formulas."""
    from fastfar.bench.tables import Table, size
    from fastfar.costs import training, training_step

    sizes = found.run.sizes
    kept, products = [], []
    for part in training_step.parts(found.run.config):
        if not part.count:
            continue
        title = f"{part.count} x {part.name}"
        for name, text in part.kept.items():
            each = size(training_step.value(text, sizes))
            kept.append((title, name, text, each))
        for name, layer in part.linears.items():
            flops = 2.0 * math.prod(layer.products(sizes)[0][0])
            text = f"2 ({layer.rows}) ({layer.outputs}) ({layer.inputs})"
            products.append((title, name, text, f"{flops / 1e9:.1f}"))
        if part.attention:
            flops = training_step.attention_flops(sizes)[0]
            products.append((title, "attention", "4 N S D", f"{flops / 1e9:.1f}"))
    meanings = {**training_step.LETTERS, **training.LETTERS}
    letters = [(letter, f"{sizes[letter]:,.12g}", text) for letter, text in meanings.items()]
    words = frozenset({0, 1, 2})
    return [
        Table("Kept for the backward by one module", ("part", "what", "bytes", ""), tuple(kept),
              words=words),
        Table("Products of one module's forward", ("part", "what", "FLOPs", "GFLOP"),
              tuple(products), words=words),
        Table("Letters", ("letter", "value", "meaning"), tuple(letters), words=frozenset({0, 2})),
    ]  # fmt: skip


def _as_data(
    model: str, found: Estimate, steps: int, remedies: list[tuple[dict[str, Any], Estimate]]
) -> dict[str, Any]:
    asked, machine = found.run, found.run.machine
    rate = asked.batch / found.seconds
    return {
        "expected": True,  # nothing here was measured
        "model": model,
        "gpu": machine.gpu.name,
        "gpus": machine.count,
        "batch": asked.batch,
        "images_per_gpu": asked.images,
        "batch_multiplier": asked.multiplier,
        "accumulate": asked.accumulate,
        "parallel": asked.parallel,
        "grad_checkpointing": asked.grad_checkpointing,
        "ema": asked.ema,
        "memory": {each.name: each.bytes for each in found.memory},
        "formulas": {each.name: each.formula for each in found.memory},
        "memory_bytes": found.bytes,
        "memory_available": machine.memory,
        "host_bytes": found.host_bytes,
        "fits": found.fits,
        "tight": found.tight,
        "stages": {
            each.name: {"seconds": each.seconds, "flops": each.flops, "bytes": each.bytes}
            for each in found.stages
        },
        "step_s": found.seconds,
        "images_per_s": rate,
        "tokens_per_s": rate * asked.config.num_tokens,
        "flops": found.flops,
        "utilisation": found.utilisation,
        "steps": steps,
        "days": steps * found.seconds / 86400,
        "fits_with": [
            {**change, "memory_bytes": other.bytes, "step_s": other.seconds,
             "days": steps * other.seconds / 86400}
            for change, other in remedies
        ],
    }  # fmt: skip
