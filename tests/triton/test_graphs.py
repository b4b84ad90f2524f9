"""A graph of Triton's kernels, in the interpreter: a replay reads buffers, nothing is baked in."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from formula import fill_by_formula
from recorder import RecordingCapturer
from tiny_far import TINY

from fastfar import FAR, SamplingPlan, SeededNoise, graphs, sample_latents
from fastfar.graphs import GraphCache
from fastfar.ops import use_backend
from fastfar.outer_step import OuterStep
from fastfar.sampling import _prepared

pytest.importorskip("triton", minversion="3.2")
CONFIG = dataclasses.replace(
    TINY, encoder_depth=1, buffer_size=2, head_depth=1, latent_size=2, width=16, head_width=16
)
PLAN = SamplingPlan(
    levels=(0, 9),
    input_levels=(None, 9),
    guidance_scale=2.0,
    guidance_ramp=(0.0, 1.0),
    temperatures=(0.8, 1.0),
    diffusion_steps=(1, 2),
    mask_ratios=(1.0, 0.5),
    x0_range=(-3.0, 3.0),
)


def test_a_replay_equals_eager_sampling() -> None:
    model = FAR(CONFIG).eval()
    fill_by_formula(model)
    made: list[RecordingCapturer] = []

    def make(device: torch.device) -> RecordingCapturer:
        made.append(RecordingCapturer(device))
        return made[-1]

    cache = GraphCache(make)
    with torch.inference_mode(), use_backend("triton"):
        step = OuterStep(*_prepared(model, "triton", torch.float32), PLAN, torch.float32)
        for label, seed in ((1, 0), (7, 3)):
            noise = SeededNoise([(seed, 0)], CONFIG.num_tokens, CONFIG.token_dim)
            ours = graphs.sample(step, torch.tensor([label]), noise, None, cache)
            options = {"backend": "triton", "dtype": torch.float32}
            truth = sample_latents(model, [label], PLAN, generator=seed, **options)
            assert bool(ours.isfinite().all()) and torch.equal(ours, truth)
    (capturer,) = made
    names = {func._schema.name for func, *_ in capturer.recorders[0].ops}
    assert {"fastfar::denoise_step", "fastfar::denoise_gate_layernorm"} <= names
