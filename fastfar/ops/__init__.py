"""Production ops: one file per op, each with a function of the same name in `fastfar.reference`."""

from fastfar.ops._registry import Op, use_backend
from fastfar.ops.adaln_mlp_block import adaln_mlp_block
from fastfar.ops.attention import attention
from fastfar.ops.denoise_loop import denoise_loop
from fastfar.ops.filter_mask_patchify import filter_mask_patchify
from fastfar.ops.hybrid_loss import hybrid_loss
from fastfar.ops.layernorm_attention_residual import layernorm_attention_residual
from fastfar.ops.layernorm_mlp_residual import layernorm_mlp_residual

__all__ = [
    "Op",
    "adaln_mlp_block",
    "attention",
    "denoise_loop",
    "filter_mask_patchify",
    "hybrid_loss",
    "layernorm_attention_residual",
    "layernorm_mlp_residual",
    "use_backend",
]
