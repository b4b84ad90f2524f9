"""KL-16, the image autoencoder of MAR that FAR's latents live in.

A convolutional encoder and decoder in the layout of latent diffusion (GroupNorm, SiLU, residual
blocks, single-head attention at the lowest resolution). Module names are the published keys.
Source: MAR (arXiv 2406.11838) and its published KL-16 weights; latent diffusion (arXiv 2112.10752).
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastfar._weights import Source, Weights, check_fit, fill, indices, open_weights, skeleton
from fastfar.diagonal_gaussian import DiagonalGaussian
from fastfar.ops import convolution_residual, groupnorm_silu, upsample_convolution

_GROUPS = 32


@dataclass(frozen=True)
class KLVAEConfig:
    """Sizes of a KL autoencoder; the defaults are KL-16.

    Attributes:
        image_channels: channels of the image.
        channels: width of the first convolution; `channel_mults` times it is each level's width.
        channel_mults: one entry per resolution, highest first; each but the last halves the image.
        blocks: residual blocks per level of the encoder (the decoder has one more).
        z_channels: channels between encoder and `quant_conv`.
        latent_channels: C, channels of the latent.
        encoder_attention, decoder_attention: levels whose blocks are followed by attention.
        scale: factor from the raw latent to the one that FAR is trained on.

    Raises:
        ValueError: a size is not positive or a width is not a multiple of 32 (GroupNorm's groups).
    """

    image_channels: int = 3
    channels: int = 128
    channel_mults: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    z_channels: int = 16
    latent_channels: int = 16
    encoder_attention: tuple[int, ...] = (4,)
    decoder_attention: tuple[int, ...] = ()
    scale: float = 0.2325

    def __post_init__(self) -> None:
        for name in ("channel_mults", "encoder_attention", "decoder_attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = (self.image_channels, self.blocks, self.z_channels, self.latent_channels)
        if min(*sizes, *self.channel_mults, self.channels) < 1:
            raise ValueError(f"the sizes of a KLVAE must be positive, got {self}")
        if self.channels % _GROUPS:
            raise ValueError(f"channels must be a multiple of {_GROUPS}, got {self.channels}")
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel along one side: 16 for KL-16."""
        return 1 << (len(self.channel_mults) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at every level."""
        return tuple(self.channels * mult for mult in self.channel_mults)


class _Norm(nn.GroupNorm):
    """GroupNorm, and SiLU unless told otherwise."""

    def __init__(self, channels: int) -> None:
        super().__init__(_GROUPS, channels, eps=1e-6)

    def forward(self, x_BCHW: torch.Tensor, silu: bool = True) -> torch.Tensor:
        return groupnorm_silu(
            x_BCHW, self.weight, self.bias, groups=self.num_groups, eps=self.eps, silu=silu
        )


class _Conv(nn.Conv2d):
    """Convolution that keeps the size of the image, plus the residual if there is one."""

    bias: torch.Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)

    def forward(
        self, x_BCHW: torch.Tensor, residual_BCHW: torch.Tensor | None = None
    ) -> torch.Tensor:
        return convolution_residual(x_BCHW, self.weight, self.bias, residual_BCHW)


class _ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = _Norm(inputs)
        self.conv1 = _Conv(inputs, outputs)
        self.norm2 = _Norm(outputs)
        self.conv2 = _Conv(outputs, outputs)
        self.nin_shortcut = _Conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        h_BCHW = self.conv1(self.norm1(x_BCHW))
        y_BCHW: torch.Tensor = self.conv2(self.norm2(h_BCHW), self.nin_shortcut(x_BCHW))
        return y_BCHW


class _Attention(nn.Module):
    """x + proj(attention of one head over all pixels)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _Norm(channels)
        self.q = _Conv(channels, channels, 1)
        self.k = _Conv(channels, channels, 1)
        self.v = _Conv(channels, channels, 1)
        self.proj_out = _Conv(channels, channels, 1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        h_BCHW = self.norm(x_BCHW, silu=False)
        # One head over L = H * W pixels: (B, C, H, W) -> (B, 1, L, C).
        q, k, v = (
            layer(h_BCHW).flatten(2).transpose(1, 2).unsqueeze(1)
            for layer in (self.q, self.k, self.v)
        )
        h_B1LC = F.scaled_dot_product_attention(q, k, v)
        h_BCHW = h_B1LC.squeeze(1).transpose(1, 2).reshape(x_BCHW.shape)
        y_BCHW: torch.Tensor = self.proj_out(h_BCHW, x_BCHW)
        return y_BCHW


class _Downsample(nn.Module):
    """Stride-2 convolution, padded right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        y_BCHW: torch.Tensor = self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))
        return y_BCHW


class _Upsample(nn.Module):
    """Nearest neighbours twice as large, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _Conv(channels, channels)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return upsample_convolution(x_BCHW, self.conv.weight, self.conv.bias)


class _Level(nn.Module):
    """The blocks of one resolution, each followed by attention if asked, then the resampling."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * blocks
        self.block = nn.ModuleList(_ResidualBlock(a, b) for a, b in itertools.pairwise(widths))
        self.attn = nn.ModuleList(_Attention(outputs) for _ in range(blocks if attention else 0))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if self.attn:
                x_BCHW = self.attn[i](x_BCHW)
        y_BCHW: torch.Tensor = self.upsample(self.downsample(x_BCHW))
        return y_BCHW


class _Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = _ResidualBlock(channels, channels)
        self.attn_1 = _Attention(channels)
        self.block_2 = _ResidualBlock(channels, channels)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        y_BCHW: torch.Tensor = self.block_2(self.attn_1(self.block_1(x_BCHW)))
        return y_BCHW


class _Encoder(nn.Module):
    def __init__(self, config: KLVAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = _Conv(config.image_channels, config.channels)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            inputs = widths[i - 1] if i else config.channels
            level = _Level(inputs, width, config.blocks, i in config.encoder_attention)
            if i < len(widths) - 1:
                level.downsample = _Downsample(width)
            self.down.append(level)
        self.mid = _Middle(widths[-1])
        self.norm_out = _Norm(widths[-1])
        self.conv_out = _Conv(widths[-1], 2 * config.z_channels)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        h_BCHW = self.conv_in(x_BCHW)
        for level in self.down:
            h_BCHW = level(h_BCHW)
        out_BCHW: torch.Tensor = self.conv_out(self.norm_out(self.mid(h_BCHW)))
        return out_BCHW


class _Decoder(nn.Module):
    def __init__(self, config: KLVAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = _Conv(config.z_channels, widths[-1])
        self.mid = _Middle(widths[-1])
        # `up` is numbered as `down` is: 0 is the full resolution, and runs last.
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            inputs = widths[min(i + 1, len(widths) - 1)]
            level = _Level(inputs, width, config.blocks + 1, i in config.decoder_attention)
            if i > 0:
                level.upsample = _Upsample(width)
            self.up.append(level)
        self.norm_out = _Norm(widths[0])
        self.conv_out = _Conv(widths[0], config.image_channels)

    def forward(self, z_BCHW: torch.Tensor) -> torch.Tensor:
        h_BCHW = self.mid(self.conv_in(z_BCHW))
        for level in reversed(self.up):
            h_BCHW = level(h_BCHW)
        out_BCHW: torch.Tensor = self.conv_out(self.norm_out(h_BCHW))
        return out_BCHW


class KLVAE(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> latents (B, 16, H / 16, W / 16).

    `encode` and `decode` speak raw latents; `to_latents` and `to_images` speak those that FAR is
    trained on, `config.scale` (0.2325) times the raw ones. Computes in the dtype of its weights.
    """

    def __init__(self, config: KLVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or KLVAEConfig()
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.quant_conv = _Conv(2 * config.z_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = _Conv(config.latent_channels, config.z_channels, 1)

    @classmethod
    def load_official(cls, source: Source, dtype: torch.dtype = torch.float32) -> KLVAE:
        """KL-16 (or another size in its key layout) from a file or a state dict.

        `source` is a `.pth` or `.safetensors` path or a state dict, flat or under "model" or
        "state_dict"; keys "loss.*" (the discriminator of its training) are passed over. Every size
        is read from the shapes. Returns it frozen (no gradients), in eval mode.

        Raises:
            FileNotFoundError, TypeError, ValueError: see `_weights.open_weights`; ValueError also
                lists keys that are missing, unexpected or of wrong shape.
        """
        return cls.from_weights(open_weights(source), dtype)

    @classmethod
    def from_weights(cls, weights: Weights, dtype: torch.dtype | None) -> KLVAE:
        """`load_official` of weights that are open already; `dtype` None keeps theirs."""
        weights = weights.without("loss.")
        return load_kl_vae(weights, infer_config(weights.shapes, weights.name), dtype)

    @property
    def scale(self) -> float:
        """Factor from the raw latent to FAR's."""
        return self.config.scale

    def encode(self, images_BCHW: torch.Tensor) -> DiagonalGaussian:
        """Distribution of the raw latent of images in [-1, 1]; H and W are multiples of 16.

        Raises:
            TypeError: the images are not floating-point numbers.
            ValueError: wrong number of dimensions or channels, or a size that does not fit.
        """
        self._check("images", images_BCHW, self.config.image_channels)
        factor = self.config.downsampling
        height, width = images_BCHW.shape[2:]
        if height % factor or width % factor or not height or not width:
            raise ValueError(
                f"height and width must be multiples of {factor}, got {height} x {width}: crop or "
                "resize the images"
            )
        moments_BCHW = self.quant_conv(self.encoder(images_BCHW.to(self.quant_conv.weight.dtype)))
        mean_BCHW, logvar_BCHW = moments_BCHW.chunk(2, dim=1)
        return DiagonalGaussian(mean_BCHW, logvar_BCHW.clamp(-30.0, 20.0))

    def decode(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, 16 h, 16 w) of raw latents (B, 16, h, w), not clamped.

        Raises:
            TypeError: the latents are not floating-point numbers.
            ValueError: wrong number of dimensions or channels.
        """
        self._check("latents", latents_BCHW, self.config.latent_channels)
        latents_BCHW = latents_BCHW.to(self.post_quant_conv.weight.dtype)
        images_BCHW: torch.Tensor = self.decoder(self.post_quant_conv(latents_BCHW))
        return images_BCHW

    @torch.no_grad()
    def to_latents(
        self, images_BCHW: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """FAR's latents of images in [-1, 1]: scale * a sample of the posterior."""
        return self.encode(images_BCHW).sample(generator) * self.scale

    @torch.no_grad()
    def to_images(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] of FAR's latents."""
        exact = torch.promote_types(latents_BCHW.dtype, torch.float32)
        return self.decode(latents_BCHW.to(exact) / self.scale).clamp(-1.0, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """{"type": "kl_vae", ...sizes}, ready for JSON; the weights are stored beside it."""
        return {"type": "kl_vae", **dataclasses.asdict(self.config)}

    def _check(self, what: str, x_BCHW: torch.Tensor, channels: int) -> None:
        if x_BCHW.dim() != 4 or x_BCHW.shape[1] != channels:
            raise ValueError(
                f"{what} must have shape (B, {channels}, H, W), got {tuple(x_BCHW.shape)}"
            )
        if not x_BCHW.is_floating_point():
            raise TypeError(
                f"{what} must be floating-point numbers, got {x_BCHW.dtype}; bytes become images "
                "in [-1, 1] by x / 127.5 - 1"
            )


def load_kl_vae(weights: Weights, config: KLVAEConfig, dtype: torch.dtype | None) -> KLVAE:
    """A frozen KLVAE of these sizes, filled from `weights` (`dtype` None: as stored)."""
    with skeleton():
        vae = KLVAE(config)
    check_fit(vae, weights, f"a KL autoencoder of {config}")
    return fill(vae, weights, dtype).eval().requires_grad_(False)


def infer_config(shapes: Mapping[str, tuple[int, ...]], name: str) -> KLVAEConfig:
    """The sizes that the shapes of a published KL autoencoder imply; ValueError if it is none."""

    def size(key: str, axis: int) -> int:
        if len(shapes.get(key, ())) <= axis:
            far = "; this is a FAR model: use fastfar.load_official"
            raise ValueError(
                f"{name} is not a KL autoencoder: {key} is missing or has no axis {axis}"
                f"{far if 'z_proj.weight' in shapes else ''}"
            )
        return shapes[key][axis]

    def attention(prefix: str) -> tuple[int, ...]:
        levels = sorted(indices(shapes, prefix))
        return tuple(i for i in levels if indices(shapes, f"{prefix}.{i}.attn"))

    channels = size("encoder.conv_in.weight", 0)
    levels = sorted(indices(shapes, "encoder.down"))
    if not channels or not levels:
        raise ValueError(f"{name} is not a KL autoencoder: it has no encoder.down.* keys")
    return KLVAEConfig(
        image_channels=size("encoder.conv_in.weight", 1),
        channels=channels,
        channel_mults=tuple(
            size(f"encoder.down.{i}.block.0.conv1.weight", 0) // channels for i in levels
        ),
        blocks=statistics.mode(len(indices(shapes, f"encoder.down.{i}.block")) for i in levels),
        z_channels=size("decoder.conv_in.weight", 1),
        latent_channels=size("post_quant_conv.weight", 1),
        encoder_attention=attention("encoder.down"),
        decoder_attention=attention("decoder.up"),
    )
