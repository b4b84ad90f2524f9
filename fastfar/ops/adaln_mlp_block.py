"""One residual block of the denoising MLP."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar import _native
from fastfar.ops import _adaln_mlp_block_triton, _launch, _training
from fastfar.ops._registry import op
from fastfar.packing import packed


@op
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
    """x + gate * (W_2 silu(W_1 (LN(x) * (1 + scale) + shift) + b_1) + b_2).

    Args:
        x_NW: (N, W) floating, the residual stream.
        shift_NW, scale_NW, gate_NW: (N, W) modulations of each row.
        norm_weight, norm_bias: (W,) affine of the LayerNorm.
        fc1_weight, fc2_weight: (W, W); fc1_bias, fc2_bias: (W,).

    Returns:
        (N, W), dtype of x. Native and Triton under autocast: float32, as the residual stream is.

    Native: float32 or bfloat16 tensors of any strides; the operands of the products have the dtype
    of the weights, or that of autocast; statistics, sums, residual and the gradients of parameters
    are float32. TypeError and ValueError for other dtypes, devices and shapes.

    Triton: the same for float32, float16 and bfloat16, gradients of the matrices in the dtype of
    the products. Three launches without gradients; modulations are read where they lie.

    Source: the denoising MLP of MAR (arXiv 2406.11838, section 4.2), unchanged in FAR.
    """
    h_NW = F.layer_norm(x_NW, (x_NW.shape[-1],), norm_weight, norm_bias, eps)
    # addcmul(a, b, c) = a + b * c in one pass over memory.
    h_NW = torch.addcmul(h_NW + shift_NW, h_NW, scale_NW)
    h_NW = F.linear(F.silu(F.linear(h_NW, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    return torch.addcmul(x_NW, gate_NW, h_NW)


# --- native ----------------------------------------------------------------------------------


def _modulations(*tensors: Tensor) -> tuple[int, list[Tensor]]:
    """Their common distance between rows, and them, copied where they have none."""
    width, stride = tensors[0].shape[1], tensors[0].stride(0)
    if all(x.stride() == (stride, 1) for x in tensors) and stride >= width:
        return stride, list(tensors)
    return width, [x.contiguous() for x in tensors]


def _block(
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
    eps: float,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The block, and what its backward needs: h = W_1 (...) + b_1 and u = W_2 silu(h) + b_2."""
    x_NW = x_NW.contiguous()
    rows, width = x_NW.shape
    out_NW = torch.empty_like(x_NW)
    h_NW = torch.empty(x_NW.shape if keep else (0,), dtype=dtype)
    u_NW = torch.empty_like(h_NW)
    stride, (shift_NW, scale_NW, gate_NW) = _modulations(shift_NW, scale_NW, gate_NW)
    if rows and width:
        _launch.launch(
            "adaln_mlp_block",
            dtype=_native.DTYPES[dtype],
            x_dtype=_native.DTYPES[x_NW.dtype],
            modulation_dtype=_native.DTYPES[shift_NW.dtype],
            threads=torch.get_num_threads(),
            rows=rows,
            width=width,
            modulation_stride=stride,
            eps=eps,
            x_NW=x_NW,
            shift_NW=shift_NW,
            scale_NW=scale_NW,
            gate_NW=gate_NW,
            norm_weight=norm_weight.contiguous(),
            norm_bias=norm_bias.contiguous(),
            fc1=packed(fc1_weight, dtype),
            fc1_bias=fc1_bias.contiguous(),
            fc2=packed(fc2_weight, dtype),
            fc2_bias=fc2_bias.contiguous(),
            h_NW=h_NW if keep else None,
            u_NW=u_NW if keep else None,
            out_NW=out_NW,
        )
    return out_NW, h_NW, u_NW


@torch.library.custom_op("fastfar::adaln_mlp_block", mutates_args=())
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
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return _block(
        x_NW, shift_NW, scale_NW, gate_NW, norm_weight, norm_bias,
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps=eps, dtype=dtype, keep=True,
    )  # fmt: skip


@torch.library.custom_op("fastfar::adaln_mlp_block_backward", mutates_args=())
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
    x_NW, dout_NW = x_NW.contiguous(), dout_NW.contiguous()
    (rows, width), dtype = x_NW.shape, h_NW.dtype
    out = _gradients_like(x_NW, shift_NW, norm_weight, fc1_weight)
    if not rows or not width:
        return [each.zero_() for each in out]
    stride, (shift_NW, scale_NW, gate_NW) = _modulations(shift_NW, scale_NW, gate_NW)
    dx, dshift, dscale, dgate, dnorm_weight, dnorm_bias, dfc1, dfc1_bias, dfc2, dfc2_bias = out
    _launch.launch(
        "adaln_mlp_block_backward",
        dtype=_native.DTYPES[dtype],
        x_dtype=_native.DTYPES[x_NW.dtype],
        modulation_dtype=_native.DTYPES[shift_NW.dtype],
        threads=torch.get_num_threads(),
        rows=rows,
        width=width,
        modulation_stride=stride,
        eps=eps,
        x_NW=x_NW,
        shift_NW=shift_NW,
        scale_NW=scale_NW,
        gate_NW=gate_NW,
        norm_weight=norm_weight.contiguous(),
        norm_bias=norm_bias.contiguous(),
        fc1_transposed=_training.transposed(fc1_weight, dtype),
        fc2_transposed=_training.transposed(fc2_weight, dtype),
        h_NW=h_NW.contiguous(),
        u_NW=u_NW.contiguous(),
        dout_NW=dout_NW,
        dx_NW=dx,
        dshift_NW=dshift,
        dscale_NW=dscale,
        dgate_NW=dgate,
        dnorm_weight=dnorm_weight,
        dnorm_bias=dnorm_bias,
        dfc1_weight=dfc1,
        dfc1_bias=dfc1_bias,
        dfc2_weight=dfc2,
        dfc2_bias=dfc2_bias,
    )
    return out


def _gradients_like(x: Tensor, modulation: Tensor, vector: Tensor, weight: Tensor) -> list[Tensor]:
    """dx, dshift, dscale, dgate, dnorm_weight, dnorm_bias, dW_1, db_1, dW_2, db_2."""
    rows = [x.new_empty(x.shape), *(modulation.new_empty(x.shape) for _ in range(3))]
    vectors = [vector.new_empty(vector.shape, dtype=torch.float32) for _ in range(4)]
    matrices = [weight.new_empty(weight.shape, dtype=torch.float32) for _ in range(2)]
    return [*rows, *vectors[:2], matrices[0], vectors[2], matrices[1], vectors[3]]


@_forward.register_fake
def _(x_NW: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    def kept() -> Tensor:
        return x_NW.new_empty(x_NW.shape, dtype=rest[-1])

    return x_NW.new_empty(x_NW.shape), kept(), kept()


@_backward.register_fake
def _(dout_NW: Tensor, x_NW: Tensor, shift_NW: Tensor, *rest: Any) -> list[Tensor]:
    norm_weight, fc1_weight = rest[2], rest[4]
    return _gradients_like(x_NW, shift_NW, norm_weight, fc1_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, _ = inputs
    kept = [x for i, x in enumerate(tensors) if i not in (7, 9)]  # the biases are not needed
    ctx.save_for_backward(*kept, *output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout_NW: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout_NW is None:
        return (None,) * 12
    return (*_backward(dout_NW, *ctx.saved_tensors, ctx.eps), None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _native_implementation(
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
    """See `adaln_mlp_block`."""
    name = "adaln_mlp_block"
    modulations = [shift_NW, scale_NW, gate_NW]
    vectors = [norm_weight, norm_bias, fc1_bias, fc2_bias]
    dtype = _training.product_dtype(name, fc1_weight, fc2_weight)
    floats = {"x": x_NW, "shift": shift_NW, "scale": scale_NW, "gate": gate_NW,
              "norm_weight": norm_weight, "norm_bias": norm_bias, "fc1_bias": fc1_bias,
              "fc2_bias": fc2_bias}  # fmt: skip
    _launch.check(name, floats)
    if x_NW.dim() != 2:
        raise ValueError(f"native {name}: x is {tuple(x_NW.shape)}, expected (N, W)")
    rows, width = x_NW.shape
    _launch.shapes(
        name,
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
    if _training.autocast_dtype() is not None:
        x_NW = x_NW.float()  # the residual stream
    if len({x.dtype for x in modulations}) > 1:
        modulations = [x.float() for x in modulations]
    norm_weight, norm_bias, fc1_bias, fc2_bias = (x.float() for x in vectors)
    tensors = (x_NW, *modulations, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight,
               fc2_bias)  # fmt: skip
    if _training.is_packed(fc1_weight, fc2_weight) or not _training.wants_graph(*tensors):
        return _block(*tensors, eps=eps, dtype=dtype, keep=False)[0]
    # Weights as float32, so that their gradients are, too; autograd rounds those back.
    fc1_weight, fc2_weight = fc1_weight.float(), fc2_weight.float()
    tensors = (*tensors[:6], fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    out_NW: Tensor = _forward(*tensors, eps, dtype)[0]
    return out_NW


adaln_mlp_block.register("native", _native_implementation)
adaln_mlp_block.register("triton", _adaln_mlp_block_triton.adaln_mlp_block)
