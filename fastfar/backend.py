"""Which back ends, instruction sets and optional packages there are, and why others are off.

The only file that probes hardware, looks for optional packages (in its part `_packages.py`) or
reads environment variables; `_memory.py` is its part that asks for free memory.
What is asked for and cannot be served is a ValueError that says why; only "auto" chooses.

FASTFAR_BACKEND         auto, reference, torch, native, triton: what backend="auto" means
FASTFAR_ISA             auto, scalar, avx2, avx512, avx512_bf16, amx: of the native library
FASTFAR_ATTENTION       auto or a back end of attention: sdpa, sdpa_flash, ..., see ATTENTIONS
FASTFAR_THREADS         number of CPU threads (PyTorch's and the native library's)
FASTFAR_LOG             0 silent, 1 choices with their reasons, 2 details; on standard error
FASTFAR_REQUIRE_NATIVE  read by setup.py: 1 makes a failed native build an error
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastfar import _native
from fastfar._memory import available_memory as available_memory
from fastfar._packages import cuda_reason as _cuda_reason
from fastfar._packages import optional_packages as optional_packages
from fastfar._packages import package_reason as _package_reason
from fastfar._packages import package_reason as package_reason

BACKENDS = ("reference", "torch", "native", "triton")
INSTRUCTION_SETS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
# Back ends of attention and the optional package that each needs; fastfar/ops/_attention.py.
ATTENTIONS: dict[str, str | None] = {
    "sdpa": None,  # of PyTorch's kernels the one that PyTorch chooses
    "sdpa_flash": None,
    "sdpa_cudnn": None,
    "sdpa_efficient": None,
    "sdpa_math": None,
    "flash_attn_2": "flash_attn",
    "flash_attn_3": "flash_attn_3",
    "flash_attn_4": "flash_attn_4",
    "xformers": "xformers",
}
DEMO = Path(__file__).resolve().parent / "assets" / "demo"

_CHOICES = {
    "FASTFAR_BACKEND": ("auto", *BACKENDS),
    "FASTFAR_ISA": ("auto", *INSTRUCTION_SETS),
    "FASTFAR_ATTENTION": ("auto", *ATTENTIONS),
    "FASTFAR_THREADS": ("auto", "a whole number from 1"),
    "FASTFAR_LOG": ("0", "1", "2"),
}

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
def cpu_description() -> dict[str, str]:
    """First processor of /proc/cpuinfo, lower-case keys; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {key.strip().lower(): value.strip() for key, value in lines}


def instruction_sets() -> dict[str, str | None]:
    """Instruction sets of this CPU, slowest first: None = usable, else the reason it is not.

    The native library is asked where there is one; else Linux, which lists what it has enabled.
    """
    if _native.reason() is None:
        return _native.load().instruction_sets()
    flags = set(cpu_description().get("flags", "").split())
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


@functools.cache
def nvtx() -> tuple[Callable[[str], object], Callable[[], object]] | None:
    """push(name) and pop() of NVTX ranges: the nvtx package's, else PyTorch's; None without CUDA.

    The package's need no CUDA; where no profiler listens they do nothing.
    """
    if _package_reason("nvtx") is None:
        package = importlib.import_module("nvtx")
        return package.push_range, package.pop_range
    if _cuda_reason() is None:
        return torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop
    return None


def require_package(name: str, option: str) -> None:
    """ValueError, with the reason, where option=name was asked for and the package is off."""
    if (reason := _package_reason(name)) is not None:
        raise ValueError(f"{option}={name!r} cannot be used: {reason}. Use {option}='torch'")


@functools.cache
def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors: a mode for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


class Launched(NamedTuple):
    """What torchrun tells a process: its number, how many there are; the same on the machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def launched() -> Launched:
    """How torchrun started this process; (0, 1, 0, 1) if it did not.

    Whoever sets these by hand may leave out LOCAL_WORLD_SIZE: all are then on one machine.
    """
    values = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if not all(map(str.isdecimal, values)):
        return Launched(0, 1, 0, 1)
    rank, size, local_rank = map(int, values)
    local_size = os.environ.get("LOCAL_WORLD_SIZE", "")
    return Launched(rank, size, local_rank, int(local_size) if local_size.isdecimal() else size)


def architecture(device: torch.device | str) -> int:
    """Of a GPU: 10 major + minor (90 is Hopper); AMD's gfx942 is 942, gfx90a 910. 0 for a CPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return 0
    described = _described.get()
    return _probe_architecture(device) if described is None else described


@functools.cache
def _probe_architecture(device: torch.device) -> int:
    if torch.version.hip is not None:
        name = str(torch.cuda.get_device_properties(device).gcnArchName)
        number = name.split(":")[0].removeprefix("gfx")
        return int(number) if number.isdecimal() else 910
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def gpu_description(device: torch.device | str) -> dict[str, Any] | None:
    """Name, memory, driver side of a GPU, for a benchmark's row; None for a CPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "architecture": architecture(device),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "runtime": torch.version.cuda or torch.version.hip,
        "triton": _version("triton"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


_described: ContextVar[int | None] = ContextVar("fastfar_gpu", default=None)


@contextmanager
def described_gpu(arch: int) -> Iterator[None]:
    """Take every CUDA device inside for one of this architecture.

    For launches that are recorded on fake tensors (proofs, cost model), never for a run.
    """
    token = _described.set(arch)
    try:
        yield
    finally:
        _described.reset(token)


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
    there and takes dtype and model, "triton" on a CUDA device if Triton is there and takes the
    dtype, else "torch".

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
    unfit = {
        "native": _native_unfit(device, dtype, native_reason),
        "triton": _triton_unfit(device, dtype),
    }
    chosen, source = _choose(name, unfit, "triton" if device.type == "cuda" else "native")
    if device.type == "cuda" and (reason := _cuda_reason()) is not None:
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}. Use device 'cpu'")
    _log.info("back end %s on %s (%s)", chosen, device, source)
    return chosen


def by_device(name: str = "auto") -> dict[str, str]:
    """The back end of a module of `fastfar.nn` by the type of its input's device; "" is any other.

    "auto" is FASTFAR_BACKEND; where that is not set either, "triton" on CUDA devices if it is
    usable, else "torch" ("native", if asked for, computes gradients no faster than PyTorch).

    Raises:
        ValueError: unknown name, or a back end that is off or has no modules ("reference").
    """
    configure()
    if name == "auto" and _setting("FASTFAR_BACKEND") == "auto":
        usable = _cuda_reason() is None and backends()["triton"] is None
        return {"cuda": "triton" if usable else "torch", "": "torch"}
    chosen, source = _choose(name)
    if chosen == "reference":
        raise ValueError(
            f"{source}='reference' cannot be used: the reference is functions, not modules. Use "
            "auto, torch, native or triton"
        )
    if chosen == "torch":
        return {"": "torch"}
    if chosen == "native":
        return {"cpu": "native"}
    return {"cuda": "triton", "cpu": "triton"} if interpreting() else {"cuda": "triton"}


def _native_unfit(
    device: torch.device, dtype: torch.dtype | None, native_reason: str | None
) -> str | None:
    """Why the native back end, if it is there, cannot run this; None if it can."""
    if device.type != "cpu":
        return f"it runs on the CPU, the model is on {device}"
    if dtype not in (None, *_native.DTYPES):
        return f"it computes in float32 or bfloat16, not in {dtype}"
    return native_reason


def _triton_unfit(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why the Triton back end, if it is there, cannot run this; None if it can."""
    if device.type != "cuda" and not interpreting():
        return f"it runs on a GPU, the model is on {device}"
    if dtype is torch.float64:
        return "it computes in float32, float16 or bfloat16, not in torch.float64"
    return None


def _choose(
    name: str, unfit: Mapping[str, str | None] | None = None, fastest: str = "native"
) -> tuple[str, str]:
    """The back end that `name` means, and why that one. ValueError when it is off.

    Args:
        unfit: why back ends that are there cannot run what is to be run.
        fastest: what "auto" takes if it can.
    """
    source = "backend"
    if name == "auto":
        name, source = _setting("FASTFAR_BACKEND"), "FASTFAR_BACKEND"
    state = {each: reason or (unfit or {}).get(each) for each, reason in backends().items()}
    if name == "auto":
        if state[fastest] is None:
            return fastest, "auto"
        return "torch", f"auto; {fastest} is off: {state[fastest]}"
    if name not in state:
        raise ValueError(f"{source}={name!r} is not known; allowed: auto, {', '.join(state)}")
    if (reason := state[name]) is not None:
        usable = ", ".join(each for each in state if state[each] is None)
        raise ValueError(f"{source}={name!r} cannot be used: {reason}. Use auto, {usable}")
    return name, source


def attention() -> str:
    """The back end of attention that FASTFAR_ATTENTION asks for, "auto" where it is not set.

    Raises ValueError when it is not known or cannot be used on this machine.
    """
    choice = _setting("FASTFAR_ATTENTION")
    if choice != "auto" and (reason := attention_reason(choice)) is not None:
        raise ValueError(f"FASTFAR_ATTENTION={choice} cannot be used: {reason}. Use auto or sdpa")
    return choice


def attention_reason(name: str) -> str | None:
    """Why back end `name` of attention cannot be used on this machine; None if it can.

    Raises ValueError for an unknown name. What a call may ask of it, `fastfar.ops` knows.
    """
    if name not in ATTENTIONS:
        allowed = ", ".join(("auto", *ATTENTIONS))
        raise ValueError(f"attention={name!r} is not known; allowed: {allowed}")
    package = ATTENTIONS[name]
    return None if package is None else _package_reason(package)


def require_attention(name: str) -> None:
    """ValueError, with the reason, unless name is "auto" or a back end that can be used here."""
    if name != "auto" and (reason := attention_reason(name)) is not None:
        raise ValueError(f"attention={name!r} cannot be used: {reason}. Use auto or sdpa")


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


def settings_report() -> dict[str, dict[str, str | None]]:
    """Each variable with its value (None = not set) and its problem (None = fine)."""
    checks: dict[str, Any] = {
        "FASTFAR_BACKEND": lambda: _choose("auto"),
        "FASTFAR_ISA": lambda: _setting("FASTFAR_ISA") == "auto" or native_library(),
        "FASTFAR_ATTENTION": attention,
        "FASTFAR_THREADS": lambda: _apply_threads(_setting("FASTFAR_THREADS")),
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
