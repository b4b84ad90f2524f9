"""A linear layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar import _native
from fastfar.ops import _launch, _training
from fastfar.ops._registry import op
from fastfar.packing import packed


@op
def linear(x_MK: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b.

    Args:
        x_MK: (..., K) floating.
        weight: (N, K).
        bias: (N,).

    Returns:
        (..., N), dtype of x; under autocast, its dtype.

    Native: float32 or bfloat16; the operands of the products have the dtype of the weight, or that
    of autocast, sums are float32, and so are the gradients of weight and bias until they are
    rounded to the parameters' dtype. TypeError and ValueError for other dtypes, devices and shapes.

    Source: the layers between the fused ops of FAR, arXiv 2503.05305.
    """
    return F.linear(x_MK, weight, bias)


# --- native ----------------------------------------------------------------------------------


def _rows(x_MK: Tensor) -> Tensor:
    """x itself, or a copy where its rows do not lie apart by a stride."""
    return x_MK if x_MK.stride(1) == 1 and x_MK.stride(0) >= x_MK.shape[1] else x_MK.contiguous()


def _product(
    x_MK: Tensor, weight: Tensor, bias: Tensor, out_dtype: torch.dtype, dtype: torch.dtype
) -> Tensor:
    x_MK = _rows(x_MK)
    (rows, k), n = x_MK.shape, bias.shape[0]
    out_MN = torch.empty(rows, n, dtype=out_dtype)
    if rows and n:
        _launch.launch(
            "linear",
            dtype=_native.DTYPES[dtype],
            x_dtype=_native.DTYPES[x_MK.dtype],
            out_dtype=_native.DTYPES[out_dtype],
            threads=torch.get_num_threads(),
            rows=rows,
            n=n,
            k=k,
            x_stride=x_MK.stride(0),
            x_MK=x_MK,
            weight=packed(weight, dtype),
            bias=bias.detach().float().contiguous(),
            out_MN=out_MN,
        )
    return out_MN


@torch.library.custom_op("fastfar::linear", mutates_args=())
def _forward(
    x_MK: Tensor, weight: Tensor, bias: Tensor, out_dtype: torch.dtype, dtype: torch.dtype
) -> Tensor:
    return _product(x_MK, weight, bias, out_dtype, dtype)


@torch.library.custom_op("fastfar::linear_backward", mutates_args=())
def _backward(
    dout_MN: Tensor, x_MK: Tensor, weight: Tensor, bias: Tensor, need_dx: bool, dtype: torch.dtype
) -> list[Tensor]:
    x_MK, dout_MN = _rows(x_MK), dout_MN.contiguous()
    (rows, k), n = x_MK.shape, dout_MN.shape[1]
    dx_MK = torch.empty(rows, k, dtype=x_MK.dtype) if need_dx else x_MK.new_empty(0)
    if rows == 0:
        return [dx_MK, torch.zeros_like(weight), torch.zeros_like(bias)]
    dweight, dbias = torch.empty(n, k), torch.empty(n)
    _launch.launch(
        "linear_backward",
        dtype=_native.DTYPES[dtype],
        x_dtype=_native.DTYPES[x_MK.dtype],
        out_dtype=_native.DTYPES[dout_MN.dtype],
        threads=torch.get_num_threads(),
        rows=rows,
        n=n,
        k=k,
        x_stride=x_MK.stride(0),
        x_MK=x_MK,
        weight_transposed=_training.transposed(weight, dtype) if need_dx else None,
        dout_MN=dout_MN,
        dx_MK=dx_MK if need_dx else None,
        dweight=dweight,
        dbias=dbias,
    )
    return [dx_MK, dweight.to(weight.dtype), dbias.to(bias.dtype)]


@_forward.register_fake
def _(x_MK: Tensor, weight: Tensor, bias: Tensor, out_dtype: Any, dtype: Any) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], weight.shape[0], dtype=out_dtype)


@_backward.register_fake
def _(
    dout_MN: Tensor, x_MK: Tensor, weight: Tensor, bias: Tensor, need_dx: bool, dtype: Any
) -> list[Tensor]:
    dx_MK = x_MK.new_empty(x_MK.shape if need_dx else (0,))
    return [dx_MK, weight.new_empty(weight.shape), bias.new_empty(bias.shape)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_MK, weight, bias, _, ctx.dtype = inputs
    ctx.save_for_backward(x_MK, weight, bias)


def _gradients(ctx: Any, dout_MN: Tensor) -> tuple[Tensor | None, ...]:
    need_dx = ctx.needs_input_grad[0]
    dx, dweight, dbias = _backward(dout_MN, *ctx.saved_tensors, need_dx, ctx.dtype)
    return dx if need_dx else None, dweight, dbias, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _native_implementation(x_MK: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `linear`."""
    name = "linear"
    dtype = _training.product_dtype(name, weight)
    _launch.check(name, {"x": x_MK, "bias": bias})
    shape, n = x_MK.shape, bias.shape[0]
    _launch.shapes(name, weight=(weight, (n, shape[-1])), bias=(bias, (n,)))
    out_dtype = _training.autocast_dtype() or x_MK.dtype
    run = _forward if _training.wants_graph(x_MK, weight, bias) else _product
    if _training.is_packed(weight):
        run = _product
    out_MN: Tensor = run(x_MK.reshape(-1, shape[-1]), weight, bias, out_dtype, dtype)
    return out_MN.view(*shape[:-1], n)


linear.register("native", _native_implementation)
