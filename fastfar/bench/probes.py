"""The gate of the baselines: a short computation through all parts of a model, against float32.

Codes that are drawn from logits would hide an error or make one of a rounding, so codes are given:

    VAR        guided logits of the first scales, the codes of the former ones given
    LlamaGen   guided logits of the first positions, the codes before them given
    MAR        the tokens of two of its steps, reached tokens and draws given
    all        the image of given tokens

Truth is the published form in float32. A form in 16 bits may be `FACTOR` times as far from it as
the published form is in that dtype, plus a floor; both forms have the same weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfar import baselines
from fastfar.baselines import Baseline
from fastfar.baselines.llamagen import LlamaGen
from fastfar.baselines.mar import MAR
from fastfar.baselines.var import VAR, guided
from fastfar.baselines.var_transformer import LENGTHS
from fastfar.baselines.var_vae import CHANNELS, SIDES, VOCABULARY
from fastfar.bench.gate import FACTOR, FLOORS, Gate, distance

SCALES = 5  # of VAR: 55 of its 680 tokens
POSITIONS = 6  # of LlamaGen: the class and five codes
MAR_PARTS = (0.25, 0.75)  # of its steps
LABEL = 0

Outputs = tuple[Tensor, ...]
Create = Callable[..., Baseline]


@dataclass(frozen=True)
class Truth:
    """What the published form computes in float32, and how far it is from that in 16 bits."""

    outputs: Outputs
    allowed: dict[torch.dtype, float]


def check(baseline: Baseline, create: Create = baselines.create) -> Gate:
    """Error of a baseline's outputs, the largest one, to the truth."""
    exact = truth(baseline.name, baseline.device, create)
    error = _distance(probe(baseline), exact.outputs)
    limit = FLOORS[baseline.dtype]
    if baseline.dtype in exact.allowed:
        limit += FACTOR * exact.allowed[baseline.dtype]
    what = {VAR: f"logits of {SCALES} scales", LlamaGen: f"logits of {POSITIONS} positions"}
    compared = next((what[kind] for kind in what if isinstance(baseline, kind)), "two steps")
    return Gate(error, limit, f"{compared} and an image, given the tokens before, against float32")


@functools.lru_cache(maxsize=16)
def truth(name: str, device: torch.device, create: Create = baselines.create) -> Truth:
    """Computed once; needs the memory of the published form in float32 while it is."""
    exact = create(name, "published", device=device, dtype=torch.float32)
    outputs = probe(exact)
    allowed = {}
    for dtype in (torch.bfloat16, torch.float16):
        if dtype == torch.bfloat16 or device.type == "cuda":
            allowed[dtype] = _distance(_in_half(exact, dtype), outputs)
    return Truth(outputs, allowed)


def probe(baseline: Baseline) -> Outputs:
    """Float32 outputs on the CPU: of stage one, and an image."""
    labels_B = torch.tensor([LABEL], device=baseline.device)
    with torch.inference_mode():
        if isinstance(baseline, VAR):
            with baseline.autocast() if baseline.form == "published" else nullcontext():
                found = _var(baseline, labels_B)
            tokens = _given((1, CHANNELS, SIDES[-1], SIDES[-1]))
        elif isinstance(baseline, LlamaGen):
            codes_BS = _codes(POSITIONS - 1, baseline.config.vocabulary).to(baseline.device)
            found = baseline.logits(labels_B, codes_BS)
            tokens = _codes(baseline.steps, baseline.config.vocabulary)
        elif isinstance(baseline, MAR):
            found = _mar(baseline, labels_B)
            tokens = _given(tuple(found.shape))
        else:
            raise TypeError(f"no probe of {type(baseline).__name__}")
        image = baseline.decode(tokens.to(baseline.device))
    return found.float().cpu(), image.float().cpu()


def _var(baseline: VAR, labels_B: Tensor) -> Tensor:
    """(1, tokens, V)."""
    runner, quantize = baseline.runner, baseline.vae.quantize
    x_MLD = runner.start(labels_B)
    f_hat_BCHW = x_MLD.new_zeros(1, CHANNELS, SIDES[-1], SIDES[-1], dtype=torch.float32)
    found = []
    for scale in range(SCALES):
        if scale:
            x_MLD = runner.embed(quantize.shrunk(f_hat_BCHW, scale), scale)
        logits_MLV = runner.logits(runner.blocks(x_MLD, scale))
        found.append(guided(logits_MLV, baseline.guidance_scale, scale))
        codes_BL = _codes(LENGTHS[scale], VOCABULARY).to(baseline.device)
        f_hat_BCHW = quantize.add(f_hat_BCHW, codes_BL, scale)
    return torch.cat(found, dim=1)


def _mar(baseline: MAR, labels_B: Tensor) -> Tensor:
    """(1, C, H, W), 0 but for the tokens of the steps that run."""
    generator = torch.Generator(baseline.device).manual_seed(0)
    steps = [int(part * baseline.steps) for part in MAR_PARTS]
    return baseline.tokens(
        labels_B, noise=baseline.draw_noise(1, generator), timed_steps=steps
    )


def _in_half(exact: Baseline, dtype: torch.dtype) -> Outputs:
    """Outputs of the float32 form as it is published in 16 bits: autocast, LlamaGen's weights."""
    if isinstance(exact, LlamaGen):
        exact.model.to(dtype)
        return probe(exact)
    with torch.autocast(exact.device.type, dtype):
        return probe(exact)


def _distance(outputs: Outputs, exact: Outputs) -> float:
    return max(distance(out, other) for out, other in zip(outputs, exact, strict=True))


def _given(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _codes(count: int, vocabulary: int) -> Tensor:
    """(1, count) codes."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(vocabulary, (1, count), generator=generator)
