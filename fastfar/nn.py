"""Fused modules for training loops of your own.

Each is a drop-in for a published module: the same constructor arguments, the same meaning, the
same parameter names and shapes, so that a state dict loads strictly in either direction.

================== ============================================== =============================
here               replaces                                       of
================== ============================================== =============================
Block              timm.models.vision_transformer.Block           encoder and decoder
DiffLoss           models.diffloss.DiffLoss                       MAR, FAR: head, loss, sampling
SimpleMLPAdaLN     models.diffloss.SimpleMLPAdaLN                 the head alone
ResBlock           models.diffloss.ResBlock                       a block of the head
FinalLayer         models.diffloss.FinalLayer                     the head's last layer
FilterMaskPatchify the low-pass, patchify and masking of FAR      input of the transformer
================== ============================================== =============================

In a training loop with stock modules (`examples/replace_modules.py` runs this, for a model of the
kind of MAR and FAR):

    from functools import partial
    from fastfar.nn import Block, DiffLoss, FilterMaskPatchify

    state = model.state_dict()
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    for i in range(len(model.blocks)):
        model.blocks[i] = Block(width, num_heads, 4.0, qkv_bias=True, norm_layer=norm)
    model.diffloss = DiffLoss(token_dim, width, depth, head_width, num_sampling_steps="100")
    model.low_pass = FilterMaskPatchify(patch_size=1, num_levels=16)
    model.load_state_dict(state)

MAR's head has no level input: DiffLoss(..., level_input=False) has the keys of MAR's checkpoints.

An option of all of them:

    backend="auto"    by the device of the input: Triton's kernels on CUDA where they are usable,
                      else PyTorch. Or "torch", "native" (the CPU kernels) or "triton".

and of some of them: `grad_checkpointing=True` (heads: compute each block again in the backward),
`attention="flash_attn_2"` or another back end of attention, `norm="apex"` (Block). What cannot be
served is a ValueError with the reason. All work under autocast and in
torch.compile(fullgraph=True), and in float64 on PyTorch.
"""

from __future__ import annotations

from torch import Tensor

from fastfar.diffloss import DiffLoss
from fastfar.head import FinalLayer, ResBlock, SimpleMLPAdaLN, TimestepEmbedder
from fastfar.ops import filter_mask_patchify
from fastfar.ops._module import OpModule
from fastfar.transformer import Block

__all__ = [
    "Block",
    "DiffLoss",
    "FilterMaskPatchify",
    "FinalLayer",
    "ResBlock",
    "SimpleMLPAdaLN",
    "TimestepEmbedder",
]


class FilterMaskPatchify(OpModule):
    """tokens = (1 - mask) * patchify(A_i x A_i^T), each image at its own level i.

    The published code low-passes one image after the other, all at one level; this is exact for
    any level per image, in one pass, with the gradient of the latent. It has no parameters.

    Args:
        patch_size: p.
        num_levels: K; level K is the latent itself, level 0 is zero.
        kind: "area_bicubic" (published) or "fourier".
        backend: see `fastfar.nn`.

    Source: FAR, arXiv 2503.05305, section 3.2.
    """

    def __init__(
        self,
        patch_size: int = 1,
        num_levels: int = 16,
        kind: str = "area_bicubic",
        *,
        backend: str | None = "auto",
    ) -> None:
        super().__init__(backend)
        self.patch_size = patch_size
        self.num_levels = num_levels
        self.kind = kind

    def forward(
        self,
        latent: Tensor,
        level: Tensor,
        mask: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """The input of the transformer.

        Args:
            latent: (B, C, H, H).
            level: (B,) int64 in 0..K; -1 leaves an image as it is.
            mask: (B, L), 1 or True where a token is masked (set to zero); None masks nothing.
            kept: (B, N) int64, which tokens to return and in which order; None is all of them.

        Returns:
            (B, L, C * p * p), or (B, N, C * p * p) with kept; dtype of the latent.

        Raises:
            ValueError: shapes that do not fit; on the CPU a level out of range.
        """
        with self.on_backend(latent):
            return filter_mask_patchify(
                latent,
                level,
                mask,
                kept,
                patch_size=self.patch_size,
                num_levels=self.num_levels,
                kind=self.kind,
            )
