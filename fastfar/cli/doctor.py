"""`fastfar doctor`: what this machine and this installation offer, and why the rest is off."""

from __future__ import annotations

import argparse
import json
from typing import Any

HELP = "show version, hardware, back ends and optional packages, with the reason each is off"

_EXAMPLE = """\
examples:
  fastfar doctor            a table to read
  fastfar doctor --json     the same for a script; exit status 1 when a setting is wrong
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help=HELP,
        description=HELP[0].upper() + HELP[1:] + ".",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report. Returns 0, or 1 when an environment variable cannot be served."""
    from fastfar.cli import _report

    report = _report.report()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print_sections(_sections(report))
    return int(any(setting["problem"] for setting in report["settings"].values()))


def _sections(report: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """The report as titled rows of (name, text)."""
    gpu, demo, native = report["gpu"], report["demo"], report["native"]
    memory = report["memory_gib"]
    machine = {
        "fastfar": report["fastfar"],
        "python": report["python"],
        "torch": report["torch"],
        "system": report["system"],
        "cpu": f"{report['cpu']}, {report['cores']} cores, {report['threads']} threads used",
        "memory": "unknown" if memory is None else f"{memory} GiB",
        "gpu": ", ".join(gpu["devices"]) or f"none: {gpu['problem']}",
        "demo model": demo["path"] or f"missing: {demo['problem']}",
        "native library": _native_text(native),
    }
    settings = {
        name: setting["problem"] or setting["value"] or "not set"
        for name, setting in report["settings"].items()
    }
    return {
        "This machine": list(machine.items()),
        "Instruction sets": _states(report["instruction_sets"]),
        "Back ends": _states(report["backends"]),
        "Attention": [*_attention_choices(report), *_states(report["attention"]["backends"])],
        "Sampling plans of the demo": _plans(report["plans"]),
        "Optional packages": _states(report["packages"]),
        "Environment variables": list(settings.items()),
    }


def _native_text(native: dict[str, str | int | None]) -> str:
    if native["problem"] is not None:
        return f"off: {native['problem']}"
    return (
        f"{native['path']}, runs on {native['isa']} ({native['why']}) in {native['dtype']} by "
        f"default, on {native['threads']} threads; self-test passed"
    )


def _attention_choices(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What "auto" takes; the native back end has an attention of its own."""
    auto = report["attention"]["auto"]
    rows = [(f"auto, {use}", f"{auto[use]['name']} ({auto[use]['why']})") for use in auto]
    if report["gpu"]["problem"] is not None and report["backends"]["native"] is None:
        rows[0] = ("auto, sampling", "the native back end's own")
    return rows


def _plans(plans: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    for name, plan in plans.items():
        few, most = min(plan["diffusion_steps"]), max(plan["diffusion_steps"])
        steps = str(few) if few == most else f"{few}..{most}"
        mode = "the published solver"
        if plan["approximate"]:
            mode = "approximate: another solver (quality in benchmarks/FEWSTEP.md)"
        rows.append((name, f"{plan['head_calls']} head calls per token, T = {steps}; {mode}"))
    return rows


def _states(reasons: dict[str, str | None]) -> list[tuple[str, str]]:
    return [
        (name, "yes" if reason is None else f"off: {reason}") for name, reason in reasons.items()
    ]


def _print_sections(sections: dict[str, list[tuple[str, str]]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        width = max(len(name) for rows in sections.values() for name, _ in rows)
        for title, rows in sections.items():
            print(title)
            for name, text in rows:
                print(f"  {name:<{width}}  {text}")
        return
    console = Console(highlight=False)
    for title, rows in sections.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in rows:
            style = "green" if text == "yes" else "dim" if text.startswith("off: ") else ""
            table.add_row(Text(f"  {name}"), Text(text, style=style))
        console.print(table)
