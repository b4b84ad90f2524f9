"""Low-pass, mask, patches and the choice of tokens in one kernel, and its transpose.

A position is one number of one kept token: cell (row, column) of every channel. With A the matrix
of the image's level, its value is

    y[c] = sum_w (sum_k A[row, k] x[c, k, w]) A[column, w],

one small product for a tile of positions and all columns of some channels, and one weighted sum.
So a program computes nothing but tokens that are kept, in any order, and writes the channels of a
token side by side. Neighbouring positions repeat each other's first product: at H = 16 that is 2
MFLOP an image, at H = 64 half a GFLOP, still little beside one layer of the transformer.

The transpose runs over the same positions, dx[c, k, w] = sum A[row, k] dy[c] A[column, w]. A
program owns its part of dx, so that the sum has one order and needs no atomics.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ._configs import config, precision
from ._launch import launch


@triton.jit
def _matrix(matrices_ptr, level_ptr, level_stride, image, size, num_levels):
    """The level of an image in 0..num_levels (-1, not filtered, is the last) and its matrix."""
    level = tl.load(level_ptr + image * level_stride).to(tl.int64)
    level = tl.where(level < 0, num_levels, tl.minimum(level, num_levels))
    return level, matrices_ptr + level * size * size


@triton.jit
def _places(
    position, image, count, size, mask_ptr, mask_stride, kept_ptr, kept_stride, PATCH: tl.constexpr
):
    """Row and column of positions in the latent, and whether their token is there and visible."""
    index = position // (PATCH * PATCH)
    cell = position % (PATCH * PATCH)
    grid = size // PATCH
    exists = index < count
    token = index.to(tl.int64)
    if kept_ptr is not None:
        token = tl.load(kept_ptr + image * kept_stride + index, mask=exists, other=0).to(tl.int64)
    visible = exists & (token >= 0) & (token < grid * grid)
    token = tl.where(visible, token, 0)
    if mask_ptr is not None:
        masked = tl.load(mask_ptr + image * mask_stride + token, mask=visible, other=0)
        visible = visible & (masked == 0)
    row = (token // grid) * PATCH + cell // PATCH
    column = (token % grid) * PATCH + cell % PATCH
    return row, column, visible


@triton.jit
def filter_mask_patchify_kernel(
    latent_ptr,
    level_ptr,
    mask_ptr,
    kept_ptr,
    matrices_ptr,
    tokens_ptr,
    count,
    channels,
    size,
    num_levels,
    latent_stride,
    channel_stride,
    row_stride,
    column_stride,
    level_stride,
    mask_stride,
    kept_stride,
    PATCH: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    # Program: a tile of BM positions of an image, BC channels.
    cells: tl.constexpr = PATCH * PATCH
    tiles, groups = tl.cdiv(count * cells, BM), tl.cdiv(channels, BC)
    program = tl.program_id(0)
    image = (program // (tiles * groups)).to(tl.int64)
    position = (program // groups) % tiles * BM + tl.arange(0, BM)
    first_channel = program % groups * BC
    row, column, visible = _places(
        position, image, count, size, mask_ptr, mask_stride, kept_ptr, kept_stride, PATCH
    )
    level, matrix_ptr = _matrix(matrices_ptr, level_ptr, level_stride, image, size, num_levels)
    latent_ptr += image * latent_stride

    channel = first_channel + tl.arange(0, BC)
    wanted = visible[:, None] & (channel < channels)[None, :]
    value = tl.zeros((BM, BC), dtype=tl.float32)
    if level == num_levels:  # the identity: exactly the latent
        offset = (row * row_stride + column * column_stride)[:, None]
        offset += channel.to(tl.int64)[None, :] * channel_stride
        value = tl.load(latent_ptr + offset, mask=wanted, other=0.0).to(tl.float32)
    elif level > 0:
        flat = tl.arange(0, BC * SIZE)  # (channel, column of the latent)
        flat_channel, flat_column = first_channel + flat // SIZE, flat % SIZE
        flat_inside = (flat_channel < channels) & (flat_column < size)
        flat_ptr = latent_ptr + flat_channel.to(tl.int64) * channel_stride
        flat_ptr += flat_column.to(tl.int64) * column_stride
        depth = tl.arange(0, BK)
        rows_MF = tl.zeros((BM, BC * SIZE), dtype=tl.float32)
        for start in range(0, size, BK):
            k = start + depth
            a = tl.load(
                matrix_ptr + (row * size)[:, None] + k[None, :],
                mask=visible[:, None] & (k < size)[None, :],
                other=0.0,
            )
            x = tl.load(
                flat_ptr[None, :] + k.to(tl.int64)[:, None] * row_stride,
                mask=(k < size)[:, None] & flat_inside[None, :],
                other=0.0,
            )
            rows_MF = tl.dot(a, x.to(tl.float32), rows_MF, input_precision=PRECISION)
        w = tl.arange(0, SIZE)
        weight = tl.load(
            matrix_ptr + (column * size)[:, None] + w[None, :],
            mask=visible[:, None] & (w < size)[None, :],
            other=0.0,
        )
        value = tl.sum(tl.reshape(rows_MF, (BM, BC, SIZE)) * weight[:, None, :], axis=2)

    index, cell = position // cells, position % cells
    offset = (image * count + index) * (channels * cells) + cell
    tl.store(
        tokens_ptr + offset[:, None] + channel[None, :] * cells,
        tl.where(wanted, value, 0.0).to(tokens_ptr.dtype.element_ty),
        mask=(index < count)[:, None] & (channel < channels)[None, :],
    )


@triton.jit
def filter_mask_patchify_backward_kernel(
    tokens_ptr,
    level_ptr,
    mask_ptr,
    kept_ptr,
    matrices_ptr,
    latent_ptr,
    count,
    channels,
    size,
    num_levels,
    level_stride,
    mask_stride,
    kept_stride,
    PATCH: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    # Program: BM rows of the latent of an image, BC channels; BK positions at a time.
    cells: tl.constexpr = PATCH * PATCH
    tiles, groups = tl.cdiv(size, BM), tl.cdiv(channels, BC)
    program = tl.program_id(0)
    image = (program // (tiles * groups)).to(tl.int64)
    k = (program // groups) % tiles * BM + tl.arange(0, BM)
    first_channel = program % groups * BC
    channel = first_channel + tl.arange(0, BC)
    _, matrix_ptr = _matrix(matrices_ptr, level_ptr, level_stride, image, size, num_levels)

    w = tl.arange(0, SIZE)
    total = tl.zeros((BM, BC * SIZE), dtype=tl.float32)
    for start in range(0, count * cells, BK):
        position = start + tl.arange(0, BK)
        row, column, visible = _places(
            position, image, count, size, mask_ptr, mask_stride, kept_ptr, kept_stride, PATCH
        )
        offset = (image * count + position // cells) * (channels * cells) + position % cells
        gradient = tl.load(
            tokens_ptr + offset[:, None] + channel[None, :] * cells,
            mask=visible[:, None] & (channel < channels)[None, :],
            other=0.0,
        ).to(tl.float32)
        weight = tl.load(
            matrix_ptr + (column * size)[:, None] + w[None, :],
            mask=visible[:, None] & (w < size)[None, :],
            other=0.0,
        )
        spread = tl.reshape(gradient[:, :, None] * weight[:, None, :], (BK, BC * SIZE))
        a = tl.load(
            matrix_ptr + (row * size)[None, :] + k[:, None],
            mask=visible[None, :] & (k < size)[:, None],
            other=0.0,
        )
        total = tl.dot(a, spread, total, input_precision=PRECISION)

    flat = tl.arange(0, BC * SIZE)
    flat_channel, flat_column = first_channel + flat // SIZE, flat % SIZE
    offset = ((image * channels + flat_channel) * size)[None, :] + k[:, None]
    tl.store(
        latent_ptr + offset * size + flat_column[None, :],
        total.to(latent_ptr.dtype.element_ty),
        mask=((flat_channel < channels) & (flat_column < size))[None, :] & (k < size)[:, None],
    )


def _stride(x: Any) -> int:
    """Distance of two images; within one the numbers lie side by side."""
    if x is None:
        return 0
    assert x.shape[-1] == 1 or x.stride(-1) == 1, "rows must be contiguous"
    return int(x.stride(0))


def _tiles(kernel: str, arch: int, channels: int, size: int) -> dict[str, Any]:
    """Constants of a launch; `BF` of the table is the width of the product: channels x columns."""
    chosen = config(kernel, arch, 4)
    width = max(16, triton.next_power_of_2(size))
    tile = chosen.tiles
    return {
        "SIZE": width,
        "PRECISION": precision(arch),
        "BM": tile["BM"],
        "BC": min(triton.next_power_of_2(channels), max(1, tile["BF"] // width)),
        "BK": tile["BK"],
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
    }


def filter_mask_patchify(
    latent_BCHH: Any,
    level_B: Any,
    mask_BL: Any,
    kept_BK: Any,
    matrices_KHH: Any,
    tokens_BKP: Any,
    *,
    patch_size: int,
    arch: int,
) -> None:
    """tokens[b, j] = (1 - mask) * patch kept[b, j] of A x A^T; see the module.

    Args:
        latent_BCHH: float32, float16 or bfloat16, of any strides.
        level_B: integers; below 0 and above the last level mean the last matrix, which is taken
            to be the identity, whatever it holds; level 0 gives zeros, whatever the latent holds.
        mask_BL: bool, or None.
        kept_BK: integers; one outside of 0..L-1 gives zeros. None keeps all L in order.
        matrices_KHH: (levels + 1, H, H) float32, contiguous.
        tokens_BKP: contiguous result, any of the dtypes.
        arch: architecture, see `_configs.config`.
    """
    batch, channels, size, _ = latent_BCHH.shape
    count = tokens_BKP.shape[1]
    tiles = _tiles("filter_mask_patchify", arch, channels, size)
    positions = count * patch_size**2
    grid = (batch * triton.cdiv(positions, tiles["BM"]) * triton.cdiv(channels, tiles["BC"]),)
    launch(
        filter_mask_patchify_kernel,
        grid,
        latent_BCHH,
        level_B,
        mask_BL,
        kept_BK,
        matrices_KHH,
        tokens_BKP,
        count,
        channels,
        size,
        matrices_KHH.shape[0] - 1,
        *latent_BCHH.stride(),
        level_B.stride(0),
        _stride(mask_BL),
        _stride(kept_BK),
        PATCH=patch_size,
        **tiles,
    )


def filter_mask_patchify_backward(
    tokens_BKP: Any,
    level_B: Any,
    mask_BL: Any,
    kept_BK: Any,
    matrices_KHH: Any,
    latent_BCHH: Any,
    *,
    patch_size: int,
    arch: int,
) -> None:
    """The transpose: the gradient of the latent from that of the tokens, which is contiguous.

    Arguments as above; latent_BCHH is the contiguous result. A token that is kept twice counts
    twice.
    """
    batch, channels, size, _ = latent_BCHH.shape
    tiles = _tiles("filter_mask_patchify_backward", arch, channels, size)
    grid = (batch * triton.cdiv(size, tiles["BM"]) * triton.cdiv(channels, tiles["BC"]),)
    launch(
        filter_mask_patchify_backward_kernel,
        grid,
        tokens_BKP,
        level_B,
        mask_BL,
        kept_BK,
        matrices_KHH,
        latent_BCHH,
        tokens_BKP.shape[1],
        channels,
        size,
        matrices_KHH.shape[0] - 1,
        level_B.stride(0),
        _stride(mask_BL),
        _stride(kept_BK),
        PATCH=patch_size,
        **tiles,
    )
