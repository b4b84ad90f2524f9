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
    load_rows,
    load_vector,
    normalise,
    normalise_backward,
    row_options,
    store_partial,
    store_rows,
    tile_of,
    tiles,
)


@triton.jit
def residual_layernorm_kernel(
    x_ND,
    update_ND,
    weight_D,
    bias_D,
    sum_ND,
    normed_ND,
    rows,
    width,
    x_stride,
    update_stride,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, columns, keep = tile_of(tl.program_id(0), rows, width, ROWS, BLOCK)
    x = load_rows(x_ND, row, x_stride, columns, keep)
    if update_ND is not None:
        x += load_rows(update_ND, row, update_stride, columns, keep)
        store_rows(sum_ND, row, width, columns, keep, x)
        # What backward, and whoever reads the sum, sees: rounded to the dtype of the sum.
        x = x.to(sum_ND.dtype.element_ty).to(tl.float32)
    n, _ = normalise(x, keep, width, eps)
    if weight_D is not None:
        n = n * load_vector(weight_D, columns, width) + load_vector(bias_D, columns, width)
    store_rows(normed_ND, row, width, columns, keep, n)


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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, step = tl.program_id(0), tl.num_programs(0)
    row, columns, keep = tile_of(first, rows, width, ROWS, BLOCK)
    if weight_D is not None:
        weight = load_vector(weight_D, columns, width)
        dweight = tl.zeros((ROWS, BLOCK), tl.float32)
        dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for _ in range(first * ROWS, rows, step * ROWS):
        x = load_rows(sum_ND, row, sum_stride, columns, keep)
        dn = load_rows(dnormed_ND, row, dnormed_stride, columns, keep)
        n, rstd = normalise(x, keep, width, eps)
        if weight_D is not None:
            dweight += dn * n
            dbias += dn
            dn *= weight
        dx = normalise_backward(dn, n, rstd, width)
        if dsum_ND is not None:
            dx += load_rows(dsum_ND, row, dsum_stride, columns, keep)
        store_rows(dx_ND, row, width, columns, keep, dx)
        if dupdate_ND is not None:
            store_rows(dupdate_ND, row, width, columns, keep, dx)
        row += step * ROWS
        keep = (row < rows) & (columns < width)
    if weight_D is not None:
        store_partial(partial_2PD, first, columns, width, dweight)
        store_partial(partial_2PD, first + step, columns, width, dbias)


def residual_layernorm(
    x_ND: torch.Tensor,
    update_ND: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    sum_ND: torch.Tensor | None,
    normed_ND: torch.Tensor,
    *,
    eps: float,
    arch: int,
) -> None:
    """Writes sum_ND (with an update only) and normed_ND.

    Rows of x and update have stride 1 inside and any distance; outputs are contiguous. sum has the
    dtype of x, the others any of float32, float16 and bfloat16. Weight and bias: both or neither.
    """
    rows, width = x_ND.shape
    options = row_options(width, arch)
    launch(
        residual_layernorm_kernel,
        tiles(rows, options),
        x_ND,
        update_ND,
        norm_weight,
        norm_bias,
        sum_ND,
        normed_ND,
        rows,
        width,
        x_ND.stride(0),
        0 if update_ND is None else update_ND.stride(0),
        eps,
        **options,
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
    arch: int,
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
        **row_options(width, arch),
    )
    if dvectors_2D is not None:
        column_sums(partial_2PD, dvectors_2D)
