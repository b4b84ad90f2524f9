"""`fastfar bench report`, `--compare`, `--base`: what becomes of rows."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastfar.bench import base as bases
from fastfar.bench import compare as comparing
from fastfar.bench import plots, rows
from fastfar.bench import report as reports
from fastfar.bench.compare import Comparison
from fastfar.bench.rows import Row
from fastfar.bench.tables import Table, as_rich, as_text


def report(args: argparse.Namespace) -> int:
    """Tables, CSV and pictures of rows in files."""
    if not args.files:
        raise ValueError("report needs a file of rows: fastfar bench report FILE.jsonl")
    found = [row for path in args.files for row in rows.read(path)]
    chosen = reports.of_run(found, args.run_id)
    if args.quality is not None:
        chosen = reports.with_quality(chosen, rows.read_lines(args.quality))
    if args.csv is not None:
        reports.write_csv(args.csv, chosen)
        _say(f"{len(chosen)} rows in {args.csv}")
    if args.plots is not None:
        _say(f"pictures: {', '.join(map(str, plots.save_all(chosen, args.plots)))}")
    if args.json:
        print(json.dumps([row.to_dict() for row in chosen], indent=2))
    elif args.markdown:
        print(reports.markdown(chosen), end="")
    else:
        show(chosen)
    return 0


def compare(args: argparse.Namespace) -> int:
    """Two files of rows, A and B."""
    a, b = args.compare
    _verdicts(args, comparing.compare_files(a, b, margin=args.margin))
    return 0


def base(args: argparse.Namespace) -> int:
    """Another commit (A) beside the working tree (B), in turns; 1 where a result is wrong."""
    if args.bench_mode in ("report", "memory"):
        raise ValueError(f"--base compares times, and {args.bench_mode} takes none")
    if args.resume or args.trace is not None:
        raise ValueError("--base starts afresh and traces nothing: leave --resume and --trace out")
    sides = bases.measure(args.base, _passed_on(args.arguments), _say)
    found = [row for side in sides for row in side]
    if args.save is not None:
        rows.append(args.save, found)
        _say(f"{len(found)} rows added to {args.save}")
    _verdicts(args, comparing.compare(*sides, margin=args.margin, in_turns=True))
    return int(any(row.gate == "red" for row in found))


def in_turns(args: argparse.Namespace, command: Callable[[argparse.Namespace], int]) -> int:
    """A command as one of the two processes of --base."""
    with bases.turns(args.turns):
        return command(args)


def _passed_on(arguments: Sequence[str]) -> list[str]:
    """The arguments of `fastfar bench` without those that are for this process alone."""
    parser = argparse.ArgumentParser(add_help=False)
    for name in ("--base", "--save", "--csv", "--plots", "--margin"):
        parser.add_argument(name)
    for name in ("--json", "--markdown"):
        parser.add_argument(name, action="store_true")
    start = list(arguments).index("bench") + 1
    return parser.parse_known_args(list(arguments[start:]))[1]


# --- printing --------------------------------------------------------------------------------


def show(found: Sequence[Row]) -> None:
    """All tables of the rows of one run."""
    print(reports.heading(found))
    show_tables(reports.tables(found))


def show_tables(tables: Iterable[Table]) -> None:
    """With rich where it is installed; as wide as they are where nobody looks."""
    try:
        from rich.console import Console
    except ImportError:
        for table in tables:
            print(f"\n{as_text(table)}")
        return
    console = Console(highlight=False)
    for table in tables:
        if not console.is_terminal:  # nothing to fit into
            needed = max(map(len, as_text(table).splitlines())) + 2 * len(table.header) + 2
            console = Console(highlight=False, width=needed)
        console.print(as_rich(table))


def _verdicts(args: argparse.Namespace, found: Sequence[Comparison]) -> None:
    if args.json:
        print(json.dumps([_plain(each) for each in found], indent=2))
    else:
        show_tables([reports.comparison(found)])


def _plain(each: Comparison) -> dict[str, Any]:
    op, subject, batch, shape = each.row.key
    return {
        "op": op,
        "subject": subject,
        "batch": batch,
        "shape": shape,
        "verdict": each.verdict,
        "text": each.text,
        "ratio": None if each.ratio is None else dataclasses.asdict(each.ratio),
        "raw_ratio": each.raw,
        "by_peak": each.by_peak,
        "reasons": each.reasons,
        "remarks": each.remarks,
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

