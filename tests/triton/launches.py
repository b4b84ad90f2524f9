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
    """The products of its second half, which have epilogues, at batch 1 and 32; cuBLAS does the
    others."""
    from fastfar.kernels.gpu._gemm import gemm

    width = 1280
    fc1, fc2 = _matrix(4 * width, width, dtype=dtype), _matrix(width, 4 * width, dtype=dtype)
    bias_F, bias_D = _matrix(4 * width, dtype=dtype), _matrix(width, dtype=dtype)
    for rows, kind in ((640, "narrow"), (32 * 640, "linear")):
        x_ND, h_ND, out_ND = (_matrix(rows, width, dtype=dtype) for _ in range(3))
        h_NF = _matrix(rows, 4 * width, dtype=dtype)
        gemm(h_ND, fc1, h_NF, arch=arch, bias_N=bias_F, activation="gelu")
        gemm(h_NF, fc2, out_ND, arch=arch, kind=kind, bias_N=bias_D, residual_MN=x_ND)


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


# --- the denoising loop ----------------------------------------------------------------------


def _denoise_loop(arch: int, dtype: torch.dtype) -> None:
    """Three diffusion steps of FAR-H's head, batch 1 (with and without guidance) and 16."""
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
        for batch, halves in ((1, 1), (1, 2), (16, 2)):
            rows = batch * tokens
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
