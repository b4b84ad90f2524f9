"""FAR written out slowly: the truth that tests and benchmarks compare against.

Imports torch only, works on plain dictionaries of tensors with the published key names, and
computes in the dtype of its inputs (float32 or float64). Read it as an appendix of the paper ("FAR,
arXiv 2503.05305"), in this order: filters, transformer, head, diffusion, solvers,
sampling, loss.

Shape suffixes: B image, L token, D transformer width, W head width, H attention head, E head width
of attention, S tokens of one attention call, N rows = batch multiplier * B * L (multiplier
outermost), C latent channels, P = C * p * p token dim, T diffusion steps, K outer steps.
`latent_BCHW` uses H and W for the grid.
"""

from __future__ import annotations

from .autoencoder import convolution_residual, groupnorm_silu, upsample_convolution
from .diffusion import (
    Schedule,
    add_noise,
    ancestral_step,
    cosine_betas,
    hybrid_loss,
    make_schedule,
    q_sample,
    space_timesteps,
)
from .filters import (
    area_bicubic_filter,
    filter_mask_patchify,
    fourier_filter,
    low_pass,
    patchify,
    unpatchify,
)
from .head import adaln_mlp_block, head_forward, linear, timestep_embedding
from .loss import level_weight_sine, training_loss
from .sampling import next_mask, sample_latents
from .solvers import denoise_loop
from .transformer import (
    attention,
    class_embedding,
    condition,
    layernorm_attention_residual,
    layernorm_linear,
    layernorm_mlp_residual,
    residual_layernorm,
    transformer_block,
)

__all__ = [
    "Schedule",
    "adaln_mlp_block",
    "add_noise",
    "ancestral_step",
    "area_bicubic_filter",
    "attention",
    "class_embedding",
    "condition",
    "convolution_residual",
    "cosine_betas",
    "denoise_loop",
    "filter_mask_patchify",
    "fourier_filter",
    "groupnorm_silu",
    "head_forward",
    "hybrid_loss",
    "layernorm_attention_residual",
    "layernorm_linear",
    "layernorm_mlp_residual",
    "level_weight_sine",
    "linear",
    "low_pass",
    "make_schedule",
    "next_mask",
    "patchify",
    "q_sample",
    "residual_layernorm",
    "sample_latents",
    "space_timesteps",
    "timestep_embedding",
    "training_loss",
    "transformer_block",
    "unpatchify",
    "upsample_convolution",
]
