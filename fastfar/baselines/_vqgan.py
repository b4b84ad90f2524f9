"""Blocks of VQGAN's image decoder that VAR's and LlamaGen's tokenizers have in common.

Submodules carry the published names. Source: VQGAN (arXiv 2012.09841).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


def norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups and VQGAN's epsilon."""
    return nn.GroupNorm(32, channels, eps=1e-6)


def swish(x: Tensor) -> Tensor:
    """x * sigmoid(x) in two operations, as VQGAN and LlamaGen write it."""
    return x * torch.sigmoid(x)


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, activation: Activation = F.silu) -> None:
        super().__init__()
        self.activation = activation
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(self.activation(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(self.activation(self.norm2(h_BCHW)))
        y_BCHW: Tensor = self.nin_shortcut(x_BCHW) + h_BCHW
        return y_BCHW


class Upsample(nn.Module):
    """Nearest neighbours twice as large, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        return y_BCHW


def attend_published(q_BCHW: Tensor, k_BCHW: Tensor, v_BCHW: Tensor) -> Tensor:
    """Attention of one head over all pixels, (B, C, H, W), as two batched products."""
    channels = q_BCHW.shape[1]
    q_BCL, k_BCL, v_BCL = q_BCHW.flatten(2), k_BCHW.flatten(2), v_BCHW.flatten(2)
    scores_BLL = torch.bmm(q_BCL.transpose(1, 2), k_BCL) * channels**-0.5
    weights_BLL = torch.softmax(scores_BLL, dim=2)
    return torch.bmm(v_BCL, weights_BLL.transpose(1, 2)).view(q_BCHW.shape)


def attend(q_BCHW: Tensor, k_BCHW: Tensor, v_BCHW: Tensor) -> Tensor:
    """The same by scaled_dot_product_attention; the result is in channels-last memory."""
    batch, channels, height, width = q_BCHW.shape
    q, k, v = (x.flatten(2).transpose(1, 2).unsqueeze(1) for x in (q_BCHW, k_BCHW, v_BCHW))
    h_B1LC = F.scaled_dot_product_attention(q, k, v)
    return h_B1LC.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
