"""Two runs beside each other: which is faster, by how much, and whether the noise allows to say so.

Each sample is first set against the machine's peak around it: seconds * peak is the number of FLOPs
that the machine would have done meanwhile, so that whatever slows machine and program alike drops
out. Two sets of samples are then compared by ranks: the estimate is the median of all ratios
b_j / a_i (Hodges and Lehmann 1963), and its interval holds those ratios that the exact test of
Wilcoxon, Mann and Whitney does not reject. Neither assumes a distribution; few samples make the
interval wide, and too few of them none: four on either side are enough for 95 %, three are not.

Where both sides took turns sample by sample (`--base`), what slows one slows the other as well, and
the seconds as they are may be the better measure: those of the two count that scatter less within
the sides. In separate runs the peak decides alone, since nothing else knows what lay between them.

What is not a measurement of the same thing on the same machine is not compared, and says why.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from fastfar.bench import rows as bench_rows
from fastfar.bench.rows import Row

CONFIDENCE = 0.95
MARGIN = 0.02  # differences below it are none, whatever the samples say: runs differ by as much

# What must be the same on both sides for times to be compared, and what is only told.
_MACHINE = ("cpu", "threads", "native_isa", "isa", "system")
_TOLD = ("torch", "python")
_MEASUREMENT = ("dtype", "mode", "plan", "steps", "extrapolation", "num_parameters")


@dataclass(frozen=True)
class Ratio:
    """Time of B over time of A: above 1, B takes longer.

    Attributes:
        estimate: Hodges-Lehmann estimate.
        low, high: interval that holds the true ratio with probability `confidence`; 0 and infinity
            where the samples are too few for one.
        confidence: at which the interval was taken.
    """

    estimate: float
    low: float
    high: float
    confidence: float

    def verdict(self, margin: float = MARGIN) -> str:
        """"faster" or "slower" (B than A) where the interval lies beyond the margin on one side."""
        if self.high < 1 / (1 + margin):
            return "faster"
        return "slower" if self.low > 1 + margin else "no difference"

    @property
    def spread(self) -> float:
        """The largest difference that the interval leaves open, as a fraction."""
        return max(self.high, 1 / self.low if self.low else math.inf) - 1


def rank_sum_cumulative(m: int, n: int) -> list[float]:
    """P(U <= u) for u = 0 .. m n, U being the Mann-Whitney statistic of m and n equal samples.

    The number of orders with U = u is the coefficient of q^u in the Gaussian binomial
    prod_{i=1..m} (1 - q^(n+i)) / (1 - q^i).
    """
    orders = [1] + [0] * (m * n)
    for i in range(1, m + 1):
        for u in range(m * n, n + i - 1, -1):
            orders[u] -= orders[u - n - i]
        for u in range(i, m * n + 1):
            orders[u] += orders[u - i]
    whole = math.comb(m + n, m)
    return [count / whole for count in accumulate(orders)]


def ratio(a: Sequence[float], b: Sequence[float], confidence: float = CONFIDENCE) -> Ratio:
    """Ratio of two sets of independent, positive samples, B over A, with its interval.

    Raises:
        ValueError: no samples on one side, one that is not positive, confidence not in (0, 1).
    """
    if not a or not b or min(*a, *b) <= 0:
        raise ValueError(f"ratio needs positive samples on both sides, got {list(a)}, {list(b)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    ratios = sorted(y / x for x in a for y in b)
    cumulative = rank_sum_cumulative(len(a), len(b))
    # The widest interval leaves out none of the ratios; each further pair has to be paid for.
    left_out = sum(p <= (1 - confidence) / 2 for p in cumulative) - 1
    low, high = (0.0, math.inf) if left_out < 0 else (ratios[left_out], ratios[-1 - left_out])
    return Ratio(statistics.median(ratios), low, high, confidence)


def normalised(row: Row) -> tuple[float, ...] | None:
    """Samples times the peak around each, in FLOPs; None where a peak is missing."""
    peaks = row.peak_flops_per_s
    if len(peaks) != len(row.samples_s):
        return None
    return tuple(seconds * peak for seconds, peak in zip(row.samples_s, peaks, strict=True))


@dataclass(frozen=True)
class Comparison:
    """One measurement in two runs.

    Attributes:
        a, b: its rows; None where one side has none.
        ratio: B over A, of the samples that were judged; None: not comparable.
        by_peak: whether these were set against the peak.
        raw: B over A, medians of seconds as they are.
        reasons: why it is not comparable.
        remarks: what differs without forbidding it.
        margin: below which a difference is none.
    """

    a: Row | None
    b: Row | None
    ratio: Ratio | None
    raw: float | None = None
    reasons: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    margin: float = MARGIN
    by_peak: bool = True

    @property
    def row(self) -> Row:
        """Either side."""
        found = self.a or self.b
        assert found is not None
        return found

    @property
    def verdict(self) -> str:
        """"faster", "slower" (B than A), "no difference" or "not comparable"."""
        return "not comparable" if self.ratio is None else self.ratio.verdict(self.margin)

    @property
    def text(self) -> str:
        """The verdict with its figure or its reason."""
        if self.ratio is None:
            return f"not comparable: {'; '.join(self.reasons)}"
        if self.verdict == "no difference":
            return f"no difference (at most {100 * self.ratio.spread:.0f} %)"
        low, high = sorted((1 / self.ratio.low, 1 / self.ratio.high))
        if self.verdict == "slower":
            return f"{self.ratio.estimate:.2f} x slower ({1 / high:.2f} to {1 / low:.2f})"
        return f"{1 / self.ratio.estimate:.2f} x faster ({low:.2f} to {high:.2f})"


def compare(
    a: Iterable[Row],
    b: Iterable[Row],
    confidence: float = CONFIDENCE,
    margin: float = MARGIN,
    in_turns: bool = False,
) -> list[Comparison]:
    """Rows of A beside those of B with the same key, in A's order, then what only B has.

    Of rows with one key the last counts. A row without a partner is set beside one of the same
    model, form, batch and shape, if there is one, so that the reason can name what differs.

    Args:
        a, b: rows of two runs.
        confidence: of the intervals.
        margin: fraction below which a difference is none.
        in_turns: the sides took turns sample by sample.

    Raises:
        ValueError: a margin below 0 or a confidence not in (0, 1).
    """
    if margin < 0:
        raise ValueError(f"margin must not be negative, got {margin}")
    ours, theirs = ({row.key: row for row in side} for side in (list(a), list(b)))
    single = {key: row for key, row in theirs.items() if key not in ours}
    found = []
    for key, row in ours.items():
        other = theirs.get(key)
        if other is None:
            near = next((k for k, r in single.items() if _alike(r) == _alike(row)), None)
            other = None if near is None else single.pop(near)
        found.append(_pair(row, other, confidence, margin, in_turns))
    return found + [_pair(None, row, confidence, margin, in_turns) for row in single.values()]


def _alike(row: Row) -> tuple[Any, ...]:
    return (row.op, row.model, row.form, row.batch, row.shape)


def _pair(
    a: Row | None, b: Row | None, confidence: float, margin: float, in_turns: bool
) -> Comparison:
    if a is None or b is None:
        return Comparison(a, b, None, reasons=(f"only in {'A' if b is None else 'B'}",))
    if reasons := tuple(_reasons(a, b)):
        return Comparison(a, b, None, reasons=reasons)
    raw = statistics.median(b.samples_s) / statistics.median(a.samples_s)
    remarks = list(_differences(a.environment, b.environment, _TOLD))
    samples = (a.samples_s, b.samples_s)
    against_a, against_b = normalised(a), normalised(b)
    by_peak = against_a is not None and against_b is not None and a.peak_kind == b.peak_kind
    if not by_peak:
        remarks.append(f"{a.subject}: no such peak around all samples: seconds as they are")
    elif against_a and against_b and not (in_turns and _steadier(samples, (against_a, against_b))):
        samples = (against_a, against_b)
    else:
        by_peak = False
    result = ratio(*samples, confidence)
    if not result.low:
        count = " and ".join(str(len(side)) for side in samples)
        reason = f"{count} samples are too few for {100 * confidence:.0f} %: repeat more often"
        return Comparison(a, b, None, raw, (reason,), tuple(remarks))
    return Comparison(a, b, result, raw, (), tuple(remarks), margin, by_peak)


def _steadier(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> bool:
    """Whether the sides of `a` scatter less, each within itself, than those of `b`."""
    scatter = [
        sum(statistics.pvariance([math.log(each) for each in side]) for side in sides)
        for sides in (a, b)
    ]
    return scatter[0] < scatter[1]


def _reasons(a: Row, b: Row) -> Iterable[str]:
    """Why two rows are measurements of different things, or wrong ones."""
    for name, row in (("A", a), ("B", b)):
        if row.gate == "red":
            yield f"the gate of {name} is red: a wrong result has no speed"
        if not row.samples_s:
            yield f"{name} has no times"
    gpus = [(row.environment.get("gpu") or {}).get("name") for row in (a, b)]
    if gpus[0] != gpus[1]:
        yield f"gpu {gpus[0]} beside {gpus[1]}"
    yield from _differences(a.environment, b.environment, _MACHINE)
    measured = [{name: getattr(row, name) for name in _MEASUREMENT} for row in (a, b)]
    for side, row in zip(measured, (a, b), strict=True):  # plans are long: a name says enough
        side["plan"] = _plain(row.plan)
    yield from _differences(measured[0], measured[1], _MEASUREMENT)


def _plain(value: Any) -> Any:
    """With lists for tuples, as JSON returns it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _differences(
    a: Mapping[str, Any], b: Mapping[str, Any], names: Sequence[str]
) -> Iterable[str]:
    for name in names:
        before, after = a.get(name), b.get(name)
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            fields = sorted(before.keys() | after.keys())
            changed = [each for each in fields if before.get(each) != after.get(each)]
            yield f"{name} differs in {', '.join(changed)}"
        else:
            yield f"{name} {before} beside {after}"


def compare_files(
    a: str | Path, b: str | Path, confidence: float = CONFIDENCE, margin: float = MARGIN
) -> list[Comparison]:
    """`compare` of two JSONL files.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file holds no rows; or as `compare`.
    """
    return compare(bench_rows.read(a), bench_rows.read(b), confidence, margin)
