"""`fastfar bench ops` and the timers on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastfar.bench import decoder, far, ops, peak, stages, timing
from fastfar.config import FARConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEMO = {"demo": FARConfig.preset("demo")}
OPTIONS = ops.Options("a run", "cuda", repeats=2)


def test_every_op_is_right_and_below_the_peak() -> None:
    paths = ("reference", "autocast", "torch", "triton")
    found = list(ops.bench(ops.problems(None, DEMO), dataclasses.replace(OPTIONS, paths=paths)))
    for row in found:
        assert len(row.samples_s) == 2 and row.peak_kind == "torch.matmul", row.subject
        # PyTorch's own float32 convolutions are TF32's by default: above float32's peak, and the
        # gate says so.
        if "convolution" not in row.subject or "torch/float32" not in row.subject:
            assert row.gate == "green", row.subject
            assert row.share_of_peak is None or row.share_of_peak < 1.1, row.subject
        if row.form == "triton":
            assert row.extra["timer"] == "graph", row.subject


def test_cold_calls_are_slower() -> None:
    """A product whose operands fit into the L2 cache."""
    a = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(a)
    warm, cold = timing.graphed, timing.flushed
    seconds = [make(lambda: torch.mm(a, a, out=out), "cuda").seconds() for make in (warm, cold)]
    assert 1e-6 < seconds[0] < seconds[1] < 1e-3


def test_the_decoder() -> None:
    options = dataclasses.replace(OPTIONS, dtypes=(torch.bfloat16,))
    found = {row.form: row for row in decoder.measure(options)}
    assert set(found) == {"autocast", "torch", "triton", "convolutions"}
    gates = {form: row.gate for form, row in found.items()}
    assert gates.pop("convolutions") == "none" and set(gates.values()) == {"green"}
    assert all(row.samples_s for row in found.values())


def test_stages_and_yardsticks() -> None:
    weights = far.load("far_base", device="cuda")
    plan = weights.official().with_changes(diffusion_steps=2)
    for form in ("autocast", "triton"):
        subject = far.FARSubject(weights, form, torch.bfloat16, plan)
        noise = subject.draw(1)

        def run(subject: far.FARSubject = subject, noise: object = noise) -> None:
            subject.decode(subject.run(subject.labels(1), noise))

        run()
        found = stages.profile(run, "cuda")
        assert set(found.stages) == {"transformer", "head", "decode"}
        assert min(found.stages.values()) > 0 and found.kernels
    flops = peak.peak_flops(torch.bfloat16, "cuda")
    assert flops > peak.peak_flops(torch.float32, "cuda") > 1e12
    assert peak.bandwidth("cuda") > 1e11
