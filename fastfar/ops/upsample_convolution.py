"""Nearest-neighbour upsampling and the convolution that follows it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar.ops import _convolution_triton as gpu
from fastfar.ops._convolution import convolve, is_packed, pack_convolution
from fastfar.ops._registry import op


@op
def upsample_convolution(x_BCHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """convolution(every pixel of x four times, weight) + bias, zeros around the image.

    Args:
        x_BCHW: (B, C, H, W) floating.
        weight: (N, C, 3, 3). On the native back end also what `pack_upsample` made of it.
        bias: (N,).

    Returns:
        (B, N, 2 H, 2 W).
    """
    large_BCHW = F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
    return F.conv2d(large_BCHW, weight, bias, padding=1)


# --- native ----------------------------------------------------------------------------------
#
# A pixel of the result sees a 2 x 2 neighbourhood of x only: row 2 i sees row i - 1 through tap 0
# and row i through taps 1 and 2; row 2 i + 1 sees row i through taps 0 and 1 and row i + 1 through
# tap 2; columns alike. So the result consists of four 2 x 2 convolutions of x, with sums of taps as
# weights: 4/9 of the products. All four slide over the same neighbourhoods of x with one row and
# column of zeros around it: the neighbourhood that starts at row i of that serves the result's rows
# 2 i - 1 and 2 i.

# (odd rows or even rows of the result, tap of the 2, tap of the 3)
_SUMS = (((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)), ((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)))


def pack_upsample(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, C, 3, 3) -> packed (4 N, C, 2, 2): the taps' sums, added in float64 and rounded once."""
    sums_RST = torch.tensor(_SUMS, dtype=torch.float64)
    weight = weight.detach().double()
    outputs, inputs = weight.shape[:2]
    taps = torch.einsum("rat,sbu,octu->rsocab", sums_RST, sums_RST, weight)
    return pack_convolution(taps.reshape(4 * outputs, inputs, 2, 2), dtype, padding=1)


def _native_implementation(x_BCHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `upsample_convolution`: four small convolutions where the weight is packed."""
    if not is_packed(weight):
        out_BCHW: Tensor = upsample_convolution.implementations["torch"](x_BCHW, weight, bias)
        return out_BCHW
    batch, _, height, width = x_BCHW.shape
    outputs = len(bias)
    sums = convolve(x_BCHW, weight, bias.repeat(4), padding=1)  # (B, 4 N, H + 1, W + 1)
    sums = sums.permute(0, 2, 3, 1).reshape(batch, height + 1, width + 1, 2, 2, outputs)
    pixels = torch.empty(batch, height, 2, width, 2, outputs, dtype=x_BCHW.dtype)
    for row in (0, 1):
        for column in (0, 1):
            # Sums (1 - row, 1 - column) start at neighbourhood (row, column).
            pixels[:, :, row, :, column] = sums[
                :, row : row + height, column : column + width, 1 - row, 1 - column
            ]
    return pixels.view(batch, 2 * height, 2 * width, outputs).permute(0, 3, 1, 2)


upsample_convolution.register("native", _native_implementation)


# --- Triton ----------------------------------------------------------------------------------


def _triton_implementation(x_BCHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `upsample_convolution`; PyTorch computes what has gradients or several dtypes."""
    if not gpu.fits(x_BCHW, weight, bias):
        out_BCHW: Tensor = upsample_convolution.implementations["torch"](x_BCHW, weight, bias)
        return out_BCHW
    # Four times a channels-last image stays channels-last.
    last_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    large_BCHW = F.interpolate(last_BCHW, scale_factor=2.0, mode="nearest")
    return gpu.convolve(large_BCHW, weight, bias)


upsample_convolution.register("triton", _triton_implementation)
