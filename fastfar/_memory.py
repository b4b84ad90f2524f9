"""Free memory: the part of `fastfar.backend` that asks the system and the GPU for it."""

from __future__ import annotations

import re
from pathlib import Path

import torch


def available_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that can be taken on a device now, a container's limit respected; None: not known."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    known = [] if found is None else [int(found[1]) * 1024]
    limit, used = _text("/sys/fs/cgroup/memory.max"), _text("/sys/fs/cgroup/memory.current")
    if limit.strip().isdecimal() and used.strip().isdecimal():
        stat = _text("/sys/fs/cgroup/memory.stat")
        cached = re.search(r"^inactive_file (\d+)", stat, re.MULTILINE)  # given up when needed
        known.append(int(limit) - int(used) + (0 if cached is None else int(cached[1])))
    return min(known, default=None)


def _text(path: str) -> str:
    """Of a file of the system; "" where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def resident_bytes(highest: bool = False) -> int | None:
    """Of this process: what it holds now, or the highest since `forget_highest`; None: unknown."""
    name = "VmHWM" if highest else "VmRSS"
    found = re.search(rf"^{name}:\s+(\d+) kB", _text("/proc/self/status"), re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def forget_highest() -> bool:
    """Let the highest of `resident_bytes` start anew; False where the system does not do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
