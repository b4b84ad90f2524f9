"""Where the time goes: the ranges of `fastfar.profiling` as seconds, of every form alike."""

from __future__ import annotations

import time

import pytest
import torch
from example_rows import row
from tiny_far import tiny_model

from fastfar import PixelTokenizer, SamplingPlan, backend, sample_latents
from fastfar.bench import far, report, stages
from fastfar.profiling import annotate, heard_by
from fastfar.reference import sampling as published

PLAN = SamplingPlan.official(diffusion_steps=1).with_changes(x0_range=(-2.0, 2.0))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of `perf_counter`, to be moved by hand."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def spend(clock: list[float], seconds: float, *names: str) -> None:
    """`seconds` inside nested ranges."""
    if not names:
        clock[0] += seconds
        return
    with annotate(names[0]):
        spend(clock, seconds, *names[1:])


def test_the_clock_adds_up_stages(clock: list[float]) -> None:
    heard = stages.StageClock()
    with heard_by(heard):
        spend(clock, 1.0, "outer step 0", "encoder")
        spend(clock, 2.0, "outer step 0", "decoder")
        spend(clock, 4.0, "level 3", "head")
        spend(clock, 8.0, "decode")
        spend(clock, 16.0, "head", "decode")  # part of the outer one
        spend(clock, 32.0)
    assert heard.seconds == {"transformer": 3.0, "head": 20.0, "decode": 8.0}
    spend(clock, 64.0, "head")
    assert heard.seconds["head"] == 20.0, "nobody listens any more"


def test_a_stage_that_raises_is_counted_and_left(clock: list[float]) -> None:
    heard = stages.StageClock()
    with heard_by(heard):
        with pytest.raises(RuntimeError), annotate("head"):
            clock[0] += 1.0
            raise RuntimeError
        spend(clock, 2.0, "decode")
    assert heard.seconds == {"head": 1.0, "decode": 2.0}


@pytest.mark.parametrize("name", ["reference", "torch", "native"])
def test_a_sampling_run_is_taken_apart(name: str) -> None:
    """Stages and the rest sum to the whole; the published loop, which has no ranges, as well."""
    if (missing := backend.backends()[name]) is not None:
        pytest.skip(missing)
    model, before = tiny_model(), (published.denoise_loop, published.condition)

    def run() -> None:
        with stages.reference_ranges():
            sample_latents(model, [1], PLAN, generator=0, backend=name, dtype=torch.float32)

    run()
    start = time.perf_counter()
    found = stages.profile(run)
    whole = time.perf_counter() - start
    assert set(found.stages) == {"transformer", "head", "rest"} and not found.kernels
    assert min(found.stages.values()) > 0
    assert 0.5 * whole < sum(found.stages.values()) <= whole
    assert (published.denoise_loop, published.condition) == before, "everything is put back"


def test_stages_have_their_own_per_cent_of_peak() -> None:
    """The row's machine gives 4 TFLOP/s."""
    taken = {"head": 1.0, "transformer": 0.5, "rest": 0.5}
    counted = row(stages_s=taken, peak_flops_per_s=(4e12,) * 5,
                  extra={"stage_flops": {"head": 2 * 10**12, "transformer": 0}})  # fmt: skip
    (line,) = report.stages([counted]).lines
    assert "1.00 s (50 %, 50.0 % of peak)" in line and line.count("500 ms (25 %)") == 2


def test_flops_of_stages_sum_to_what_is_executed() -> None:
    weights = far.Weights("tiny", tiny_model(), PixelTokenizer(0.0, 1.0), random=True)
    found = {}
    for form in ("native", "torch", "autocast"):
        subject = far.FARSubject(weights, form, torch.bfloat16, weights.official())
        found[form] = subject.stage_flops(2)
        assert subject.executed_flops(2) == sum(found[form].values())
        assert found[form] == {name: 2 * n for name, n in subject.stage_flops(1).items()}
        masked = far.FARSubject(weights, form, torch.bfloat16, weights.official("mask"))
        if form == "autocast":
            assert masked.stage_flops(1) == {} and masked.executed_flops(1) is None
        else:  # one step more, of fewer tokens
            assert 0 < masked.stage_flops(1)["head"] < 1.1 * found[form]["head"] / 2
    assert found["native"]["head"] < found["torch"]["head"] < found["autocast"]["head"]
    assert found["native"]["decode"] == 0, "no autoencoder"
