"""The decoder of VQ-16, LlamaGen's image tokenizer: 256 codes of 16384 -> an image of 256x256.

The published file also holds the encoder, its 1x1 convolution and a usage counter of training,
which sampling has no use for. Keys are the published ones.
Source: LlamaGen (arXiv 2406.06525), repository FoundationVision/LlamaGen,
`tokenizer/tokenizer_image/vq_model.py`: VQ_16, codebook 16384 x 8, l2-normalised.
"""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from fastfar.baselines._vqgan import (
    Activation,
    ResidualBlock,
    Upsample,
    attend,
    attend_published,
    norm,
    swish,
)

UNUSED = ("encoder.", "quant_conv.", "quantize.codebook_used")  # published keys, for encoding only

_CODES, _CODE_DIM, _Z_CHANNELS = 16384, 8, 256
_WIDTHS = (512, 256, 256, 128, 128)  # of the levels, lowest resolution first
_BLOCKS = 3  # per level


class _Attention(nn.Module):
    """x + proj(attention of one head over all pixels)."""

    def __init__(self, channels: int, well_run: bool) -> None:
        super().__init__()
        self.attend = attend if well_run else attend_published
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.norm(x_BCHW)
        h_BCHW = self.attend(self.q(h_BCHW), self.k(h_BCHW), self.v(h_BCHW))
        y_BCHW: Tensor = x_BCHW + self.proj_out(h_BCHW)
        return y_BCHW


class _Level(nn.Module):
    """The blocks of one resolution, each followed by attention at the lowest, then upsampling."""

    def __init__(
        self, inputs: int, outputs: int, lowest: bool, highest: bool, well_run: bool
    ) -> None:
        super().__init__()
        activation = _activation(well_run)
        widths = [inputs] + [outputs] * _BLOCKS
        self.res = nn.ModuleList(
            ResidualBlock(a, b, activation) for a, b in itertools.pairwise(widths)
        )
        attentions = _BLOCKS if lowest else 0
        self.attn = nn.ModuleList(_Attention(outputs, well_run) for _ in range(attentions))
        self.upsample: nn.Module = nn.Identity() if highest else Upsample(outputs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x_BCHW = block(x_BCHW)
            if self.attn:
                x_BCHW = self.attn[i](x_BCHW)
        y_BCHW: Tensor = self.upsample(x_BCHW)
        return y_BCHW


class _Decoder(nn.Module):
    def __init__(self, well_run: bool) -> None:
        super().__init__()
        low, high, last = _WIDTHS[0], _WIDTHS[-1], len(_WIDTHS) - 1
        self.activation = activation = _activation(well_run)
        self.conv_in = nn.Conv2d(_Z_CHANNELS, low, 3, padding=1)
        self.mid = nn.Sequential(
            ResidualBlock(low, low, activation),
            _Attention(low, well_run),
            ResidualBlock(low, low, activation),
        )
        self.conv_blocks = nn.Sequential(
            *(
                _Level(_WIDTHS[max(i - 1, 0)], width, i == 0, i == last, well_run)
                for i, width in enumerate(_WIDTHS)
            )
        )
        self.norm_out = norm(high)
        self.conv_out = nn.Conv2d(high, 3, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv_blocks(self.mid(self.conv_in(z_BCHW)))
        x_BCHW: Tensor = self.conv_out(self.activation(self.norm_out(h_BCHW)))
        return x_BCHW


class _Codebook(nn.Module):
    """16384 vectors of 8 numbers, used at length 1."""

    def __init__(self, well_run: bool) -> None:
        super().__init__()
        self.well_run = well_run
        self.embedding = nn.Embedding(_CODES, _CODE_DIM)

    def forward(self, codes_BL: Tensor) -> Tensor:
        """(B, L, 8)."""
        if self.well_run:
            return F.normalize(self.embedding(codes_BL), dim=-1)
        # The published way: the whole table is normalised for every image.
        return F.normalize(self.embedding.weight, dim=-1)[codes_BL]


class VQDecoder(nn.Module):
    """Codes (B, h * w) -> images (B, 3, 16 h, 16 w) in [-1, 1] and a little beyond.

    Args:
        well_run: SiLU in one operation, attention by scaled_dot_product_attention and only the
            codes that are looked up normalised; else the published operations.
    """

    def __init__(self, well_run: bool) -> None:
        super().__init__()
        self.well_run = well_run
        self.quantize = _Codebook(well_run)
        self.post_quant_conv = nn.Conv2d(_CODE_DIM, _Z_CHANNELS, 1)
        self.decoder = _Decoder(well_run)

    def forward(self, codes_BL: Tensor, grid: tuple[int, int] = (16, 16)) -> Tensor:
        """Images of the codes, which lie row by row in a grid of (h, w)."""
        z_BCHW = self.quantize(codes_BL).transpose(1, 2).view(len(codes_BL), _CODE_DIM, *grid)
        if not self.well_run:  # the view is channels-last, and all that follows would be
            z_BCHW = z_BCHW.contiguous()
        images_BCHW: Tensor = self.decoder(self.post_quant_conv(z_BCHW))
        return images_BCHW


def _activation(well_run: bool) -> Activation:
    return F.silu if well_run else swish
