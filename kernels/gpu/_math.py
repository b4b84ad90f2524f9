"""Functions that several kernels use, inlined into them. Arguments are float32 blocks."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu(x):
    """x / (1 + exp(-x))."""
    return x * tl.sigmoid(x)


@triton.jit
def gelu(x):
    """Exact: x (1 + erf(x / sqrt(2))) / 2."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def tile_statistics(x, columns, N, count):
    """Mean of each row over the `count` columns below N, and the sum of squares around it."""
    inside = (columns < N)[None, :]
    mean = tl.sum(tl.where(inside, x, 0.0), axis=1) / count
    centred = tl.where(inside, x - mean[:, None], 0.0)
    return mean, tl.sum(centred * centred, axis=1)


@triton.jit
def row_statistics(statistics_ptr, rows, K, eps, COUNT: tl.constexpr, TILE: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of rows, from the statistics of their tiles.

    statistics_ptr: (rows, ceil(K / TILE), 2) float32: mean and sum of squares around it of TILE
    columns each (Chan, Golub and LeVeque: exact whatever the order). COUNT: a power of two that
    is at least the number of tiles.
    """
    index = tl.arange(0, COUNT)
    tiles = (K + TILE - 1) // TILE
    inside = (index < tiles)[None, :]
    offsets = (rows.to(tl.int64) * tiles)[:, None] + index[None, :]
    means = tl.load(statistics_ptr + 2 * offsets, mask=inside, other=0.0)
    squares = tl.load(statistics_ptr + 2 * offsets + 1, mask=inside, other=0.0)
    sizes = tl.minimum(tl.maximum(K - index * TILE, 0), TILE).to(tl.float32)[None, :]
    mean = tl.sum(means * sizes, axis=1) / K
    between = means - mean[:, None]
    total = tl.sum(squares, axis=1) + tl.sum(sizes * between * between, axis=1)
    return mean, tl.rsqrt(total / K + eps)


@triton.jit
def store_statistics(statistics_ptr, rows, tile, tiles, mean, squares, mask):
    """Write the statistics of one tile of every row, in the form that `row_statistics` reads."""
    offsets = 2 * (rows.to(tl.int64) * tiles + tile)
    tl.store(statistics_ptr + offsets, mean, mask=mask)
    tl.store(statistics_ptr + offsets + 1, squares, mask=mask)
