"""Cases of the denoising MLP. Rows are tokens of both halves of guidance."""

from __future__ import annotations

import torch

from fastfar import FARConfig
from fastfar.bench.cases._case import Arguments, Case, matrix, vector
from fastfar.costs.counts import Head
from fastfar.head import DenoisingMLP

STEPS = 8  # T of the denoising loop: its time is linear in T, and a short loop keeps runs short


def _linear(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    width, rows = config.head_width, 2 * batch * config.num_tokens
    x_NW = torch.randn(rows, width).to(dtype)
    return (x_NW, matrix(3 * width, width, dtype), vector(3 * width, dtype)), {}


def _adaln_mlp_block(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    width, rows = config.head_width, 2 * batch * config.num_tokens
    args = (
        *(torch.randn(rows, width).to(dtype) for _ in range(4)),
        vector(width, dtype, mean=1.0),
        vector(width, dtype),
        matrix(width, width, dtype),
        vector(width, dtype),
        matrix(width, width, dtype),
        vector(width, dtype),
    )
    return args, {}


def head_inputs(
    config: FARConfig, tokens: int, steps: int, dtype: torch.dtype, halves: int = 2
) -> Arguments:
    """A random denoising MLP and what `denoise_loop` takes with it, guided if `halves` is 2."""
    numbers = config.token_dim
    with torch.device("meta"):
        shapes = DenoisingMLP(config).state_dict()
    head = {
        name: matrix(*x.shape, dtype) if x.ndim == 2 else vector(len(x), dtype)
        for name, x in shapes.items()
    }
    # As after training, the variance channel stays near -1..1: outside, the noise explodes.
    head["final_layer.linear.weight"] *= 0.1
    args = (
        head,
        torch.randn(halves * tokens, config.width).to(dtype),
        config.num_levels // 2,
        torch.randn(tokens, numbers).to(dtype),
        torch.randn(steps, tokens, numbers).to(dtype),
    )
    # Bounded, as random weights would let the tokens grow without limit.
    return args, {"guidance_scale": 3.0, "temperature": 1.0, "x0_range": (-3.0, 3.0)}


def _denoise_loop(config: FARConfig, batch: int, dtype: torch.dtype) -> Arguments:
    return head_inputs(config, batch * config.num_tokens, STEPS, dtype)


def _work(config: FARConfig, batch: int) -> Head:
    return Head.of(config, batch * config.num_tokens, 2, STEPS)


def _denoise_loop_executed(config: FARConfig, batch: int, path: str) -> int:
    """See `fastfar.costs.counts.Head`. The folded head of the GPU multiplies as the CPU's does."""
    work = _work(config, batch)
    if path == "reference":
        return work.published_flops()
    return work.native_flops() if path in ("native", "triton") else work.hoisted_flops()


CASES = (
    Case("linear", _linear, lambda c, batch: 2 * batch * c.num_tokens * 6 * c.head_width**2),
    Case(
        "adaln_mlp_block",
        _adaln_mlp_block,
        lambda c, batch: 2 * batch * c.num_tokens * 4 * c.head_width**2,
    ),
    Case(
        "denoise_loop",
        _denoise_loop,
        lambda c, batch: _work(c, batch).reference_flops(),
        _denoise_loop_executed,
    ),
)
