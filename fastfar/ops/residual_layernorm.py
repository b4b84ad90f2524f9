"""A residual sum and its LayerNorm, in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar.kernels.gpu._launch import is_recording
from fastfar.ops._registry import op
from fastfar.ops._rows import autocast_dtype, check, recorded, rows
from fastfar.ops._triton import architecture, kernels, traced


@op
def residual_layernorm(
    x_ND: Tensor,
    update_ND: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """s = x + update and LN(s) = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias.

    Args:
        x_ND: (..., D) floating, the residual stream.
        update_ND: (..., D), what is added to it; None adds nothing.
        norm_weight, norm_bias: (D,), or both None for a LayerNorm without affine.

    Returns:
        s in the dtype of x (x itself without an update) and LN(s), both of the shape of x. LN(s)
        has the dtype of x; under autocast it has autocast's dtype on Triton, which the product that
        reads it would round it to, and float32 on PyTorch.

    Triton: float32, float16 or bfloat16, each tensor its own; statistics and sums are float32, and
    so are the gradients of weight and bias until they are rounded to the parameters' dtype.
    TypeError and ValueError for other dtypes, devices and shapes.

    Source: Ba et al., arXiv 1607.06450; the order of a pre-norm transformer block.
    """
    sum_ND = x_ND if update_ND is None else x_ND + update_ND.to(x_ND.dtype)
    return sum_ND, F.layer_norm(sum_ND, sum_ND.shape[-1:], norm_weight, norm_bias, eps)


# --- Triton ----------------------------------------------------------------------------------


def _run(
    x_ND: Tensor,
    update_ND: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The sum, without elements where there is no update, and its LayerNorm in `dtype`."""
    sum_ND, normed_ND = _outputs(x_ND, update_ND, dtype)
    kernels("residual_layernorm").residual_layernorm(
        rows(x_ND),
        None if update_ND is None else rows(update_ND),
        None if norm_weight is None else norm_weight.contiguous(),
        None if norm_bias is None else norm_bias.contiguous(),
        None if update_ND is None else sum_ND,
        normed_ND,
        eps=eps,
        arch=architecture(x_ND),
    )
    return sum_ND, normed_ND


def _outputs(x_ND: Tensor, update_ND: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = tuple(x_ND.shape)
    return x_ND.new_empty((0,) if update_ND is None else shape), x_ND.new_empty(shape, dtype=dtype)


@torch.library.custom_op("fastfar::residual_layernorm", mutates_args=())
def _forward(
    x_ND: Tensor,
    update_ND: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _run(x_ND, update_ND, norm_weight, norm_bias, eps, dtype)


def _run_backward(
    dsum_ND: Tensor | None,
    dnormed_ND: Tensor,
    sum_ND: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    update_dtype: torch.dtype,
) -> list[Tensor]:
    out = _gradients_like(sum_ND, update_dtype)
    dx_ND, dupdate_ND, dvectors_2D = out
    count = kernels("_rows").programs(sum_ND.shape[0])
    kernels("residual_layernorm").residual_layernorm_backward(
        None if dsum_ND is None else rows(dsum_ND),
        rows(dnormed_ND),
        rows(sum_ND),
        None if norm_weight is None else norm_weight.contiguous(),
        dx_ND,
        dupdate_ND if dupdate_ND.ndim == 2 else None,
        sum_ND.new_empty(2, count, sum_ND.shape[1], dtype=torch.float32),
        None if norm_weight is None else dvectors_2D,
        eps=eps,
        arch=architecture(sum_ND),
    )
    return out


@torch.library.custom_op("fastfar::residual_layernorm_backward", mutates_args=())
def _backward(
    dsum_ND: Tensor | None,
    dnormed_ND: Tensor,
    sum_ND: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    update_dtype: torch.dtype,
) -> list[Tensor]:
    return _run_backward(dsum_ND, dnormed_ND, sum_ND, norm_weight, eps, update_dtype)


def _gradients_like(sum_ND: Tensor, update_dtype: torch.dtype) -> list[Tensor]:
    """dx; the same as dupdate, unless it has the dtype of dx; those of weight and bias."""
    shape = tuple(sum_ND.shape)
    other = (0,) if update_dtype == sum_ND.dtype else shape
    return [
        sum_ND.new_empty(shape),
        sum_ND.new_empty(other, dtype=update_dtype),
        sum_ND.new_empty(2, shape[1], dtype=torch.float32),
    ]


@_forward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    return _run(*args) if is_recording() else _outputs(args[0], args[1], args[5])


@_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    return _run_backward(*args) if is_recording() else _gradients_like(args[2], args[5])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_ND, update_ND, norm_weight, norm_bias, ctx.eps, _ = inputs
    ctx.save_for_backward(x_ND if update_ND is None else output[0], norm_weight)
    ctx.update_dtype = None if update_ND is None else update_ND.dtype
    ctx.vector_dtypes = [None if v is None else v.dtype for v in (norm_weight, norm_bias)]
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dsum_ND: Tensor | None, dnormed_ND: Tensor | None
) -> tuple[Tensor | None, ...]:
    sum_ND, norm_weight = ctx.saved_tensors
    update_dtype = ctx.update_dtype or sum_ND.dtype
    if ctx.update_dtype is None:
        dsum_ND = None  # of an empty tensor: x itself was the sum
    if dnormed_ND is None:
        dx_ND, dvectors = dsum_ND, (None, None)
        dupdate_ND = None if dsum_ND is None else dsum_ND.to(update_dtype)
    else:
        dx_ND, dupdate_ND, dvectors_2D = _backward(
            dsum_ND, dnormed_ND, sum_ND, norm_weight, ctx.eps, update_dtype
        )
        dupdate_ND = dupdate_ND if dupdate_ND.ndim == 2 else dx_ND
        dvectors = dvectors_2D.unbind()
    dweight, dbias = (
        None if given is None or d is None else d.to(given)
        for given, d in zip(ctx.vector_dtypes, dvectors, strict=True)
    )
    return dx_ND, None if ctx.update_dtype is None else dupdate_ND, dweight, dbias, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def residual_layernorm_rows(
    x_ND: Tensor,
    update_ND: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The op on Triton, (N, D) and LN(s) in `dtype`: for ops that know what reads it."""
    width = x_ND.shape[1]
    check(
        "residual_layernorm",
        x=(x_ND, tuple(x_ND.shape)),
        update=(update_ND, tuple(x_ND.shape)),
        norm_weight=(norm_weight, (width,)),
        norm_bias=(norm_bias, (width,)),
    )
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("triton residual_layernorm: give both norm_weight and norm_bias, or none")
    tensors = x_ND, update_ND, norm_weight, norm_bias
    run = _forward if traced() or recorded(*tensors) else _run
    sum_ND, normed_ND = run(*tensors, eps, dtype)
    return x_ND if update_ND is None else sum_ND, normed_ND


def _triton_implementation(
    x_ND: Tensor,
    update_ND: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """See `residual_layernorm`."""
    shape, width = x_ND.shape, x_ND.shape[-1]
    sum_ND, normed_ND = residual_layernorm_rows(
        x_ND.reshape(-1, width),
        None if update_ND is None else update_ND.reshape(-1, width),
        norm_weight,
        norm_bias,
        eps,
        autocast_dtype(x_ND) or x_ND.dtype,
    )
    return x_ND if update_ND is None else sum_ND.view(shape), normed_ND.view(shape)


residual_layernorm.register("triton", _triton_implementation)
