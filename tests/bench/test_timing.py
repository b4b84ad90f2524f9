"""The one timing loop and its yardstick."""

from __future__ import annotations

import pytest
import torch

from fastfar.bench import peak, timing
from fastfar.bench.timing import Contender, Timer


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in order; the peak is 2e9 FLOP/s, then 4e9, and so on in turn."""
    seen: list[str] = []

    def peaks(dtype: torch.dtype, device: object) -> float:
        seen.append("peak")
        return (2e9, 4e9)[seen.count("peak") % 2 - 1]

    monkeypatch.setattr(peak, "peak_flops", peaks)
    return seen


def test_contenders_take_turns_between_two_peaks(log: list[str]) -> None:
    def contender(name: str, seconds: float) -> Contender:
        def take() -> float:
            log.append(name)
            return seconds

        return Contender(name, torch.float32, lambda: None, timer=Timer("wall", take))

    a, b = contender("a", 2.0), contender("b", 1.0)
    timing.alternate([a, b], 2, progress=lambda: log.append("."))
    assert log == ["peak", "a", "peak", ".", "peak", "b", "peak", "."] * 2
    assert [sample.seconds for sample in a.samples] == [2.0, 2.0] and a.median == 2.0
    assert {sample.peak for sample in a.samples + b.samples} == {3e9}, "mean of before and after"


def test_who_raises_is_left_out_and_says_why(log: list[str]) -> None:
    def fails() -> None:
        raise RuntimeError("no such kernel")

    good, bad = Contender("a", torch.float32, lambda: None), Contender("b", torch.float32, fails)
    timing.alternate([good, bad], 3)
    assert len(good.samples) == 3 and good.timer is not None and good.timer.kind == "wall"
    assert not bad.samples and bad.run is None and bad.note == "RuntimeError: no such kernel"

    def bug() -> None:
        raise AssertionError

    with pytest.raises(AssertionError):
        timing.alternate([Contender("c", torch.float32, bug)], 1)


def test_fast_calls_are_repeated_within_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, clock = [], [0.0]

    def run() -> None:
        calls.append(1)
        clock[0] += timing.MIN_SECONDS / 4

    monkeypatch.setattr(timing, "now", lambda device: clock[0])
    timer = timing.wall(run)
    assert len(calls) == 2
    assert timer.seconds() == pytest.approx(timing.MIN_SECONDS / 4) and len(calls) == 2 + 4


def test_the_gate_holds_back_what_is_wrong() -> None:
    truth = torch.ones(4)
    contender = Contender("a", torch.float32, lambda: None)
    for out, green in ((truth * 1.01, True), (truth * 1.1, False), (truth * float("nan"), False)):
        timing.gate(contender, lambda out=out: out, truth, limit=0.05)
        assert contender.green is green and contender.cold_s is not None
    assert timing.relative(truth * 1.5, truth) == pytest.approx(0.5)
    assert timing.relative(torch.tensor(float("inf")), truth[0]) == float("inf")

    def fails() -> torch.Tensor:
        raise ValueError("odd width")

    timing.gate(contender, fails, truth, limit=0.05)
    assert contender.run is None and "odd width" in contender.note


def test_the_yardstick_measures() -> None:
    assert 1e7 < peak.matmul_flops(torch.float32, side=64) < 1e14
    assert peak.kind(torch.float64) == "torch.matmul" == peak.kind(torch.bfloat16, "cuda")
    with pytest.raises(ValueError, match="level"):
        peak.bandwidth(level="L9")
    if (missing := peak.reason()) is not None:
        with pytest.raises(OSError):
            peak.bandwidth()
        pytest.skip(f"no products in registers: {missing}")
    assert peak.kind(torch.bfloat16) == "registers"
    for dtype in (torch.float32, torch.bfloat16):
        stick = peak.Yardstick(dtype, threads=1, seconds=1e-4)
        assert 1e8 < stick() < 1e14
    assert 1e7 < peak.bandwidth(level="L2", threads=1, repeats=1) < 1e13
    assert 1e7 < peak.bandwidth(threads=1, size=1 << 20, repeats=1) < 1e13
    with pytest.raises(ValueError, match="float64"):
        peak.Yardstick(torch.float64)
