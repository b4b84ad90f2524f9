"""VAR's transformer: ten scales in turn, each attending to itself and to all before it.

`Transformer` has the published keys and runs as the published code does. `WellRun` computes the
same function from the same parameters: what depends on the class only is computed once per image,
keys and values lie in buffers made beforehand, linear layers are prepared, and the steps between
them can be compiled.

Letters: M rows = 2 B with guidance (conditional half first), L tokens of a scale, D width, H heads,
E width of a head (64), K keys so far.
Source: VAR, arXiv 2404.02905; the published FoundationVision/VAR, models/{var,basic_var}.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfar.baselines._linear import PreparedLinear
from fastfar.baselines.var_vae import CHANNELS, SIDES, VOCABULARY

HEAD_WIDTH = 64
LENGTHS = tuple(side * side for side in SIDES)
ENDS = tuple(sum(LENGTHS[: i + 1]) for i in range(len(SIDES)))
TOTAL = ENDS[-1]
NUM_CLASSES = 1000
EPS = 1e-6
LOG_MAX_SCALE = math.log(100)

Cache = list[Tensor]  # keys and values of one block: [] or two tensors


def modulate_published(x_MLD: Tensor, scale_M1D: Tensor, shift_M1D: Tensor) -> Tensor:
    """LN(x) scale + shift, LN without affine."""
    return F.layer_norm(x_MLD, x_MLD.shape[-1:], eps=EPS).mul(scale_M1D).add_(shift_M1D)


def modulate(x_MLD: Tensor, scale_M1D: Tensor, shift_M1D: Tensor) -> Tensor:
    """The same in one dtype, rounded once less."""
    normed_MLD = F.layer_norm(x_MLD, x_MLD.shape[-1:], eps=EPS)
    return torch.addcmul(shift_M1D, normed_MLD, scale_M1D)


class Attention(nn.Module):
    """Softmax attention on l2-normalised queries and keys, with a learned scale per head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        heads = width // HEAD_WIDTH
        self.scale_mul_1H11 = nn.Parameter(torch.empty(1, heads, 1, 1))
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def qkv_bias(self) -> Tensor:
        """(3 D): keys have no bias."""
        return torch.cat((self.q_bias, self.get_buffer("zero_k_bias"), self.v_bias))

    def scale_1H11(self) -> Tensor:
        """Factor of the normalised queries, at most 100."""
        return self.scale_mul_1H11.clamp_max(LOG_MAX_SCALE).exp()

    def forward(self, x_MLD: Tensor, cache: Cache) -> Tensor:
        """The published way: the cache grows by concatenation."""
        qkv_ML3D = F.linear(x_MLD, self.mat_qkv.weight, self.qkv_bias())
        qkv_ML3HE = qkv_ML3D.view(*x_MLD.shape[:2], 3, -1, HEAD_WIDTH)
        qkv_3MHLE = qkv_ML3HE.permute(2, 0, 3, 1, 4)
        q_MHLE, k_MHLE, v_MHLE = qkv_3MHLE.unbind(0)
        q_MHLE = F.normalize(q_MHLE, dim=-1) * self.scale_1H11()
        k_MHLE = F.normalize(k_MHLE, dim=-1)
        if cache:
            k_MHLE = torch.cat((cache[0], k_MHLE), dim=2)
            v_MHLE = torch.cat((cache[1], v_MHLE), dim=2)
        cache[:] = k_MHLE, v_MHLE
        out_MHLE = F.scaled_dot_product_attention(q_MHLE, k_MHLE, v_MHLE, scale=1.0)
        y_MLD: Tensor = self.proj(out_MHLE.transpose(1, 2).flatten(2))
        return y_MLD


class FeedForward(nn.Module):
    """fc2(gelu(fc1(x))), the tanh approximation of GELU, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_MLD: Tensor) -> Tensor:
        y_MLD: Tensor = self.fc2(F.gelu(self.fc1(x_MLD), approximate="tanh"))
        return y_MLD


def ada_lin(width: int, parts: int) -> nn.Sequential:
    """The class embedding to gates, scales and shifts."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class Block(nn.Module):
    """x += gate1 attention(modulate(x)), then x += gate2 ffn(modulate(x)); adaLN from the class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = Attention(width)
        self.ffn = FeedForward(width)
        self.ada_lin = ada_lin(width, 6)

    def modulations(self, condition_MD: Tensor) -> tuple[Tensor, ...]:
        """gate1, gate2, scale1, scale2, shift1, shift2, each (M, 1, D); scales still less 1."""
        out_MN: Tensor = self.ada_lin(condition_MD)
        return out_MN.view(len(out_MN), 1, 6, -1).unbind(2)

    def forward(self, x_MLD: Tensor, condition_MD: Tensor, cache: Cache) -> Tensor:
        """The published way: the modulations are computed anew for every scale."""
        gate1, gate2, scale1, scale2, shift1, shift2 = self.modulations(condition_MD)
        y_MLD: Tensor = self.attn(modulate_published(x_MLD, scale1 + 1, shift1), cache)
        x_MLD = x_MLD + y_MLD.mul_(gate1)
        y_MLD = self.ffn(modulate_published(x_MLD, scale2 + 1, shift2))
        return x_MLD + y_MLD.mul(gate2)


class HeadNorm(nn.Module):
    """adaLN before the classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = ada_lin(width, 2)

    def modulations(self, condition_MD: Tensor) -> tuple[Tensor, ...]:
        """scale (less 1) and shift, each (M, 1, D)."""
        out_MN: Tensor = self.ada_lin(condition_MD)
        return out_MN.view(len(out_MN), 1, 2, -1).unbind(2)

    def forward(self, x_MLD: Tensor, condition_MD: Tensor) -> Tensor:
        scale, shift = self.modulations(condition_MD)
        return modulate_published(x_MLD, scale + 1, shift)


class Transformer(nn.Module):
    """VAR of `depth` blocks; the published models are 64 * depth wide, with `depth` heads."""

    def __init__(self, depth: int, width: int | None = None) -> None:
        super().__init__()
        self.width = width = width or HEAD_WIDTH * depth
        self.pos_start = nn.Parameter(torch.empty(1, 1, width))
        self.pos_1LC = nn.Parameter(torch.empty(1, TOTAL, width))
        for key, value in training_buffers().items():
            self.register_buffer(key, torch.empty(value.shape, dtype=value.dtype))
        self.word_embed = nn.Linear(CHANNELS, width)
        self.class_emb = nn.Embedding(NUM_CLASSES + 1, width)
        self.lvl_embed = nn.Embedding(len(SIDES), width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head_nm = HeadNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def conditions(self, labels_B: Tensor) -> Tensor:
        """(M, D) class embeddings: of the labels, then as often of "no class"."""
        no_class_B = torch.full_like(labels_B, NUM_CLASSES)
        embeddings_MD: Tensor = self.class_emb(torch.cat((labels_B, no_class_B)))
        return embeddings_MD

    def positions(self) -> Tensor:
        """(1, 680, D): what is added to a token for its place and its scale."""
        levels_1L = self.get_buffer("lvl_1L")
        out_1LD: Tensor = self.lvl_embed(levels_1L) + self.pos_1LC
        return out_1LD


@functools.cache
def training_buffers() -> dict[str, Tensor]:
    """The scale of every token and the mask of training: in the published files, unused here."""
    with torch.device("cpu"):
        scale_L = torch.repeat_interleave(torch.arange(len(SIDES)), torch.tensor(LENGTHS))
        allowed_LL = scale_L[:, None] >= scale_L[None, :]
        mask_LL = torch.zeros(TOTAL, TOTAL).masked_fill_(~allowed_LL, -math.inf)
    return {"lvl_1L": scale_L[None], "attn_bias_for_masking": mask_LL[None, None]}


class Published:
    """The published way to run the transformer: eager, as its code is written."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def start(self, labels_B: Tensor) -> Tensor:
        """(M, 1, D): the first token, the class; forgets what the caches held."""
        model = self.model
        self.condition_MD = condition_MD = model.conditions(labels_B)
        self.caches: list[Cache] = [[] for _ in model.blocks]
        self.positions_1LD = model.positions()
        return condition_MD.unsqueeze(1) + model.pos_start + self.positions_1LD[:, :1]

    def embed(self, tokens_BLC: Tensor, scale: int) -> Tensor:
        """(M, L, D): the feature map of the former scales, for both halves."""
        places_1LD = self.positions_1LD[:, ENDS[scale - 1] : ENDS[scale]]
        tokens_BLD: Tensor = self.model.word_embed(tokens_BLC)
        return (tokens_BLD + places_1LD).repeat(2, 1, 1)

    def blocks(self, x_MLD: Tensor, scale: int) -> Tensor:
        """All blocks on the tokens of a scale."""
        for block, cache in zip(self.model.blocks, self.caches, strict=True):
            x_MLD = block(x_MLD, self.condition_MD, cache)
        return x_MLD

    def logits(self, x_MLD: Tensor) -> Tensor:
        """(M, L, V) float32."""
        h_MLD = self.model.head_nm(x_MLD.float(), self.condition_MD)
        logits_MLV: Tensor = self.model.head(h_MLD.float()).float()
        return logits_MLV


@dataclass
class _Prepared:
    """A block's parameters as `WellRun` uses them."""

    qkv: PreparedLinear
    proj: PreparedLinear
    fc1: PreparedLinear
    fc2: PreparedLinear
    scale_H1: Tensor  # float32


def _normalised(qkv_ML3HE: Tensor, scale_H1: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of length `scale` and 1, (M, L, H, E); computed in float32."""
    q_MLHE = F.normalize(qkv_ML3HE[:, :, 0].float(), dim=-1) * scale_H1
    k_MLHE = F.normalize(qkv_ML3HE[:, :, 1].float(), dim=-1)
    return q_MLHE.to(qkv_ML3HE.dtype), k_MLHE.to(qkv_ML3HE.dtype)


def _added(
    x_MLD: Tensor, y_MLD: Tensor, gate_M1D: Tensor, scale_M1D: Tensor, shift_M1D: Tensor
) -> tuple[Tensor, Tensor]:
    """x + gate y, and that modulated for the layer that follows."""
    x_MLD = torch.addcmul(x_MLD, y_MLD, gate_M1D)
    return x_MLD, modulate(x_MLD, scale_M1D, shift_M1D)


class WellRun:
    """The same function, weights and activations in one dtype.

    Args:
        model: emptied of the parameters that are prepared, one block after the other.
        compile: torch.compile what lies between the linear layers. That is little work on a CPU,
            but most of the launches on a GPU.
    """

    def __init__(self, model: Transformer, compile: bool) -> None:
        self.model = model
        self.dtype, self.device = model.head.weight.dtype, model.head.weight.device
        self.heads = model.width // HEAD_WIDTH
        self.positions_1LD = model.positions()
        self._blocks = [block for block in model.blocks if isinstance(block, Block)]
        self.layers = [_prepare(block) for block in self._blocks]
        self.classify = PreparedLinear(model.head.weight, model.head.bias)
        self.normalised: Callable[..., tuple[Tensor, Tensor]] = _normalised
        self.added: Callable[..., tuple[Tensor, Tensor]] = _added
        if compile:
            self.normalised = torch.compile(_normalised, dynamic=True)
            self.added = torch.compile(_added, dynamic=True)
        self._caches = torch.empty(0)

    def reserve(self, rows: int) -> bool:
        """Have buffers of keys and values for M = `rows`; True if they had to be made anew."""
        shape = (len(self.layers), 2, rows, self.heads, TOTAL, HEAD_WIDTH)
        if self._caches.shape == shape:
            return False
        self._caches = torch.empty(shape, dtype=self.dtype, device=self.device)
        return True

    def start(self, labels_B: Tensor) -> Tensor:
        """As `Published.start`; also computes all modulations of the image."""
        model, rows = self.model, 2 * len(labels_B)
        condition_MD = model.conditions(labels_B)
        self.modulations = []
        for block in self._blocks:
            gate1, gate2, scale1, scale2, shift1, shift2 = block.modulations(condition_MD)
            self.modulations.append((gate1, gate2, scale1 + 1, shift1, scale2 + 1, shift2))
        scale, shift = model.head_nm.modulations(condition_MD)
        self.last = scale + 1, shift
        self.reserve(rows)
        return condition_MD.unsqueeze(1) + model.pos_start + self.positions_1LD[:, :1]

    def embed(self, tokens_BLC: Tensor, scale: int) -> Tensor:
        """As `Published.embed`."""
        places_1LD = self.positions_1LD[:, ENDS[scale - 1] : ENDS[scale]]
        tokens_BLD: Tensor = self.model.word_embed(tokens_BLC.to(self.dtype))
        return (tokens_BLD + places_1LD).repeat(2, 1, 1)

    def blocks(self, x_MLD: Tensor, scale: int) -> Tensor:
        """All blocks, and the adaLN before the classifier."""
        end = ENDS[scale]
        start = end - LENGTHS[scale]
        after = [(scale1, shift1) for _, _, scale1, shift1, _, _ in self.modulations]
        after.append(self.last)
        h_MLD = modulate(x_MLD, *after[0])
        for i, layer in enumerate(self.layers):
            gate1, gate2, _, _, scale2, shift2 = self.modulations[i]
            keys_MHKE, values_MHKE = self._caches[i, :, :, :, :end].unbind(0)
            qkv_ML3HE = layer.qkv(h_MLD).view(*x_MLD.shape[:2], 3, -1, HEAD_WIDTH)
            q_MLHE, k_MLHE = self.normalised(qkv_ML3HE, layer.scale_H1)
            keys_MHKE[:, :, start:].copy_(k_MLHE.transpose(1, 2))
            values_MHKE[:, :, start:].copy_(qkv_ML3HE[:, :, 2].transpose(1, 2))
            out_MHLE = F.scaled_dot_product_attention(
                q_MLHE.transpose(1, 2), keys_MHKE, values_MHKE, scale=1.0
            )
            y_MLD = layer.proj(out_MHLE.transpose(1, 2).flatten(2))
            x_MLD, h_MLD = self.added(x_MLD, y_MLD, gate1, scale2, shift2)
            x_MLD, h_MLD = self.added(x_MLD, layer.fc2(layer.fc1(h_MLD)), gate2, *after[i + 1])
        return h_MLD

    def logits(self, h_MLD: Tensor) -> Tensor:
        """(M, L, V) float32."""
        return self.classify(h_MLD).float()


def _prepare(block: Block) -> _Prepared:
    """The block's layers prepared; packed weights take the place of its parameters."""
    attention, ffn = block.attn, block.ffn
    weight = attention.mat_qkv.weight
    prepared = _Prepared(
        qkv=PreparedLinear(weight, attention.qkv_bias().to(weight.dtype)),
        proj=PreparedLinear(attention.proj.weight, attention.proj.bias),
        fc1=PreparedLinear(ffn.fc1.weight, ffn.fc1.bias, gelu=True),
        fc2=PreparedLinear(ffn.fc2.weight, ffn.fc2.bias),
        scale_H1=attention.scale_1H11().float().flatten(0, 2),
    )
    del block.attn, block.ffn
    return prepared
