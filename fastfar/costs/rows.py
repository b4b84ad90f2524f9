"""Benchmark rows: each line of a JSONL file says on its own what was measured, and on what."""

from __future__ import annotations

import datetime
import json
import os
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

from fastfar import _native, backend
from fastfar._version import __version__


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


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """All that a row has to say beside its figures."""
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "fastfar": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "native_isa": native_isa(),
        "threads": torch.get_num_threads(),
        "gpu": backend.gpu_description(device),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def quantiles(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and percentiles of repeated times, with their number."""
    ranked = sorted(seconds)
    cuts = ranked * 19 if len(ranked) == 1 else statistics.quantiles(
        ranked, n=20, method="inclusive"
    )
    return {
        "median_s": statistics.median(ranked),
        "p5_s": cuts[0],
        "p10_s": cuts[1],
        "p90_s": cuts[17],
        "p95_s": cuts[18],
        "repeats": len(ranked),
    }


def matmul_peak(
    dtype: torch.dtype, size: int = 1024, repeats: int = 5, device: torch.device | str = "cpu"
) -> float:
    """FLOP/s of PyTorch's own square product, best of a few: the yardstick of the same run."""
    a = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = now(a.device)
        a @ a
        times.append(now(a.device) - start)
    return 2 * size**3 / min(times[1:])


def now(device: torch.device) -> float:
    """Seconds of a clock, read when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a JSONL file, all of them in one write; nothing in it is ever changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    with open(handle, "ab", buffering=0) as file:
        file.write(text.encode())


# --- text ------------------------------------------------------------------------------------


def share(value: float | None) -> str:
    """Per cent, or a dash."""
    return "-" if value is None else f"{100 * value:.1f}%"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1.0:
            return f"{seconds * factor:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds * 1e9:.3g} ns"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns under their names; the first is aligned left, the others right."""
    cells = [list(header), *(list(line) for line in lines)]
    widths = [max(len(line[i]) for line in cells if i < len(line)) for i in range(len(header))]
    rows = []
    for line in cells:
        parts = [line[0].ljust(widths[0])]
        parts += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=False)]
        rows.append("  ".join(parts).rstrip())
    return "\n".join(rows)
