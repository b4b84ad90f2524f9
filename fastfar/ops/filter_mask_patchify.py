"""From a latent to the transformer's input tokens in one pass."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastfar import _native
from fastfar.levels import check_levels, filter_matrices, low_pass, patchify
from fastfar.ops import _filter_triton
from fastfar.ops._registry import op


@op
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
    """tokens = (1 - mask) * patchify(A_i x A_i^T), each image at its own level i.

    With kept_BK only these tokens, in this order: result[b, j] = tokens[b, kept[b, j]].

    Args:
        latent_BCHW: (B, C, H, H) floating.
        level_B: (B,) int64 in 0..num_levels; -1 leaves an image unfiltered.
        mask_BL: (B, L), 1 or True where a token is masked (set to zero); None masks nothing.
        kept_BK: (B, K) int64 in 0..L-1; None keeps all.
        patch_size: p.
        num_levels: K; level K is the identity, level 0 is zero.
        kind: "area_bicubic" or "fourier".

    Returns:
        (B, L, C * p * p), or (B, K, C * p * p) with kept_BK; dtype of the latent.

    Triton: levels and kept tokens on a GPU are not checked, since that would wait for it: a level
    below 0 or above K leaves the image as it is, a token outside of 0..L-1 is zero.

    Source: FAR, arXiv 2503.05305, section 3.2; published code of FAR.
    """
    _check(latent_BCHW, level_B, mask_BL, kept_BK, patch_size)
    filtered_BCHW = low_pass(latent_BCHW, level_B, num_levels=num_levels, kind=kind)
    tokens_BLP = patchify(filtered_BCHW, patch_size)
    if mask_BL is not None:
        tokens_BLP = tokens_BLP.masked_fill(mask_BL.bool()[..., None], 0.0)
    return _keep(tokens_BLP, kept_BK)


def _keep(tokens_BLP: Tensor, kept_BK: Tensor | None) -> Tensor:
    """tokens[b, kept[b, j]]; all of them without `kept`."""
    if kept_BK is None:
        return tokens_BLP
    return tokens_BLP.gather(1, kept_BK[..., None].expand(-1, -1, tokens_BLP.shape[-1]))


def _check(
    latent_BCHW: Tensor,
    level_B: Tensor,
    mask_BL: Tensor | None,
    kept_BK: Tensor | None,
    patch_size: int,
) -> None:
    """ValueError for shapes that do not fit each other."""
    batch, _, height, size = latent_BCHW.shape
    if level_B.shape != (batch,):
        raise ValueError(
            f"level_B must hold one level for each of the {batch} images, "
            f"got shape {tuple(level_B.shape)}"
        )
    if height != size or size % patch_size:
        raise ValueError(
            f"a latent of {height} x {size} does not split into square patches of {patch_size}"
        )
    length = (size // patch_size) ** 2
    if mask_BL is not None and mask_BL.shape != (batch, length):
        raise ValueError(f"mask_BL must have shape {(batch, length)}, got {tuple(mask_BL.shape)}")
    if kept_BK is not None and (kept_BK.ndim != 2 or len(kept_BK) != batch):
        raise ValueError(f"kept_BK must have shape ({batch}, K), got {tuple(kept_BK.shape)}")


# --- native ----------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def _tables(size: int, num_levels: int, kind: str) -> tuple[Tensor, Tensor]:
    """A_i and A_i^T of every level, (K + 1, H, H rounded up to 16) float32, padded with zeros."""
    matrices_KHH = filter_matrices(size, num_levels, kind).to(torch.float32)
    table_KHX = torch.zeros(num_levels + 1, size, -(-size // 16) * 16)
    transposed_KHX = torch.zeros_like(table_KHX)
    table_KHX[..., :size] = matrices_KHH
    transposed_KHX[..., :size] = matrices_KHH.transpose(1, 2)
    return table_KHX, transposed_KHX


def _run(
    name: str,
    x: Tensor,
    out: Tensor,
    level_B: Tensor,
    mask_BL: Tensor | None,
    patch_size: int,
    num_levels: int,
    kind: str,
) -> Tensor:
    """Run the native operation `name` from x to out, one of which is (B, C, H, H)."""
    check_levels(level_B, num_levels)
    batch, channels, size, _ = (x if x.ndim == 4 else out).shape
    matrices, transposed = _tables(size, num_levels, kind)
    x, level_B = x.contiguous(), level_B.to(torch.int64).contiguous()
    mask = None if mask_BL is None else mask_BL.bool().contiguous()
    library, threads = _native.load(), torch.get_num_threads()
    fields: dict[str, Tensor | float | None] = {
        "dtype": _native.DTYPES[x.dtype],
        "threads": threads,
        "batch": batch,
        "channels": channels,
        "size": size,
        "patch": patch_size,
        "levels": num_levels,
        "stride": matrices.shape[-1],
        "matrices": matrices,
        "transposed": transposed,
        "level_B": level_B,
        "mask_BL": mask,
    }
    if x.ndim == 4:
        fields |= {"latent_BCHW": x, "tokens_BLP": out}
    else:
        fields |= {"tokens_BLP": x, "latent_BCHW": out}
    scratch_bytes = threads * library.scratch(name, **fields, scratch=None)
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8)
    if out.numel():
        library.call(name, **fields, scratch=scratch)
    return out


def _empty_tokens(latent_BCHW: Tensor, patch_size: int) -> Tensor:
    batch, channels, size, _ = latent_BCHW.shape
    shape = (batch, (size // patch_size) ** 2, channels * patch_size**2)
    return torch.empty(shape, dtype=latent_BCHW.dtype, device=latent_BCHW.device)


def _empty_latent(tokens_BLP: Tensor, patch_size: int) -> Tensor:
    batch, length, numbers = tokens_BLP.shape
    size = math.isqrt(length) * patch_size
    shape = (batch, numbers // patch_size**2, size, size)
    return torch.empty(shape, dtype=tokens_BLP.dtype, device=tokens_BLP.device)


@torch.library.custom_op("fastfar::filter_mask_patchify", mutates_args=())
def _forward(
    latent_BCHW: Tensor,
    level_B: Tensor,
    mask_BL: Tensor | None,
    patch_size: int,
    num_levels: int,
    kind: str,
) -> Tensor:
    out_BLP = _empty_tokens(latent_BCHW, patch_size)
    options = (level_B, mask_BL, patch_size, num_levels, kind)
    return _run("filter_mask_patchify", latent_BCHW, out_BLP, *options)


@torch.library.custom_op("fastfar::filter_mask_patchify_backward", mutates_args=())
def _backward(
    grad_BLP: Tensor,
    level_B: Tensor,
    mask_BL: Tensor | None,
    patch_size: int,
    num_levels: int,
    kind: str,
) -> Tensor:
    out_BCHW = _empty_latent(grad_BLP, patch_size)
    options = (level_B, mask_BL, patch_size, num_levels, kind)
    return _run("filter_mask_patchify_backward", grad_BLP, out_BCHW, *options)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, level_B, mask_BL, *ctx.options = inputs
    ctx.save_for_backward(level_B, mask_BL)


# The operation is linear in the latent: each of the two is the other's gradient.
_forward.register_fake(lambda x, level_B, mask_BL, patch_size, *_: _empty_tokens(x, patch_size))
_backward.register_fake(lambda g, level_B, mask_BL, patch_size, *_: _empty_latent(g, patch_size))
for _one, _other in ((_forward, _backward), (_backward, _forward)):
    _one.register_autograd(
        lambda ctx, grad, other=_other: (
            other(grad, *ctx.saved_tensors, *ctx.options),
            *[None] * 5,
        ),
        setup_context=_setup_context,
    )


def _native_implementation(
    latent_BCHW: Tensor,
    level_B: Tensor,
    mask_BL: Tensor | None = None,
    kept_BK: Tensor | None = None,
    *,
    patch_size: int,
    num_levels: int,
    kind: str = "area_bicubic",
) -> Tensor:
    """See `filter_mask_patchify`; float32 or bfloat16 on the CPU, float32 arithmetic."""
    if latent_BCHW.dtype not in _native.DTYPES:
        raise TypeError(f"the latent must be float32 or bfloat16, got {latent_BCHW.dtype}")
    if latent_BCHW.device.type != "cpu":
        raise ValueError(f"the latent must be on the CPU, got {latent_BCHW.device}")
    _check(latent_BCHW, level_B, mask_BL, kept_BK, patch_size)
    options = (level_B, mask_BL, patch_size, num_levels, kind)
    graph = torch.is_grad_enabled() and latent_BCHW.requires_grad
    if graph or torch.compiler.is_compiling():
        tokens_BLP: Tensor = _forward(latent_BCHW, *options)
    else:
        # A custom op costs more than the kernel; its first call imports PyTorch's compiler (1 s).
        out_BLP = _empty_tokens(latent_BCHW, patch_size)
        tokens_BLP = _run("filter_mask_patchify", latent_BCHW, out_BLP, *options)
    return _keep(tokens_BLP, kept_BK)


filter_mask_patchify.register("native", _native_implementation)


# --- triton ----------------------------------------------------------------------------------


def _triton_implementation(
    latent_BCHW: Tensor,
    level_B: Tensor,
    mask_BL: Tensor | None = None,
    kept_BK: Tensor | None = None,
    *,
    patch_size: int,
    num_levels: int,
    kind: str = "area_bicubic",
) -> Tensor:
    """See `filter_mask_patchify`; PyTorch computes what is not of a dtype of the kernel."""
    options = (level_B, mask_BL, kept_BK, patch_size, num_levels, kind)
    if latent_BCHW.dtype not in _filter_triton.DTYPES:
        plain: Tensor = filter_mask_patchify.implementations["torch"](
            latent_BCHW, level_B, mask_BL, kept_BK,
            patch_size=patch_size, num_levels=num_levels, kind=kind,
        )  # fmt: skip
        return plain
    _check(latent_BCHW, level_B, mask_BL, kept_BK, patch_size)
    return _filter_triton.filter_mask_patchify(latent_BCHW, *options)


filter_mask_patchify.register("triton", _triton_implementation)
