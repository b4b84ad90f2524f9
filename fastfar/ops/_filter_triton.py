"""filter_mask_patchify on Triton: buffers, custom ops and gradient around its two kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfar.kernels.gpu._launch import is_recording
from fastfar.levels import check_levels, filter_table
from fastfar.ops._rows import DTYPES, recorded
from fastfar.ops._triton import architecture, kernels, traced

__all__ = ["DTYPES", "filter_mask_patchify"]


def filter_mask_patchify(
    latent_BCHW: Tensor,
    level_B: Tensor,
    mask_BL: Tensor | None,
    kept_BK: Tensor | None,
    patch_size: int,
    num_levels: int,
    kind: str,
) -> Tensor:
    """The op's Triton implementation, once shapes and the latent's dtype have been checked.

    Only the first call for a size, a kind and a device copies the matrices there; none waits.
    """
    device = latent_BCHW.device
    if level_B.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"levels must be an integer tensor, got {level_B.dtype}")
    if level_B.device.type == "cpu" and not traced():
        check_levels(level_B, num_levels)
    level_B = level_B.to(device)
    if mask_BL is not None:
        mask_BL = mask_BL.to(device, torch.bool)
    if kept_BK is not None:
        kept_BK = kept_BK.to(device)
    run = _forward if recorded(latent_BCHW) or traced() else _run_forward
    tokens_BKP: Tensor = run(latent_BCHW, level_B, mask_BL, kept_BK, patch_size, num_levels, kind)
    return tokens_BKP


def _rows(x: Tensor | None) -> Tensor | None:
    """x, or a copy with numbers of a row side by side."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _empty_tokens(latent_BCHW: Tensor, kept_BK: Tensor | None, patch_size: int) -> Tensor:
    batch, channels, size, _ = latent_BCHW.shape
    count = (size // patch_size) ** 2 if kept_BK is None else kept_BK.shape[1]
    return latent_BCHW.new_empty((batch, count, channels * patch_size**2))


def _empty_latent(tokens_BKP: Tensor, patch_size: int, size: int) -> Tensor:
    batch, _, numbers = tokens_BKP.shape
    return tokens_BKP.new_empty((batch, numbers // patch_size**2, size, size))


def _matrices(x: Tensor, size: int, num_levels: int, kind: str) -> Tensor:
    """(K + 1, H, H) float32 on x's device; launches that are only recorded do not read them."""
    if is_recording():
        return x.new_empty((num_levels + 1, size, size), dtype=torch.float32)
    return filter_table(size, num_levels, kind, x.device, torch.float32)


def _run_forward(
    latent_BCHW: Tensor,
    level_B: Tensor,
    mask_BL: Tensor | None,
    kept_BK: Tensor | None,
    patch_size: int,
    num_levels: int,
    kind: str,
) -> Tensor:
    matrices = _matrices(latent_BCHW, latent_BCHW.shape[-1], num_levels, kind)
    tokens_BKP = _empty_tokens(latent_BCHW, kept_BK, patch_size)
    kernels("filter_mask_patchify").filter_mask_patchify(
        latent_BCHW, level_B, _rows(mask_BL), _rows(kept_BK), matrices, tokens_BKP,
        patch_size=patch_size, arch=architecture(latent_BCHW),
    )  # fmt: skip
    return tokens_BKP


@torch.library.custom_op("fastfar::filter_mask_patchify_triton", mutates_args=())
def _forward(
    latent_BCHW: Tensor,
    level_B: Tensor,
    mask_BL: Tensor | None,
    kept_BK: Tensor | None,
    patch_size: int,
    num_levels: int,
    kind: str,
) -> Tensor:
    return _run_forward(latent_BCHW, level_B, mask_BL, kept_BK, patch_size, num_levels, kind)


def _run_backward(
    tokens_BKP: Tensor,
    level_B: Tensor,
    mask_BL: Tensor | None,
    kept_BK: Tensor | None,
    patch_size: int,
    num_levels: int,
    kind: str,
    size: int,
) -> Tensor:
    matrices = _matrices(tokens_BKP, size, num_levels, kind)
    latent_BCHW = _empty_latent(tokens_BKP, patch_size, size)
    kernels("filter_mask_patchify").filter_mask_patchify_backward(
        tokens_BKP.contiguous(), level_B, _rows(mask_BL), _rows(kept_BK), matrices, latent_BCHW,
        patch_size=patch_size, arch=architecture(tokens_BKP),
    )  # fmt: skip
    return latent_BCHW


@torch.library.custom_op("fastfar::filter_mask_patchify_triton_backward", mutates_args=())
def _backward(
    tokens_BKP: Tensor,
    level_B: Tensor,
    mask_BL: Tensor | None,
    kept_BK: Tensor | None,
    patch_size: int,
    num_levels: int,
    kind: str,
    size: int,
) -> Tensor:
    options = (patch_size, num_levels, kind, size)
    return _run_backward(tokens_BKP, level_B, mask_BL, kept_BK, *options)


# What runs on fake tensors: the launchers, too, where their launches are being recorded.
@_forward.register_fake
def _(x: Tensor, level_B: Any, mask_BL: Any, kept_BK: Any, patch_size: int, *rest: Any) -> Tensor:
    if is_recording():
        return _run_forward(x, level_B, mask_BL, kept_BK, patch_size, *rest)
    return _empty_tokens(x, kept_BK, patch_size)


@_backward.register_fake
def _(x: Tensor, level_B: Any, mask_BL: Any, kept_BK: Any, patch_size: int, *rest: Any) -> Tensor:
    if is_recording():
        return _run_backward(x, level_B, mask_BL, kept_BK, patch_size, *rest)
    return _empty_latent(x, patch_size, size=rest[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, level_B, mask_BL, kept_BK, *ctx.options = inputs
    ctx.size = x.shape[-1]
    ctx.save_for_backward(level_B, mask_BL, kept_BK)


def _transpose(ctx: Any, grad_BKP: Tensor) -> tuple[Tensor | None, ...]:
    return (_backward(grad_BKP, *ctx.saved_tensors, *ctx.options, ctx.size), *[None] * 6)


def _transpose_of_transpose(ctx: Any, grad_BCHW: Tensor) -> tuple[Tensor | None, ...]:
    return (_forward(grad_BCHW, *ctx.saved_tensors, *ctx.options[:-1]), *[None] * 7)


_forward.register_autograd(_transpose, setup_context=_save)
_backward.register_autograd(_transpose_of_transpose, setup_context=_save)
