"""A convolution and the residual that is added to it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastfar.ops import _convolution_triton as gpu
from fastfar.ops._convolution import convolve, is_packed
from fastfar.ops._registry import op


@op
def convolution_residual(
    x_BCHW: Tensor, weight: Tensor, bias: Tensor, residual_BCHW: Tensor | None = None
) -> Tensor:
    """residual + convolution(x, weight) + bias, stride 1, zeros around the image.

    Args:
        x_BCHW: (B, C, H, W) floating.
        weight: (N, C, k, k), k odd. On the native back end also one that `pack_convolution` made:
            then channels-last is the memory format of the result, and sum and residual are
            rounded once. On Triton the result is channels-last, too, and the sum of bias and
            residual is rounded once, after the convolution.
        bias: (N,).
        residual_BCHW: (B, N, H, W), or None for no residual.

    Returns:
        (B, N, H, W).
    """
    y_BCHW = F.conv2d(x_BCHW, weight, bias, padding=weight.shape[-1] // 2)
    return y_BCHW if residual_BCHW is None else residual_BCHW + y_BCHW


def _native_implementation(
    x_BCHW: Tensor, weight: Tensor, bias: Tensor, residual_BCHW: Tensor | None = None
) -> Tensor:
    """See `convolution_residual`: oneDNN's where the weight is packed, else PyTorch's."""
    if is_packed(weight):
        return convolve(x_BCHW, weight, bias, weight.shape[-1] // 2, residual_BCHW)
    out_BCHW: Tensor = convolution_residual.implementations["torch"](
        x_BCHW, weight, bias, residual_BCHW
    )
    return out_BCHW


convolution_residual.register("native", _native_implementation)


def _triton_implementation(
    x_BCHW: Tensor, weight: Tensor, bias: Tensor, residual_BCHW: Tensor | None = None
) -> Tensor:
    """See `convolution_residual`; PyTorch computes what has gradients or several dtypes."""
    if gpu.fits(x_BCHW, weight, bias, residual_BCHW):
        return gpu.convolve(x_BCHW, weight, bias, residual_BCHW)
    out_BCHW: Tensor = convolution_residual.implementations["torch"](
        x_BCHW, weight, bias, residual_BCHW
    )
    return out_BCHW


convolution_residual.register("triton", _triton_implementation)
