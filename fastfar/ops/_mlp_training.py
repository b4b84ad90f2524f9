"""layernorm_mlp_residual with a native backward, which computes the hidden layer again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfar import _native
from fastfar.ops import _launch, _training
from fastfar.packing import packed


def _shared(
    x_MD: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, hidden: int, dtype: Any
) -> dict[str, Tensor | float | None]:
    rows, width = x_MD.shape
    return {
        "dtype": _native.DTYPES[dtype],
        "x_dtype": _native.DTYPES[x_MD.dtype],
        "threads": torch.get_num_threads(),
        "rows": rows,
        "width": width,
        "hidden": hidden,
        "eps": eps,
        "x_MD": x_MD,
        "norm_weight": norm_weight.contiguous(),
        "norm_bias": norm_bias.contiguous(),
    }


@torch.library.custom_op("fastfar::layernorm_mlp_residual", mutates_args=())
def _forward(
    x_MD: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    x_MD = x_MD.contiguous()
    out_MD = torch.empty_like(x_MD)
    if out_MD.numel():
        _launch.launch(
            "layernorm_mlp_residual",
            **_shared(x_MD, norm_weight, norm_bias, eps, len(fc1_bias), dtype),
            fc1=packed(fc1_weight, dtype),
            fc1_bias=fc1_bias.contiguous(),
            fc2=packed(fc2_weight, dtype),
            fc2_bias=fc2_bias.contiguous(),
            out_MD=out_MD,
        )
    return out_MD


@torch.library.custom_op("fastfar::layernorm_mlp_residual_backward", mutates_args=())
def _backward(
    dout_MD: Tensor,
    x_MD: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    x_MD, dout_MD = x_MD.contiguous(), dout_MD.contiguous()
    out = _gradients_like(x_MD, fc1_weight)
    if not x_MD.numel():
        return [each.zero_() for each in out]
    dx, dnorm_weight, dnorm_bias, dfc1, dfc1_bias, dfc2, dfc2_bias = out
    _launch.launch(
        "layernorm_mlp_residual_backward",
        **_shared(x_MD, norm_weight, norm_bias, eps, len(fc1_bias), dtype),
        fc1=packed(fc1_weight, dtype),
        fc1_bias=fc1_bias.contiguous(),
        fc1_transposed=_training.transposed(fc1_weight, dtype),
        fc2_transposed=_training.transposed(fc2_weight, dtype),
        dout_MD=dout_MD,
        dx_MD=dx,
        dnorm_weight=dnorm_weight,
        dnorm_bias=dnorm_bias,
        dfc1_weight=dfc1,
        dfc1_bias=dfc1_bias,
        dfc2_weight=dfc2,
        dfc2_bias=dfc2_bias,
    )
    return out


def _gradients_like(x_MD: Tensor, fc1_weight: Tensor) -> list[Tensor]:
    """dx, dnorm_weight, dnorm_bias, dW_1, db_1, dW_2, db_2."""
    hidden, width = fc1_weight.shape

    def sums(*shape: int) -> Tensor:
        return x_MD.new_empty(shape, dtype=torch.float32)

    vectors = [sums(width), sums(width), sums(hidden, width), sums(hidden), sums(width, hidden)]
    return [x_MD.new_empty(x_MD.shape), *vectors, sums(width)]


@_forward.register_fake
def _(x_MD: Tensor, *_: Any) -> Tensor:
    return x_MD.new_empty(x_MD.shape)


@_backward.register_fake
def _(dout_MD: Tensor, x_MD: Tensor, weight: Tensor, bias: Tensor, fc1: Tensor, *_: Any) -> Any:
    return _gradients_like(x_MD, fc1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.eps, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dout_MD: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(dout_MD, *ctx.saved_tensors, ctx.eps, ctx.dtype), None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)


def layernorm_mlp_residual(
    x_BSD: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    eps: float,
) -> Tensor:
    """The op of this name, recorded for autograd; float32 under autocast, else dtype of x."""
    name = "layernorm_mlp_residual"
    vectors = {"norm_weight": norm_weight, "norm_bias": norm_bias, "fc1_bias": fc1_bias,
               "fc2_bias": fc2_bias}  # fmt: skip
    width, hidden = x_BSD.shape[-1], fc1_bias.shape[0]
    dtype = _training.product_dtype(name, fc1_weight, fc2_weight)
    _launch.check(name, {"x": x_BSD, **vectors})
    _launch.shapes(
        name,
        norm_weight=(norm_weight, (width,)),
        norm_bias=(norm_bias, (width,)),
        fc1_weight=(fc1_weight, (hidden, width)),
        fc2_weight=(fc2_weight, (width, hidden)),
        fc2_bias=(fc2_bias, (width,)),
    )
    if _training.autocast_dtype() is not None:
        x_BSD = x_BSD.float()  # the residual stream
    out_MD: Tensor = _forward(
        x_BSD.reshape(-1, width),
        norm_weight.float(),
        norm_bias.float(),
        fc1_weight.float(),
        fc1_bias.float(),
        fc2_weight.float(),
        fc2_bias.float(),
        eps,
        dtype,
    )
    return out_MD.view(x_BSD.shape)
