"""Tables as data, the numbers in them as text, and how they are shown: terminal, Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable

NONE = "-"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is aligned left, the others right unless they are words.

    Attributes:
        title: what it shows.
        header: names of the columns.
        lines: cells, as many as there are columns.
        notes: sentences to stand below it.
        words: columns that hold words.
        strong: lines to stand out.
    """

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    words: frozenset[int] = frozenset({0})
    strong: frozenset[int] = frozenset()


# --- numbers ---------------------------------------------------------------------------------


def duration(seconds: float | None) -> str:
    """Three digits and a unit, or a dash."""
    if seconds is None:
        return NONE
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1.0:
            return f"{digits(seconds * factor)} {unit}"
    return f"{digits(seconds * 1e9)} ns"


def share(value: float | None) -> str:
    """Per cent, or a dash."""
    return NONE if value is None else f"{100 * value:.1f} %"


def size(count: float | None) -> str:
    """Bytes in GiB or MiB."""
    if count is None:
        return NONE
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def rate(value: float | None) -> str:
    """FLOP/s or bytes/s with a prefix, without the unit."""
    if value is None:
        return NONE
    prefix, factor = next(
        ((p, f) for p, f in (("T", 1e12), ("G", 1e9), ("M", 1e6)) if value >= f), ("", 1.0)
    )
    return f"{digits(value / factor)} {prefix}"


def times(value: float | None) -> str:
    """A ratio."""
    return NONE if value is None else f"{digits(value)} x"


def digits(value: float) -> str:
    """At least three of them, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


# --- how a table is shown --------------------------------------------------------------------


def as_text(table: Table) -> str:
    """Columns under their names, without any package."""
    cells = [table.header, *table.lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(table.header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i in table.words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return "\n".join([*lines, *table.notes])


def as_markdown(table: Table) -> str:
    """A pipe table below a bold title, its notes as a paragraph."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    def strong(cells: Iterable[str]) -> str:
        return line(cell if cell == NONE else f"**{cell}**" for cell in cells)

    rule = ["---" if i in table.words else "---:" for i in range(len(table.header))]
    text = [f"**{table.title}**", "", line(table.header), line(rule)]
    text += [(strong if i in table.strong else line)(each) for i, each in enumerate(table.lines)]
    return "\n".join([*text, "", ". ".join(table.notes)] if table.notes else text)


def as_rich(table: Table) -> RichTable:
    """For rich's console; ImportError where rich is not installed."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.caption = Text("\n".join(table.notes)) if table.notes else None
    shown.caption_justify = "left"
    for i, name in enumerate(table.header):
        words = i in table.words
        shown.add_column(name, justify="left" if words else "right", no_wrap=not words)
    for i, line in enumerate(table.lines):
        red = any(cell.startswith("red") for cell in line)
        style = "red" if red else "bold" if i in table.strong else ""
        shown.add_row(*map(Text, line), style=style)
    return shown
