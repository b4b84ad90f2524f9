"""From a latent to the transformer's input tokens in one pass."""

from __future__ import annotations

from torch import Tensor

from fastfar.levels import low_pass, patchify
from fastfar.ops._registry import op


@op
def filter_mask_patchify(
    latent_BCHW: Tensor,
    level_B: Tensor,
    mask_BL: Tensor | None = None,
    *,
    patch_size: int,
    num_levels: int,
    kind: str = "area_bicubic",
) -> Tensor:
    """tokens = (1 - mask) * patchify(A_i x A_i^T), each image at its own level i.

    Args:
        latent_BCHW: (B, C, H, H) floating.
        level_B: (B,) int64 in 0..num_levels; -1 leaves an image unfiltered.
        mask_BL: (B, L), 1 or True where a token is masked (set to zero); None masks nothing.
        patch_size: p.
        num_levels: K; level K is the identity, level 0 is zero.
        kind: "area_bicubic" or "fourier".

    Returns:
        (B, L, C * p * p), dtype of the latent.

    Source: FAR, arXiv 2503.05305, section 3.2; published code of FAR.
    """
    filtered_BCHW = low_pass(latent_BCHW, level_B, num_levels=num_levels, kind=kind)
    tokens_BLP = patchify(filtered_BCHW, patch_size)
    if mask_BL is None:
        return tokens_BLP
    return tokens_BLP.masked_fill(mask_BL.bool()[..., None], 0.0)
