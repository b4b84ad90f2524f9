"""`fastfar experiment`: the project's experiments, each with its prediction and its rows."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from fastfar.cli._study import WORK, add_shared, add_study, stopped
from fastfar.evaluation.samples import check_seed
from fastfar.experiments import EXPERIMENTS, SHOWN, STUDIES, Rows, Setting
from fastfar.experiments.picture import side_by_side
from fastfar.experiments.report import report
from fastfar.experiments.run import run_part
from fastfar.moments import MomentHead
from fastfar.pictures import save_png

_DESCRIPTION = """\
Run the parts of an experiment and append every finding to a JSONL file as soon as it is there: a
stopped run goes on where it was. `report` prints Markdown tables of what the file holds."""

_EPILOG = """examples:
  fastfar experiment table5                            # trains and samples: hours on two cores
  fastfar experiment table5 report > table5.md
  fastfar experiment fewstep --help
"""
_FEWSTEP_EPILOG = """examples:
  fastfar experiment fewstep E0 --quick
  fastfar experiment fewstep E1 --samples 1000 --seeds 0 1
  fastfar experiment fewstep report > fewstep.md
  fastfar experiment fewstep E2 --tokens --checkpoint models/far_huge
"""
QUICK = {"samples": 40, "seeds": (0, 1), "conditions": 16, "draws": 32, "teacher_steps": 20}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command, and one for every experiment, to the parser of `fastfar`."""
    parser = subparsers.add_parser(
        "experiment",
        help="run an experiment of the project again",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    fewstep = names.add_parser(
        "fewstep",
        help="samplers with few head calls",
        description=_DESCRIPTION,
        epilog=_FEWSTEP_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = fewstep.add_argument
    add("part", nargs="*", metavar="PART", help="parts, in this order; or report (default: all)")
    add("--checkpoint", metavar="NAME", default="demo", help="name or folder (%(default)s)")
    add("--moments", metavar="FILE", type=Path, help="moment head in place of the checkpoint's")
    add("--conditions", metavar="N", type=int, default=256, help="of token metrics (%(default)s)")
    add("--draws", metavar="N", type=int, default=256, help="tokens for each (%(default)s)")
    add("--teacher-steps", metavar="T", type=int, default=100, help="of R (%(default)s)")
    add("--reference", metavar="DIR", type=Path, help="R's images, DIR/<seed>/*.npy, if drawn")
    add("--tokens", action="store_true", help="token metrics alone: no images, any checkpoint")
    add("--picture", metavar="FILE", type=Path, help="also the same seeds by its samplers (.png)")
    add_shared(fewstep, samples=5000)
    fewstep.set_defaults(run=run)
    for study in STUDIES.values():
        add_study(names, study)


def run(args: argparse.Namespace) -> int:
    """Run parts of `fewstep`, or print the tables; 0, or 130 after Ctrl-C."""
    parts = EXPERIMENTS[args.name]
    wanted = args.part or list(parts)
    if unknown := sorted(set(wanted) - {*parts, "report"}):
        raise ValueError(f"{args.name} has no part {unknown}; it has {[*parts, 'report']}")
    work = args.work or WORK
    quick = "-quick" if args.quick else ""
    output = args.output or work / f"{args.name}{quick}.jsonl"
    rows = Rows(output)
    if wanted == ["report"] and args.picture is None:
        print(report(args.name, parts, rows))
        return 0
    setting = _setting(args, work, output)
    with tqdm(bar_format="{desc}", disable=not sys.stderr.isatty()) as line:
        setting.tell = line.set_description_str
        try:
            for name in wanted:
                if name != "report":
                    run_part(args.name, parts[name], setting, rows)
            if args.picture is not None:
                save_png(args.picture, side_by_side(setting, SHOWN[args.name](setting)))
        except KeyboardInterrupt:
            return stopped(output, work)
    asked = {name: part for name, part in parts.items() if name in wanted or "report" in wanted}
    print(report(args.name, asked, rows))
    return 0


def _setting(args: argparse.Namespace, work: Path, output: Path) -> Setting:
    import fastfar  # not needed for a report

    numbers = {
        name: getattr(args, name)
        for name in ("samples", "seeds", "conditions", "draws", "teacher_steps")
    }
    if args.quick:
        numbers = QUICK
    numbers["seeds"] = tuple(numbers["seeds"])
    for seed in numbers["seeds"]:
        check_seed(seed)
    if numbers["samples"] < 40:
        raise ValueError(f"--samples {numbers['samples']}: give at least 40, better 5000")
    if numbers["conditions"] < 10 or numbers["draws"] < 4 or numbers["draws"] % 4:
        raise ValueError("--conditions must be at least 10 and --draws a multiple of 4")
    pipeline = fastfar.FARPipeline.from_pretrained(args.checkpoint)
    if args.moments is not None:
        pipeline.moments = MomentHead.load(args.moments)
    return Setting(
        pipeline,
        work,
        output,
        reference=args.reference,
        data=args.data,
        backend=args.backend,
        checkpoint=Path(args.checkpoint).name,
        images=not args.tokens,
        batch_size=args.batch_size,
        **numbers,
    )
