"""Frequency levels: the low-pass filters as fixed matrices.

Both filters of the paper are linear and separable, so level i of a latent is

    x_i = A_i x A_i^T          per channel, A_i of shape (H, H)

with one matrix per level. Level 0 is the zero matrix, level K the identity. Row -1 of a lookup
(level -1) also is the identity: "not filtered".

Source: FAR, arXiv 2503.05305, section 3.2; FAR's published code for the resampling rule.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar._tables import lookup


def _area_bicubic_matrix(size: int, level: int, num_levels: int) -> Tensor:
    """Area average down to ceil(size * level / num_levels), then bicubic (a = -0.75) back up."""
    small = math.ceil(size * level / num_levels)
    columns_11HH = torch.eye(size, dtype=torch.float64)[None, None]
    # Resampling the rows of the identity alone gives the 1-D operator as a matrix.
    down = F.interpolate(columns_11HH, size=(small, size), mode="area")
    up = F.interpolate(down, size=(size, size), mode="bicubic", align_corners=False)
    return up[0, 0]


def _fourier_matrix(size: int, level: int, num_levels: int) -> Tensor:
    """Keep the frequencies |u| <= (level / num_levels) * size / 2 along one axis."""
    frequency_H = torch.fft.fftfreq(size, 1.0 / size, dtype=torch.float64).abs()
    kept_H = (frequency_H <= level * size / (2 * num_levels)).to(torch.float64)
    identity = torch.eye(size, dtype=torch.float64)
    matrix: Tensor = torch.fft.ifft(kept_H[:, None] * torch.fft.fft(identity, dim=0), dim=0).real
    return matrix


_MATRIX = {"area_bicubic": _area_bicubic_matrix, "fourier": _fourier_matrix}


@lru_cache(maxsize=32)
def filter_matrices(size: int, num_levels: int, kind: str = "area_bicubic") -> Tensor:
    """All low-pass operators of one latent size.

    Args:
        size: H, side of the latent.
        num_levels: K.
        kind: "area_bicubic" or "fourier".

    Returns:
        (K + 1, H, H) float64 on the CPU; entry i is A_i. Shared and cached: do not write to it.

    Raises:
        ValueError: unknown kind, or sizes below 1.
    """
    if kind not in _MATRIX:
        raise ValueError(f"filter kind must be one of {sorted(_MATRIX)}, got {kind!r}")
    if size < 1 or num_levels < 1:
        raise ValueError(f"size and num_levels must be positive, got {size} and {num_levels}")
    # A table outlives the run that asks for it first, and the next one may want gradients.
    with torch.inference_mode(False):
        matrices = [torch.zeros(size, size, dtype=torch.float64)]
        matrices += [_MATRIX[kind](size, level, num_levels) for level in range(1, num_levels)]
        matrices.append(torch.eye(size, dtype=torch.float64))
        return torch.stack(matrices)


@lru_cache(maxsize=64)
def footprint(
    level: int, size: int, patch_size: int, num_levels: int, kind: str = "area_bicubic"
) -> Tensor:
    """Which tokens of a low-passed latent depend on which tokens of the latent.

    Token i of A_l x A_l^T depends on token j if a row of A_l in i's patch has an entry that is not
    zero in a column of j's patch, and so has A_l for the columns of the latent.

    Returns:
        (L, L) bool on the CPU, entry (i, j). Shared and cached: do not write to it.
    """
    grid = size // patch_size
    matrix_HH = filter_matrices(size, num_levels, kind)[level]
    blocks = matrix_HH.view(grid, patch_size, grid, patch_size)
    with torch.inference_mode(False):
        depends_GG = (blocks != 0).any(dim=3).any(dim=1)
        both = depends_GG[:, None, :, None] & depends_GG[None, :, None, :]
        return both.reshape(grid * grid, grid * grid)


@cache  # without a bound: what a CUDA graph points to must stay
def filter_table(
    size: int, num_levels: int, kind: str, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """`filter_matrices` on a device. Shared and cached: do not write to it."""
    with torch.inference_mode(False):
        return filter_matrices(size, num_levels, kind).to(device, dtype)


@lookup(
    "filter_of_level",
    lambda level_B, size, num_levels, kind, dtype: level_B.new_empty(
        (level_B.shape[0], size, size), dtype=dtype
    ),
)
def filter_of_level(
    level_B: Tensor, size: int, num_levels: int, kind: str, dtype: torch.dtype
) -> Tensor:
    """(B, H, H): the low-pass operator of each image's level; the identity for level -1."""
    # Level -1 indexes the last matrix, the identity.
    return filter_table(size, num_levels, kind, level_B.device, dtype)[level_B]


def check_levels(level_B: Tensor, num_levels: int) -> None:
    """ValueError unless every level is an integer in -1..num_levels (-1: not filtered).

    Values are looked at on the CPU only: elsewhere that would wait for the device. Nor are they in
    compiled code, where there are none.
    """
    if level_B.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"levels must be an integer tensor, got {level_B.dtype}")
    if level_B.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if level_B.numel() and not (int(level_B.min()) >= -1 and int(level_B.max()) <= num_levels):
        raise ValueError(
            f"levels must lie in 0..{num_levels} (or -1 for 'not filtered'), "
            f"got {sorted(set(level_B.tolist()))}"
        )


def low_pass(
    latent_BCHH: Tensor, level_B: Tensor, *, num_levels: int, kind: str = "area_bicubic"
) -> Tensor:
    """x_i = A_i x A_i^T, each image at its own level.

    Args:
        latent_BCHH: (B, C, H, H), any floating dtype.
        level_B: (B,) int64 in 0..num_levels, or -1 for an image that stays as it is.

    Returns:
        (B, C, H, H), dtype of the input.

    Raises:
        ValueError: not one level per image, or a level out of range (see `check_levels`).
    """
    if level_B.shape != latent_BCHH.shape[:1]:
        raise ValueError(
            f"level_B must hold one level for each of the {len(latent_BCHH)} images, "
            f"got shape {tuple(level_B.shape)}"
        )
    check_levels(level_B, num_levels)
    matrix_BHH = filter_of_level(
        level_B.to(latent_BCHH.device), latent_BCHH.shape[-1], num_levels, kind, latent_BCHH.dtype
    )
    matrix_B1HH = matrix_BHH[:, None]
    return matrix_B1HH @ latent_BCHH @ matrix_B1HH.transpose(-1, -2)


def patchify(latent_BCHH: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, H) -> (B, L, C * p * p); tokens row by row, numbers as (channel, row, column)."""
    batch, channels, size, _ = latent_BCHH.shape
    if size % patch_size:
        raise ValueError(f"a latent of {size} x {size} does not split into patches of {patch_size}")
    grid = size // patch_size
    x = latent_BCHH.reshape(batch, channels, grid, patch_size, grid, patch_size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, grid * grid, channels * patch_size**2)


def unpatchify(tokens_BLP: Tensor, patch_size: int) -> Tensor:
    """Inverse of `patchify`."""
    batch, length, numbers = tokens_BLP.shape
    grid = math.isqrt(length)
    channels = numbers // patch_size**2
    x = tokens_BLP.reshape(batch, grid, grid, channels, patch_size, patch_size)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(
        batch, channels, grid * patch_size, grid * patch_size
    )
