"""Launches that stand for all that a kernel is used for: FAR-H's sizes, unless said otherwise.

Each entry calls the launchers of kernels/gpu/<op>.py on fake CUDA tensors; the caller has entered
FakeTensorMode and `recording`. What they record is compiled (proof 2) and costed (proof 4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch


def _matrix(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def residual_layernorm(arch: int, dtype: torch.dtype) -> None:
    """Sampling in one dtype, then training under autocast; FAR-B and FAR-L share a block."""
    from fastfar.kernels.gpu import residual_layernorm as kernels

    for width in (1024, 1280):
        vectors = [_matrix(width), _matrix(width)]
        for stream in dict.fromkeys((dtype, torch.float32)):
            x_ND, sum_ND, dx_ND = (_matrix(640, width, dtype=stream) for _ in range(3))
            update_ND, normed_ND = (_matrix(640, width, dtype=dtype) for _ in range(2))
            each = {"eps": 1e-6, "arch": arch}
            kernels.residual_layernorm(x_ND, update_ND, *vectors, sum_ND, normed_ND, **each)
            kernels.residual_layernorm(x_ND, None, *vectors, None, normed_ND, **each)
            dupdate_ND = None if stream is dtype else update_ND
            partial_2PD, dvectors_2D = _matrix(2, 160, width), _matrix(2, width)
            kernels.residual_layernorm_backward(
                sum_ND, normed_ND, x_ND, vectors[0], dx_ND, dupdate_ND, partial_2PD, dvectors_2D,
                **each,
            )  # fmt: skip


def adaln_mlp_block(arch: int, dtype: torch.dtype) -> None:
    """Sampling in one dtype; training under autocast, modulations in slices of one matrix."""
    from fastfar.kernels.gpu import adaln_mlp_block as kernels

    rows, width = 512, 1024
    shift, scale, gate = _matrix(rows, 3 * width, dtype=dtype).chunk(3, dim=1)
    for stream in dict.fromkeys((dtype, torch.float32)):
        x, dout, dx, out = (_matrix(rows, width, dtype=stream) for _ in range(4))
        a, h, g, u, dh, dg = (_matrix(rows, width, dtype=dtype) for _ in range(6))
        norm = (_matrix(width, dtype=stream),) * 2
        kernels.modulate(x, shift, scale, *norm, a, eps=1e-6, arch=arch)
        kernels.gated_residual(x, gate, u, out, arch=arch)
        partial_PW, partial_2PW = _matrix(128, width), _matrix(2, 128, width)
        kernels.gate_backward(dout, gate, u, a, g, partial_PW, arch=arch)
        kernels.silu_backward(dg, h, dh, g, partial_PW, arch=arch)
        kernels.modulate_backward(
            dout, dg, x, shift, scale, *norm, dx, dh, h, a, partial_2PW, eps=1e-6, arch=arch
        )


LAUNCHES: dict[str, Callable[[int, torch.dtype], None]] = {
    "residual_layernorm": residual_layernorm,
    "adaln_mlp_block": adaln_mlp_block,
}


# --- filter, noise and loss ------------------------------------------------------------------


def _filter(
    arch: int, dtype: torch.dtype, channels: int, size: int, patch: int, kept: int | None
) -> None:
    from fastfar.kernels.gpu import filter_mask_patchify as kernels

    batch, length = 8, (size // patch) ** 2
    count = length if kept is None else kept
    latent_BCHH = _matrix(batch, channels, size, size, dtype=dtype)
    tokens_BKP = _matrix(batch, count, channels * patch**2, dtype=dtype)
    shared = (
        _matrix(batch, dtype=torch.int64),
        _matrix(batch, length, dtype=torch.bool),
        None if kept is None else _matrix(batch, kept, dtype=torch.int64),
        _matrix(17, size, size),
    )
    options = {"patch_size": patch, "arch": arch}
    kernels.filter_mask_patchify(latent_BCHH, *shared, tokens_BKP, **options)
    kernels.filter_mask_patchify_backward(tokens_BKP, *shared, latent_BCHH, **options)


def filter_mask_patchify(arch: int, dtype: torch.dtype) -> None:
    """All tokens, those that are kept, and the demo model's patches of 4 x 4 numbers."""
    _filter(arch, dtype, channels=16, size=16, patch=1, kept=None)
    _filter(arch, dtype, channels=16, size=16, patch=1, kept=36)
    _filter(arch, dtype, channels=1, size=32, patch=4, kept=None)


def add_noise(arch: int, dtype: torch.dtype) -> None:
    """8 images, batch multiplier 4."""
    from fastfar.kernels.gpu import add_noise as kernels

    x0_RP = _matrix(8 * 256, 16, dtype=dtype)
    noise_NP, out_NP = (_matrix(4 * 8 * 256, 16, dtype=dtype) for _ in range(2))
    timestep_N, table_2T = _matrix(4 * 8 * 256, dtype=torch.int64), _matrix(2, 1000)
    kernels.add_noise(x0_RP, noise_NP, timestep_N, table_2T, out_NP, arch=arch)


def hybrid_loss(arch: int, dtype: torch.dtype) -> None:
    """8 images, batch multiplier 4; as under autocast, the head's output in `dtype`."""
    from fastfar.kernels.gpu import hybrid_loss as kernels

    rows = 4 * 8 * 256
    output_N2P, doutput_N2P = (_matrix(rows, 32, dtype=dtype) for _ in range(2))
    target_RP, noise_NP, noised_NP = _matrix(8 * 256, 16), _matrix(rows, 16), _matrix(rows, 16)
    timestep_N, weight_N, loss_N = _matrix(rows, dtype=torch.int64), _matrix(rows), _matrix(rows)
    inputs = (output_N2P, target_RP, noise_NP, noised_NP, timestep_N, weight_N, _matrix(6, 1000))
    kernels.hybrid_loss(*inputs, loss_N, arch=arch)
    kernels.hybrid_loss_backward(loss_N, *inputs, doutput_N2P, arch=arch)


LAUNCHES |= {
    "filter_mask_patchify": filter_mask_patchify,
    "add_noise": add_noise,
    "hybrid_loss": hybrid_loss,
}


# --- the image autoencoder -------------------------------------------------------------------

# Positions and channels of KL-16's decoder: a layer of every cut of the kernel.
_IMAGES = ((256, 512), (1024, 512), (1024, 256), (4096, 256), (16384, 256), (16384, 128))
_IMAGES += ((65536, 128),)


def groupnorm_silu(arch: int, dtype: torch.dtype) -> None:
    """KL-16's decoder at batch 1; before attention without SiLU."""
    from fastfar.kernels.gpu import groupnorm_silu as kernels

    for positions, channels in _IMAGES:
        x_BSC, y_BSC = (_matrix(1, positions, channels, dtype=dtype) for _ in range(2))
        vectors = (_matrix(channels, dtype=dtype),) * 2
        statistics = _matrix(*kernels.statistics_shape(x_BSC, 32, arch))
        for silu in (True, False)[: 2 if (positions, channels) == _IMAGES[0] else 1]:
            kernels.groupnorm_silu(
                x_BSC, *vectors, statistics, y_BSC, eps=1e-6, silu=silu, arch=arch
            )


def convolution_residual(arch: int, dtype: torch.dtype) -> None:
    """As above, with and without the residual; and the image itself, of 3 channels."""
    from fastfar.kernels.gpu import convolution_residual as kernels

    for positions, channels, residual in ((256, 512, True), (256, 512, False), (65536, 3, False)):
        y_NC, residual_NC = (_matrix(positions, channels, dtype=dtype) for _ in range(2))
        bias_C = _matrix(channels, dtype=dtype)
        kernels.convolution_residual(y_NC, bias_C, residual_NC if residual else None, arch=arch)


LAUNCHES |= {"groupnorm_silu": groupnorm_silu, "convolution_residual": convolution_residual}


# --- the denoising loop ----------------------------------------------------------------------


def _denoise_loop(arch: int, dtype: torch.dtype) -> None:
    """Three diffusion steps of FAR-H's head, batch 1 (with and without guidance) and 64; and of one
    whose width is no multiple of a tile."""
    from fastfar import FARConfig, backend
    from fastfar.head import DenoisingMLP
    from fastfar.ops import denoise_loop
    from fastfar.ops._folded_head import fold_head

    huge = FARConfig.preset("far_huge")
    odd = dataclasses.replace(huge, head_width=200, latent_channels=5, head_depth=1)
    with torch.no_grad(), backend.described_gpu(arch):
        for config, batch, halves in ((huge, 1, 1), (huge, 1, 2), (huge, 64, 2), (odd, 1, 2)):
            with torch.device("meta"):
                shapes = DenoisingMLP(config).state_dict()
            head = fold_head({name: _matrix(*x.shape) for name, x in shapes.items()}, dtype)
            rows, channels = batch * config.num_tokens, config.token_dim
            denoise_loop.implementations["triton"](
                head,
                _matrix(halves * rows, config.width, dtype=dtype),
                7,
                _matrix(rows, channels),
                _matrix(3, rows, channels),
                guidance_scale=2.0,
                temperature=1.0,
            )


LAUNCHES["denoise_loop"] = _denoise_loop
