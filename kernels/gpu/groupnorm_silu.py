"""GroupNorm and SiLU of channels-last images, in two passes over memory.

An image is (S, C): positions, and the channels of each side by side. It is cut into parts of
positions and blocks of whole groups, one program each. The first kernel writes mean and sum of
squares around it of every (image, group, part), the second merges them (Chan, Golub and LeVeque:
exact whatever the order), normalises and applies weight, bias and SiLU. How an image is cut depends
on its size alone, and nothing is added atomically: so results repeat bit for bit, and an image's
are the same in every batch.

A group's D channels are padded to a power of two, WIDTH; what lies in between is masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ._configs import config
from ._launch import launch
from ._math import silu


@triton.jit
def channels_of(block, groups, D: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """The channels of block number `block`, (GROUPS * WIDTH,), and which of them there are."""
    index = tl.arange(0, GROUPS * WIDTH)
    if D == WIDTH:  # said in a way that shows the compiler that they lie side by side
        channels = block * (GROUPS * D) + index
        return channels, channels < groups * D
    group = block * GROUPS + index // WIDTH
    within = index % WIDTH
    return group * D + within, (group < groups) & (within < D)


@triton.jit
def sum_groups(x, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """(GROUPS * WIDTH,) -> (GROUPS,)."""
    return tl.sum(tl.reshape(x, (GROUPS, WIDTH)), axis=1)


@triton.jit
def spread_groups(x, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """(GROUPS,) -> (GROUPS * WIDTH,): each number WIDTH times."""
    return tl.reshape(tl.broadcast_to(x[:, None], (GROUPS, WIDTH)), (GROUPS * WIDTH,))


@triton.jit
def groupnorm_statistics_kernel(
    x_BSC,
    statistics_2BGP,
    positions,
    groups,
    part,
    plane,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    index, block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channels, real = channels_of(block, groups, D, GROUPS, WIDTH)
    first = index * part
    last = tl.minimum(first + part, positions)
    # Every place of the tile keeps statistics of its own, so that nothing is summed across threads
    # before the end: Welford's, with a count by row.
    count = tl.zeros((ROWS, 1), tl.float32)
    mean = tl.zeros((ROWS, GROUPS * WIDTH), tl.float32)
    squares = tl.zeros((ROWS, GROUPS * WIDTH), tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        inside = rows < last
        offsets = (image * positions + rows) * (groups * D) + channels[None, :]
        x = tl.load(x_BSC + offsets, mask=inside & real[None, :], other=0.0).to(tl.float32)
        count += inside.to(tl.float32)
        distance = tl.where(inside, x - mean, 0.0)
        mean += distance * (1.0 / tl.maximum(count, 1.0))
        squares += distance * (x - mean)
    total = tl.sum(tl.sum(count, axis=1), axis=0) * D
    group_mean = sum_groups(tl.sum(count * mean, axis=0), GROUPS, WIDTH) / total
    between = tl.where(real[None, :], mean - spread_groups(group_mean, GROUPS, WIDTH)[None, :], 0.0)
    column_squares = tl.sum(squares + count * between * between, axis=0)
    group = block * GROUPS + tl.arange(0, GROUPS)
    group_squares = sum_groups(column_squares, GROUPS, WIDTH)
    places = (image * groups + group) * tl.num_programs(0) + index
    tl.store(statistics_2BGP + places, group_mean, mask=group < groups)
    tl.store(statistics_2BGP + plane + places, group_squares, mask=group < groups)


@triton.jit
def groupnorm_silu_kernel(
    x_BSC,
    statistics_2BGP,
    weight_C,
    bias_C,
    y_BSC,
    positions,
    groups,
    part,
    plane,
    eps,
    SILU: tl.constexpr,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    index, block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts = tl.num_programs(0)
    group = block * GROUPS + tl.arange(0, GROUPS)
    each = tl.arange(0, PARTS)[None, :]
    places = (image * groups + group)[:, None] * parts + each
    inside = (group < groups)[:, None] & (each < parts)
    means = tl.load(statistics_2BGP + places, mask=inside, other=0.0)
    squares = tl.load(statistics_2BGP + plane + places, mask=inside, other=0.0)
    total = positions * 1.0 * D
    counts = tl.minimum(tl.maximum(positions - each * part, 0), part).to(tl.float32) * D
    group_mean = tl.sum(means * counts, axis=1) / total
    between = means - group_mean[:, None]
    variance = tl.sum(squares + counts * between * between, axis=1) / total
    rstd = tl.math.rsqrt(variance + eps)

    channels, real = channels_of(block, groups, D, GROUPS, WIDTH)
    weight = tl.load(weight_C + channels, mask=real, other=0.0).to(tl.float32)
    bias = tl.load(bias_C + channels, mask=real, other=0.0).to(tl.float32)[None, :]
    factor = (weight * spread_groups(rstd, GROUPS, WIDTH))[None, :]
    mean = spread_groups(group_mean, GROUPS, WIDTH)[None, :]
    first = index * part
    last = tl.minimum(first + part, positions)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        keep = (rows < last) & real[None, :]
        offsets = (image * positions + rows) * (groups * D) + channels[None, :]
        x = tl.load(x_BSC + offsets, mask=keep, other=0.0).to(tl.float32)
        y = (x - mean) * factor + bias
        if SILU:
            y = silu(y)
        tl.store(y_BSC + offsets, y.to(y_BSC.dtype.element_ty), mask=keep)


@dataclass(frozen=True)
class Cut:
    """How an image of S positions is cut into parts and blocks of groups.

    Attributes:
        part: positions of a part, a power of two.
        parts, blocks: programs along S and C.
        tile: constants of both kernels, and warps.
    """

    part: int
    parts: int
    blocks: int
    tile: dict[str, Any]


def cut(positions: int, channels: int, groups: int, arch: int) -> Cut:
    """Parts for PROGRAMS programs or, where the image is large, at most PARTS parts.

    Raises ValueError where one position of a group does not fit in a program.
    """
    tiles = config("groupnorm_silu", arch, 4).tiles
    width = triton.next_power_of_2(channels // groups)
    if width > tiles["TILE"]:
        raise ValueError(f"groups of {channels // groups} channels; at most {tiles['TILE']} fit")
    together = max(tiles["CHANNELS"] // width, 1)
    blocks = triton.cdiv(groups, together)
    wanted = max(triton.cdiv(positions * blocks, tiles["PROGRAMS"]), tiles["ROWS"])
    part = triton.next_power_of_2(max(wanted, triton.cdiv(positions, tiles["PARTS"])))
    rows = min(part, tiles["TILE"] // (together * width))
    options = {
        "D": channels // groups,
        "ROWS": rows,
        "GROUPS": together,
        "WIDTH": width,
        "num_warps": min(max(rows * together * width // 256, 1), 8),
    }
    return Cut(part, triton.cdiv(positions, part), blocks, options)


def statistics_shape(x_BSC: torch.Tensor, groups: int, arch: int) -> tuple[int, int, int, int]:
    """(2, B, G, parts) of the scratch that `groupnorm_silu` needs."""
    batch, positions, channels = x_BSC.shape
    return 2, batch, groups, cut(positions, channels, groups, arch).parts


def groupnorm_silu(
    x_BSC: torch.Tensor,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    statistics_2BGP: torch.Tensor,
    y_BSC: torch.Tensor,
    *,
    eps: float,
    silu: bool,
    arch: int,
) -> None:
    """y = silu(weight (x - mean) / sqrt(variance + eps) + bias), or without the SiLU.

    x, y: contiguous, each of float32, float16 or bfloat16, as weight and bias are. statistics:
    float32 scratch of `statistics_shape`.
    """
    batch, positions, channels = x_BSC.shape
    groups = statistics_2BGP.shape[2]
    image = cut(positions, channels, groups, arch)
    grid = (image.parts, image.blocks, batch)
    sizes = positions, groups, image.part, batch * groups * image.parts
    launch(groupnorm_statistics_kernel, grid, x_BSC, statistics_2BGP, *sizes, **image.tile)
    launch(
        groupnorm_silu_kernel, grid, x_BSC, statistics_2BGP, weight_C, bias_C, y_BSC, *sizes, eps,
        SILU=silu, PARTS=triton.next_power_of_2(image.parts), **image.tile,
    )  # fmt: skip
