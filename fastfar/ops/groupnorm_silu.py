"""GroupNorm and SiLU, the step between the convolutions of an image autoencoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar import _native
from fastfar.ops._registry import op
from fastfar.ops._rows import DTYPES, check, recorded
from fastfar.ops._triton import architecture, kernel_op, kernels


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
            end and on Triton, which return that format.
        weight, bias: (C,).
        groups: G; a group is C / G neighbouring channels.
        eps: added to the variance.
        silu: False leaves the SiLU out.

    Returns:
        (B, C, H, W), dtype of x. The statistics are float32 or better.

    Native and Triton compute no gradients: PyTorch does where autograd records.

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


# --- Triton ----------------------------------------------------------------------------------


@kernel_op("groupnorm_silu", mutates=("y_BSC", "statistics_2BGP"))
def _launch(
    x_BSC: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics_2BGP: Tensor,
    y_BSC: Tensor,
    eps: float,
    silu: bool,
) -> None:
    kernels("groupnorm_silu").groupnorm_silu(
        x_BSC, weight, bias, statistics_2BGP, y_BSC, eps=eps, silu=silu, arch=architecture(x_BSC)
    )


def _triton_implementation(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float = 1e-6,
    silu: bool = True,
) -> Tensor:
    """See `groupnorm_silu`; PyTorch computes what has gradients or a dtype that is not taken."""
    if x_BCHW.dtype not in DTYPES or recorded(x_BCHW, weight, bias):
        plain: Tensor = groupnorm_silu.implementations["torch"](
            x_BCHW, weight, bias, groups=groups, eps=eps, silu=silu
        )
        return plain
    batch, channels, height, width = x_BCHW.shape
    if groups < 1 or channels % groups:
        raise ValueError(f"{channels} channels cannot be split into {groups} groups")
    check(
        "groupnorm_silu",
        x=(x_BCHW, tuple(x_BCHW.shape)),
        weight=(weight, (channels,)),
        bias=(bias, (channels,)),
    )
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    y_BCHW = torch.empty_like(x_BCHW, memory_format=torch.channels_last)
    if not y_BCHW.numel():
        return y_BCHW
    x_BSC, y_BSC = (
        each.permute(0, 2, 3, 1).view(batch, height * width, channels) for each in (x_BCHW, y_BCHW)
    )
    shape = kernels("groupnorm_silu").statistics_shape(x_BSC, groups, architecture(x_BCHW))
    statistics_2BGP = x_BCHW.new_empty(shape, dtype=torch.float32)
    vectors = weight.contiguous(), bias.contiguous()
    _launch(x_BSC, *vectors, statistics_2BGP, y_BSC, eps, silu)
    return y_BCHW


groupnorm_silu.register("triton", _triton_implementation)
