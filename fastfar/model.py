"""FAR: a bidirectional encoder-decoder that gives one condition vector per token.

The low-passed latent goes in, z comes out; the denoising MLP in `head.py` samples the clean latent
from p(x | z). Parameter names and shapes are those of the published checkpoints.

Source: FAR, arXiv 2503.05305, section 3; the masked encoder-decoder is MAE's and MAR's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastfar.backend import require_attention
from fastfar.config import FARConfig
from fastfar.diffloss import DiffLoss
from fastfar.head import SimpleMLPAdaLN
from fastfar.ops import layernorm_linear
from fastfar.ops._module import checkpointed
from fastfar.profiling import annotate
from fastfar.transformer import Block

EPS = 1e-6


def _block(config: FARConfig) -> Block:
    return Block(
        config.width,
        config.num_heads,
        config.mlp_ratio,
        qkv_bias=True,
        proj_drop=config.dropout,
        attn_drop=config.dropout,
        norm_layer=partial(nn.LayerNorm, eps=EPS),
        backend=None,
    )


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
        self.encoder_blocks = nn.ModuleList(_block(config) for _ in range(config.encoder_depth))
        self.encoder_norm = nn.LayerNorm(width, eps=EPS)

        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, positions, width))
        self.decoder_blocks = nn.ModuleList(_block(config) for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps=EPS)
        self.diffusion_pos_embed_learned = nn.Parameter(
            torch.zeros(1, config.num_tokens, width)
        )

        self.diffloss = DiffLoss(
            config.token_dim,
            config.width,
            config.head_depth,
            config.head_width,
            num_timesteps=config.num_timesteps,
            backend=None,
        )
        self.grad_checkpointing = False
        self.attention_backend = "auto"
        if not self.fake_latent.is_meta:
            self.init_weights()

    @property
    def head(self) -> SimpleMLPAdaLN:
        """The denoising MLP."""
        return self.diffloss.net

    @property
    def head_weights(self) -> Mapping[str, Tensor]:
        """Its parameters by name, as `fastfar.ops.denoise_loop` takes them."""
        return dict(self.head.named_parameters())

    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier for linear layers, normal(0.02) for embeddings, zero for the head's gates."""
        head = set(self.head.modules())
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in head:
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
        self.head.initialize_weights()

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
            num_kept: visible tokens, where that is the same number in every image and known: the
                encoder then sees those alone. None counts them on a CPU. Elsewhere, and in compiled
                code, counting would stall the device or break the graph: the encoder keeps all
                positions there, and masked tokens are no keys of its attention.

        Returns:
            (B, L, D).

        torch.compile(model, fullgraph=True) works with and without a mask, also given `num_kept`.
        """
        kept_BK = key_mask_BS = None
        if mask_BL is not None:
            mask_BL = mask_BL.bool()
            kept_BK, key_mask_BS = self._visible(mask_BL, num_kept)
            if kept_BK is None:
                tokens_BLP = tokens_BLP.masked_fill(mask_BL[..., None], 0.0)
        with annotate("encoder"):
            x_BSD = self._encode(tokens_BLP, class_BD, kept_BK, key_mask_BS)
        with annotate("decoder"):
            return self._decode(x_BSD, kept_BK, mask_BL)

    def _visible(
        self, mask_BL: Tensor, num_kept: int | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which tokens the encoder gets, None for all of them, and which positions are its keys."""
        buffer_BS = torch.ones_like(mask_BL[:, :1]).expand(-1, self.config.buffer_size)
        if num_kept is None and (torch.compiler.is_compiling() or mask_BL.device.type != "cpu"):
            return None, torch.cat([buffer_BS, mask_BL.logical_not()], dim=1)
        # Visible tokens first, in their own order; images with fewer of them are padded.
        order_BL = mask_BL.to(torch.uint8).argsort(dim=1, stable=True)
        key_mask_BS = None
        if num_kept is None:
            counts_B = (~mask_BL).sum(dim=1)
            num_kept = int(counts_B.max())
            if num_kept != int(counts_B.min()):
                slots_K = torch.arange(num_kept)
                key_mask_BS = torch.cat([buffer_BS, slots_K < counts_B[:, None]], dim=1)
        return order_BL[:, :num_kept], key_mask_BS

    def _encode(
        self,
        tokens_BLP: Tensor,
        class_BD: Tensor,
        kept_BK: Tensor | None = None,
        key_mask_BS: Tensor | None = None,
    ) -> Tensor:
        buffer = self.config.buffer_size
        positions: Tensor = self.encoder_pos_embed_learned
        if kept_BK is not None:
            tokens_BLP = _take(tokens_BLP, kept_BK)
            rows = positions.expand(len(kept_BK), -1, -1)
            positions = torch.cat([rows[:, :buffer], _take(rows[:, buffer:], kept_BK)], dim=1)
        x_BLD = self.z_proj(tokens_BLP)
        buffer_BUD = class_BD[:, None].to(x_BLD.dtype).expand(-1, buffer, -1)
        x_BSD = self.z_proj_ln(torch.cat([buffer_BUD, x_BLD], dim=1) + positions)
        x_BSD = self._through(self.encoder_blocks, x_BSD, key_mask_BS)
        return x_BSD

    def _decode(
        self, x_BSD: Tensor, kept_BK: Tensor | None = None, mask_BL: Tensor | None = None
    ) -> Tensor:
        """kept_BK: which tokens x_BSD holds after the buffer; None is all of them."""
        x_BSD = layernorm_linear(
            x_BSD,
            self.encoder_norm.weight,
            self.encoder_norm.bias,
            self.decoder_embed.weight,
            self.decoder_embed.bias,
            eps=EPS,
        )
        buffer = self.config.buffer_size
        if mask_BL is not None:
            hidden_BLD = self.mask_token.to(x_BSD.dtype).expand(*mask_BL.shape, -1)
            filled_BLD = x_BSD[:, buffer:]
            if kept_BK is not None:
                index_BKD = kept_BK[..., None].expand(-1, -1, x_BSD.shape[-1])
                filled_BLD = hidden_BLD.scatter(1, index_BKD, filled_BLD)
            filled_BLD = torch.where(mask_BL[..., None], hidden_BLD, filled_BLD)
            x_BSD = torch.cat([x_BSD[:, :buffer], filled_BLD], dim=1)
        x_BSD = x_BSD + self.decoder_pos_embed_learned
        x_BSD = self._through(self.decoder_blocks, x_BSD)
        z_BLD: Tensor = self.decoder_norm(x_BSD)[:, buffer:]
        return z_BLD + self.diffusion_pos_embed_learned

    def _through(
        self, blocks: Iterable[nn.Module], x_BSD: Tensor, key_mask_BS: Tensor | None = None
    ) -> Tensor:
        for block in blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x_BSD = checkpointed(block, x_BSD, key_mask_BS)
            else:
                x_BSD = block(x_BSD, key_mask_BS)
        return x_BSD

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute every block again in the backward instead of keeping its activations."""
        self.grad_checkpointing = self.head.grad_checkpointing = enable

    def set_attention_backend(self, name: str) -> FAR:
        """Compute attention with back end `name`; returns the model.

        name: "auto", or one of "sdpa", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "sdpa_math",
            "flash_attn_2", "flash_attn_3", "flash_attn_4", "xformers". It beats FASTFAR_ATTENTION,
            which "auto" leaves it to. The native CPU back end has its own attention, which only
            "auto" takes.

        Raises ValueError for an unknown name, or where its package cannot be used here. A call that
        the back end cannot serve (dtype, width of the heads, dropout) raises when it is made.
        """
        require_attention(name)
        for module in self.modules():
            if isinstance(module, Block):
                module.attention = name
        self.attention_backend = name
        return self

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
