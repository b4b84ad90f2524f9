"""FAR: a bidirectional encoder-decoder that gives one condition vector per token.

The low-passed latent goes in, z comes out; the denoising MLP in `head.py` samples the clean latent
from p(x | z). Parameter names and shapes are those of the published checkpoints.

Source: FAR, arXiv 2503.05305, section 3; the masked encoder-decoder is MAE's and MAR's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastfar.config import FARConfig
from fastfar.head import DenoisingMLP
from fastfar.ops import (
    layernorm_attention_residual,
    layernorm_linear,
    layernorm_mlp_residual,
)

EPS = 1e-6


class Attention(nn.Module):
    """Parameters of self-attention, in timm's names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)


class MLP(nn.Module):
    """Parameters of the feed-forward half, in timm's names."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, config: FARConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.norm1 = nn.LayerNorm(config.width, eps=EPS)
        self.attn = Attention(config.width)
        self.norm2 = nn.LayerNorm(config.width, eps=EPS)
        self.mlp = MLP(config.width, config.mlp_ratio * config.width)

    def forward(self, x_BSD: Tensor, key_mask_BS: Tensor | None = None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        x_BSD = layernorm_attention_residual(
            x_BSD,
            self.norm1.weight,
            self.norm1.bias,
            self.attn.qkv.weight,
            self.attn.qkv.bias,
            self.attn.proj.weight,
            self.attn.proj.bias,
            key_mask_BS,
            num_heads=self.num_heads,
            eps=EPS,
            dropout=dropout,
        )
        return layernorm_mlp_residual(
            x_BSD,
            self.norm2.weight,
            self.norm2.bias,
            self.mlp.fc1.weight,
            self.mlp.fc1.bias,
            self.mlp.fc2.weight,
            self.mlp.fc2.bias,
            eps=EPS,
            dropout=dropout,
        )


class DiffLoss(nn.Module):
    """Holds the head under the name that the published checkpoints give it."""

    def __init__(self, config: FARConfig) -> None:
        super().__init__()
        self.net = DenoisingMLP(config)


class FAR(nn.Module):
    """Frequency autoregressive model.

    Args:
        config: sizes; see `FARConfig.preset`.

    Example:
        >>> model = FAR(FARConfig.preset("demo"))
        >>> tokens_BLP = torch.zeros(2, 64, 16)
        >>> model(tokens_BLP, model.class_embedding(torch.tensor([3, 7]))).shape
        torch.Size([2, 64, 192])
    """

    def __init__(self, config: FARConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        positions = config.buffer_size + config.num_tokens

        self.class_emb = nn.Embedding(config.num_classes, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))

        self.z_proj = nn.Linear(config.token_dim, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, positions, width))
        self.encoder_blocks = nn.ModuleList(Block(config) for _ in range(config.encoder_depth))
        self.encoder_norm = nn.LayerNorm(width, eps=EPS)

        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, positions, width))
        self.decoder_blocks = nn.ModuleList(Block(config) for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps=EPS)
        self.diffusion_pos_embed_learned = nn.Parameter(
            torch.zeros(1, config.num_tokens, width)
        )

        self.diffloss = DiffLoss(config)
        if not self.fake_latent.is_meta:
            self.init_weights()

    @property
    def head(self) -> DenoisingMLP:
        """The denoising MLP."""
        return self.diffloss.net

    @property
    def head_weights(self) -> Mapping[str, Tensor]:
        """Its parameters by name, as `fastfar.ops.denoise_loop` takes them."""
        return dict(self.head.named_parameters())

    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier for linear layers, normal(0.02) for embeddings, zero for the head's gates."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (
            self.class_emb.weight,
            self.fake_latent,
            self.mask_token,
            self.encoder_pos_embed_learned,
            self.decoder_pos_embed_learned,
            self.diffusion_pos_embed_learned,
        ):
            nn.init.normal_(table, std=0.02)
        self.head.init_weights()

    def class_embedding(
        self, class_labels_B: Tensor, dropped_B: Tensor | None = None
    ) -> Tensor:
        """(B,) int64 -> (B, D); rows where `dropped_B` is True get the unconditional embedding."""
        embedding_BD: Tensor = self.class_emb(class_labels_B)
        if dropped_B is None:
            return embedding_BD
        return torch.where(dropped_B[:, None], self.fake_latent.to(embedding_BD), embedding_BD)

    def unconditional_embedding(self, batch: int) -> Tensor:
        """(batch, D): the embedding of "no class"."""
        return self.fake_latent.expand(batch, -1)

    def forward(
        self,
        tokens_BLP: Tensor,
        class_BD: Tensor,
        mask_BL: Tensor | None = None,
        num_kept: int | None = None,
    ) -> Tensor:
        """z = decoder(encoder(visible tokens)), one vector per token.

        Args:
            tokens_BLP: (B, L, P) low-passed tokens; masked ones are not looked at.
            class_BD: (B, D) from `class_embedding` or `unconditional_embedding`.
            mask_BL: (B, L), True or 1 where a token is masked; None masks nothing.
            num_kept: visible tokens, where that is the same number in every image and known:
                spares a host synchronisation and the key mask. Counted if None.

        Returns:
            (B, L, D).
        """
        if mask_BL is None:
            return self._decode(self._encode(tokens_BLP, class_BD))
        mask_BL = mask_BL.bool()
        # Visible tokens first, in their own order; images with fewer of them are padded.
        order_BL = mask_BL.to(torch.uint8).argsort(dim=1, stable=True)
        key_mask_BS = None
        if num_kept is None:
            counts_B = (~mask_BL).sum(dim=1)
            num_kept = int(counts_B.max())
            if num_kept != int(counts_B.min()):
                slots_K = torch.arange(num_kept, device=mask_BL.device)
                buffer_BS = mask_BL.new_ones(len(mask_BL), self.config.buffer_size)
                key_mask_BS = torch.cat([buffer_BS, slots_K < counts_B[:, None]], dim=1)
        kept_BK = order_BL[:, :num_kept]
        x_BSD = self._encode(tokens_BLP, class_BD, kept_BK, key_mask_BS)
        return self._decode(x_BSD, kept_BK, mask_BL)

    def _encode(
        self,
        tokens_BLP: Tensor,
        class_BD: Tensor,
        kept_BK: Tensor | None = None,
        key_mask_BS: Tensor | None = None,
    ) -> Tensor:
        x_BLD = self.z_proj(tokens_BLP)
        buffer_BUD = class_BD[:, None].to(x_BLD.dtype).expand(-1, self.config.buffer_size, -1)
        x_BSD = torch.cat([buffer_BUD, x_BLD], dim=1) + self.encoder_pos_embed_learned
        x_BSD = self.z_proj_ln(x_BSD)
        if kept_BK is not None:
            buffer = self.config.buffer_size
            visible_BKD = _take(x_BSD[:, buffer:], kept_BK)
            x_BSD = torch.cat([x_BSD[:, :buffer], visible_BKD], dim=1)
        for block in self.encoder_blocks:
            x_BSD = block(x_BSD, key_mask_BS)
        return x_BSD

    def _decode(
        self, x_BSD: Tensor, kept_BK: Tensor | None = None, mask_BL: Tensor | None = None
    ) -> Tensor:
        x_BSD = layernorm_linear(
            x_BSD,
            self.encoder_norm.weight,
            self.encoder_norm.bias,
            self.decoder_embed.weight,
            self.decoder_embed.bias,
            eps=EPS,
        )
        buffer = self.config.buffer_size
        if kept_BK is not None and mask_BL is not None:
            hidden_BLD = self.mask_token.to(x_BSD.dtype).expand(*mask_BL.shape, -1)
            index_BKD = kept_BK[..., None].expand(-1, -1, x_BSD.shape[-1])
            filled_BLD = hidden_BLD.scatter(1, index_BKD, x_BSD[:, buffer:])
            filled_BLD = torch.where(mask_BL[..., None], hidden_BLD, filled_BLD)
            x_BSD = torch.cat([x_BSD[:, :buffer], filled_BLD], dim=1)
        x_BSD = x_BSD + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x_BSD = block(x_BSD)
        z_BLD: Tensor = self.decoder_norm(x_BSD)[:, buffer:]
        return z_BLD + self.diffusion_pos_embed_learned

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and model.safetensors into the folder `path`, atomically."""
        from fastfar.checkpoint import save_model

        save_model(path, self)

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> FAR:
        """Load from a folder, "demo" (embedded), or a hub name; eval mode.

        backend: None gives a model for every back end and for training; "native" one that is
            packed as it is read, for sampling only (`fastfar.load_official` says more).
        """
        from fastfar.checkpoint import load_model

        return load_model(path_or_name, dtype=dtype, backend=backend)


def _take(x_BLD: Tensor, index_BK: Tensor) -> Tensor:
    return x_BLD.gather(1, index_BK[..., None].expand(-1, -1, x_BLD.shape[-1]))
