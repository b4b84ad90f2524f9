"""What `fastfar doctor` shows, ready for JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import Any

import torch

from fastfar import _native, _packages, backend
from fastfar._version import __version__
from fastfar.cli._plans import PLANS, plan_named
from fastfar.ops import _attention
from fastfar.plan import SamplingPlan


def _native_report(settings: dict[str, dict[str, str | None]]) -> dict[str, str | int | None]:
    """The native library: file, selected set and why, dtype, threads; its problem (None: none)."""
    found: dict[str, str | int | None] = dict.fromkeys(("path", "isa", "why", "dtype", "threads"))
    if (reason := _native.reason()) is not None:
        return {**found, "problem": reason}
    found["path"] = str(_native.library_path())
    if (problem := settings["FASTFAR_ISA"]["problem"]) is not None:
        return {**found, "problem": problem}
    a_MK = torch.arange(-24, 24, dtype=torch.float32).reshape(3, 16)  # exact in bfloat16
    c_MN, isa = backend.native_library().selftest(a_MK, a_MK.T)
    passed = torch.equal(c_MN, a_MK @ a_MK.T)
    forced = settings["FASTFAR_ISA"]["value"] not in (None, "", "auto")
    return {
        **found,
        "isa": isa,
        "why": f"FASTFAR_ISA={isa}" if forced else "the fastest that processor and build offer",
        "dtype": str(backend.best_dtype("native", "cpu")).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "problem": None if passed else "its self-test gives a wrong result",
    }


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None


def _plans() -> dict[str, dict[str, Any]]:
    """Of the demo: T of every outer step, head calls per token, whether it is approximate."""
    config = backend.DEMO / "config.json"
    if not config.is_file():
        return {}
    own = SamplingPlan.from_dict(json.loads(config.read_text(encoding="utf-8"))["plan"])
    found = {"its own": own, **{name: plan_named(name, own) for name in PLANS}}
    return {
        name: {
            "diffusion_steps": plan.diffusion_steps,
            "head_calls": plan.head_calls,
            "approximate": plan.is_approximate,
        }
        for name, plan in found.items()
    }


def report() -> dict[str, Any]:
    """All that `fastfar doctor` shows, ready for JSON; problems are reported, not raised."""
    settings = backend.settings_report()
    demo = backend.DEMO / "model.safetensors"
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "fastfar": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": backend.cpu_description().get("model name") or platform.processor() or "unknown",
        "cores": len(affinity(0)) if affinity is not None else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpu": {"devices": gpus, "problem": _packages.cuda_reason()},
        "demo": {
            "path": str(backend.DEMO) if demo.is_file() else None,
            "problem": None if demo.is_file() else f"no checkpoint at {demo}",
        },
        "native": _native_report(settings),
        "instruction_sets": backend.instruction_sets(),
        "backends": backend.backends(),
        "attention": _attention.report("cpu" if _packages.cuda_reason() else "cuda"),
        "plans": _plans(),
        "packages": backend.optional_packages(),
        "settings": settings,
    }
