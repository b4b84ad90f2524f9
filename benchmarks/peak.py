"""What the machine gives at this moment: the yardstick of every per cent in these benchmarks.

Two figures, both taken by `fastfar_peak` of the native library on the selected instruction set:

    peak_flops(dtype, threads)   FLOP/s of products whose operands stay in registers (AMX tiles,
                                 bfloat16 pairs or float32 FMAs, whichever a product of that dtype
                                 uses in this set)
    bandwidth(threads, level)    bytes/s of a streaming read, from memory or from the L2 cache

Neighbours on the same machine take their share within milliseconds (two threads on one core halve
each other's AMX unit), so a peak holds for a moment only: `Yardstick` takes a short one right
before and right after each timed sample.
"""

from __future__ import annotations

import time
from functools import cache

import torch

from fastfar import _native, backend

SECONDS = 0.004  # of one measurement of products
SETTLE = 0.015  # PyTorch's threads spin this long after their work, on cores that we measure
MEMORY_BYTES = 512 << 20  # far beyond an L3 cache
L2_BYTES = 512 << 10  # of each thread: beyond L1, within L2
LEVELS = ("memory", "L2")


def reason() -> str | None:
    """None where there is a yardstick, else why there is none."""
    if (missing := _native.reason()) is not None:
        return missing
    return None if hasattr(_native.load()._c, "fastfar_peak") else "an older native library"


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


class Yardstick:
    """Peak FLOP/s of one dtype, at the moment of each call.

    Args:
        dtype: float32 or bfloat16, of the products.
        threads: that multiply at the same time; None is PyTorch's number.
        seconds: that one measurement takes about.

    Raises OSError where there is no native library, ValueError for another dtype.
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


@cache
def yardstick(dtype: torch.dtype, threads: int, isa: str) -> Yardstick:
    """The yardstick of a dtype on a set, calibrated once."""
    return Yardstick(dtype, threads)


def peak_flops(dtype: torch.dtype, threads: int | None = None) -> float:
    """FLOP/s of register-only products in `dtype` now, on PyTorch's number of threads if None."""
    threads = torch.get_num_threads() if threads is None else threads
    if (missing := reason()) is not None:
        raise OSError(missing)
    return yardstick(dtype, threads, backend.native_library().selected)()


@cache
def _numbers(count: int) -> torch.Tensor:
    return torch.ones(count)


def bandwidth(
    threads: int | None = None,
    level: str = "memory",
    *,
    size: int | None = None,
    repeats: int = 3,
) -> float:
    """Bytes/s that all threads together read from memory or from their L2 caches, best of a few.

    Args:
        threads: None is PyTorch's number.
        level: "memory" or "L2".
        size: bytes read by all threads; None fits the level.
        repeats: measurements of which the best counts.

    Raises OSError where there is no native library, ValueError for another level.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {LEVELS}, got {level!r}")
    if (missing := reason()) is not None:
        raise OSError(missing)
    threads = torch.get_num_threads() if threads is None else threads
    if size is None:
        size = MEMORY_BYTES if level == "memory" else threads * L2_BYTES
    numbers = _numbers(size // 4)
    passes = 1 if level == "memory" else 100
    best = 0.0
    for _ in range(repeats + 1):  # the first one warms up
        done, seconds = _run(passes, threads, torch.float32, numbers)
        best = max(best, done / seconds)
    return best
