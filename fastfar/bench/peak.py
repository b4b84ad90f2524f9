"""What the machine gives at this moment: the yardstick of every per cent of the benchmarks.

    peak_flops(dtype, device)    FLOP/s of products; `kind` says which products
    bandwidth(device, level)     bytes/s of a streaming read, from memory or from the L2 cache

On a CPU with the native library the products are `fastfar_peak`: operands stay in registers (AMX
tiles, bfloat16 pairs or float32 FMAs, whichever a product of that dtype uses in the selected
instruction set). Anywhere else they are a large square torch.matmul, timed on a GPU by events.

Neighbours on the same machine take their share within milliseconds (two threads on one core halve
each other's AMX unit), so a peak holds for a moment only: `fastfar.bench.timing` takes a short one
right before and right after each timed sample.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch

from fastfar import _native, backend

SECONDS = 0.004  # of one measurement of products
SETTLE = 0.015  # PyTorch's threads spin this long after their work, on cores that we measure
MEMORY_BYTES = 512 << 20  # far beyond an L3 cache
L2_BYTES = 512 << 10  # of each thread: beyond L1, within L2
LEVELS = ("memory", "L2")
REGISTERS, MATMUL = "registers", "torch.matmul"
# Sides of the squares: enough to fill a GPU, little enough for some ten milliseconds on a CPU.
_SIDES = {"cuda": 8192, "cpu": 1024}

Device = torch.device | str


def reason() -> str | None:
    """None where products in registers can be measured (the native library), else why not."""
    if (missing := _native.reason()) is not None:
        return missing
    return None if hasattr(_native.load()._c, "fastfar_peak") else "an older native library"


def kind(dtype: torch.dtype, device: Device = "cpu") -> str:
    """Which products `peak_flops` measures: "registers" or "torch.matmul"."""
    on_cpu = torch.device(device).type == "cpu"
    return REGISTERS if on_cpu and dtype in _native.DTYPES and reason() is None else MATMUL


def peak_flops(dtype: torch.dtype, device: Device = "cpu", threads: int | None = None) -> float:
    """FLOP/s of products in `dtype` now.

    Args:
        dtype: of the products' operands.
        device: that multiplies.
        threads: of a CPU; None is PyTorch's number.
    """
    if kind(dtype, device) == MATMUL:
        return matmul_flops(dtype, device)
    threads = torch.get_num_threads() if threads is None else threads
    time.sleep(SETTLE)
    return _yardstick(dtype, threads, backend.native_library().selected)()


def bandwidth(
    device: Device = "cpu",
    level: str = "memory",
    *,
    threads: int | None = None,
    size: int | None = None,
    repeats: int = 3,
) -> float:
    """Bytes/s that can be read, best of a few measurements.

    Args:
        device: "cpu" needs the native library; a GPU is measured by a sum over its memory.
        level: "memory" or, of a CPU, "L2".
        threads: of a CPU; None is PyTorch's number.
        size: bytes read by all threads; None fits the level.
        repeats: measurements of which the best counts; one more comes first and warms up.

    Raises:
        ValueError: another level.
        OSError: a CPU without the native library.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {LEVELS}, got {level!r}")
    if torch.device(device).type != "cpu":
        if level != "memory":
            raise ValueError(f"on a GPU only the bandwidth of memory is measured, not of {level}")
        numbers = torch.ones((size or MEMORY_BYTES) // 4, device=device)
        size = numbers.numel() * 4
        return max(size / _event_seconds(lambda: numbers.sum(), device) for _ in range(repeats))
    if (missing := reason()) is not None:
        raise OSError(f"the native library measures the bandwidth, and there is none: {missing}")
    threads = torch.get_num_threads() if threads is None else threads
    if size is None:
        size = MEMORY_BYTES if level == "memory" else threads * L2_BYTES
    numbers = _ones(size // 4)
    passes = 1 if level == "memory" else 100
    best = 0.0
    for _ in range(repeats + 1):
        done, seconds = _run(passes, threads, torch.float32, numbers)
        best = max(best, done / seconds)
    return best


def matmul_flops(dtype: torch.dtype, device: Device = "cpu", side: int | None = None) -> float:
    """FLOP/s of PyTorch's own square product of `side` x `side`, once, after one that warms up."""
    device = torch.device(device)
    side = _SIDES.get(device.type, 1024) if side is None else side
    a = _square(side, dtype, device)
    return 2.0 * side**3 / _event_seconds(lambda: a @ a, device)


class Yardstick:
    """FLOP/s of products in registers, at the moment of each call.

    Args:
        dtype: float32 or bfloat16, of the products.
        threads: that multiply at the same time; None is PyTorch's number.
        seconds: that one measurement takes about.

    Raises:
        OSError: there is no native library.
        ValueError: another dtype.
    """

    def __init__(
        self, dtype: torch.dtype, threads: int | None = None, seconds: float = SECONDS
    ) -> None:
        if dtype not in _native.DTYPES:
            raise ValueError(f"there is a peak of {list(_native.DTYPES)}, not of {dtype}")
        if (missing := reason()) is not None:
            raise OSError(missing)
        self.dtype = dtype
        self.threads = torch.get_num_threads() if threads is None else threads
        iterations, taken = 256, 0.0
        while taken < seconds / 4:  # wakes the threads and the clocks on the way
            iterations *= 2
            _, taken = _run(iterations, self.threads, dtype, None)
        self.iterations = max(1, round(iterations * seconds / taken))

    def __call__(self) -> float:
        """FLOP/s now."""
        flops, seconds = _run(self.iterations, self.threads, self.dtype, None)
        return flops / seconds


# --- parts -----------------------------------------------------------------------------------


@cache
def _yardstick(dtype: torch.dtype, threads: int, isa: str) -> Yardstick:
    """The yardstick of a dtype on an instruction set, calibrated once."""
    return Yardstick(dtype, threads)


def _run(
    iterations: int, threads: int, dtype: torch.dtype, buffer: torch.Tensor | None
) -> tuple[int, float]:
    """FLOPs done or bytes read by all threads together, and the seconds that took."""
    library = backend.native_library()
    results, work = torch.empty(threads), torch.empty(1, dtype=torch.int64)
    start = time.perf_counter()
    library.call(
        "peak",
        dtype=_native.DTYPES[dtype],
        threads=threads,
        iterations=iterations,
        numbers=0 if buffer is None else buffer.numel(),
        buffer=buffer,
        results=results,
        work=work,
    )
    seconds = time.perf_counter() - start
    if not results.isfinite().all():
        raise RuntimeError("the yardstick computed nonsense: its figures cannot be trusted")
    return int(work), seconds


def _event_seconds(run: Any, device: Device) -> float:
    """Seconds of the second of two calls, by events on a GPU and by the clock elsewhere."""
    run()
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    cuda: Any = torch.cuda
    with cuda.device(device):
        first, last = (cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) * 1e-3


@cache
def _ones(count: int) -> torch.Tensor:
    return torch.ones(count)


@cache
def _square(side: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)  # the user's numbers stay as they are
    return torch.randn(side, side, device=device, generator=generator).to(dtype)
