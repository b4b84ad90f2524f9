"""The linters, as tests: each is skipped, with the reason, where its tool is not installed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("tool", [["ruff", "check", "."], ["mypy"]], ids=lambda tool: tool[0])
def test_python(tool: list[str]) -> None:
    if importlib.util.find_spec(tool[0]) is None:
        pytest.skip(f"{tool[0]} is not installed")
    run(sys.executable, "-m", *tool)


def test_cpp_format() -> None:
    beside_python = str(Path(sys.executable).parent)
    tool = shutil.which("clang-format", path=beside_python) or shutil.which("clang-format")
    if tool is None:
        pytest.skip("clang-format is not installed")
    sources = [
        str(path)
        for folder in ("kernels", "tests/cpp")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".cc", ".h")
    ]
    assert sources
    run(tool, "--dry-run", "--Werror", *sources)
