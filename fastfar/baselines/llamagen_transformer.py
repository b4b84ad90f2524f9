"""LlamaGen's transformer: a Llama that predicts the codes of an image, one after the other.

Position 0 is the class, position i + 1 the i-th code, row by row. `Transformer` has the published
keys and runs as the published code does; `WellRun` computes the same function from the same keys.

Letters: M rows = 2 B with guidance (conditional half first), S positions in one call, P positions
of the cache, D width, H heads, E width of a head, V codes (16384).
Source: LlamaGen, arXiv 2406.06525, section 2.2; the published FoundationVision/LlamaGen,
autoregressive/models/gpt.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfar.baselines._linear import PreparedLinear, can_pack

NORM_EPS = 1e-5
ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class LlamaGenConfig:
    """Sizes of a class-conditional LlamaGen for 256x256 images.

    Attributes:
        depth, width, heads: of the transformer.
        grid: tokens along one side.
        vocabulary: V, codes of the tokenizer.
        num_classes: one more embedding stands for "no class".
    """

    depth: int
    width: int
    heads: int
    grid: int = 16
    vocabulary: int = 16384
    num_classes: int = 1000

    @property
    def hidden(self) -> int:
        """Width inside the MLP: 8/3 of the width, rounded up to a multiple of 256."""
        return math.ceil(int(8 * self.width / 3) / 256) * 256

    @property
    def head_width(self) -> int:
        """E."""
        return self.width // self.heads


def rotary_table(grid: int, head_width: int) -> Tensor:
    """(1 + grid**2, E / 2, 2) float32: cosine and sine by position and pair of channels.

    The first half of the pairs turns with the row, the second with the column, by
    place * base**(-4 j / E) for pair j of its half. At the class the published table holds zeros,
    not a rotation by 0: its query and key vanish there, so every position gives it the score 0.
    """
    quarter = head_width // 4
    frequencies_Q = ROTARY_BASE ** (-torch.arange(quarter) / quarter)
    angles_GQ = torch.arange(grid)[:, None] * frequencies_Q
    by_row = angles_GQ[:, None].expand(grid, grid, quarter)
    by_column = angles_GQ[None].expand(grid, grid, quarter)
    angles_LE = torch.cat((by_row, by_column), dim=-1).flatten(0, 1)
    table_LE2 = torch.stack((angles_LE.cos(), angles_LE.sin()), dim=-1)
    return torch.cat((torch.zeros_like(table_LE2[:1]), table_LE2))


def rotated(x_MSHE: Tensor, table_SE2: Tensor) -> Tensor:
    """Neighbouring channels (a, b) turned to (a cos - b sin, b cos + a sin), in float32."""
    pairs = x_MSHE.float().reshape(*x_MSHE.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = table_SE2[:, None, :, 0], table_SE2[:, None, :, 1]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(3).type_as(x_MSHE)


class RMSNorm(nn.Module):
    """x / rms(x) * weight: the quotient in float32, the product in the dtype of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(torch.mean(x32 * x32, dim=-1, keepdim=True) + NORM_EPS)
        return x32.type_as(x) * self.weight


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return y


class Attention(nn.Module):
    """Causal attention with a cache of keys and values."""

    cache_2MHPE: Tensor

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self, x_MSD: Tensor, table_SE2: Tensor, positions_S: Tensor, visible_M1SP: Tensor
    ) -> Tensor:
        """The published way: the whole cache is copied, and read under a mask."""
        q_MSHE, k_MSHE, v_MSHE = (
            part.unflatten(-1, (self.heads, -1)) for part in self.wqkv(x_MSD).chunk(3, dim=-1)
        )
        q_MSHE, k_MSHE = rotated(q_MSHE, table_SE2), rotated(k_MSHE, table_SE2)
        keys, values = self.cache_2MHPE
        keys[:, :, positions_S] = k_MSHE.transpose(1, 2)
        values[:, :, positions_S] = v_MSHE.transpose(1, 2)
        # Grouped queries repeat keys and values; with groups of one this is a copy.
        keys, values = (cached.repeat_interleave(1, dim=1) for cached in (keys, values))
        out_MHSE = F.scaled_dot_product_attention(
            q_MSHE.transpose(1, 2), keys, values, attn_mask=visible_M1SP
        )
        y_MSD: Tensor = self.wo(out_MHSE.transpose(1, 2).flatten(2))
        return y_MSD


class Block(nn.Module):
    """x += attention(norm(x)), then x += feed_forward(norm(x))."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.width, config.hidden)
        self.attention_norm = RMSNorm(config.width)
        self.ffn_norm = RMSNorm(config.width)

    def forward(
        self, x_MSD: Tensor, table_SE2: Tensor, positions_S: Tensor, visible_M1SP: Tensor
    ) -> Tensor:
        h_MSD = self.attention_norm(x_MSD)
        x_MSD = x_MSD + self.attention(h_MSD, table_SE2, positions_S, visible_M1SP)
        y_MSD: Tensor = x_MSD + self.feed_forward(self.ffn_norm(x_MSD))
        return y_MSD


class ClassEmbedding(nn.Module):
    """One row per class, and one for none."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels_M: Tensor) -> Tensor:
        embeddings_MD: Tensor = self.embedding_table(labels_M)
        return embeddings_MD


class Transformer(nn.Module):
    """LlamaGen with the published keys, run as published."""

    table_PE2: Tensor
    visible_MPP: Tensor

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = ClassEmbedding(config.num_classes, config.width)
        self.tok_embeddings = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width)
        self.output = nn.Linear(config.width, config.vocabulary, bias=False)

    def prepare(self, rows: int) -> None:
        """Empty caches, mask and rotary table for a batch of M rows: anew for every batch."""
        config, weight = self.config, self.tok_embeddings.weight
        positions = math.ceil((config.grid**2 + 1) / 8) * 8
        shape = (2, rows, config.heads, positions, config.head_width)
        for layer in self.layers:
            assert isinstance(layer, Block)
            layer.attention.cache_2MHPE = weight.new_zeros(shape)
        visible_PP = torch.ones(positions, positions, dtype=torch.bool, device=weight.device).tril()
        self.visible_MPP = visible_PP.repeat(rows, 1, 1)
        self.table_PE2 = rotary_table(config.grid, config.head_width).to(weight.device)

    def embed_class(self, labels_M: Tensor) -> Tensor:
        """(M, D): what position 0 reads."""
        x_MD: Tensor = self.cls_embedding(labels_M)
        return x_MD

    def embed_code(self, codes_M: Tensor) -> Tensor:
        """(M, D): what the later positions read."""
        x_MD: Tensor = self.tok_embeddings(codes_M)
        return x_MD

    def forward(self, x_MSD: Tensor, positions_S: Tensor) -> Tensor:
        """(M, S, D) after the blocks; keys and values of these positions enter the caches."""
        visible_M1SP = self.visible_MPP[:, None, positions_S]
        table_SE2 = self.table_PE2[positions_S]
        for layer in self.layers:
            x_MSD = layer(x_MSD, table_SE2, positions_S, visible_M1SP)
        return x_MSD

    def logits(self, h_MSD: Tensor, guidance_scale: float | None) -> Tensor:
        """(B, V) float32 of the last position: u + scale (c - u) on the logits, None for c."""
        logits_MV: Tensor = self.output(self.norm(h_MSD)).float()[:, -1]
        if guidance_scale is None:
            return logits_MV
        c_BV, u_BV = logits_MV.chunk(2)
        return u_BV + (c_BV - u_BV) * guidance_scale


class WellRun(nn.Module):
    """The same function of the same parameters, without the waste.

    Norms are one operation, queries and keys are rotated together, attention reads the filled part
    of the cache (under a compiler, whose shapes are fixed: all of it, under a mask), guidance
    comes before the last linear layer, which is exact and halves it, and caches stay.
    """

    cos_PE: Tensor
    sin_PE: Tensor
    places_P: Tensor

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        self._rows = 0
        config, weight = model.config, model.tok_embeddings.weight
        table_PE2 = rotary_table(config.grid, config.head_width).to(weight.device)
        # a cos - b sin, b cos + a sin = x cos + swapped(x) (-sin, sin)
        cos_PE = table_PE2[..., 0].repeat_interleave(2, dim=-1)
        sin_PE = torch.stack((-table_PE2[..., 1], table_PE2[..., 1]), dim=-1).flatten(1)
        places_P = torch.arange(len(table_PE2), device=weight.device)
        # Buffers, as the caches: a CUDA graph reads and writes them where they are.
        for name, value in (("cos_PE", cos_PE), ("sin_PE", sin_PE), ("places_P", places_P)):
            self.register_buffer(name, value, persistent=False)

    def prepare(self, rows: int) -> None:
        """Caches for M rows; those of a former call are kept where they fit."""
        if rows == self._rows:
            return
        config, weight = self.model.config, self.model.tok_embeddings.weight
        shape = (rows, config.heads, len(self.places_P), config.head_width)
        for i in range(config.depth):
            self.register_buffer(f"keys_{i}", weight.new_zeros(shape), persistent=False)
            self.register_buffer(f"values_{i}", weight.new_zeros(shape), persistent=False)
        self._rows = rows

    def hidden(self, x_MD: Tensor, position: int | Tensor) -> Tensor:
        """(M, D) after the blocks; keys and values of this position enter the caches.

        position: an int, or a tensor of one int64 where shapes must not depend on it.
        """
        if isinstance(position, Tensor):
            filled, visible_1P = slice(None), (self.places_P <= position)[None]
        else:
            filled, visible_1P = slice(position + 1), None
        cos_E, sin_E = (table[position].view(-1) for table in (self.cos_PE, self.sin_PE))
        for i, layer in enumerate(self.model.layers):
            assert isinstance(layer, Block)
            keys, values = self.get_buffer(f"keys_{i}"), self.get_buffer(f"values_{i}")
            attention, mlp = layer.attention, layer.feed_forward
            h_MD = _normed(x_MD, layer.attention_norm)
            qkv_M3HE = attention.wqkv(h_MD).view(len(x_MD), 3, attention.heads, -1)
            qk = qkv_M3HE[:, :2]
            swapped = qk.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
            qk = (qk * cos_E + swapped * sin_E).to(qk.dtype)  # the tables are float32
            if isinstance(position, Tensor):
                keys.index_copy_(2, position, qk[:, 1, :, None])
                values.index_copy_(2, position, qkv_M3HE[:, 2, :, None])
            else:
                keys[:, :, position] = qk[:, 1]
                values[:, :, position] = qkv_M3HE[:, 2]
            out_MH1E = F.scaled_dot_product_attention(
                qk[:, 0, :, None], keys[:, :, filled], values[:, :, filled], attn_mask=visible_1P
            )
            x_MD = x_MD + attention.wo(out_MH1E.flatten(1))
            h_MD = _normed(x_MD, layer.ffn_norm)
            x_MD = x_MD + mlp.w2(F.silu(mlp.w1(h_MD)) * mlp.w3(h_MD))
        return x_MD

    def logits(self, x_MD: Tensor, guidance_scale: float | None) -> Tensor:
        """(B, V) float32."""
        h_MD = _normed(x_MD, self.model.norm)
        if guidance_scale is not None:
            c_BD, u_BD = h_MD.float().chunk(2)
            h_MD = torch.lerp(u_BD, c_BD, guidance_scale).to(h_MD.dtype)
        logits_BV: Tensor = self.model.output(h_MD)
        return logits_BV.float()


def pack(model: Transformer) -> bool:
    """Replace the linear layers by prepared ones where that changes their weights' order.

    One at a time, so that two copies of the weights never lie side by side. The model then has
    fewer keys. Returns whether there was anything to pack.
    """
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    packed = False
    for name in linear:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if can_pack(layer.weight):
            owner, _, leaf = name.rpartition(".")
            parent = model.get_submodule(owner)
            delattr(parent, leaf)  # a module; what takes its place is a plain attribute
            setattr(parent, leaf, PreparedLinear(layer.weight, None))
            packed = True
    return packed


def _normed(x: Tensor, norm: RMSNorm) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, NORM_EPS)
