"""The timing loop of all benchmarks: contenders take turns, with the peak around every sample.

A sample is what a `Timer` takes: seconds of one call. `wall` measures as a user waits, the
device idle before and after; `graphed` and `flushed` measure what a GPU does, without the host:
calls captured in a CUDA graph, or calls one by one behind a kernel that displaces the L2 cache.

Per cent of peak is the median over the samples of FLOPs / (seconds * peak), where peak is the mean
of two short measurements, one right before the sample and one right after it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from fastfar.bench import peak
from fastfar.profiling import annotate

MIN_SECONDS = 0.005  # of a sample: faster calls are repeated within it
GRAPHED = 20  # calls in a CUDA graph
FLUSH_BYTES = 256 << 20  # more than any L2 cache
# What a contender may raise and be left out for, with a note; anything else is a bug of ours.
FAILURES = (RuntimeError, TypeError, ValueError, OSError, ImportError)

Device = torch.device | str
T = TypeVar("T")

# Called before each sample: `fastfar.bench.base` makes two processes take turns by it.
before_sample: ContextVar[Callable[[], object]] = ContextVar("before_sample", default=lambda: None)


@dataclass(frozen=True)
class Timer:
    """Takes a sample: `seconds()` of one call. kind: "wall", "graph" or "flushed"."""

    kind: str
    seconds: Callable[[], float]


@dataclass(frozen=True)
class Sample:
    """Seconds of one call, and FLOP/s that the machine gave around it."""

    seconds: float
    peak: float


@dataclass
class Contender:
    """One way to compute a thing, beside others.

    Attributes:
        name: of the row, e.g. "native bfloat16".
        dtype: of its products; says which peak it is measured against.
        run: computes it once. None: not available, and `note` says why.
        executed: FLOPs of matrix products that `run` really does.
        error, limit: of the correctness gate; no ratio is printed where error > limit.
        cold_s: seconds of the first call, where the gate made it.
        timer: what takes a sample; None: `alternate` makes it.
    """

    name: str
    dtype: torch.dtype
    run: Callable[[], Any] | None
    executed: int = 0
    error: float | None = None
    limit: float | None = None
    note: str = ""
    cold_s: float | None = None
    timer: Timer | None = None
    samples: list[Sample] = field(default_factory=list)

    @property
    def green(self) -> bool:
        """Whether its result was right; False for a NaN."""
        return self.error is None or (self.limit is not None and self.error <= self.limit)

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(sample.seconds for sample in self.samples)

    def give_up(self, error: Exception) -> None:
        """Not available after all."""
        self.run, self.note = None, f"{type(error).__name__}: {error}"
        self.samples.clear()


# --- one sample ------------------------------------------------------------------------------


def now(device: Device) -> float:
    """Seconds of a clock, read when the device has done all that it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def around(
    measure: Callable[[], T], dtype: torch.dtype, device: Device = "cpu"
) -> tuple[T, float]:
    """What `measure` returns, and the mean of the peaks right before and right after it."""
    before = peak.peak_flops(dtype, device)
    result = measure()
    return result, (before + peak.peak_flops(dtype, device)) / 2


def wall(run: Callable[[], Any], device: Device = "cpu") -> Timer:
    """Mean seconds of as many calls as take `MIN_SECONDS`, the device idle before and after.

    Calls `run` twice at once: it warms up, and says how many calls that are.
    """

    def seconds(calls: int) -> float:
        start = now(device)
        for _ in range(calls):
            run()
        return (now(device) - start) / calls

    run()
    calls = max(1, round(MIN_SECONDS / max(seconds(1), 1e-9)))
    return Timer("wall", lambda: seconds(calls))


def graphed(run: Callable[[], Any], device: Device, calls: int = GRAPHED) -> Timer:
    """Mean seconds of one of `calls` calls in a CUDA graph: the gap to the next one is part of it.

    The L2 cache holds what fits. RuntimeError where `run` cannot be captured.
    """
    cuda: Any = torch.cuda
    with cuda.device(device):
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            run()
        cuda.current_stream().wait_stream(side)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            for _ in range(calls):
                run()
        graph.replay()

    def seconds() -> float:
        with cuda.device(device):
            first, last = (cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            graph.replay()
            last.record()
            last.synchronize()
            return float(first.elapsed_time(last)) * 1e-3 / calls

    return Timer("graph", seconds)


def on_device(run: Callable[[], Any], device: Device) -> Timer:
    """What the device does alone: `graphed` on a GPU, `wall` elsewhere and where no graph can be.

    On a CPU the host is the device.
    """
    if torch.device(device).type != "cuda":
        return wall(run, device)
    try:
        return graphed(run, device)
    except RuntimeError:
        return wall(run, device)


def flushed(run: Callable[[], Any], device: Device, calls: int = GRAPHED) -> Timer:
    """Median seconds of `calls` calls, each right after L2 was filled with something else."""
    cuda: Any = torch.cuda
    run()

    def seconds() -> float:
        with cuda.device(device):
            flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
            pairs = []
            for _ in range(calls):
                flush.zero_()  # long enough for the host to be ahead when the call starts
                first, last = (cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                run()
                last.record()
                pairs.append((first, last))
            cuda.synchronize()
            return statistics.median(float(a.elapsed_time(b)) for a, b in pairs) * 1e-3

    return Timer("flushed", seconds)


# --- all of them, in turns -------------------------------------------------------------------


def alternate(
    contenders: Sequence[Contender],
    repeats: int,
    device: Device = "cpu",
    timer: Callable[[Callable[[], Any], Device], Timer] = wall,
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Time all contenders that can run, taking turns, into their `samples`.

    Args:
        contenders: those that raise while `timer` is made are given up, with a note.
        repeats: samples of each.
        device: that they run on.
        timer: `wall`, `graphed` or `flushed`; not asked where a contender has its own.
        progress: called after each sample.
    """
    for contender in contenders:
        if contender.run is not None and contender.timer is None:
            try:
                contender.timer = timer(contender.run, device)
            except FAILURES as error:
                contender.give_up(error)
    for _ in range(repeats):
        for contender in contenders:
            if contender.run is None or contender.timer is None:
                continue
            before_sample.get()()
            take = partial(_in_range, contender.name, contender.timer)
            contender.samples.append(Sample(*around(take, contender.dtype, device)))
            progress()


def _in_range(name: str, timer: Timer) -> float:
    """A sample; for profilers a range of the contender's name."""
    with annotate(name):
        return timer.seconds()


# --- right before fast -----------------------------------------------------------------------


def relative(out: torch.Tensor, truth: torch.Tensor) -> float:
    """||out - truth|| / ||truth||; infinite where the result is not finite."""
    out, truth = out.detach().cpu().double(), truth.detach().cpu().double()
    error = float((out - truth).norm() / truth.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def gate(
    contender: Contender,
    compute: Callable[[], torch.Tensor],
    truth: torch.Tensor,
    limit: float,
    device: Device = "cpu",
) -> None:
    """Relative error of what `compute` gives to `truth`, into the contender with its limit."""
    contender.limit = limit
    try:
        with torch.inference_mode():
            start = now(device)
            out = compute()
            contender.cold_s = now(device) - start
        contender.error = relative(out, truth)
    except FAILURES as error:
        contender.give_up(error)
