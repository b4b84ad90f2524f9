"""Frequency levels: low-pass filters, patches and the token mask (FAR, arXiv 2503.05305)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NOT_FILTERED = -1


def area_bicubic_filter(latent_BCHW: Tensor, level: int, num_levels: int) -> Tensor:
    """Average areas down to ceil(H i / F) x ceil(W i / F), then bicubic (a = -0.75) up to H x W.

    latent_BCHW: float. level: i in 1..F. Returns the shape and dtype of the input. The filter of
    the published code.
    """
    height, width = latent_BCHW.shape[-2:]
    small = (-(-height * level // num_levels), -(-width * level // num_levels))
    down = F.interpolate(latent_BCHW, size=small, mode="area")
    return F.interpolate(down, size=(height, width), mode="bicubic", align_corners=False)


def fourier_filter(latent_BCHW: Tensor, level: int, num_levels: int) -> Tensor:
    """Keep the frequencies with max(|u|, |v|) <= i/2 (cycles per image), drop all others.

    latent_BCHW: float. level: i in 1..F. On a grid of H != F the bound is (i/2) (H/F), so that
    level F keeps all. Returns the shape and dtype of the input. The paper's second filter.
    """
    height, width = latent_BCHW.shape[-2:]

    def kept(size: int) -> Tensor:
        index = torch.arange(size, device=latent_BCHW.device)
        cycles = torch.minimum(index, size - index)  # |u| of the DFT's index
        return torch.le(2 * num_levels * cycles, level * size)

    keep_HW = kept(height)[:, None] & kept(width)[None, :]
    return torch.real(torch.fft.ifft2(torch.fft.fft2(latent_BCHW) * keep_HW)).contiguous()


_FILTERS = {"area_bicubic": area_bicubic_filter, "fourier": fourier_filter}


def low_pass(
    latent_BCHW: Tensor, level_B: Tensor, *, num_levels: int, kind: str = "area_bicubic"
) -> Tensor:
    """Low-pass each image to its own level.

    level_B: int64 (B,). 0 gives all zeros, num_levels the image itself, -1 the image itself ("not
    filtered"). Raises ValueError for an unknown kind, a wrong number of levels or a level outside
    -1..num_levels.
    """
    if kind not in _FILTERS:
        raise ValueError(f"kind is {kind!r}: choose one of {sorted(_FILTERS)}")
    if level_B.shape != latent_BCHW.shape[:1]:
        raise ValueError(
            f"level_B has shape {tuple(level_B.shape)}: give one level for each of the "
            f"{latent_BCHW.shape[0]} images"
        )
    filtered = []
    for image, level in enumerate(level_B.tolist()):
        latent_1CHW = latent_BCHW[image : image + 1]
        if level == 0:
            filtered.append(torch.zeros_like(latent_1CHW))
        elif level in (NOT_FILTERED, num_levels):
            filtered.append(latent_1CHW)
        elif 0 < level < num_levels:
            filtered.append(_FILTERS[kind](latent_1CHW, level, num_levels))
        else:
            raise ValueError(
                f"level is {level}: choose 0..{num_levels}, or {NOT_FILTERED} for no filter"
            )
    return torch.cat(filtered)


def patchify(latent_BCHW: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, L, P): p x p patches row by row; token order channel, row, column."""
    batch, channels, height, width = latent_BCHW.shape
    p = patch_size
    if height % p or width % p:
        raise ValueError(f"latent of {height} x {width} does not split in patches of {p} x {p}")
    x = latent_BCHW.reshape(batch, channels, height // p, p, width // p, p)
    x = torch.einsum("bchpwq->bhwcpq", x)
    return x.reshape(batch, (height // p) * (width // p), channels * p * p)


def unpatchify(tokens_BLP: Tensor, patch_size: int, latent_size: int) -> Tensor:
    """(B, L, P) -> (B, C, latent_size, latent_size): `patchify` undone, on square latents."""
    batch, _, token_dim = tokens_BLP.shape
    p, grid = patch_size, latent_size // patch_size
    x = tokens_BLP.reshape(batch, grid, grid, token_dim // (p * p), p, p)
    x = torch.einsum("bhwcpq->bchpwq", x)
    return x.reshape(batch, token_dim // (p * p), grid * p, grid * p)


def filter_mask_patchify(
    latent_BCHW: Tensor,
    level_B: Tensor,
    mask_BL: Tensor | None = None,
    kept_BK: Tensor | None = None,
    *,
    patch_size: int,
    num_levels: int,
    kind: str = "area_bicubic",
) -> Tensor:
    """tokens = (1 - mask) * patchify(low_pass(latent, level)), the input of the transformer.

    latent_BCHW: float. level_B: int64 (B,), 0..num_levels, or -1 for "not filtered" (see
    `low_pass`). mask_BL: 1 (or True) = masked, or None. kept_BK: int64 (B, K), the tokens to
    return, in this order, or None for all. Returns tokens_BLP (tokens_BKP with kept_BK) in the
    dtype of the latent.
    """
    filtered_BCHW = low_pass(latent_BCHW, level_B, num_levels=num_levels, kind=kind)
    tokens_BLP = patchify(filtered_BCHW, patch_size)
    if mask_BL is not None:
        tokens_BLP = tokens_BLP.masked_fill(mask_BL.bool().unsqueeze(-1), 0.0)
    if kept_BK is None:
        return tokens_BLP
    return torch.stack([tokens_BLP[b, kept_K] for b, kept_K in enumerate(kept_BK)])
