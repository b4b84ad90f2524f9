"""FLOPs of the baselines' products and convolutions, counted by PyTorch on the meta device.

Work is affine in the number of blocks and of diffusion steps, so models of one and of two of each
are counted and the rest follows exactly; whole ones would take minutes, as every elementwise op on
the meta device is Python. Counted is the published form, which both forms answer for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastfar import baselines
from fastfar.baselines import llamagen, mar, var
from fastfar.baselines._baseline import Baseline, Settings

META = Settings(device=torch.device("meta"))
MAR_STEPS = 4  # of 256, each counted for its neighbours


@functools.lru_cache(maxsize=16)
def published_flops(name: str) -> int:
    """FLOPs of one image of a baseline, tokens and decoding, two per multiply-add."""
    counted = {"var": _var, "mar": _mar, "llamagen": _llamagen}[name.split("_")[0]]
    whole = baselines.create(name, device="meta")
    shape = {"var": (1, 32, 16, 16), "mar": (1, 16, 16, 16)}
    tokens = torch.zeros(1, 256, dtype=torch.int64, device="meta")
    if name.split("_")[0] in shape:
        tokens = torch.zeros(shape[name.split("_")[0]], device="meta")
    return round(counted(name)) + _count(lambda: whole.decode(tokens))


def _count(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        run()
    return int(counter.get_total_flops())


def _label() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int64, device="meta")


def _var(name: str) -> float:
    depth = int(name.removeprefix("var_d"))

    def of(blocks: int) -> int:
        model = var.VAR(name, META, depth=blocks, width=64 * depth)
        return _count(lambda: model.tokens(_label()))

    one, two = of(1), of(2)
    return one + (depth - 1) * (two - one)


def _llamagen(name: str) -> float:
    """Every position but the first, whose attention is another one, costs the same."""
    config = llamagen.CONFIGS[name]

    def of(blocks: int) -> int:
        model = llamagen.Published(name, META, replace(config, depth=blocks))
        given = [torch.zeros(1, count, dtype=torch.int64, device="meta") for count in (0, 1)]
        first, both = (_count(functools.partial(model.logits, _label(), g)) for g in given)
        return first + (model.steps - 1) * (both - first)

    one, two = of(1), of(2)
    return one + (config.depth - 1) * (two - one)


def _mar(name: str) -> float:
    """encoder, decoder: blocks; steps: T; head: its blocks; a step is a + T (b + head c)."""
    config = mar.CONFIGS[name]
    whole = baselines.create(name, device="meta")
    assert isinstance(whole, mar.MAR)

    def of(encoder: int = 1, decoder: int = 1, steps: int = 1, head: int = 1) -> float:
        small = replace(config, encoder_depth=encoder, decoder_depth=decoder, head_depth=head)
        model = mar.MAR(
            name, META, small, title="", guidance_scale=whole.guidance_scale, diffusion_steps=steps
        )
        return _over_steps(model)

    least = of()
    encoder, decoder = of(encoder=2) - least, of(decoder=2) - least
    two_steps = of(steps=2)
    per_step, per_block = two_steps - least, (of(steps=2, head=2) - two_steps) / 2
    head = per_step + (config.head_depth - 1) * per_block
    return (
        least
        - per_step
        + (config.encoder_depth - 1) * encoder
        + (config.decoder_depth - 1) * decoder
        + whole.diffusion_steps * head
    )


def _over_steps(model: Baseline) -> float:
    """Of all steps of a model whose steps can be run alone."""
    part = model.steps // MAR_STEPS
    steps = range(part // 2, model.steps, part)
    total = 0.0
    for step, weight in zip(steps, model.step_weights(steps), strict=True):
        total += weight * _count(functools.partial(model.tokens, _label(), timed_steps=(step,)))
    return total
