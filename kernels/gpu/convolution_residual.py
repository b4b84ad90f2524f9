"""What follows a convolution: its bias and the residual, in one pass over a channels-last image."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._configs import config, row_tile
from ._launch import launch


@triton.jit
def convolution_residual_kernel(
    y_NC, bias_C, residual_NC, rows, channels, BN: tl.constexpr, BP: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)[:, None]
    column = tl.program_id(1) * BP + tl.arange(0, BP)[None, :]
    keep = (row < rows) & (column < channels)
    offsets = row * channels + column
    y = tl.load(y_NC + offsets, mask=keep, other=0.0).to(tl.float32)
    y += tl.load(bias_C + column, mask=column < channels, other=0.0).to(tl.float32)
    if residual_NC is not None:
        y += tl.load(residual_NC + offsets, mask=keep, other=0.0).to(tl.float32)
    tl.store(y_NC + offsets, y.to(y_NC.dtype.element_ty), mask=keep)


def convolution_residual(
    y_NC: torch.Tensor,
    bias_C: torch.Tensor,
    residual_NC: torch.Tensor | None,
    *,
    arch: int,
) -> None:
    """y = y + bias + residual, in place, in float32 and rounded once.

    y, residual: contiguous, N positions of C channels; each tensor of float32, float16 or bfloat16.
    """
    rows, channels = y_NC.shape
    chosen = config("convolution_residual", arch, 4)
    tile = row_tile(chosen, channels)
    launch(
        convolution_residual_kernel,
        (triton.cdiv(rows, tile["BN"]), triton.cdiv(channels, tile["BP"])),
        y_NC,
        bias_C,
        residual_NC,
        rows,
        channels,
        **tile,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
