"""The convolutions of the image autoencoder on a GPU: PyTorch's, then bias and residual at once.

PyTorch adds the bias of a convolution in a pass of its own over the image, and the residual in
another one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastfar.ops._rows import DTYPES, autocast_dtype, check, recorded
from fastfar.ops._triton import architecture, kernel_op, kernels


def fits(x_BCHW: Tensor, *others: Tensor | None) -> bool:
    """Whether `convolve` takes these tensors: one dtype of the kernel's, no gradients, no autocast.

    Autocast would have the residual in another dtype than the convolution.
    """
    same = all(x is None or x.dtype is x_BCHW.dtype for x in others)
    plain = autocast_dtype(x_BCHW) is None and not recorded(x_BCHW, *others)
    return same and plain and x_BCHW.dtype in DTYPES


@kernel_op("convolution_residual", mutates=("y_NC",))
def _add(y_NC: Tensor, bias: Tensor, residual_NC: Tensor | None) -> None:
    kernels("convolution_residual").convolution_residual(
        y_NC, bias, residual_NC, arch=architecture(y_NC)
    )


def convolve(
    x_BCHW: Tensor, weight: Tensor, bias: Tensor, residual_BCHW: Tensor | None = None
) -> Tensor:
    """residual + convolution(x, weight) + bias, size kept, channels-last; rounded twice.

    float32 products are float32, whatever `torch.backends.cudnn.allow_tf32` says: it is the dtype
    of parity.

    Raises:
        TypeError, ValueError: see `check`.
    """
    cudnn, padding = torch.backends.cudnn, weight.shape[-1] // 2
    y_BCHW: Tensor = torch._convolution(  # the only way to say allow_tf32 for one call
        x_BCHW.contiguous(memory_format=torch.channels_last),
        weight,
        None,
        stride=(1, 1),
        padding=(padding, padding),
        dilation=(1, 1),
        transposed=False,
        output_padding=(0, 0),
        groups=1,
        benchmark=cudnn.benchmark,
        deterministic=cudnn.deterministic,
        cudnn_enabled=cudnn.enabled,
        allow_tf32=False,
    )
    check(
        "convolution_residual",
        y=(y_BCHW, tuple(y_BCHW.shape)),
        bias=(bias, (len(weight),)),
        residual=(residual_BCHW, tuple(y_BCHW.shape)),
    )
    y_BCHW = y_BCHW.contiguous(memory_format=torch.channels_last)
    if y_BCHW.numel():
        residual_NC = None if residual_BCHW is None else _rows(residual_BCHW)
        _add(_rows(y_BCHW), bias.contiguous(), residual_NC)
    return y_BCHW


def _rows(x_BCHW: Tensor) -> Tensor:
    """(B H W, C), without a copy where x is channels-last."""
    last = x_BCHW.contiguous(memory_format=torch.channels_last)
    return last.permute(0, 2, 3, 1).reshape(-1, x_BCHW.shape[1])
