"""One matrix product with what surrounds it: out = residual + gate * f(LN(a) scale W^T + bias).

All products that fastfar writes itself are this kernel: the modulations of the denoising MLP, both
layers of its blocks, and the transformer's MLP. Parts that a caller leaves out (None) are not
compiled in.

    operand    a, or rstd (a - mean) * scale with the row's mean and rstd from partial statistics
    epilogue   y = a W^T + bias + addend;  y = f(y);  y = residual + gate * y
    outputs    y in the dtype of `out`, once more in that of `copy`, statistics of its tiles

Sums, statistics and epilogue are float32. a and residual may have fewer rows than the result: row
m reads row m modulo their number, so that both halves of guidance share them.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ._configs import Config, config, precision
from ._launch import launch
from ._math import gelu, row_statistics, silu, store_statistics, tile_statistics


@triton.jit
def gemm_kernel(
    a_ptr,
    w_ptr,
    out_ptr,
    bias_ptr,
    statistics_ptr,
    scale_ptr,
    addend_ptr,
    gate_ptr,
    residual_ptr,
    copy_ptr,
    out_statistics_ptr,
    M,
    N,
    K,
    a_rows,
    residual_rows,
    a_stride,
    out_stride,
    scale_stride,
    addend_stride,
    gate_stride,
    residual_stride,
    eps,
    ACTIVATION: tl.constexpr,
    STATISTICS_TILE: tl.constexpr,
    STATISTICS_COUNT: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Programs in groups of GROUP row tiles, so that neighbours share panels of W in L2.
    row_tiles, column_tiles = tl.cdiv(M, BM), tl.cdiv(N, BN)
    program = tl.program_id(0)
    group = program // (GROUP * column_tiles)
    first = group * GROUP
    in_group = tl.minimum(row_tiles - first, GROUP)
    within = program - group * GROUP * column_tiles
    row_tile, column_tile = first + within % in_group, within // in_group

    rows = row_tile * BM + tl.arange(0, BM)
    columns = column_tile * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    # Rows and columns beyond the end read the last one; they are not stored.
    safe_rows = tl.minimum(rows, M - 1)
    safe_columns = tl.minimum(columns, N - 1)
    shared = safe_rows % a_rows
    a_ptrs = a_ptr + shared.to(tl.int64)[:, None] * a_stride + depth[None, :]
    w_ptrs = w_ptr + safe_columns.to(tl.int64)[None, :] * K + depth[:, None]
    if statistics_ptr is not None:
        mean, rstd = row_statistics(
            statistics_ptr, shared, K, eps, STATISTICS_COUNT, STATISTICS_TILE
        )
        scale_ptrs = scale_ptr + safe_rows.to(tl.int64)[:, None] * scale_stride + depth[None, :]

    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        if EVEN_K:
            a = tl.load(a_ptrs)
            w = tl.load(w_ptrs)
        else:
            inside = depth < K - start
            a = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=inside[:, None], other=0.0)
        if statistics_ptr is not None:
            if EVEN_K:
                scale = tl.load(scale_ptrs)
            else:
                scale = tl.load(scale_ptrs, mask=inside[None, :], other=0.0)
            centred = (a.to(tl.float32) - mean[:, None]) * rstd[:, None]
            a = (centred * scale.to(tl.float32)).to(w.dtype)
            scale_ptrs += BK
        total = tl.dot(a, w, total, input_precision=PRECISION)
        a_ptrs += BK
        w_ptrs += BK

    mask = (rows < M)[:, None] & (columns < N)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + safe_columns).to(tl.float32)
        total += bias[None, :]
    if addend_ptr is not None:
        offsets = safe_rows.to(tl.int64)[:, None] * addend_stride + safe_columns[None, :]
        total += tl.load(addend_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        total = silu(total)
    elif ACTIVATION == "gelu":
        total = gelu(total)
    if gate_ptr is not None:
        offsets = safe_rows.to(tl.int64)[:, None] * gate_stride + safe_columns[None, :]
        total *= tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        shared = safe_rows % residual_rows
        offsets = shared.to(tl.int64)[:, None] * residual_stride + safe_columns[None, :]
        total += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)

    offsets = rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + offsets, total.to(copy_ptr.dtype.element_ty), mask=mask)
    if out_statistics_ptr is not None:
        count = tl.minimum(N - column_tile * BN, BN).to(tl.float32)
        mean, squares = tile_statistics(total, columns, N, count)
        store_statistics(
            out_statistics_ptr, rows, column_tile, column_tiles, mean, squares, rows < M
        )


def gemm_config(kind: str, arch: int, element_size: int) -> Config:
    """Tiles of a kind of product.

    kind: "linear" for many columns or many rows, "narrow" for few; "modulated" for a normalised
        operand and "gated" for a gate, "modulations" for what runs beside those two, "large" for
        the same with many rows.
    """
    return config(f"gemm_{kind}", arch, element_size)


def _stride(x: Any) -> int:
    if x is None:
        return 0
    assert x.stride(-1) == 1, "rows must be contiguous"
    return int(x.stride(0))


def gemm(
    a_MK: Any,
    w_NK: Any,
    out_MN: Any,
    *,
    arch: int,
    kind: str = "linear",
    bias_N: Any = None,
    statistics: Any = None,
    statistics_tile: int = 1,
    scale_MK: Any = None,
    addend_MN: Any = None,
    activation: str = "none",
    gate_MN: Any = None,
    residual_MN: Any = None,
    copy_MN: Any = None,
    out_statistics: Any = None,
    eps: float = 1e-6,
) -> None:
    """out = residual + gate * f(operand W^T + bias + addend); see the module.

    Args:
        a_MK: (M, K), or (R, K) with M a multiple of R; unit stride along K, as all matrices have.
        w_NK: (N, K) contiguous, float32, float16 or bfloat16; the dtype of the operands. a has the
            same dtype unless it is normalised.
        out_MN: (M, N), any of these dtypes.
        arch: architecture, see `_configs.config`.
        kind: which row of the table of configurations, see `gemm_config`.
        bias_N: (N,).
        statistics, statistics_tile: (R, ceil(K / tile), 2) float32 of the rows of a, and the tile;
            normalises a. None takes a as it is.
        scale_MK: (M, K), factor of the normalised operand; needed with `statistics`.
        addend_MN, gate_MN: (M, N).
        activation: "none", "silu" or "gelu" (exact).
        residual_MN: (R, N).
        copy_MN: (M, N) with the strides of out: the result once more, in another dtype.
        out_statistics: (M, ceil(N / BN), 2) float32, BN of `gemm_config(kind, ...)`.
    """
    (rows, columns), depth = out_MN.shape, w_NK.shape[1]
    chosen = gemm_config(kind, arch, w_NK.element_size())
    tiles = chosen.tiles
    grid = (triton.cdiv(rows, tiles["BM"]) * triton.cdiv(columns, tiles["BN"]),)
    count = triton.next_power_of_2(triton.cdiv(depth, statistics_tile))
    launch(
        gemm_kernel,
        grid,
        a_MK,
        w_NK,
        out_MN,
        bias_N,
        statistics,
        scale_MK,
        addend_MN,
        gate_MN,
        residual_MN,
        copy_MN,
        out_statistics,
        rows,
        columns,
        depth,
        a_MK.shape[0],
        rows if residual_MN is None else residual_MN.shape[0],
        _stride(a_MK),
        _stride(out_MN),
        _stride(scale_MK),
        _stride(addend_MN),
        _stride(gate_MN),
        _stride(residual_MN),
        eps,
        ACTIVATION=activation,
        STATISTICS_TILE=statistics_tile if statistics is not None else 1,
        STATISTICS_COUNT=count if statistics is not None else 1,
        EVEN_K=depth % tiles["BK"] == 0,
        PRECISION=precision(arch),
        **chosen.options,
    )
