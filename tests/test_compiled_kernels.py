"""Every Triton kernel as machine code, within the hardware's limits and the committed budget.

A short list here; `make test-compile` takes every architecture and dtype.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from budget import (
    ARCHS,
    DTYPES,
    NVIDIA,
    Budget,
    Row,
    budget_problems,
    hard_problems,
    read_budget,
    table,
    write_budget,
)
from compiled import LAUNCHES, ROOT, TESTS, Measured, load_launches, measure, unusable

REASON = unusable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
EXAMPLES = TESTS / "triton" / "examples.py"

ROW = Row(
    op="op",
    kernel="kernel",
    number=1,
    dtype="bf16",
    arch="sm_90",
    key="0",
    constants="BM=64",
    threads=256,
    registers=255,
    shared=227 * 1024,
    spills=0,
    local=0,
    products=1,
    wanted="tl.dot in bf16",
    columns=512,
)


@pytest.fixture(scope="module")
def short() -> Measured:
    """Every kernel in bfloat16 for Hopper."""
    return measure([("sm_90", "bf16")])


@pytest.fixture(scope="module")
def examples() -> Measured:
    return measure([("sm_90", "bf16"), ("gfx942", "bf16")], source=EXAMPLES)


# --- the kernels -----------------------------------------------------------------------------


def test_every_kernel_compiles_within_the_limits_of_the_hardware(short: Measured) -> None:
    problems = [problem for row in short.rows for problem in hard_problems(row)]
    assert not short.failures + problems, "\n".join(short.failures + problems)
    assert {row.op for row in short.rows} == set(load_launches(LAUNCHES))


def test_no_kernel_is_left_out(short: Measured) -> None:
    """Functions called ..._kernel in kernels/gpu are launched by an entry of LAUNCHES."""
    written = {
        node.name
        for path in (ROOT / "kernels" / "gpu").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert written and {row.kernel for row in short.rows} == written


def test_the_committed_budget_is_kept(short: Measured) -> None:
    budget = read_budget()
    if short.triton != budget.triton:
        pytest.skip(f"made with Triton {budget.triton}, this is {short.triton}: limits only")
    problems = budget_problems(short.rows, budget)
    assert not problems, "\n".join(problems)


def test_the_budget_covers_the_grid_and_keeps_to_the_limits() -> None:
    rows = read_budget().rows
    covered = {(row.op, row.arch, row.dtype) for row in rows}
    wanted = {
        (op, arch, dtype) for op in load_launches(LAUNCHES) for arch in NVIDIA for dtype in DTYPES
    }
    assert covered == wanted, "run `make budget`"
    assert not [problem for row in rows for problem in hard_problems(row)]


# --- the proof itself ------------------------------------------------------------------------


def test_good_examples_pass(examples: Measured) -> None:
    rows = [row for row in examples.rows if row.op in ("product", "rows")]
    assert not [problem for row in rows for problem in hard_problems(replace(row, arch="sm_90"))]
    product, aligned, unaligned = (row for row in rows if row.arch == "sm_90")
    assert product.products > 0 and product.wanted == "tl.dot in bf16"
    assert product.constants == (
        "BM=64 BN=64 BK=32 PRECISION=ieee WITH_DOT=True no bias warps=4 stages=2"
    )
    assert (product.threads, product.shared) == (128, 16384)
    assert (aligned.number, unaligned.number) == (1, 2) and aligned.key != unaligned.key
    assert not aligned.wanted and not aligned.products
    assert next(row for row in rows if row.arch == "gfx942").products > 0


def test_bad_examples_are_caught(examples: Measured) -> None:
    spilling, without = (
        next(row for row in examples.rows if (row.op, row.arch) == (op, "sm_90"))
        for op in ("spilling", "without a dot")
    )
    assert spilling.spills > 0 and spilling.local > 0
    assert ["spills" in problem for problem in hard_problems(spilling)] == [True]
    (problem,) = hard_problems(without)
    assert problem.endswith("no tensor-core instruction: tl.dot in bf16")
    refused, raises = (
        [message for message in examples.failures if message.startswith(op)]
        for op in ("refused", "raises")
    )
    assert len(refused) == len(raises) == 2
    assert "does not compile" in refused[0] and "power of 2" in refused[0]
    assert "cannot be recorded" in raises[0]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, None),
        ({"spills": 8}, "spills: 8 bytes"),
        ({"local": 1}, "1 loads and stores"),
        ({"shared": 227 * 1024 + 1}, "shared memory"),
        ({"arch": "sm_80"}, "shared memory: 232448 bytes, sm_80 has 166912"),
        ({"threads": 512, "registers": 129}, "registers: 129 x 512"),
        ({"registers": 256, "threads": 32}, "registers"),
        ({"columns": 513}, "tensor memory"),
        ({"products": 0}, "no tensor-core instruction"),
        ({"products": 0, "wanted": ""}, None),
    ],
    ids=str,
)
def test_limits(changes: dict[str, object], found: str | None) -> None:
    problems = hard_problems(replace(ROW, **changes))  # type: ignore[arg-type]
    assert len(problems) == (found is not None)
    assert found is None or found in problems[0]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, None),
        ({"registers": 200, "shared": 0, "products": 7}, None),
        ({"registers": 256}, "registers 256, the budget is 255"),
        ({"shared": 300000}, "shared 300000"),
        ({"threads": 512}, "threads 512"),
        ({"products": 0}, "no tensor-core instruction"),
    ],
    ids=str,
)
def test_budget(changes: dict[str, object], found: str | None) -> None:
    problems = budget_problems(
        [replace(ROW, **changes)],  # type: ignore[arg-type]
        Budget("1", [ROW]),
    )
    assert len(problems) == (found is not None)
    assert found is None or found in problems[0]


def test_a_budget_that_is_not_of_these_kernels() -> None:
    changed = replace(ROW, key="1")
    new, gone = budget_problems([changed], Budget("1", [ROW]))
    assert "not in budget.json" in new and "not launched any more" in gone
    other = replace(ROW, dtype="fp16")
    assert not budget_problems([ROW], Budget("1", [ROW, other])), "was not compiled"


def test_the_file_of_the_budget(tmp_path: Path) -> None:
    path = tmp_path / "budget.json"
    assert read_budget(path) == Budget("", [])
    rows = [replace(ROW, arch=arch) for arch in reversed(NVIDIA)]
    write_budget(rows, "3.9.0", path)
    assert read_budget(path) == Budget("3.9.0", rows[::-1])
    assert len(path.read_text().splitlines()) == 5, "one line per row"
    write_budget([], "4", path)
    assert read_budget(path) == Budget("4", []) and list(tmp_path.iterdir()) == [path]


def test_the_table() -> None:
    spilled = replace(ROW, arch="sm_80", spills=16)
    lines = table([ROW, spilled, replace(ROW, arch="gfx942")]).splitlines()
    assert lines[2] == "| op | kernel | dtype | sm_80 | sm_90 | gfx942 |"
    assert lines[4] == (
        "| op | kernel 1 | bf16 | 64 w8: 255 r, 227 K, 1 p, spills 16 | 64 w8: 255 r, 227 K, 1 p "
        "| 64 w4: 255 r, 227 K, 1 p |"
    )
    assert list(ARCHS) == ["sm_80", "sm_90", "sm_100", "gfx942"]


def test_specialised_as_triton_s_run_time_does() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(TESTS / "triton" / "run_time.py")],
        env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
