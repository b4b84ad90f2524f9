"""Alternating timings with a peak beside every sample, and what is reported of them.

A sample is the mean time of as many calls as take `MIN_SECONDS`. Per cent of peak is the median
over the samples of FLOPs / (seconds * peak), where peak is the mean of two short measurements, one
right before the sample and one right after it; `best` sets the fastest sample against the highest
peak that was seen in the whole run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import peak
import torch
from rows import quantiles

MIN_SECONDS = 0.005
NOT_AVAILABLE = "not available"


@dataclass(frozen=True)
class Sample:
    """Seconds of one call, and FLOP/s of the machine around it (None: no native library)."""

    seconds: float
    peak: float | None


@dataclass
class Variant:
    """One way to compute a thing.

    Attributes:
        name: of the row, e.g. "native bfloat16".
        dtype: of its products; says which peak it is measured against.
        run: computes it once. None: not available, and `note` says why.
        executed: FLOPs of matrix products that `run` really does.
        error, limit: of the correctness gate; no ratio is printed where error > limit.
    """

    name: str
    dtype: torch.dtype
    run: Callable[[], Any] | None
    executed: int = 0
    error: float | None = None
    limit: float | None = None
    note: str = ""
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


def _peak(dtype: torch.dtype) -> float | None:
    if peak.reason() is not None:
        return None
    time.sleep(peak.SETTLE)
    return peak.peak_flops(dtype)


def _seconds(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def alternate(variants: Sequence[Variant], repeats: int) -> None:
    """Time all variants that can run, taking turns, into their `samples`."""
    calls: dict[str, int] = {}
    for variant in list(variants):
        if variant.run is not None:
            try:
                variant.run()  # warms up
                calls[variant.name] = max(1, round(MIN_SECONDS / _seconds(variant.run, 1)))
            except (RuntimeError, TypeError, ValueError, OSError) as error:
                variant.give_up(error)
    for _ in range(repeats):
        for variant in variants:
            if variant.run is None:
                continue
            before = _peak(variant.dtype)
            seconds = _seconds(variant.run, calls[variant.name])
            after = _peak(variant.dtype)
            between = None if before is None or after is None else (before + after) / 2
            variant.samples.append(Sample(seconds, between))


def gate(
    variant: Variant,
    compute: Callable[[], torch.Tensor],
    truth: torch.Tensor,
    limit: float,
) -> None:
    """Relative error of what `compute` gives to `truth`, into the variant with its limit."""
    variant.limit = limit
    try:
        with torch.inference_mode():
            variant.error = relative(compute(), truth)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        variant.give_up(error)


def relative(out: torch.Tensor, truth: torch.Tensor) -> float:
    """||out - truth|| / ||truth||; infinite where the result is not finite."""
    difference = (out.detach().double() - truth.double()).norm()
    error = float(difference / truth.double().norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def figures(variant: Variant, reference_flops: int = 0) -> dict[str, Any]:
    """What a row says of a variant's samples."""
    seconds = [sample.seconds for sample in variant.samples]
    done = variant.executed
    result: dict[str, Any] = {
        **quantiles(seconds),
        "best_s": min(seconds),
        "samples_s": seconds,
        "reference_flops": reference_flops,
        "executed_flops": done,
        "reference_flops_per_s": reference_flops / variant.median,
        "executed_flops_per_s": done / variant.median,
        "error": variant.error,
        "error_limit": variant.limit,
        "gate": "green" if variant.green else "red",
    }
    peaks = [sample.peak for sample in variant.samples if sample.peak is not None]
    if peaks and done:
        shares = [done / s.seconds / s.peak for s in variant.samples if s.peak is not None]
        result |= {
            "peak_flops_per_s": peaks,
            "share_of_peak": statistics.median(shares),
            "best_share_of_best_peak": done / min(seconds) / max(peaks),
        }
    return result


def ratio(variant: Variant, baseline: Variant) -> str:
    """How many times as fast as the baseline, or why no figure is given."""
    if not variant.samples or not baseline.samples:
        return "-"
    if not variant.green:
        return "gate is red: wrong result"
    return f"{baseline.median / variant.median:.2f} x"
