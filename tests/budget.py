"""What a compiled kernel needs of a GPU, held against the hardware and the committed budget.

`compiled.py` fills the rows from binaries; kernels/gpu/budget.json holds those that were accepted.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

BUDGET = Path(__file__).resolve().parents[1] / "kernels" / "gpu" / "budget.json"

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
ARCHS = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": 942}
NVIDIA = ("sm_80", "sm_90", "sm_100")

# Limits of the hardware. CUDA C programming guide, table "Technical specifications per compute
# capability": shared memory of a block that may be asked for, registers of a block and a thread.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
REGISTER_FILE, REGISTERS_PER_THREAD, REGISTER_STEP = 64 * 1024, 255, 8
TENSOR_COLUMNS = 512  # of the tensor memory of sm_100

@dataclass(frozen=True)
class Row:
    """One specialisation of a kernel on one architecture, and what its binary needs.

    Attributes:
        op, kernel: the entry of LAUNCHES, and the function that it launches.
        number: counts the kernel's specialisations in the order of the entry's launches.
        dtype, arch: "fp32", "fp16", "bf16"; "sm_80", ...
        key: hash of the specialisation: types, alignment, constants, warps, stages.
        constants: the constants, readable.
        threads: of a block.
        registers: of a thread (AMD: vector registers).
        shared: bytes of shared memory.
        spills: bytes of the stack and of local memory.
        local: instructions that read or write local memory.
        products: tensor-core instructions.
        wanted: why there must be some; "" if they need not be.
        columns: of tensor memory.
    """

    op: str
    kernel: str
    number: int
    dtype: str
    arch: str
    key: str
    constants: str
    threads: int
    registers: int
    shared: int
    spills: int
    local: int
    products: int
    wanted: str
    columns: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.op}: {self.kernel} {self.number} ({self.constants}) {self.dtype} {self.arch}"


@dataclass(frozen=True)
class Budget:
    """The committed numbers, and the Triton that they were made with."""

    triton: str
    rows: list[Row]


# --- what is held against what ---------------------------------------------------------------


def hard_problems(row: Row) -> list[str]:
    """Why a kernel must not stay as it is, whatever the budget says; empty if it may."""
    found = []
    if row.spills or row.local:
        found.append(f"spills: {row.spills} bytes, {row.local} loads and stores of local memory")
    limit = SHARED_LIMIT[row.arch]
    if row.shared > limit:
        found.append(f"shared memory: {row.shared} bytes, {row.arch} has {limit}")
    allocated = math.ceil(row.registers / REGISTER_STEP) * REGISTER_STEP * row.threads
    if row.registers > REGISTERS_PER_THREAD or allocated > REGISTER_FILE:
        found.append(f"registers: {row.registers} x {row.threads} threads do not fit")
    if row.columns > TENSOR_COLUMNS:
        found.append(f"tensor memory: {row.columns} columns of {TENSOR_COLUMNS}")
    if row.wanted and not row.products:
        found.append(f"no tensor-core instruction: {row.wanted}")
    return [f"{row.name}: {problem}" for problem in found]


def budget_problems(rows: Sequence[Row], budget: Budget) -> list[str]:
    """Where kernels need more than was committed, or are not in the budget, or not launched."""
    committed = {identity(row): row for row in budget.rows}
    found = []
    for row in rows:
        allowed = committed.get(identity(row))
        if allowed is None:
            found.append(f"{row.name}: not in {BUDGET.name}; look at it, then run `make budget`")
            continue
        found += [
            f"{row.name}: {name} {getattr(row, name)}, the budget is {getattr(allowed, name)}"
            for name in ("threads", "registers", "shared", "columns")
            if getattr(row, name) > getattr(allowed, name)
        ]
        if allowed.products and not row.products:
            found.append(f"{row.name}: no tensor-core instruction, the budget has some")
    compiled = {identity(row) for row in rows}
    covered = {(row.op, row.dtype, row.arch) for row in rows}
    return found + [
        f"{row.name}: in {BUDGET.name}, but not launched any more; run `make budget`"
        for row in budget.rows
        if (row.op, row.dtype, row.arch) in covered and identity(row) not in compiled
    ]


def identity(row: Row) -> tuple[str, ...]:
    """What makes two rows stand for the same thing."""
    return row.op, row.kernel, row.dtype, row.arch, row.key


def read_budget(path: Path = BUDGET) -> Budget:
    """The committed budget; empty if there is no file."""
    if not path.is_file():
        return Budget("", [])
    data = json.loads(path.read_text(encoding="utf-8"))
    return Budget(data["triton"], [Row(**row) for row in data["rows"]])


def _order(row: Row) -> tuple[str, str, int, str, int]:
    return row.op, row.kernel, row.number, row.dtype, ARCHS[row.arch]


def write_budget(rows: Iterable[Row], version: str, path: Path = BUDGET) -> None:
    """Replace the file in one step; one line per row, so that a change reads well."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in sorted(rows, key=_order))
    text = f'{{"triton": {json.dumps(version)}, "rows": [\n{lines}\n]}}\n'
    json.loads(text)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line per kernel and dtype, a column per architecture."""
    cells: dict[tuple[str, str, int, str], dict[str, str]] = {}
    for row in rows:
        tiles = re.findall(r"\bB[A-Z]?(?:LOCK\w*)?=(\d+)", row.constants)
        spilled = f", spills {row.spills}" if row.spills or row.local else ""
        cells.setdefault((row.op, row.kernel, row.number, row.dtype), {})[row.arch] = (
            f"{'x'.join(tiles)} w{row.threads // (64 if row.arch == 'gfx942' else 32)}: "
            f"{row.registers} r, {row.shared / 1024:.3g} K, {row.products} p{spilled}"
        )
    archs = [arch for arch in ARCHS if any(row.arch == arch for row in rows)]
    lines = [
        "Tiles, warps: registers of a thread, KiB of shared memory, tensor-core instructions.",
        "",
        f"| op | kernel | dtype | {' | '.join(archs)} |",
        f"|---|---|---|{'---|' * len(archs)}",
    ]
    for (op, kernel, number, dtype), found in cells.items():
        each = " | ".join(found.get(arch, "-") for arch in archs)
        lines.append(f"| {op} | {kernel} {number} | {dtype} | {each} |")
    return "\n".join(lines)
