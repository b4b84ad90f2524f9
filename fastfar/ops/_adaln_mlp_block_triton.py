"""`adaln_mlp_block` on Triton: kernels/gpu/adaln_mlp_block.py around cuBLAS's products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar.kernels.gpu._launch import is_recording
from fastfar.ops import _rows
from fastfar.ops._triton import architecture, kernels, traced

NAME = "adaln_mlp_block"


def _run_forward(
    x_NW: Tensor,
    shift_NW: Tensor,
    scale_NW: Tensor,
    gate_NW: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The block, and what its backward needs: h = W_1 (...) + b_1 and u = W_2 silu(h) + b_2."""
    dtype = fc1_weight.dtype
    x_NW, shift_NW, scale_NW, gate_NW = map(_rows.rows, (x_NW, shift_NW, scale_NW, gate_NW))
    out_NW = x_NW.new_empty(x_NW.shape)
    a_NW = x_NW.new_empty(x_NW.shape, dtype=dtype)
    triton, arch = kernels(NAME), architecture(x_NW)
    triton.modulate(x_NW, shift_NW, scale_NW, norm_weight, norm_bias, a_NW, eps=eps, arch=arch)
    h_NW = F.linear(a_NW, fc1_weight, fc1_bias.to(dtype))
    u_NW = F.linear(F.silu(h_NW), fc2_weight, fc2_bias.to(dtype))
    triton.gated_residual(x_NW, gate_NW, u_NW, out_NW, arch=arch)
    return out_NW, h_NW, u_NW


def _run_backward(
    dout_NW: Tensor,
    x_NW: Tensor,
    shift_NW: Tensor,
    scale_NW: Tensor,
    gate_NW: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    h_NW: Tensor,
    u_NW: Tensor,
    eps: float,
) -> list[Tensor]:
    """dx, dshift, dscale, dgate, dW_1, dW_2 and float32 sums: b_2, b_1, norm_weight, norm_bias."""
    triton, shared, arch = kernels(NAME), kernels("_rows"), architecture(x_NW)
    dout_NW, x_NW, shift_NW, scale_NW, gate_NW = map(
        _rows.rows, (dout_NW, x_NW, shift_NW, scale_NW, gate_NW)
    )
    dx_NW, dshift_NW, dscale_NW, dgate_NW = _row_gradients(x_NW, shift_NW, scale_NW, gate_NW)
    rows, width = x_NW.shape
    partial = x_NW.new_empty(4, shared.programs(rows), width, dtype=torch.float32)
    du_NW, g_NW, dh_NW, a_NW = (torch.empty_like(h_NW) for _ in range(4))

    sums_of_du, sums_of_dh = partial.select(0, 0), partial.select(0, 1)
    triton.gate_backward(dout_NW, gate_NW, u_NW, du_NW, dgate_NW, sums_of_du, arch=arch)
    triton.silu_backward(du_NW @ fc2_weight, h_NW, dh_NW, g_NW, sums_of_dh, arch=arch)
    dfc2 = du_NW.t() @ g_NW
    triton.modulate_backward(
        dout_NW,
        dh_NW @ fc1_weight,
        x_NW,
        shift_NW,
        scale_NW,
        norm_weight,
        norm_bias,
        dx_NW,
        dshift_NW,
        dscale_NW,
        a_NW,
        partial.narrow(0, 2, 2),
        eps=eps,
        arch=arch,
    )
    dfc1 = dh_NW.t() @ a_NW
    sums_4W = x_NW.new_empty(4, width, dtype=torch.float32)
    shared.column_sums(partial, sums_4W)
    return [dx_NW, dshift_NW, dscale_NW, dgate_NW, dfc1, dfc2, sums_4W]


def _row_gradients(*tensors: Tensor) -> list[Tensor]:
    """One for each, contiguous: the modulations may be slices of a larger matrix."""
    return [x.new_empty(x.shape) for x in tensors]


@torch.library.custom_op("fastfar::adaln_mlp_block_rows", mutates_args=())
def _forward(
    x_NW: Tensor,
    shift_NW: Tensor,
    scale_NW: Tensor,
    gate_NW: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _run_forward(
        x_NW, shift_NW, scale_NW, gate_NW, norm_weight, norm_bias,
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps,
    )  # fmt: skip


@torch.library.custom_op("fastfar::adaln_mlp_block_rows_backward", mutates_args=())
def _backward(
    dout_NW: Tensor,
    x_NW: Tensor,
    shift_NW: Tensor,
    scale_NW: Tensor,
    gate_NW: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    h_NW: Tensor,
    u_NW: Tensor,
    eps: float,
) -> list[Tensor]:
    return _run_backward(
        dout_NW, x_NW, shift_NW, scale_NW, gate_NW, norm_weight, norm_bias,
        fc1_weight, fc2_weight, h_NW, u_NW, eps,
    )  # fmt: skip


@_forward.register_fake
def _(x_NW: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    if is_recording():
        return _run_forward(x_NW, *rest)
    kept = [x_NW.new_empty(x_NW.shape, dtype=rest[5].dtype) for _ in range(2)]
    return x_NW.new_empty(x_NW.shape), kept[0], kept[1]


@_backward.register_fake
def _(dout_NW: Tensor, *rest: Any) -> list[Tensor]:
    if is_recording():
        return _run_backward(dout_NW, *rest)
    x_NW, fc1_weight, fc2_weight = rest[0], rest[6], rest[7]
    weights = [w.new_empty(w.shape) for w in (fc1_weight, fc2_weight)]
    sums_4W = x_NW.new_empty(4, x_NW.shape[1], dtype=torch.float32)
    return [*_row_gradients(*rest[:4]), *weights, sums_4W]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*(x for i, x in enumerate(tensors) if i not in (7, 9)), *output[1:])
    ctx.dtypes = [tensors[i].dtype for i in (9, 7, 4, 5)]  # of the vectors, as they are summed
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout_NW: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout_NW is None:
        return (None,) * 11
    *rows, dfc1, dfc2, sums_4W = _backward(dout_NW, *ctx.saved_tensors, ctx.eps)
    dfc2_bias, dfc1_bias, dnorm_weight, dnorm_bias = (
        x.to(dtype) for x, dtype in zip(sums_4W.unbind(), ctx.dtypes, strict=True)
    )
    return *rows, dnorm_weight, dnorm_bias, dfc1, dfc1_bias, dfc2, dfc2_bias, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def adaln_mlp_block(
    x_NW: Tensor,
    shift_NW: Tensor,
    scale_NW: Tensor,
    gate_NW: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """The op of this name; float32 under autocast, else dtype of x."""
    if x_NW.dim() != 2:
        raise ValueError(f"triton {NAME}: x is {tuple(x_NW.shape)}, expected (N, W)")
    rows, width = x_NW.shape
    _rows.check(
        NAME,
        x=(x_NW, (rows, width)),
        shift=(shift_NW, (rows, width)),
        scale=(scale_NW, (rows, width)),
        gate=(gate_NW, (rows, width)),
        norm_weight=(norm_weight, (width,)),
        norm_bias=(norm_bias, (width,)),
        fc1_weight=(fc1_weight, (width, width)),
        fc1_bias=(fc1_bias, (width,)),
        fc2_weight=(fc2_weight, (width, width)),
        fc2_bias=(fc2_bias, (width,)),
    )
    dtype = _rows.product_dtype(NAME, fc1_weight, fc2_weight)
    if _rows.autocast_dtype(x_NW) is not None:
        x_NW = x_NW.float()  # the residual stream
    modulations = [_rows.rows(x) for x in (shift_NW, scale_NW, gate_NW)]
    vectors = [x.contiguous() for x in (norm_weight, norm_bias, fc1_bias, fc2_bias)]
    norm_weight, norm_bias, fc1_bias, fc2_bias = vectors
    fc1_weight, fc2_weight = (x.to(dtype).contiguous() for x in (fc1_weight, fc2_weight))
    tensors: Any = (_rows.rows(x_NW), *modulations, norm_weight, norm_bias, fc1_weight, fc1_bias,
               fc2_weight, fc2_bias)  # fmt: skip
    run: Any = _forward if _rows.recorded(*tensors) or traced() else _run_forward
    out_NW: Tensor = run(*tensors, eps)[0]
    return out_NW
