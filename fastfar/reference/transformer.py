"""The encoder-decoder (FAR, arXiv 2503.05305; as MAR): tokens to one condition vector each."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

LAYERNORM_EPS = 1e-6


def attention(qkv_BS3HE: Tensor, key_mask_BS: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(E)) v, every position attends to every position (with a True key mask).

    qkv_BS3HE: float (B, S, 3, H, E). key_mask_BS: bool, or None for all True. Returns (B, S, H *
    E), head after head.
    """
    q_BHSE, k_BHSE, v_BHSE = qkv_BS3HE.permute(2, 0, 3, 1, 4).unbind(0)
    score_BHSS = q_BHSE @ k_BHSE.transpose(-1, -2) / math.sqrt(q_BHSE.shape[-1])
    if key_mask_BS is not None:
        score_BHSS = score_BHSS.masked_fill(~key_mask_BS[:, None, None], -math.inf)
    out_BHSE = torch.softmax(score_BHSS, dim=-1) @ v_BHSE
    return out_BHSE.transpose(1, 2).flatten(2)


def layernorm_attention_residual(
    x_BSD: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    key_mask_BS: Tensor | None = None,
    *,
    num_heads: int,
    eps: float = LAYERNORM_EPS,
) -> Tensor:
    """x + proj(attention(qkv(LN(x)))): the first half of a pre-norm ViT block.

    x_BSD: float. qkv_weight: (3 D, D), rows q then k then v. proj_weight: (D, D). key_mask_BS: see
    `attention`. Returns (B, S, D).
    """
    batch, length, width = x_BSD.shape
    h_BSD = F.layer_norm(x_BSD, (width,), norm_weight, norm_bias, eps)
    qkv = F.linear(h_BSD, qkv_weight, qkv_bias)
    qkv_BS3HE = qkv.reshape(batch, length, 3, num_heads, width // num_heads)
    return x_BSD + F.linear(attention(qkv_BS3HE, key_mask_BS), proj_weight, proj_bias)


def layernorm_linear(
    x_BSD: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = LAYERNORM_EPS,
) -> Tensor:
    """linear(LN(x)): what lies between the encoder and the decoder.

    x_BSD: float. weight: (N, D). Returns (B, S, N).
    """
    h_BSD = F.layer_norm(x_BSD, x_BSD.shape[-1:], norm_weight, norm_bias, eps)
    return F.linear(h_BSD, weight, bias)


def layernorm_mlp_residual(
    x_BSD: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    eps: float = LAYERNORM_EPS,
) -> Tensor:
    """x + fc2(gelu(fc1(LN(x)))) with the exact (erf) GELU: the second half of a pre-norm ViT block.

    x_BSD: float. fc1_weight: (M, D). fc2_weight: (D, M). Returns (B, S, D).
    """
    h_BSD = F.layer_norm(x_BSD, x_BSD.shape[-1:], norm_weight, norm_bias, eps)
    hidden = F.gelu(F.linear(h_BSD, fc1_weight, fc1_bias), approximate="none")
    return x_BSD + F.linear(hidden, fc2_weight, fc2_bias)


def residual_layernorm(
    x_ND: Tensor,
    update_ND: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float = LAYERNORM_EPS,
) -> tuple[Tensor, Tensor]:
    """s = x + update and LN(s): what lies between the halves of two blocks.

    x_ND: float (..., D). update_ND: the same shape, or None for s = x. norm_weight, norm_bias: None
    for a LayerNorm without affine. Returns both, of the shape of x.
    """
    sum_ND = x_ND if update_ND is None else x_ND + update_ND
    return sum_ND, F.layer_norm(sum_ND, sum_ND.shape[-1:], norm_weight, norm_bias, eps)


def transformer_block(
    x_BSD: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    key_mask_BS: Tensor | None = None,
    *,
    num_heads: int,
    eps: float = LAYERNORM_EPS,
) -> Tensor:
    """Both halves of a pre-norm ViT block.

    x_BSD: float. Weights and mask: see `layernorm_attention_residual` and `layernorm_mlp_residual`.
    Returns (B, S, D).
    """
    first = (norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, key_mask_BS)
    y_BSD = layernorm_attention_residual(x_BSD, *first, num_heads=num_heads, eps=eps)
    second = (norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return layernorm_mlp_residual(y_BSD, *second, eps=eps)


def _blocks(x_BSD: Tensor, params: Mapping[str, Tensor], stack: str, num_heads: int) -> Tensor:
    """All blocks `stack.0`, `stack.1`, ... in turn."""
    index = 0
    while f"{stack}.{index}.norm1.weight" in params:
        prefix = f"{stack}.{index}"

        def pair(name: str, prefix: str = prefix) -> tuple[Tensor, Tensor]:
            return params[f"{prefix}.{name}.weight"], params[f"{prefix}.{name}.bias"]

        names = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        pairs = [each for name in names for each in pair(name)]
        x_BSD = transformer_block(x_BSD, *pairs, num_heads=num_heads)
        index += 1
    return x_BSD


def _layer_norm(x_BSD: Tensor, params: Mapping[str, Tensor], name: str) -> Tensor:
    weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
    return F.layer_norm(x_BSD, x_BSD.shape[-1:], weight, bias, LAYERNORM_EPS)


def class_embedding(params: Mapping[str, Tensor], labels_B: Tensor) -> Tensor:
    """(B, D): the row of the class table, or `fake_latent` for the label -1 (no class)."""
    table = params["class_emb.weight"]
    embedding_BD = table[labels_B.clamp(min=0)]
    return torch.where((labels_B < 0).unsqueeze(-1), params["fake_latent"], embedding_BD)


def condition(
    params: Mapping[str, Tensor],
    tokens_BLP: Tensor,
    mask_BL: Tensor | None,
    class_embedding_BD: Tensor,
    *,
    num_heads: int,
) -> Tensor:
    """z = decoder(encoder(kept tokens)) + position: one condition vector per token, masked or not.

    params: published keys. tokens_BLP: float, low-passed (values at masked tokens do not matter).
    mask_BL: 1 (or True) = masked, the same count in every image; None = nothing masked.
    class_embedding_BD: fills all buffer positions. Returns z_BLD.
    Raises ValueError where the images keep different numbers of tokens.
    """
    batch, length, _ = tokens_BLP.shape
    width = class_embedding_BD.shape[-1]
    buffer_size = params["encoder_pos_embed_learned"].shape[1] - length
    if mask_BL is None:
        mask_BL = torch.zeros(batch, length, dtype=torch.bool, device=tokens_BLP.device)
    keep_BL = ~mask_BL.bool()
    kept = keep_BL.sum(dim=1)
    if bool((kept != kept[0]).any()):
        raise ValueError(f"kept tokens per image are {kept.tolist()}: mask the same number in all")
    keep_BS = torch.cat([keep_BL.new_ones(batch, buffer_size), keep_BL], dim=1)

    # Encoder: buffer positions hold the class; masked tokens are dropped after the first norm.
    x_BLD = F.linear(tokens_BLP, params["z_proj.weight"], params["z_proj.bias"])
    buffer = class_embedding_BD.unsqueeze(1).expand(batch, buffer_size, width)
    x_BSD = torch.cat([buffer, x_BLD], dim=1) + params["encoder_pos_embed_learned"]
    x_BSD = _layer_norm(x_BSD, params, "z_proj_ln")
    x_BSD = x_BSD[keep_BS].reshape(batch, -1, width)
    x_BSD = _blocks(x_BSD, params, "encoder_blocks", num_heads)
    x_BSD = _layer_norm(x_BSD, params, "encoder_norm")

    # Decoder: masked positions come back as the mask token.
    x_BSD = F.linear(x_BSD, params["decoder_embed.weight"], params["decoder_embed.bias"])
    full_BSD = params["mask_token"].to(x_BSD.dtype).repeat(batch, buffer_size + length, 1)
    full_BSD[keep_BS] = x_BSD.reshape(-1, width)
    x_BSD = full_BSD + params["decoder_pos_embed_learned"]
    x_BSD = _blocks(x_BSD, params, "decoder_blocks", num_heads)
    x_BSD = _layer_norm(x_BSD, params, "decoder_norm")
    return x_BSD[:, buffer_size:] + params["diffusion_pos_embed_learned"]
