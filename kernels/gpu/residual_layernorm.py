"""sum = x + update, normed = LN(sum), in one pass over the rows; and its backward.

One program per row forward. Backward a fixed number of programs walks over the rows, so that the
gradients of weight and bias are sums of a few partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import launch
from ._rows import (
    column_sums,
    load_row,
    normalise,
    normalise_backward,
    row_options,
    store_row,
)


@triton.jit
def residual_layernorm_kernel(
    x_ND,
    update_ND,
    weight_D,
    bias_D,
    sum_ND,
    normed_ND,
    width,
    x_stride,
    update_stride,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    keep = columns < width
    x = load_row(x_ND, row, x_stride, columns, keep)
    if update_ND is not None:
        x += load_row(update_ND, row, update_stride, columns, keep)
        store_row(sum_ND, row, width, columns, keep, x)
        # What backward, and whoever reads the sum, sees: rounded to the dtype of the sum.
        x = x.to(sum_ND.dtype.element_ty).to(tl.float32)
    n, _ = normalise(x, keep, width, eps)
    if weight_D is not None:
        weight = tl.load(weight_D + columns, mask=keep, other=0.0).to(tl.float32)
        bias = tl.load(bias_D + columns, mask=keep, other=0.0).to(tl.float32)
        n = n * weight + bias
    store_row(normed_ND, row, width, columns, keep, n)


@triton.jit
def residual_layernorm_backward_kernel(
    dsum_ND,
    dnormed_ND,
    sum_ND,
    weight_D,
    dx_ND,
    dupdate_ND,
    partial_2PD,
    rows,
    width,
    dsum_stride,
    dnormed_stride,
    sum_stride,
    eps,
    BLOCK: tl.constexpr,
):
    first, step = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    keep = columns < width
    if weight_D is not None:
        weight = tl.load(weight_D + columns, mask=keep, other=0.0).to(tl.float32)
        dweight = tl.zeros((BLOCK,), tl.float32)
        dbias = tl.zeros((BLOCK,), tl.float32)
    row = first.to(tl.int64)
    for _ in range(first, rows, step):
        x = load_row(sum_ND, row, sum_stride, columns, keep)
        dn = load_row(dnormed_ND, row, dnormed_stride, columns, keep)
        n, rstd = normalise(x, keep, width, eps)
        if weight_D is not None:
            dweight += dn * n
            dbias += dn
            dn *= weight
        dx = normalise_backward(dn, n, rstd, width)
        if dsum_ND is not None:
            dx += load_row(dsum_ND, row, dsum_stride, columns, keep)
        store_row(dx_ND, row, width, columns, keep, dx)
        if dupdate_ND is not None:
            store_row(dupdate_ND, row, width, columns, keep, dx)
        row += step
    if weight_D is not None:
        store_row(partial_2PD, first.to(tl.int64), width, columns, keep, dweight)
        store_row(partial_2PD, (first + step).to(tl.int64), width, columns, keep, dbias)


def residual_layernorm(
    x_ND: torch.Tensor,
    update_ND: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    sum_ND: torch.Tensor | None,
    normed_ND: torch.Tensor,
    *,
    eps: float,
) -> None:
    """Writes sum_ND (with an update only) and normed_ND.

    Rows of x and update have stride 1 inside and any distance; outputs are contiguous. sum has the
    dtype of x, the others any of float32, float16 and bfloat16. Weight and bias: both or neither.
    """
    rows, width = x_ND.shape
    launch(
        residual_layernorm_kernel,
        (rows,),
        x_ND,
        update_ND,
        norm_weight,
        norm_bias,
        sum_ND,
        normed_ND,
        width,
        x_ND.stride(0),
        0 if update_ND is None else update_ND.stride(0),
        eps,
        **row_options(width),
    )


def residual_layernorm_backward(
    dsum_ND: torch.Tensor | None,
    dnormed_ND: torch.Tensor,
    sum_ND: torch.Tensor,
    norm_weight: torch.Tensor | None,
    dx_ND: torch.Tensor,
    dupdate_ND: torch.Tensor | None,
    partial_2PD: torch.Tensor,
    dvectors_2D: torch.Tensor | None,
    *,
    eps: float,
) -> None:
    """Writes dx, the same as dupdate in another dtype if that is wanted, and with affine
    dvectors_2D: the gradients of weight and bias.

    partial_2PD: float32 scratch; its P programs share the rows. dvectors_2D: float32.
    """
    rows, width = sum_ND.shape
    launch(
        residual_layernorm_backward_kernel,
        (partial_2PD.shape[1],),
        dsum_ND,
        dnormed_ND,
        sum_ND,
        norm_weight,
        dx_ND,
        dupdate_ND,
        partial_2PD,
        rows,
        width,
        0 if dsum_ND is None else dsum_ND.stride(0),
        dnormed_ND.stride(0),
        sum_ND.stride(0),
        eps,
        **row_options(width),
    )
    if dvectors_2D is not None:
        column_sums(partial_2PD, dvectors_2D)
