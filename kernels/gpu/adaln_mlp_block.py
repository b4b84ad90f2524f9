"""x + gate * (W_2 silu(W_1 (LN(x) (1 + scale) + shift) + b_1) + b_2): all but the two products.

The products are cuBLAS's. h = W_1 (...) + b_1 and u = W_2 silu(h) + b_2 are kept for the backward,
where these kernels run between the products, in this order:

    gate_backward       du = dout gate, dgate = dout u;              sums of du: b_2
    silu_backward       dh = dg silu'(h), g = silu(h) once more;     sums of dh: b_1
    modulate_backward   dx, dscale, a = LN(x) (1 + scale) + shift;   sums for the norm's vectors

Every kernel keeps whole rows in registers; the modulations are read where they lie, be it as
slices of one matrix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import launch
from ._math import silu
from ._rows import (
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
def modulate_kernel(
    x_NW,
    shift_NW,
    scale_NW,
    weight_W,
    bias_W,
    a_NW,
    rows,
    width,
    x_stride,
    shift_stride,
    scale_stride,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, columns, keep = tile_of(tl.program_id(0), rows, width, ROWS, BLOCK)
    n, _ = normalise(load_rows(x_NW, row, x_stride, columns, keep), keep, width, eps)
    y = n * load_vector(weight_W, columns, width) + load_vector(bias_W, columns, width)
    scale = load_rows(scale_NW, row, scale_stride, columns, keep)
    shift = load_rows(shift_NW, row, shift_stride, columns, keep)
    store_rows(a_NW, row, width, columns, keep, y * (1.0 + scale) + shift)


@triton.jit
def gate_kernel(
    x_NW,
    gate_NW,
    u_NW,
    out_NW,
    rows,
    width,
    x_stride,
    gate_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, columns, keep = tile_of(tl.program_id(0), rows, width, ROWS, BLOCK)
    gate = load_rows(gate_NW, row, gate_stride, columns, keep)
    out = load_rows(x_NW, row, x_stride, columns, keep)
    out += gate * load_rows(u_NW, row, width, columns, keep)
    store_rows(out_NW, row, width, columns, keep, out)


@triton.jit
def gate_backward_kernel(
    dout_NW,
    gate_NW,
    u_NW,
    du_NW,
    dgate_NW,
    partial_PW,
    rows,
    width,
    dout_stride,
    gate_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, step = tl.program_id(0), tl.num_programs(0)
    row, columns, keep = tile_of(first, rows, width, ROWS, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for _ in range(first * ROWS, rows, step * ROWS):
        dout = load_rows(dout_NW, row, dout_stride, columns, keep)
        du = dout * load_rows(gate_NW, row, gate_stride, columns, keep)
        total += du
        store_rows(du_NW, row, width, columns, keep, du)
        dgate = dout * load_rows(u_NW, row, width, columns, keep)
        store_rows(dgate_NW, row, width, columns, keep, dgate)
        row += step * ROWS
        keep = (row < rows) & (columns < width)
    store_partial(partial_PW, first, columns, width, total)


@triton.jit
def silu_backward_kernel(
    dg_NW,
    h_NW,
    dh_NW,
    g_NW,
    partial_PW,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, step = tl.program_id(0), tl.num_programs(0)
    row, columns, keep = tile_of(first, rows, width, ROWS, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for _ in range(first * ROWS, rows, step * ROWS):
        h = load_rows(h_NW, row, width, columns, keep)
        g = silu(h)
        store_rows(g_NW, row, width, columns, keep, g)
        slope = tl.sigmoid(h) * (1.0 + h - g)
        dh = load_rows(dg_NW, row, width, columns, keep) * slope
        total += dh
        store_rows(dh_NW, row, width, columns, keep, dh)
        row += step * ROWS
        keep = (row < rows) & (columns < width)
    store_partial(partial_PW, first, columns, width, total)


@triton.jit
def modulate_backward_kernel(
    dout_NW,
    da_NW,
    x_NW,
    shift_NW,
    scale_NW,
    weight_W,
    bias_W,
    dx_NW,
    dshift_NW,
    dscale_NW,
    a_NW,
    partial_2PW,
    rows,
    width,
    dout_stride,
    x_stride,
    shift_stride,
    scale_stride,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, step = tl.program_id(0), tl.num_programs(0)
    row, columns, keep = tile_of(first, rows, width, ROWS, BLOCK)
    weight, bias = load_vector(weight_W, columns, width), load_vector(bias_W, columns, width)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for _ in range(first * ROWS, rows, step * ROWS):
        x = load_rows(x_NW, row, x_stride, columns, keep)
        n, rstd = normalise(x, keep, width, eps)
        y = n * weight + bias
        scale = 1.0 + load_rows(scale_NW, row, scale_stride, columns, keep)
        shift = load_rows(shift_NW, row, shift_stride, columns, keep)
        store_rows(a_NW, row, width, columns, keep, y * scale + shift)
        da = load_rows(da_NW, row, width, columns, keep)
        store_rows(dshift_NW, row, width, columns, keep, da)
        store_rows(dscale_NW, row, width, columns, keep, da * y)
        dy = da * scale
        dweight += dy * n
        dbias += dy
        dx = normalise_backward(dy * weight, n, rstd, width)
        dx += load_rows(dout_NW, row, dout_stride, columns, keep)
        store_rows(dx_NW, row, width, columns, keep, dx)
        row += step * ROWS
        keep = (row < rows) & (columns < width)
    store_partial(partial_2PW, first, columns, width, dweight)
    store_partial(partial_2PW, first + step, columns, width, dbias)


# --- launchers: matrices have contiguous rows; those named out are contiguous -----------------


def modulate(
    x_NW: torch.Tensor,
    shift_NW: torch.Tensor,
    scale_NW: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    a_NW: torch.Tensor,
    *,
    eps: float,
    arch: int,
) -> None:
    """a = LN(x) (1 + scale) + shift."""
    rows, width = x_NW.shape
    strides = [x.stride(0) for x in (x_NW, shift_NW, scale_NW)]
    tensors = (x_NW, shift_NW, scale_NW, norm_weight, norm_bias, a_NW)
    options = row_options(width, arch)
    grid = tiles(rows, options)
    launch(modulate_kernel, grid, *tensors, rows, width, *strides, eps, **options)


def gated_residual(
    x_NW: torch.Tensor,
    gate_NW: torch.Tensor,
    u_NW: torch.Tensor,
    out_NW: torch.Tensor,
    *,
    arch: int,
) -> None:
    """out = x + gate * u."""
    rows, width = x_NW.shape
    strides = x_NW.stride(0), gate_NW.stride(0)
    tensors = (x_NW, gate_NW, u_NW, out_NW)
    options = row_options(width, arch)
    launch(gate_kernel, tiles(rows, options), *tensors, rows, width, *strides, **options)


def gate_backward(
    dout_NW: torch.Tensor,
    gate_NW: torch.Tensor,
    u_NW: torch.Tensor,
    du_NW: torch.Tensor,
    dgate_NW: torch.Tensor,
    partial_PW: torch.Tensor,
    *,
    arch: int,
) -> None:
    """du = dout * gate, dgate = dout * u, and P partial column sums of du, float32."""
    rows, width = dout_NW.shape
    launch(
        gate_backward_kernel,
        (partial_PW.shape[0],),
        *(dout_NW, gate_NW, u_NW, du_NW, dgate_NW, partial_PW),
        *(rows, width, dout_NW.stride(0), gate_NW.stride(0)),
        **row_options(width, arch),
    )


def silu_backward(
    dg_NW: torch.Tensor,
    h_NW: torch.Tensor,
    dh_NW: torch.Tensor,
    g_NW: torch.Tensor,
    partial_PW: torch.Tensor,
    *,
    arch: int,
) -> None:
    """g = silu(h), dh = dg * silu'(h), and P partial column sums of dh; all contiguous."""
    rows, width = h_NW.shape
    launch(
        silu_backward_kernel,
        (partial_PW.shape[0],),
        *(dg_NW, h_NW, dh_NW, g_NW, partial_PW),
        *(rows, width),
        **row_options(width, arch),
    )


def modulate_backward(
    dout_NW: torch.Tensor,
    da_NW: torch.Tensor,
    x_NW: torch.Tensor,
    shift_NW: torch.Tensor,
    scale_NW: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    dx_NW: torch.Tensor,
    dshift_NW: torch.Tensor,
    dscale_NW: torch.Tensor,
    a_NW: torch.Tensor,
    partial_2PW: torch.Tensor,
    *,
    eps: float,
    arch: int,
) -> None:
    """Backward of `modulate`, to which dout is added; a as forward; da is contiguous.

    partial_2PW: P partial column sums of the gradients of weight and bias, float32.
    """
    rows, width = x_NW.shape
    strides = [x.stride(0) for x in (dout_NW, x_NW, shift_NW, scale_NW)]
    launch(
        modulate_backward_kernel,
        (partial_2PW.shape[1],),
        *(dout_NW, da_NW, x_NW, shift_NW, scale_NW, norm_weight, norm_bias),
        *(dx_NW, dshift_NW, dscale_NW, a_NW, partial_2PW),
        *(rows, width, *strides, eps),
        **row_options(width, arch),
    )
