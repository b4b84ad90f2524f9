"""`fastfar train`: train a model, or go on with it, and export the averaged weights."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastfar._recipes import recipe_names

if TYPE_CHECKING:  # imported in `run`: --help need not wait for PyTorch
    from fastfar.data import Examples
    from fastfar.training import Recipe, Trainer

EXPORT_DTYPES = ("bfloat16", "float32", "float16")

_DESCRIPTION = """\
Train a FAR model. OUTPUT gets checkpoints/, recipe.json, log.jsonl and, at the end, export/: the
averaged weights with tokenizer, sampling plan and class names, for `fastfar sample`. If OUTPUT
holds a run already, it goes on exactly where it was. Ctrl-C finishes the step and saves.

Started by torchrun it is one run on all of its processes (recipe entries: parallel, accumulate,
ema_device, grad_checkpointing); batch_size is that of all together. A run may go on with another
number of processes."""

_EPILOG = """examples:
  fastfar train                                        # the demo model, into runs/demo
  fastfar train --output runs/short --set steps=500 lr=1e-3 --minutes 30
  fastfar train --output runs/short                    # goes on, with that run's own recipe
  fastfar train --output runs/short --export-only --plot
  torchrun --nproc-per-node 8 -m fastfar train --device cuda --data latents --workers 4 \\
      --recipe far_base --output runs/base
  fastfar sample runs/short/export
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `fastfar`."""
    parser = subparsers.add_parser(
        "train",
        help="train a model",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", metavar="DIR", type=Path, default=Path("runs/demo"), help="(%(default)s)")
    add(
        "--recipe",
        metavar="NAME",
        help=f"{', '.join(recipe_names())}, or a .json file (default: the recipe of the run in "
        "OUTPUT, or demo)",
    )
    add(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change entries of the recipe; model, seed and batch_size stay within a run",
    )
    add(
        "--data",
        metavar="SPEC",
        help="folder of IDX files, of class folders, of .tar shards, of `fastfar cache`, or one "
        "that `datasets` saved (default: what the recipe says)",
    )
    add("--workers", metavar="N", type=int, default=0, help="that read the data (%(default)s)")
    add("--minutes", metavar="M", type=float, help="stop after that time, as if finished")
    add("--device", metavar="NAME", default="cpu", help="cpu, cuda, cuda:1 (%(default)s)")
    add("--threads", metavar="N", type=int, help="CPU threads")
    add("--log-every", metavar="N", type=int, default=50, help="steps (%(default)s)")
    add("--save-every", metavar="N", type=int, default=500, help="steps (%(default)s)")
    add("--sync-save", action="store_true", help="do not go on while a checkpoint is written")
    add("--probe-every", metavar="N", type=int, default=1000, help="steps (%(default)s)")
    add("--tensorboard", action="store_true", help="also log to OUTPUT/tensorboard")
    add("--plot", action="store_true", help="write the loss curve to OUTPUT/loss.png")
    add("--export-only", action="store_true", help="export what is saved, without training")
    add("--export-dtype", choices=EXPORT_DTYPES, default="bfloat16", help="(%(default)s)")
    add("--quiet", action="store_true", help="no progress bar")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train and export; 0, or 130 where SIGINT or SIGTERM ended the run before its last step.

    Of several processes the first one speaks and exports.
    """
    from fastfar import backend

    first = backend.launched().rank == 0
    args.quiet = args.quiet or not first
    for name in ("minutes", "threads", "log_every", "save_every", "probe_every"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if args.workers < 0:
        raise ValueError(f"--workers must be at least 0, got {args.workers}")
    # What is asked for and not installed is found before the first step.
    if args.plot:
        _figure()
    writer = None
    if args.tensorboard and first and not args.export_only:
        writer = _writer(args.output)
    found = _export_only(args) if args.export_only else _train(args, writer)
    if first:
        if args.plot:
            found["plot"] = str(_plot(args.output))
        print(json.dumps(found) if args.json else _report(found))
    return 130 if found["outcome"] == "interrupted" else 0


def read_recipe(name: str | None, changes: Sequence[str], folder: Path) -> Recipe:
    """The recipe of --recipe, else that of the run in `folder`, else "demo", with --set applied.

    Raises:
        ValueError: an entry without "=", an unknown name, a value out of range.
        FileNotFoundError: no such file.
    """
    from fastfar.training import Recipe
    from fastfar.training.state import has_run, read_run

    if name is not None:
        recipe = Recipe.load(name)
    elif has_run(folder):
        recipe = Recipe.from_dict(read_run(folder)["recipe"])
    else:
        recipe = Recipe.load("demo")
    values: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not (key and equals):
            raise ValueError(f"--set takes KEY=VALUE, such as steps=500, got {change!r}")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:  # a word: --set dtype=float32
            values[key] = text
    return recipe.with_changes(values)


def _load_data(args: argparse.Namespace, recipe: Recipe) -> Examples:
    from fastfar.data import open_data

    config = recipe.config
    mode = "L" if config.latent_channels == 1 else "RGB"
    return open_data(args.data or recipe.data, size=config.latent_size, mode=mode)


def _train(args: argparse.Namespace, writer: Any) -> dict[str, Any]:
    import torch

    from fastfar.training import Trainer, export_run
    from fastfar.training.checkpoints import latest
    from fastfar.training.state import LOG_FILE

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    recipe = read_recipe(args.recipe, args.set, args.output)
    data = _load_data(args, recipe)
    trainer = Trainer(
        recipe,
        data,
        args.output,
        args.device,
        async_save=not args.sync_save,
        workers=args.workers,
    )
    first, world = trainer.step, trainer.world
    if world.main:
        spread = f"{world.size} processes ({recipe.parallel}), " if world.size > 1 else ""
        print(
            f"{args.output}: step {first} of {recipe.steps}, {spread}"
            f"{sum(p.numel() for p in trainer.model.parameters()) / 1e6:.1f} M parameters, "
            f"{str(trainer.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads",
            file=sys.stderr,
        )
    start = time.perf_counter()
    outcome, last = _run_with_bar(trainer, args, writer)
    seconds = time.perf_counter() - start
    found: dict[str, Any] = {
        "outcome": outcome,
        "step": trainer.step,
        "steps": recipe.steps,
        "loss": last.get("loss"),
        "seconds": round(seconds, 2),
        "images_per_second": round((trainer.step - first) * recipe.batch_size / seconds, 2),
        "state": str(latest(args.output)),
        "log": str(args.output / LOG_FILE),
        "export": None,
    }
    if outcome != "interrupted" and world.main:
        folder = args.output / "export"
        export_run(args.output, folder, _dtypes()[args.export_dtype], lambda: data)
        found["export"] = str(folder)
    if trainer.step < recipe.steps:
        found["resume"] = _resume(args)
    world.leave()
    return found


def _resume(args: argparse.Namespace) -> str:
    """The command that goes on, with the options that a run's folder does not know."""
    from fastfar import backend

    command, (_, size, _, here) = ["fastfar", "train"], backend.launched()
    if size > 1:
        nodes = ["--nnodes", str(size // here)] if here < size else []
        command = ["torchrun", *nodes, "--nproc-per-node", str(here), "-m", *command]
    command += ["--output", str(args.output)]
    for name, usual in (("device", "cpu"), ("data", None), ("workers", 0), ("threads", None)):
        if (value := getattr(args, name)) != usual:
            command += [f"--{name}", str(value)]
    return shlex.join(command + (["--sync-save"] if args.sync_save else []))


def _run_with_bar(
    trainer: Trainer, args: argparse.Namespace, writer: Any
) -> tuple[str, dict[str, Any]]:
    """How the run ended, and the last entry of its log."""
    from tqdm import tqdm

    size, steps = trainer.recipe.batch_size, trainer.recipe.steps
    last: dict[str, Any] = {}
    with tqdm(
        total=steps * size,
        initial=trainer.step * size,
        unit="image",
        unit_scale=True,
        disable=args.quiet,
    ) as bar:

        def on_step(record: dict[str, float]) -> None:
            bar.set_description(f"step {trainer.step}/{steps}", refresh=False)
            bar.set_postfix(loss=f"{record['loss']:.4f}", lr=f"{record['lr']:.2e}", refresh=False)
            bar.update(size)

        def on_log(entry: dict[str, Any]) -> None:
            last.update(entry)
            for name in sorted(entry.keys() - {"step", "time"}) if writer is not None else ():
                writer.add_scalar(name, entry[name], entry["step"])

        try:
            outcome = trainer.run(
                log_every=args.log_every,
                save_every=args.save_every,
                probe_every=args.probe_every,
                on_step=on_step,
                on_log=on_log,
                minutes=args.minutes,
            )
        finally:
            if writer is not None:
                writer.close()
    return outcome, last


def _export_only(args: argparse.Namespace) -> dict[str, Any]:
    from fastfar.training import Recipe, export_run
    from fastfar.training.state import read_run

    folder = args.output / "export"
    dtype = _dtypes()[args.export_dtype]
    recipe = Recipe.from_dict(read_run(args.output)["recipe"])
    step = export_run(args.output, folder, dtype, lambda: _load_data(args, recipe))
    return {"outcome": "exported", "step": step, "export": str(folder)}


def _dtypes() -> dict[str, Any]:
    import torch

    return {name: getattr(torch, name) for name in EXPORT_DTYPES}


def _writer(folder: Path) -> Any:
    """TensorBoard's SummaryWriter; ImportError says how to get it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "--tensorboard needs TensorBoard: pip install 'fastfar[train]'. Without it, the log is "
            f"in {folder / 'log.jsonl'}"
        ) from error
    make: Callable[..., Any] = SummaryWriter
    return make(log_dir=str(folder / "tensorboard"))


def _figure() -> Any:
    """An empty matplotlib figure; ImportError says how to get it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "--plot needs matplotlib: pip install 'fastfar[bench]', or leave --plot out"
        ) from error
    return Figure(figsize=(8, 4.5), layout="constrained")


def _plot(folder: Path) -> Path:
    """Write loss.png: the training loss by step."""
    from fastfar._files import atomic_write
    from fastfar.training.state import read_log

    entries = [entry for entry in read_log(folder) if entry.get("loss") is not None]
    figure = _figure()
    axes = figure.subplots()
    axes.plot([entry["step"] for entry in entries], [entry["loss"] for entry in entries])
    axes.set(xlabel="step", ylabel="training loss", yscale="log", title=folder.name)
    axes.grid(alpha=0.3, which="both")
    path = folder / "loss.png"
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


def _report(found: dict[str, Any]) -> str:
    lines = []
    if found["outcome"] != "exported":
        loss = "" if found["loss"] is None else f", loss {found['loss']:.4f}"
        lines += [
            f"{found['outcome']} at step {found['step']} of {found['steps']}{loss}: "
            f"{found['seconds']:.1f} s, {found['images_per_second']:.1f} images/s",
            f"saved in {found['state']}, log in {found['log']}",
        ]
    if found.get("plot"):
        lines.append(f"loss curve in {found['plot']}")
    if found["export"]:
        lines += [
            f"averaged weights of step {found['step']} exported to {found['export']}; try: "
            f"fastfar sample {shlex.quote(found['export'])}",
        ]
    if "resume" in found:
        lines.append(f"to go on: {found['resume']}")
    return "\n".join(lines)
