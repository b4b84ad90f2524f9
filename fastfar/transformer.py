"""The transformer block of FAR and MAR, a pre-norm ViT block.

The modules are drop-ins for timm's: names, constructor arguments and parameter names are its own,
as far as FAR and MAR use them.

Source: timm's `vision_transformer.Block`; FAR, arXiv 2503.05305, section 3.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fastfar.backend import require_attention, require_package
from fastfar.ops import attention as attend
from fastfar.ops import linear, transformer_block
from fastfar.ops._module import OpModule

NORMS = ("torch", "apex")


class Attention(nn.Module):
    """Parameters of self-attention."""

    def __init__(self, dim: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)


class Mlp(nn.Module):
    """Parameters of the feed-forward half."""

    def __init__(self, in_features: int, hidden_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, in_features)


class Block(OpModule):
    """x + attention(LN(x)), then x + MLP(LN(x)), with the exact GELU.

    `attn` and `mlp` hold parameters only: the block is one op.

    Args:
        dim: D, width of x.
        num_heads: divides D.
        mlp_ratio: hidden width of the MLP over D.
        qkv_bias: whether queries, keys and values have a bias (in FAR and MAR they do).
        proj_drop, attn_drop: dropout after the linear layers and on the attention weights, in
            training; the fused op has one probability for both.
        norm_layer: makes a LayerNorm with affine of a width; its eps counts. FAR and MAR take
            functools.partial(nn.LayerNorm, eps=1e-6).
        norm: "torch", or "apex" for apex.normalization.FusedLayerNorm, in a block that is not
            fused otherwise.
        attention: "auto" or a back end of `backend.ATTENTIONS`, such as "flash_attn_2".
        backend: see `fastfar.nn`.

    Raises:
        ValueError: heads do not divide D; the two dropouts differ; norm_layer makes something
            else; an option is not known or cannot be served here.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        *,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        norm: str = "torch",
        attention: str = "auto",
        backend: str | None = "auto",
    ) -> None:
        super().__init__(backend)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got {num_heads} heads for {dim}")
        if proj_drop != attn_drop:
            raise ValueError(
                f"proj_drop and attn_drop must be equal, got {proj_drop} and {attn_drop}: the "
                "fused block has one probability of dropout"
            )
        require_attention(attention)
        self.num_heads = num_heads
        self.dropout = proj_drop
        self.attention = attention
        self.norm = norm
        self.norm1 = _norm(norm, norm_layer, dim)
        self.attn = Attention(dim, qkv_bias)
        self.norm2 = _norm(norm, norm_layer, dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """x: (B, S, D). key_mask: (B, S) bool, True where a key takes part. Returns (B, S, D)."""
        dropout = self.dropout if self.training else 0.0
        with self.on_backend(x):
            if self.norm == "apex":
                return self._with_norm_modules(x, key_mask, dropout)
            return transformer_block(
                x,
                self.norm1.weight,
                self.norm1.bias,
                self.attn.qkv.weight,
                self._qkv_bias(x),
                self.attn.proj.weight,
                self.attn.proj.bias,
                self.norm2.weight,
                self.norm2.bias,
                self.mlp.fc1.weight,
                self.mlp.fc1.bias,
                self.mlp.fc2.weight,
                self.mlp.fc2.bias,
                key_mask,
                num_heads=self.num_heads,
                eps=self.norm1.eps,
                dropout=dropout,
                attention=self.attention,
            )

    def _qkv_bias(self, x: Tensor) -> Tensor:
        bias = self.attn.qkv.bias
        return x.new_zeros(3 * x.shape[-1]) if bias is None else bias

    def _with_norm_modules(self, x: Tensor, key_mask: Tensor | None, dropout: float) -> Tensor:
        """The same with norm1 and norm2 called as modules."""
        batch, length, width = x.shape
        qkv = linear(self.norm1(x), self.attn.qkv.weight, self._qkv_bias(x))
        qkv_BS3HE = qkv.view(batch, length, 3, self.num_heads, width // self.num_heads)
        out = attend(qkv_BS3HE, key_mask, dropout=dropout, implementation=self.attention)
        out = linear(out, self.attn.proj.weight, self.attn.proj.bias)
        x = x + F.dropout(out, dropout)
        out = linear(self.norm2(x), self.mlp.fc1.weight, self.mlp.fc1.bias)
        out = linear(F.dropout(F.gelu(out), dropout), self.mlp.fc2.weight, self.mlp.fc2.bias)
        return x + F.dropout(out, dropout)


def _norm(kind: str, norm_layer: Callable[[int], nn.Module], dim: int) -> nn.LayerNorm:
    """The LayerNorm that norm_layer makes, or apex's with its eps."""
    if kind not in NORMS:
        raise ValueError(f"norm={kind!r} is not known; allowed: {', '.join(NORMS)}")
    made = norm_layer(dim)
    eps = getattr(made, "eps", None)
    vectors = [getattr(made, name, None) for name in ("weight", "bias")]
    if eps is None or any(v is None or tuple(v.shape) != (dim,) for v in vectors):
        raise ValueError(f"norm_layer must make a LayerNorm with weight and bias, made {made}")
    if kind == "torch":
        return made  # type: ignore[return-value]
    require_package("apex", "norm")
    fused: nn.LayerNorm = importlib.import_module("apex.normalization").FusedLayerNorm(dim, eps=eps)
    return fused
