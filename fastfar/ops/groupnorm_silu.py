"""GroupNorm and SiLU, the step between the convolutions of an image autoencoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar import _native
from fastfar.ops._registry import op


@op
def groupnorm_silu(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float = 1e-6,
    silu: bool = True,
) -> Tensor:
    """silu(weight (x - mean) / sqrt(var + eps) + bias), mean and var of each image and group.

    Args:
        x_BCHW: (B, C, H, W) floating; fastest in channels-last memory format on the native back
            end, which returns that format.
        weight, bias: (C,).
        groups: G; a group is C / G neighbouring channels.
        eps: added to the variance.
        silu: False leaves the SiLU out.

    Returns:
        (B, C, H, W), dtype of x. The statistics are float32 or better.

    Source: group normalization, arXiv 1803.08494; latent diffusion, arXiv 2112.10752.
    """
    y_BCHW = F.group_norm(x_BCHW, groups, weight, bias, eps)
    return F.silu(y_BCHW) if silu else y_BCHW


# --- native ----------------------------------------------------------------------------------


def _native_implementation(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float = 1e-6,
    silu: bool = True,
) -> Tensor:
    """See `groupnorm_silu`; float32 or bfloat16 on the CPU, without gradients of its own."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x_BCHW, weight, bias)):
        torch_implementation = groupnorm_silu.implementations["torch"]
        out_BCHW: Tensor = torch_implementation(
            x_BCHW, weight, bias, groups=groups, eps=eps, silu=silu
        )
        return out_BCHW
    if x_BCHW.dtype not in _native.DTYPES:
        raise TypeError(f"x must be float32 or bfloat16, got {x_BCHW.dtype}")
    if any(t.device.type != "cpu" for t in (x_BCHW, weight, bias)):
        raise ValueError(f"x, weight and bias must be on the CPU, x is on {x_BCHW.device}")
    batch, channels, height, width = x_BCHW.shape
    if groups < 1 or channels % groups:
        raise ValueError(f"{channels} channels cannot be split into {groups} groups")
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(f"weight and bias must have {channels} numbers, one per channel")
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    y_BCHW = torch.empty_like(x_BCHW)
    if not y_BCHW.numel():
        return y_BCHW
    library = _native.load()
    fields: dict[str, Tensor | float | None] = {
        "dtype": _native.DTYPES[x_BCHW.dtype],
        "silu": int(silu),
        "threads": torch.get_num_threads(),
        "eps": eps,
        "batch": batch,
        "positions": height * width,
        "channels": channels,
        "groups": groups,
        "x_BSC": x_BCHW,
        "weight_C": weight.to(torch.float32).contiguous(),
        "bias_C": bias.to(torch.float32).contiguous(),
        "y_BSC": y_BCHW,
    }
    bytes_ = library.scratch("groupnorm_silu", **fields, scratch=None)
    scratch = torch.empty(bytes_, dtype=torch.uint8)
    library.call("groupnorm_silu", **fields, scratch=scratch)
    return y_BCHW


groupnorm_silu.register("native", _native_implementation)
