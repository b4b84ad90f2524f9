"""The whole sampling loop on Triton's kernels, in the interpreter, against the reference path."""

from __future__ import annotations

import dataclasses

import interpreter
import pytest
import torch
from formula import fill_by_formula
from tiny_far import TINY
from tolerances import GOLDEN, relative

from fastfar import FAR, SamplingPlan, sample_latents

interpreter.need()


@pytest.mark.parametrize("mode", ["nomask", "mask"])
def test_parity_with_the_reference(mode: str) -> None:
    """float32 is parity mode: two images, guided from the second of two outer steps on."""
    model = FAR(dataclasses.replace(TINY, encoder_depth=1, buffer_size=2, head_depth=1)).eval()
    fill_by_formula(model)
    with torch.no_grad():  # v stays near -1..1, as in a trained head
        model.head.final_layer.linear.weight.mul_(0.1)
    plan = SamplingPlan(
        levels=(0, 9),
        input_levels=(None, 9),
        guidance_scale=2.0,
        guidance_ramp=(0.0, 1.0),
        temperatures=(0.8, 1.0),
        diffusion_steps=(1, 2),
        mask_ratios=(1.0, 0.4) if mode == "mask" else None,
        x0_range=(-3.0, 3.0),
    )
    levels: list[int] = []

    def sample(backend: str, dtype: torch.dtype) -> torch.Tensor:
        return sample_latents(
            model, [1, 7], plan, generator=3, backend=backend, dtype=dtype,
            on_level=lambda k, _: levels.append(k),
        )  # fmt: skip

    truth = sample("reference", torch.float64)
    ours = sample("triton", torch.float32)
    assert ours.dtype is torch.float32 and levels == [*range(len(plan))] * 2
    assert relative(ours, truth) < GOLDEN
