"""Selectors, FAR's forms and the baselines as subjects; tiny models."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny_far import TINY

from fastfar import _memory, backend, baselines, config
from fastfar.baselines import mar
from fastfar.baselines._baseline import Baseline, Settings
from fastfar.bench import baseline as baseline_subjects
from fastfar.bench import flops, memory, probes, subjects
from fastfar.bench.baseline import BaselineSubject
from fastfar.bench.far import FARSubject, load
from fastfar.bench.memory import Selection, Use
from fastfar.bench.plans import plan_name
from fastfar.bench.subjects import Choice, timed_run
from fastfar.config import FARConfig
from fastfar.kl_vae import KLVAEConfig
from fastfar.plan import SamplingPlan
from fastfar.solver import Solver

CPU = torch.device("cpu")


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset "far_base" becomes very small."""
    monkeypatch.setitem(config.PRESETS, "far_base", TINY)


def test_selectors(tiny_preset: None) -> None:
    asked = ["torch/paper", "autocast", "torch/T=3-mask", "torch/paper", "torch/fast",
             "torch/T=2..5"]  # fmt: skip
    half = Choice(dtype=torch.bfloat16)
    found = subjects.select([f"far_base/{form}" for form in asked], CPU, half)
    assert [recipe.key for recipe in found] == [
        "far_base/torch/bfloat16/paper",
        "far_base/autocast/bfloat16/official",
        "far_base/torch/bfloat16/T=3-mask",
        "far_base/torch/bfloat16/fast",
        "far_base/torch/bfloat16/T=2..5",
    ]
    paper, official, masked, fast, _ = (recipe.sketch for recipe in found)
    assert paper.title == "FAR-B torch, T = 40..100" and paper.mode == "exact"
    assert official.title == "FAR-B as published, T = 100" and official.mode == "as published"
    assert masked.executed_flops(1) and masked.steps == 11
    assert fast.mode == "approximate" and fast.title == "FAR-B torch, T = 6 (fast)"
    assert {recipe.family for recipe in found} == {"far_base"}
    assert official.executed_flops(2) == 2 * (official.executed_flops(1) or 0)
    assert (official.executed_flops(1) or 0) > official.reference_flops(1)


@pytest.mark.parametrize(
    ("selector", "message"),
    [("far_giant", "var_d24"), ("far_base/magic", "autocast"), ("far_base/torch/quick", "T=1"),
     ("far_base/torch/T=0", "T=1"),
     ("far_base/torch/T=40..x", "T=40..100"), ("far_base/torch/paper/x", r"MODEL\[/FORM"),
     ("var_d16/native", "well_run"), ("var_d16/published/paper", "one plan")],
)  # fmt: skip
def test_unknown_selectors(selector: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        subjects.select([selector], CPU)


def test_plans_have_names() -> None:
    assert plan_name(SamplingPlan.official()) == "official"
    assert plan_name(SamplingPlan.paper("mask")) == "paper-mask"
    assert plan_name(SamplingPlan.official(diffusion_steps=7)) == "T=7"
    assert plan_name(SamplingPlan.paper(diffusion_steps=(2, 5))) == "T=2..5"
    assert plan_name(SamplingPlan.fast("mask")) == "fast-mask"
    few = SamplingPlan.official(diffusion_steps=4).with_changes(solvers=Solver(method="ddim"))
    assert plan_name(few) == "ddim-40-calls"


def test_forms_share_weights_and_agree(tiny_preset: None) -> None:
    forms = ["reference", "torch", "native"]
    if backend.backends()["native"] is not None:
        forms.remove("native")
    shared: dict[str, Any] = {}
    found = subjects.select([f"far_base/{form}/T=2" for form in forms], CPU,
                            Choice(dtype=torch.float32))  # fmt: skip
    built = [recipe.build(shared) for recipe in found]
    assert len(shared) == 1
    for subject in built:
        assert isinstance(subject, FARSubject)
        gate = subject.check()
        assert gate.green and "float64" in gate.note, (subject.key, gate)
        tokens, seconds = timed_run(subject, subject.labels(1), subject.draw(1))
        image = subject.decode(tokens)
        assert seconds > 0 and image.dtype == torch.float32
        assert image.ndim == 4 and 0 <= float(image.min()) <= float(image.max()) <= 1


def test_a_large_model_is_checked_on_a_shortened_plan(
    tiny_preset: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastfar.bench.far.FLOAT64_LIMIT", 0)
    monkeypatch.setattr("fastfar.bench.far.GATE_DIFFUSION_STEPS", 2)
    weights = load("far_base")
    subject = FARSubject(weights, "torch", torch.float32, weights.official())
    gate = subject.check()
    assert gate.green and gate.note.endswith("2 outer steps of 2 diffusion steps against float32")
    (plan,) = weights._truths
    assert plan.diffusion_steps == (2, 2)


# --- baselines -------------------------------------------------------------------------------

SMALL = FARConfig(width=32, encoder_depth=1, decoder_depth=1, num_heads=2, head_depth=1,
                  head_width=16, latent_size=4, buffer_size=4)  # fmt: skip
SMALL_VAE = KLVAEConfig(channels=32, channel_mults=(1, 1), blocks=1)


def tiny_mar(name: str, form: str = "published", **settings: Any) -> Baseline:
    device = torch.device(settings.get("device", "cpu"))
    made = Settings(form, device, settings.get("dtype"), compile=False)
    return mar.MAR("mar_base", made, SMALL, title="MAR-B", guidance_scale=2.9, steps=16,
                   diffusion_steps=2, tokenizer=SMALL_VAE)  # fmt: skip


def test_extrapolation_is_marked_and_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = BaselineSubject(tiny_mar("mar_base"), timed_steps=4)
    assert subject.timed_steps == (2, 6, 10, 14)
    assert subject.extrapolation is not None
    assert subject.extrapolation.startswith("4 of 16 steps were run")
    assert "(2, 6, 10, 14)" in subject.extrapolation
    tokens, seconds = timed_run(subject, subject.labels(1), None)
    baseline = subject.baseline
    assert isinstance(baseline, mar.MAR)
    expected = baseline.fixed_seconds + 4 * sum(baseline.step_seconds.values())
    assert seconds == pytest.approx(expected) and tokens.isfinite().all()
    assert BaselineSubject(tiny_mar("mar_base"), timed_steps=16).extrapolation is None


def test_gate_of_a_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MAR_PARTS", (0.5,))
    for form in baselines.FORMS:
        baseline = tiny_mar("mar_base", form, dtype=torch.bfloat16)
        gate = probes.check(baseline, tiny_mar)
        assert gate.green and gate.error is not None and 0 < gate.error < 0.1, (form, gate)
        decode = baseline.decode
        baseline.decode = lambda x, decode=decode: decode(x) + 0.5  # type: ignore[method-assign]
        assert not probes.check(baseline, tiny_mar).green


def test_counted_flops_are_those_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Affine in blocks and steps: what two small models give is what a larger one has."""
    sizes = dataclasses.replace(SMALL, encoder_depth=3, decoder_depth=2, head_depth=4)
    monkeypatch.setitem(mar.CONFIGS, "mar_base", sizes)

    def small(name: str, **settings: Any) -> Baseline:
        made = Settings(device=torch.device("meta"))
        return mar.MAR(name, made, mar.CONFIGS[name], title="", guidance_scale=2.9, steps=16,
                       diffusion_steps=3, tokenizer=SMALL_VAE)  # fmt: skip

    original = mar.MAR.__init__

    def shorter(self: mar.MAR, *args: Any, **settings: Any) -> None:
        original(self, *args, **{"steps": 16, "tokenizer": SMALL_VAE, **settings})

    monkeypatch.setattr(mar.MAR, "__init__", shorter)
    monkeypatch.setattr(baselines, "create", small)
    monkeypatch.setattr(flops, "MAR_STEPS", 1)
    whole = flops._over_steps(small("mar_base"))
    assert flops._mar("mar_base") == pytest.approx(whole, rel=1e-12)


def test_a_baseline_says_what_it_is() -> None:
    (published, run_well) = (recipe.sketch for recipe in subjects.select(["var_d16"], CPU))
    assert (published.key, run_well.key) == ("var_d16/published", "var_d16/well_run")
    assert published.mode == "as published" and run_well.mode == "exact"
    assert isinstance(published, BaselineSubject) and isinstance(run_well, BaselineSubject)
    weights = published.weight_bytes() - baseline_subjects.DECODER_BYTES
    assert weights == 4 * published.num_parameters == 2 * (
        run_well.weight_bytes() - baseline_subjects.DECODER_BYTES
    )


# --- memory ----------------------------------------------------------------------------------


def test_memory_rows(tiny_preset: None) -> None:
    selection = Selection(("far_base/torch/T=1", "far_base/native/T=1"), None, None, "cpu",
                          Choice(), 1)  # fmt: skip

    def alone(given: Selection, key: str, batch: int) -> Use:
        if "native" in key:
            raise RuntimeError("no room")
        return memory.use(given, key, batch)

    found, skipped = memory.measure(selection, [2], "memory-1", alone=alone)
    assert [(row.form, row.batch, row.samples_s) for row in found] == [("torch", 2, ())]
    assert all("native" in key for key in skipped) and len(skipped) == 1
    if _memory.resident_bytes() is not None:
        assert (found[0].peak_memory_bytes or 0) > 50 << 20
        assert backend.available_memory() is not None
