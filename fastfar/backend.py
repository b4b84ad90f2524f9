"""Which back ends, instruction sets and optional packages there are, and why others are off.

The only file that probes hardware, looks for optional packages or reads environment variables.
What is asked for and cannot be served is a ValueError that says why; only "auto" chooses.

FASTFAR_BACKEND         auto, reference, torch, native, triton: what backend="auto" means
FASTFAR_ISA             auto, scalar, avx2, avx512, avx512_bf16, amx: of the native library
FASTFAR_ATTENTION       auto, sdpa, flash, xformers: implementation of attention
FASTFAR_THREADS         number of CPU threads (PyTorch's and the native library's)
FASTFAR_LOG             0 silent, 1 choices with their reasons, 2 details; on standard error
FASTFAR_REQUIRE_NATIVE  read by setup.py: 1 makes a failed native build an error
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from fastfar import _native
from fastfar._version import __version__

BACKENDS = ("reference", "torch", "native", "triton")
INSTRUCTION_SETS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
ATTENTIONS = ("sdpa", "flash", "xformers")
DEMO = Path(__file__).resolve().parent / "assets" / "demo"

_CHOICES = {
    "FASTFAR_BACKEND": ("auto", *BACKENDS),
    "FASTFAR_ISA": ("auto", *INSTRUCTION_SETS),
    "FASTFAR_ATTENTION": ("auto", *ATTENTIONS),
    "FASTFAR_THREADS": ("auto", "a whole number from 1"),
    "FASTFAR_LOG": ("0", "1", "2"),
}
# name -> (module, how to get it)
_PACKAGES = {
    "flash_attn": ("flash_attn", "pip install 'fastfar[flash]' (CUDA only)"),
    "xformers": ("xformers.ops", "pip install 'fastfar[xformers]' (CUDA only)"),
    "triton": ("triton", "pip install 'fastfar[triton]'"),
    "apex": ("apex", "build NVIDIA apex from source; PyPI's apex is another project"),
    "huggingface_hub": ("huggingface_hub", "pip install 'fastfar[hub]'"),
    "tensorboard": ("tensorboard", "pip install 'fastfar[train]'"),
    "torch_fidelity": ("torch_fidelity", "pip install 'fastfar[eval]'"),
    "matplotlib": ("matplotlib", "pip install 'fastfar[bench]'"),
    "nvtx": ("nvtx", "pip install nvtx"),
}
_NEEDS_CUDA = ("flash_attn", "xformers", "apex")

_log = logging.getLogger("fastfar")


def _setting(name: str) -> str:
    """Value of an environment variable; unset and empty mean the default. ValueError if unknown."""
    choices = _CHOICES[name]
    value = os.environ.get(name, "").strip().lower() or choices[0]
    valid = value in choices
    if name == "FASTFAR_THREADS":
        valid = value == "auto" or (value.isascii() and value.isdecimal() and int(value) >= 1)
    if not valid:
        raise ValueError(f"{name}={value} is not known; allowed: {', '.join(choices)}")
    return value


# --- the machine -----------------------------------------------------------------------------


@functools.cache
def _cpu_description() -> dict[str, str]:
    """First processor of /proc/cpuinfo, lower-case keys; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {key.strip().lower(): value.strip() for key, value in lines}


def _cuda_reason() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "no CUDA device (this PyTorch is a CPU build)"
    return "no CUDA device"


def instruction_sets() -> dict[str, str | None]:
    """Instruction sets of this CPU, slowest first: None = usable, else the reason it is not.

    The native library is asked where there is one; else Linux, which lists what it has enabled.
    """
    if _native.reason() is None:
        return _native.load().instruction_sets()
    flags = set(_cpu_description().get("flags", "").split())
    needs = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl"},
        "avx512_bf16": {"avx512_bf16"},
        "amx": {"amx_tile", "amx_bf16"},
    }
    result: dict[str, str | None] = {"scalar": None}
    needed: set[str] = set()
    for name, added in needs.items():
        needed = needed | added
        missing = sorted(needed - flags)
        result[name] = f"not reported by this system: {', '.join(missing)}" if missing else None
    return result


def optional_packages() -> dict[str, str | None]:
    """Optional packages: None = imports and can work here, else the reason it cannot."""
    return {name: _package_reason(name) for name in _PACKAGES}


@functools.cache
def _package_reason(name: str) -> str | None:
    module, remedy = _PACKAGES[name]
    if importlib.util.find_spec(name) is None:
        return f"not installed; {remedy}"
    if name in _NEEDS_CUDA and (no_cuda := _cuda_reason()) is not None:
        return no_cuda
    try:
        importlib.import_module(module)
        if name == "apex":
            if importlib.util.find_spec("apex.multi_tensor_apply") is None:
                return f"installed, but not NVIDIA's apex; {remedy}"
            importlib.import_module("apex.optimizers")
            importlib.import_module("amp_C")  # its CUDA extension, without which FusedAdam raises
    except Exception as error:  # a broken binary package raises errors of any type
        return f"installed, but does not import: {type(error).__name__}: {error}"
    return None


@functools.cache
def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors: a mode for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


@functools.cache
def architecture(device: torch.device | str) -> int:
    """Of a GPU: 10 major + minor (90 is Hopper); AMD's gfx942 is 942, gfx90a 910. 0 for a CPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return 0
    if torch.version.hip is not None:
        name = str(torch.cuda.get_device_properties(device).gcnArchName)
        number = name.split(":")[0].removeprefix("gfx")
        return int(number) if number.isdecimal() else 910
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# --- choices ---------------------------------------------------------------------------------


def native_library() -> _native.NativeLibrary:
    """The native library, with FASTFAR_ISA selected where that is set.

    Raises ValueError when the library is missing or cannot serve FASTFAR_ISA.
    """
    choice = _setting("FASTFAR_ISA")
    if (missing := _native.reason()) is not None:
        raise ValueError(f"FASTFAR_ISA={choice} cannot be served: {missing}")
    library = _native.load()
    if choice != "auto":
        try:
            library.select(choice)
        except ValueError as error:
            raise ValueError(f"FASTFAR_ISA={choice}: {error}") from error
    return library


def backends() -> dict[str, str | None]:
    """Back ends: None = usable, else the reason it is off."""
    triton = _package_reason("triton") or (None if interpreting() else _cuda_reason())
    return {"reference": None, "torch": None, "native": _native.reason(), "triton": triton}


def resolve(
    name: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    native_reason: str | None = None,
) -> str:
    """The back end that `name` means on `device`.

    "auto" is FASTFAR_BACKEND; where that is not set either, "native" on a CPU if the library is
    there and takes dtype and model, else "torch".

    Also applies FASTFAR_THREADS, FASTFAR_LOG and FASTFAR_ISA, and checks the other variables, so
    that none is ignored in silence.

    Args:
        name: "auto" or one of `BACKENDS`.
        device: where the model is.
        dtype: to compute in; None leaves it to the back end.
        native_reason: why the native kernels do not take the model; None if they do.

    Raises:
        ValueError: unknown name, back end or device not available, or one that cannot run this.
    """
    configure()
    device = torch.device(device)
    unfit = _native_unfit(device, dtype, native_reason)
    chosen, source = _choose(name, unfit)
    if device.type == "cuda" and (reason := _cuda_reason()) is not None:
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}. Use device 'cpu'")
    _log.info("back end %s on %s (%s)", chosen, device, source)
    return chosen


def _native_unfit(
    device: torch.device, dtype: torch.dtype | None, native_reason: str | None
) -> str | None:
    """Why the native back end, if it is there, cannot run this; None if it can."""
    if device.type != "cpu":
        return f"it runs on the CPU, the model is on {device}"
    if dtype not in (None, *_native.DTYPES):
        return f"it computes in float32 or bfloat16, not in {dtype}"
    return native_reason


def _choose(name: str, unfit: str | None = None) -> tuple[str, str]:
    """The back end that `name` means, and why that one. ValueError when it is off.

    unfit: why "native" cannot run what is to be run.
    """
    source = "backend"
    if name == "auto":
        name, source = _setting("FASTFAR_BACKEND"), "FASTFAR_BACKEND"
    state = backends()
    state["native"] = state["native"] or unfit
    if name == "auto":
        if state["native"] is None:
            return "native", "auto"
        return "torch", f"auto; native is off: {state['native']}"
    if name not in state:
        raise ValueError(f"{source}={name!r} is not known; allowed: auto, {', '.join(state)}")
    if (reason := state[name]) is not None:
        usable = ", ".join(each for each in state if state[each] is None)
        raise ValueError(f"{source}={name!r} cannot be used: {reason}. Use auto, {usable}")
    return name, source


def attention() -> str:
    """The implementation of attention; ValueError when FASTFAR_ATTENTION cannot be served."""
    choice = _setting("FASTFAR_ATTENTION")
    if choice in ("auto", "sdpa"):
        return "sdpa"
    package = "flash_attn" if choice == "flash" else choice
    reason = _package_reason(package) or f"attention through {package} is not written yet"
    raise ValueError(f"FASTFAR_ATTENTION={choice} cannot be used: {reason}. Use auto or sdpa")


def best_dtype(backend: str, device: torch.device | str) -> torch.dtype:
    """The compute dtype that a back end is fastest in, of those that hold the model's precision.

    bfloat16 where the device multiplies it natively (CPU: AMX or AVX512_BF16; CUDA: 8.0 and newer),
    else float32. For "native" the instruction set that is selected counts, not the fastest one.
    "reference" is always float32. Raises ValueError for an unknown back end, or for "native"
    where it is off.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; allowed: {', '.join(BACKENDS)}")
    device = torch.device(device)
    if backend == "reference":
        return torch.float32
    if backend == "native":
        fast = native_library().selected in ("avx512_bf16", "amx")
        return torch.bfloat16 if fast else torch.float32
    if device.type == "cuda" and torch.cuda.is_available():
        modern = torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if modern else torch.float32
    if device.type == "cpu" and instruction_sets()["avx512_bf16"] is None:
        return torch.bfloat16  # AMX includes it
    return torch.float32


def configure() -> None:
    """Apply FASTFAR_LOG and FASTFAR_THREADS; check all variables. Raises ValueError."""
    level = _setting("FASTFAR_LOG")
    _apply_log(level)
    _apply_threads(_setting("FASTFAR_THREADS"))
    attention()
    if _setting("FASTFAR_ISA") != "auto":
        native_library()


@functools.cache
def _apply_log(level: str) -> None:
    if level != "0":
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("fastfar: %(message)s"))
        _log.addHandler(handler)
        _log.setLevel(logging.INFO if level == "1" else logging.DEBUG)


@functools.cache
def _apply_threads(value: str) -> None:
    if value != "auto":
        torch.set_num_threads(int(value))


# --- for `fastfar doctor` --------------------------------------------------------------------


def _settings_report() -> dict[str, dict[str, str | None]]:
    """Each variable with its value (None = not set) and its problem (None = fine)."""
    checks: dict[str, Any] = {
        "FASTFAR_BACKEND": lambda: _choose("auto"),
        "FASTFAR_ISA": lambda: _setting("FASTFAR_ISA") == "auto" or native_library(),
        "FASTFAR_ATTENTION": attention,
        "FASTFAR_THREADS": lambda: _setting("FASTFAR_THREADS"),
        "FASTFAR_LOG": lambda: _setting("FASTFAR_LOG"),
    }
    report: dict[str, dict[str, str | None]] = {}
    for name, check in checks.items():
        problem = None
        try:
            check()
        except ValueError as error:
            problem = str(error)
        report[name] = {"value": os.environ.get(name), "problem": problem}
    return report


def _native_report(settings: dict[str, dict[str, str | None]]) -> dict[str, str | int | None]:
    """The native library: file, selected set and why, dtype, threads; its problem (None: none)."""
    found: dict[str, str | int | None] = dict.fromkeys(("path", "isa", "why", "dtype", "threads"))
    if (reason := _native.reason()) is not None:
        return {**found, "problem": reason}
    found["path"] = str(_native.library_path())
    if (problem := settings["FASTFAR_ISA"]["problem"]) is not None:
        return {**found, "problem": problem}
    a_MK = torch.arange(-24, 24, dtype=torch.float32).reshape(3, 16)  # exact in bfloat16
    c_MN, isa = native_library().selftest(a_MK, a_MK.T)
    passed = torch.equal(c_MN, a_MK @ a_MK.T)
    forced = _setting("FASTFAR_ISA") != "auto"
    return {
        **found,
        "isa": isa,
        "why": f"FASTFAR_ISA={isa}" if forced else "the fastest that processor and build offer",
        "dtype": str(best_dtype("native", "cpu")).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "problem": None if passed else "its self-test gives a wrong result",
    }


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None


def report() -> dict[str, Any]:
    """All that `fastfar doctor` shows, ready for JSON; problems are reported, not raised."""
    settings = _settings_report()
    if settings["FASTFAR_THREADS"]["problem"] is None:
        _apply_threads(_setting("FASTFAR_THREADS"))
    demo = DEMO / "model.safetensors"
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "fastfar": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_description().get("model name") or platform.processor() or "unknown",
        "cores": len(affinity(0)) if affinity is not None else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpu": {"devices": gpus, "problem": _cuda_reason()},
        "demo": {
            "path": str(DEMO) if demo.is_file() else None,
            "problem": None if demo.is_file() else f"no checkpoint at {demo}",
        },
        "native": _native_report(settings),
        "instruction_sets": instruction_sets(),
        "backends": backends(),
        "packages": optional_packages(),
        "settings": settings,
    }
