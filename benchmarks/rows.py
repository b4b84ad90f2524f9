"""Benchmark rows: each line of results/*.jsonl says on its own what was measured, and on what."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastfar
from fastfar import _native, backend

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """The commit of the working tree, with "+changes" where files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        folder = Path(__file__).parent
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("diff", "HEAD") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_name() -> str:
    """What the system calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def native_isa() -> str | None:
    """The instruction set that the native library runs on; None without a library."""
    return None if _native.reason() is not None else backend.native_library().selected


def environment() -> dict[str, Any]:
    """All that a row has to say beside its figures."""
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "fastfar": fastfar.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "native_isa": native_isa(),
        "threads": torch.get_num_threads(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
    }


def quantiles(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, tenth and ninetieth percentile of repeated times, with their number."""
    ranked = sorted(seconds)
    if len(ranked) == 1:
        low = high = ranked[0]
    else:
        low, *_, high = statistics.quantiles(ranked, n=10, method="inclusive")
    return {
        "median_s": statistics.median(ranked),
        "p10_s": low,
        "p90_s": high,
        "repeats": len(ranked),
    }


def matmul_peak(dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of PyTorch's own square product, best of a few: the yardstick of the same run."""
    a = torch.randn(size, size).to(dtype)
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:])


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a JSONL file; nothing in it is ever changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
