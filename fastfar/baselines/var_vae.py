"""The decoding half of VAR's multi-scale VQ-VAE: code words to the feature map to the image.

Module names are the published keys, less the encoder's. The feature map f_hat is a sum over the
ten scales: a scale's code words, enlarged to 16x16 and passed through a "phi" convolution. Between
scales it is shrunk to the next scale's size and is what the transformer reads.

Letters: B images, C channels of the feature map (32), V code words (4096), P side of a scale.
Source: VAR, arXiv 2404.02905, section 3.2, and the published FoundationVision/VAR models/quant.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fastfar.baselines._vqgan import ResidualBlock, Upsample, attend_published, norm

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
VOCABULARY = 4096
CHANNELS = 32
# Keys of the published file that decoding does not need: the encoder, and counts of training.
IGNORED = ("encoder.", "quant_conv.", "quantize.ema_vocab_hit_SV")

_WIDTHS = (160, 160, 320, 320, 640)  # highest resolution first
_BLOCKS = 3
_PHI_WEIGHT = 0.5
# Of four phis at evenly spaced places 1/12..11/12, scale k takes the nearest to k/9. Scales 2 and 7
# are ties, which the published code's rounding decides: so the outcome is written down here.
_PHI_OF_SCALE = (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values -> (B, C, H, W)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Phi(nn.Conv2d):
    """h / 2 + conv(h) / 2."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, h_BCHW: Tensor) -> Tensor:
        return h_BCHW * (1 - _PHI_WEIGHT) + super().forward(h_BCHW) * _PHI_WEIGHT


class _Phis(nn.Module):
    """Four phi convolutions for ten scales."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(channels) for _ in sorted(set(_PHI_OF_SCALE)))

    def forward(self, h_BCHW: Tensor, scale: int) -> Tensor:
        y_BCHW: Tensor = self.qresi_ls[_PHI_OF_SCALE[scale]](h_BCHW)
        return y_BCHW


class Quantizer(nn.Module):
    """The codebook, and how the code words of a scale enter the feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.quant_resi = _Phis(CHANNELS)
        self.embedding = nn.Embedding(VOCABULARY, CHANNELS)

    def add(self, f_hat_BCHW: Tensor, codes_BL: Tensor, scale: int) -> Tensor:
        """f_hat plus the code words of `scale`, (B, P**2) row by row."""
        side = SIDES[scale]
        h_BCPP = self.embedding(codes_BL).transpose(1, 2).unflatten(2, (side, side))
        if scale < len(SIDES) - 1:
            h_BCPP = F.interpolate(h_BCPP, f_hat_BCHW.shape[-2:], mode="bicubic")
        sum_BCHW: Tensor = f_hat_BCHW + self.quant_resi(h_BCPP, scale)
        return sum_BCHW

    @staticmethod
    def shrunk(f_hat_BCHW: Tensor, scale: int) -> Tensor:
        """(B, P**2, C): f_hat averaged down to the side P of `scale`, as rows of tokens."""
        small_BCPP = F.interpolate(f_hat_BCHW, (SIDES[scale], SIDES[scale]), mode="area")
        return small_BCPP.flatten(2).transpose(1, 2)


class _Attention(nn.Module):
    """x + proj_out(attention of one head over all pixels)."""

    def __init__(self, channels: int, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.attend(*self.qkv(self.norm(x_BCHW)).chunk(3, dim=1))
        y_BCHW: Tensor = self.proj_out(h_BCHW)
        return x_BCHW + y_BCHW


class _Level(nn.Module):
    """The blocks of one resolution, then twice the size."""

    def __init__(self, inputs: int, outputs: int, attend: Attend | None, upsample: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(outputs if i else inputs, outputs) for i in range(_BLOCKS)
        )
        self.attn = nn.ModuleList(
            _Attention(outputs, attend) for _ in range(_BLOCKS) if attend is not None
        )
        self.upsample = Upsample(outputs) if upsample else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if self.attn:
                x_BCHW = self.attn[i](x_BCHW)
        y_BCHW: Tensor = self.upsample(x_BCHW)
        return y_BCHW


class _Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, attend: Attend) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = _Attention(channels, attend)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.block_2(self.attn_1(self.block_1(x_BCHW)))
        return y_BCHW


class Decoder(nn.Module):
    """(B, 32, 16, 16) -> (B, 3, 256, 256)."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        last = len(_WIDTHS) - 1
        self.conv_in = _conv(CHANNELS, _WIDTHS[last])
        self.mid = _Middle(_WIDTHS[last], attend)
        # Numbered from the highest resolution, which runs last.
        self.up = nn.ModuleList(
            _Level(_WIDTHS[min(i + 1, last)], width, attend if i == last else None, i > 0)
            for i, width in enumerate(_WIDTHS)
        )
        self.norm_out = norm(_WIDTHS[0])
        self.conv_out = _conv(_WIDTHS[0], 3)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        h_BCHW = self.mid(self.conv_in(z_BCHW))
        for level in reversed(self.up):
            h_BCHW = level(h_BCHW)
        y_BCHW: Tensor = self.conv_out(F.silu(self.norm_out(h_BCHW)))
        return y_BCHW


class VQVAE(nn.Module):
    """Quantizer and decoder; `attend` computes the decoder's attention."""

    def __init__(self, attend: Attend = attend_published) -> None:
        super().__init__()
        self.quantize = Quantizer()
        self.post_quant_conv = _conv(CHANNELS, CHANNELS)
        self.decoder = Decoder(attend)

    def forward(self, f_hat_BCHW: Tensor) -> Tensor:
        """(B, 3, 256, 256) images in [0, 1] of the feature map."""
        image_BCHW: Tensor = self.decoder(self.post_quant_conv(f_hat_BCHW))
        return (image_BCHW.clamp(-1, 1) + 1) * 0.5
