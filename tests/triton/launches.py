"""Launches that stand for all that a kernel is used for: FAR-H's sizes, unless said otherwise.

Each entry calls the launchers of kernels/gpu/<op>.py on fake CUDA tensors; the caller has entered
FakeTensorMode and `recording`. What they record is compiled (proof 2) and costed (proof 4).
"""

from __future__ import annotations

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


def transformer_block(arch: int, dtype: torch.dtype) -> None:
    """The products of its second half, which have epilogues; cuBLAS does the others."""
    from fastfar.kernels.gpu._gemm import gemm

    rows, width = 640, 1280
    x_ND, h_ND, out_ND = (_matrix(rows, width, dtype=dtype) for _ in range(3))
    h_NF = _matrix(rows, 4 * width, dtype=dtype)
    fc1, fc2 = _matrix(4 * width, width, dtype=dtype), _matrix(width, 4 * width, dtype=dtype)
    bias_F, bias_D = _matrix(4 * width, dtype=dtype), _matrix(width, dtype=dtype)
    gemm(h_ND, fc1, h_NF, arch=arch, bias_N=bias_F, activation="gelu")
    gemm(h_NF, fc2, out_ND, arch=arch, bias_N=bias_D, residual_MN=x_ND)


def adaln_mlp_block(arch: int, dtype: torch.dtype) -> None:
    """Sampling in one dtype; training under autocast, modulations in slices of one matrix."""
    from fastfar.kernels.gpu import adaln_mlp_block as kernels

    rows, width = 512, 1024
    shift, scale, gate = _matrix(rows, 3 * width, dtype=dtype).chunk(3, dim=1)
    for stream in dict.fromkeys((dtype, torch.float32)):
        x, dout, dx, out = (_matrix(rows, width, dtype=stream) for _ in range(4))
        a, h, g, u, dh, dg = (_matrix(rows, width, dtype=dtype) for _ in range(6))
        norm_weight, norm_bias, fc1_bias, fc2_bias = (_matrix(width, dtype=stream),) * 4
        fc1, fc2 = (_matrix(width, width, dtype=dtype),) * 2
        norm = norm_weight, norm_bias
        kernels.adaln_mlp_block(
            x, shift, scale, gate, *norm, fc1, fc1_bias, fc2, fc2_bias, a, g, out,
            eps=1e-6, arch=arch,
        )  # fmt: skip
        kernels.gated_residual(x, gate, u, out, arch=arch)
        partial_PW, partial_2PW = _matrix(128, width), _matrix(2, 128, width)
        kernels.gate_backward(dout, gate, u, a, g, partial_PW, arch=arch)
        kernels.silu_backward(dg, h, dh, g, partial_PW, arch=arch)
        kernels.modulate_backward(
            dout, dg, x, shift, scale, *norm, dx, dh, h, a, partial_2PW, eps=1e-6, arch=arch
        )


LAUNCHES: dict[str, Callable[[int, torch.dtype], None]] = {
    "residual_layernorm": residual_layernorm,
    "transformer_block": transformer_block,
    "adaln_mlp_block": adaln_mlp_block,
}


# --- filter, noise and loss ------------------------------------------------------------------


def _filter_arguments(
    dtype: torch.dtype, channels: int = 16, size: int = 16, kept: int | None = None, patch: int = 1
) -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor, torch.Tensor]:
    """What both kernels share (levels, mask, kept tokens, matrices), the latent and the tokens."""
    batch, length = 8, (size // patch) ** 2
    shared = (
        torch.empty(batch, dtype=torch.int64, device="cuda"),
        torch.empty(batch, length, dtype=torch.bool, device="cuda"),
        None if kept is None else torch.empty(batch, kept, dtype=torch.int64, device="cuda"),
        torch.empty(17, size, size, device="cuda"),
    )
    latent = torch.empty(batch, channels, size, size, dtype=dtype, device="cuda")
    count = length if kept is None else kept
    tokens = torch.empty(batch, count, channels * patch**2, dtype=dtype, device="cuda")
    return shared, latent, tokens


def _filter_mask_patchify(arch: int, dtype: torch.dtype) -> None:
    """All tokens, those that are kept, the demo model's patches of 4 x 4, and a 64 x 64 latent."""
    from fastfar.kernels.gpu.filter_mask_patchify import (
        filter_mask_patchify,
        filter_mask_patchify_backward,
    )

    cases = ({}, {"kept": 36}, {"channels": 1, "size": 32, "patch": 4}, {"size": 64})
    for sizes in cases:
        shared, latent, tokens = _filter_arguments(dtype, **sizes)
        options = {"patch_size": sizes.get("patch", 1), "arch": arch}
        filter_mask_patchify(latent, *shared, tokens, **options)
        filter_mask_patchify_backward(tokens, *shared, latent, **options)


def _diffusion_rows(arch: int, dtype: torch.dtype) -> None:
    """Noise, loss and its gradient: batch multiplier 4, 8 images; head output in `dtype`."""
    from fastfar.kernels.gpu.add_noise import add_noise
    from fastfar.kernels.gpu.hybrid_loss import hybrid_loss, hybrid_loss_backward

    tokens, rows, numbers = 8 * 256, 4 * 8 * 256, 16
    target = torch.empty(tokens, numbers, dtype=dtype, device="cuda")
    noise, noised = torch.empty(2, rows, numbers, dtype=dtype, device="cuda")
    output = torch.empty(rows, 2 * numbers, dtype=dtype, device="cuda")
    timestep = torch.empty(rows, dtype=torch.int64, device="cuda")
    loss = torch.empty(rows, device="cuda")
    table = torch.empty(6, 1000, device="cuda")
    add_noise(target, noise, timestep, torch.empty(2, 1000, device="cuda"), noised, arch=arch)
    for weight in (None, torch.empty(rows, device="cuda")):
        inputs = (output, target, noise, noised, timestep, weight, table)
        hybrid_loss(*inputs, loss, arch=arch)
        hybrid_loss_backward(loss, *inputs, output, arch=arch)


LAUNCHES |= {
    "filter_mask_patchify": _filter_mask_patchify,
    "add_noise and hybrid_loss": _diffusion_rows,
}


# --- the denoising loop ----------------------------------------------------------------------


def _denoise_loop(arch: int, dtype: torch.dtype) -> None:
    """Three diffusion steps of FAR-H's head, batch 1, with and without guidance."""
    from fastfar import FARConfig, backend
    from fastfar.head import DenoisingMLP
    from fastfar.ops import denoise_loop
    from fastfar.ops._folded_head import fold_head

    config = FARConfig.preset("far_huge")
    with torch.device("meta"):
        shapes = DenoisingMLP(config).state_dict()
    facts = backend.GPUFacts(l2_bytes=50 * 2**20, multiprocessors=132)
    tokens, channels = config.num_tokens, config.token_dim
    with torch.no_grad(), backend.described_gpu(arch, facts):
        head = fold_head({name: _matrix(*x.shape) for name, x in shapes.items()}, dtype)
        for halves in (1, 2):
            denoise_loop.implementations["triton"](
                head,
                _matrix(halves * tokens, config.width, dtype=dtype),
                7,
                _matrix(tokens, channels),
                _matrix(3, tokens, channels),
                guidance_scale=2.0,
                temperature=1.0,
            )


LAUNCHES["denoise_loop"] = _denoise_loop
