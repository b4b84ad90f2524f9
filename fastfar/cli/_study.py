"""The commands of the paper's experiments in small: `fastfar experiment table5` and its kin."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from fastfar._files import atomic_write
from fastfar.backend import BACKENDS
from fastfar.evaluation.samples import check_seed
from fastfar.experiments import STUDIES, Rows, Study
from fastfar.pictures import save_png

if TYPE_CHECKING:  # imported in `run`: --help need not wait for PyTorch's trainers
    from fastfar.experiments.study import Studio

WORK = Path.home() / ".cache" / "fastfar" / "experiments"
QUICK: dict[str, Any] = {"samples": 40, "seeds": (0, 1), "steps": 2}

_DESCRIPTION = """\
{question}
Prediction: {prediction}
Trains the small models that are not in WORK/runs yet, samples, judges, and appends a row to OUTPUT
for every variant and seed as soon as it is there: a stopped run goes on where it was. Beside OUTPUT
it writes the tables (.md), a plot (.png) and a picture of the same seeds by all variants
(-images.png). `report` makes tables and plot again from the rows alone."""

_EPILOG = """variants:
  {variants}

examples:
  fastfar experiment {name} --quick
  fastfar experiment {name} --seeds 0 1 2 3 4
  fastfar experiment {name} "{last}" --work /data/experiments
  fastfar experiment {name} report > {name}.md
"""


def add_shared(parser: argparse.ArgumentParser, samples: int) -> None:
    """Options that all experiments have."""
    add = parser.add_argument
    add("--samples", metavar="N", type=int, default=samples, help="images a seed (%(default)s)")
    add("--seeds", metavar="N", type=int, nargs="+", default=(0, 1, 2), help="(0 1 2)")
    add("--batch-size", metavar="N", type=int, default=100, help="images a batch (%(default)s)")
    add("--data", metavar="DIR", type=Path, help="of the four IDX files, if not installed")
    add("--backend", choices=("auto", *BACKENDS), default="auto", help="(%(default)s)")
    add("--work", metavar="DIR", type=Path, help="(~/.cache/fastfar/experiments)")
    add("--output", metavar="FILE", type=Path, help="rows, JSONL (WORK/<name>.jsonl)")
    add("--quick", action="store_true", help="tiny numbers: shows that it runs, decides nothing")


def stopped(output: Path, work: Path) -> int:
    """Say what is kept after Ctrl-C; the exit status."""
    print(
        f"stopped; what is finished is kept in {output} and {work}, and the same command goes on "
        "from there",
        file=sys.stderr,
    )
    return 130


def add_study(
    names: argparse._SubParsersAction[argparse.ArgumentParser], study: Study
) -> None:
    """The command of one study."""
    variants = [variant.name for variant in study.variants]
    parser = names.add_parser(
        study.name,
        help=study.question,
        description=_DESCRIPTION.format(question=study.question, prediction=study.prediction),
        epilog=_EPILOG.format(
            variants="\n  ".join(variants), name=study.name, last=variants[-1]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("variant", nargs="*", metavar="VARIANT", help="some of them, or report (default: all)")
    add_shared(parser, samples=1000)
    add("--recipe", metavar="NAME", default="small", help="base recipe, or .json (%(default)s)")
    add("--steps", metavar="N", type=int, help="of training, in place of the recipe's")
    add("--trained", action="store_true", help="train nothing: leave out models that are not there")
    add("--threads", metavar="N", type=int, help="CPU threads")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run a study and print its tables; 0, or 130 after Ctrl-C with what is finished kept."""
    study = STUDIES[args.name]
    known = [variant.name for variant in study.variants]
    if unknown := sorted(set(args.variant) - {*known, "report"}):
        raise ValueError(f"{study.name} has no variant {unknown}; it has {[*known, 'report']}")
    studio = _studio(args)
    rows = Rows(studio.output)
    missing: list[str] = []
    only_report = set(args.variant) == {"report"}
    if not only_report:
        from fastfar.experiments.study import run_study

        with tqdm(bar_format="{desc}", disable=not sys.stderr.isatty()) as line:
            studio.tell = line.set_description_str
            try:
                missing = run_study(study, studio, rows, tuple(set(args.variant) - {"report"}))
            except KeyboardInterrupt:
                return stopped(studio.output, studio.work)
    if missing:
        print(f"not trained, left out: {'; '.join(missing)}", file=sys.stderr)
    print(_write(study, studio, rows, pictures=not only_report))
    return 0


def _studio(args: argparse.Namespace) -> Studio:
    import torch

    from fastfar.experiments.study import Studio
    from fastfar.training import Recipe

    work = args.work or WORK
    numbers = {name: getattr(args, name) for name in ("samples", "seeds", "steps")}
    numbers = QUICK if args.quick else numbers
    for seed in numbers["seeds"]:
        check_seed(seed)
    if numbers["samples"] < 40:
        raise ValueError(f"--samples {numbers['samples']}: give at least 40, better 1000")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    recipe = Recipe.load(args.recipe)
    if numbers["steps"] is not None:
        recipe = recipe.with_changes({"steps": numbers["steps"]})
    quick = "-quick" if args.quick else ""
    return Studio(
        recipe,
        work,
        args.output or work / f"{args.name}{quick}.jsonl",
        samples=numbers["samples"],
        seeds=tuple(numbers["seeds"]),
        trains=not args.trained,
        data=args.data,
        backend=args.backend,
        batch_size=args.batch_size,
    )


def _write(study: Study, studio: Studio, rows: Rows, pictures: bool) -> str:
    """The tables; they and what can be drawn are written beside the rows."""
    from fastfar.experiments.study import picture
    from fastfar.experiments.study_plot import plot_reason, save_plot
    from fastfar.experiments.study_report import study_report

    text = study_report(study, rows)
    if not rows.find(part=study.name, kind="images"):
        return text
    with atomic_write(studio.output.with_suffix(".md")) as temporary:
        temporary.write_text(text, encoding="utf-8")
    if (reason := plot_reason()) is None:
        save_plot(studio.output.with_suffix(".png"), study, rows)
    else:
        print(f"no plot: matplotlib is {reason}", file=sys.stderr)
    images = picture(study, studio, rows) if pictures else None
    if images is not None:
        save_png(studio.output.with_name(f"{studio.output.stem}-images.png"), images)
    return text
