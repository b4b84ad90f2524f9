"""Production ops: one file per op, each with a function of the same name in `fastfar.reference`."""

from fastfar.ops._registry import Op, use_backend
from fastfar.ops.adaln_mlp_block import adaln_mlp_block
from fastfar.ops.add_noise import add_noise
from fastfar.ops.attention import attention
from fastfar.ops.convolution_residual import convolution_residual
from fastfar.ops.denoise_loop import denoise_loop
from fastfar.ops.filter_mask_patchify import filter_mask_patchify
from fastfar.ops.groupnorm_silu import groupnorm_silu
from fastfar.ops.hybrid_loss import hybrid_loss
from fastfar.ops.layernorm_attention_residual import layernorm_attention_residual
from fastfar.ops.layernorm_linear import layernorm_linear
from fastfar.ops.layernorm_mlp_residual import layernorm_mlp_residual
from fastfar.ops.linear import linear
from fastfar.ops.residual_layernorm import residual_layernorm
from fastfar.ops.transformer_block import transformer_block
from fastfar.ops.upsample_convolution import upsample_convolution

__all__ = [
    "Op",
    "adaln_mlp_block",
    "add_noise",
    "attention",
    "convolution_residual",
    "denoise_loop",
    "filter_mask_patchify",
    "groupnorm_silu",
    "hybrid_loss",
    "layernorm_attention_residual",
    "layernorm_linear",
    "layernorm_mlp_residual",
    "linear",
    "residual_layernorm",
    "transformer_block",
    "upsample_convolution",
    "use_backend",
]
