"""The back ends of attention: what each one takes, why not the rest, and how it is called.

All of them get views of the same (B, S, 3, heads, E) tensor, never copies. PyTorch's functions want
the heads before the positions, the packages the other way round; both are strides.

Sources of the limits: PyTorch's sdp_utils.cpp, flash-attn 2.8.3 and its hopper/ (3), flash-attn-4
4.0.0b36, xformers 0.0.35; `make test-attention-libs` holds them against the real packages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HALF = (torch.float16, torch.bfloat16)
AMD = 900  # architectures from here on are AMD's


@dataclass(frozen=True)
class AttentionRequest:
    """What a back end is asked to compute.

    architecture: 10 major + minor of the GPU, 0 on a CPU. deterministic: PyTorch's switch, which
    matters to gradients only. key_padding: a mask says which keys of each image take part.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: str
    architecture: int
    dropout: float
    deterministic: bool
    key_padding: bool
    needs_gradient: bool


Run = Callable[[Tensor, Tensor | None, float, bool], Tensor]


@dataclass(frozen=True)
class AttentionBackend:
    """One implementation.

    package: what it needs, a key of `backend.optional_packages()`; None needs PyTorch only.
    supports: why a request cannot be served and what to do instead; None if it can.
    run: (qkv_BS3HE, key_mask_BS, dropout, deterministic) -> (B, S, heads * E).
    """

    name: str
    package: str | None
    supports: Callable[[AttentionRequest], str | None]
    run: Run


# --- limits that several back ends have --------------------------------------------------------


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _nvidia(r: AttentionRequest, low: int, high: int) -> str | None:
    """low, high: architectures, the latter included."""
    if r.device != "cuda":
        return f"it runs on NVIDIA GPUs, the tensors are on {r.device}; use sdpa"
    if r.architecture >= AMD:
        return "it is for NVIDIA GPUs, this one is AMD's; use sdpa"
    if not low <= r.architecture <= high:
        span = f"{low / 10}" if low == high else f"{low / 10} to {high / 10}"
        return f"it needs compute capability {span}, this GPU has {r.architecture / 10}; use sdpa"
    return None


def _half(r: AttentionRequest) -> str | None:
    if r.dtype in HALF:
        return None
    return f"it takes float16 and bfloat16, not {_name(r.dtype)}; compute in these or use sdpa"


def _width(r: AttentionRequest, widest: int, multiple: int) -> str | None:
    if r.head_dim <= widest and r.head_dim % multiple == 0:
        return None
    steps = f" in steps of {multiple}" if multiple > 1 else ""
    return f"it takes heads up to {widest} wide{steps}, these have {r.head_dim}; use sdpa"


def _no_key_padding(r: AttentionRequest, because: str) -> str | None:
    if not r.key_padding:
        return None
    return f"{because}; use sdpa_efficient, or keep the same number of tokens in every image"


def _no_dropout(r: AttentionRequest) -> str | None:
    if r.dropout == 0:
        return None
    return f"it has no dropout, {r.dropout} was asked for; use sdpa_flash or flash_attn_2 to train"


def _wide_gradient(r: AttentionRequest) -> str | None:
    """The backward of FlashAttention 2 on GPUs with little shared memory."""
    small = 86 <= r.architecture <= 89 or 120 <= r.architecture <= 121
    if not (r.needs_gradient and small) or r.head_dim <= 192:
        return None
    if r.head_dim > 224 and r.dropout == 0:
        return None
    return f"it has no backward for heads {r.head_dim} wide on this GPU; use sdpa_efficient"


# --- PyTorch -----------------------------------------------------------------------------------


def _anything(r: AttentionRequest) -> str | None:
    return None


def _supports_sdpa_flash(r: AttentionRequest) -> str | None:
    if r.device == "cpu":
        if r.dropout > 0:
            return "it has no dropout on the CPU; use sdpa"
        return None
    return (
        _nvidia(r, 80, 121)
        or _half(r)
        or _width(r, 256, 1)
        or _no_key_padding(r, "it takes no mask on a GPU")
        or _wide_gradient(r)
    )


def _supports_sdpa_cudnn(r: AttentionRequest) -> str | None:
    reason = _nvidia(r, 80, 121) or _half(r) or _width(r, 128, 8)
    if reason is not None:
        return reason
    if r.deterministic:
        return "it is not deterministic; use sdpa_flash or sdpa_efficient"
    if (16 * r.dropout) % 1 != 0:
        return f"its dropout is a multiple of 1/16, not {r.dropout}; use sdpa_flash"
    if r.queries == 1 or r.keys == 1:
        return "it needs two positions or more; use sdpa_flash"
    return None


def _supports_sdpa_efficient(r: AttentionRequest) -> str | None:
    if reason := _nvidia(r, 50, 121):
        return reason
    if r.dtype not in (*HALF, torch.float32) or (r.dtype == torch.bfloat16 and r.architecture < 80):
        return (
            "it takes float16, float32, and from compute capability 8.0 on bfloat16, not "
            f"{_name(r.dtype)}; use sdpa"
        )
    return _width(r, 65536, 8 if r.dtype in HALF else 4)


def _views(qkv_BS3HE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as (B, heads, S, E)."""
    q, k, v = qkv_BS3HE.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _sdpa(
    qkv_BS3HE: Tensor, key_mask_BS: Tensor | None, dropout: float, deterministic: bool
) -> Tensor:
    q, k, v = _views(qkv_BS3HE)
    mask = None if key_mask_BS is None else key_mask_BS[:, None, None, :]
    if q.requires_grad and q.device.type == "cpu":
        out_BHSE = _attention_for_backward(q, k, v, mask, dropout)
    else:
        out_BHSE = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return out_BHSE.transpose(1, 2).flatten(2)


def _attention_for_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """The formula spelt out: PyTorch's CPU flash backward takes a multiple of this at S < 600."""
    scores_BHSS = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores_BHSS = scores_BHSS.masked_fill(~mask, float("-inf"))
    weights_BHSS = F.dropout(scores_BHSS.softmax(dim=-1), dropout)
    return weights_BHSS.to(v.dtype) @ v


def _sdpa_with(kernel: SDPBackend) -> Run:
    """scaled_dot_product_attention held to one kernel: it raises rather than take another."""

    def run(
        qkv_BS3HE: Tensor, key_mask_BS: Tensor | None, dropout: float, deterministic: bool
    ) -> Tensor:
        q, k, v = _views(qkv_BS3HE)
        mask = None if key_mask_BS is None else key_mask_BS[:, None, None, :]
        with sdpa_kernel(kernel):
            out_BHSE = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return out_BHSE.transpose(1, 2).flatten(2)

    return run


# --- packages ----------------------------------------------------------------------------------


def _supports_flash_attn_2(r: AttentionRequest) -> str | None:
    return (
        _nvidia(r, 80, 121)
        or _half(r)
        or _width(r, 256, 8)
        or _no_key_padding(r, "its packed form needs the lengths on the host, a synchronisation")
        or _wide_gradient(r)
    )


def _flash_attn_2(
    qkv_BS3HE: Tensor, key_mask_BS: Tensor | None, dropout: float, deterministic: bool
) -> Tensor:
    from flash_attn import flash_attn_func

    q, k, v = qkv_BS3HE.unbind(2)
    out_BSHE: Tensor = flash_attn_func(q, k, v, dropout_p=dropout, deterministic=deterministic)
    return out_BSHE.flatten(2)


def _supports_flash_attn_3(r: AttentionRequest) -> str | None:
    reason = (
        _nvidia(r, 90, 90)
        or _half(r)
        or _width(r, 256, 8)
        or _no_dropout(r)
        or _no_key_padding(r, "its packed form needs the lengths on the host, a synchronisation")
    )
    if reason is None and r.deterministic and r.needs_gradient and r.head_dim > 128:
        return "its deterministic backward ends at heads 128 wide; use sdpa_flash"
    return reason


def _flash_attn_3(
    qkv_BS3HE: Tensor, key_mask_BS: Tensor | None, dropout: float, deterministic: bool
) -> Tensor:
    from flash_attn_interface import flash_attn_func

    q, k, v = qkv_BS3HE.unbind(2)
    out = flash_attn_func(q, k, v, deterministic=deterministic)
    out_BSHE: Tensor = out[0] if isinstance(out, tuple) else out  # 3.0 betas add the log-sum-exp
    return out_BSHE.flatten(2)


def _supports_flash_attn_4(r: AttentionRequest) -> str | None:
    reason = (
        _nvidia(r, 90, 121)
        or _half(r)
        or _no_dropout(r)
        or _no_key_padding(r, "its packed form needs the lengths on the host, a synchronisation")
    )
    if reason is not None:
        return reason
    if r.architecture >= 120 and r.deterministic and r.needs_gradient:
        return "it has no deterministic backward on this GPU; use sdpa_flash"
    if 100 <= r.architecture < 120 and r.head_dim == 256:
        return None
    return _width(r, 256 if r.architecture == 90 else 128, 8)


def _flash_attn_4(
    qkv_BS3HE: Tensor, key_mask_BS: Tensor | None, dropout: float, deterministic: bool
) -> Tensor:
    from flash_attn.cute import flash_attn_func

    q, k, v = qkv_BS3HE.unbind(2)
    out = flash_attn_func(q, k, v, deterministic=deterministic)
    out_BSHE: Tensor = out[0] if isinstance(out, tuple) else out  # with the log-sum-exp or None
    return out_BSHE.flatten(2)


def _supports_xformers(r: AttentionRequest) -> str | None:
    """It has two kernels: flash (half precision, no mask), and CUTLASS up to capability 9.0."""
    if reason := _supports_sdpa_efficient(r):
        return reason
    if r.deterministic and r.needs_gradient:
        return "its backward is not always deterministic; use sdpa_flash or sdpa_efficient"
    if r.architecture > 90 and (r.key_padding or r.dtype not in HALF or r.head_dim > 256):
        return (
            "its kernel for masks, float32 and heads over 256 wide ends at compute capability 9.0; "
            "use sdpa_efficient"
        )
    return None


def _xformers(
    qkv_BS3HE: Tensor, key_mask_BS: Tensor | None, dropout: float, deterministic: bool
) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v = qkv_BS3HE.unbind(2)
    bias = None if key_mask_BS is None else _bias(key_mask_BS, q)
    out_BSHE: Tensor = memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout)
    return out_BSHE.flatten(2)


def _bias(key_mask_BS: Tensor, q_BSHE: Tensor) -> Tensor:
    """(B, heads, S, S): 0 where a key takes part, else -inf.

    Only B S numbers are stored: rows are repeated over heads and queries by strides of 0, and lie
    in longer ones, since the kernel wants all strides but the last to be multiples of 16 bytes.
    (`expand` would give a stride of S or 1 to a single head or query.)
    """
    (batch, keys), (_, queries, heads, _) = key_mask_BS.shape, q_BSHE.shape
    row = (keys + 7) // 8 * 8
    bias_BS = q_BSHE.new_zeros(batch, row)[:, :keys]
    bias_BS.masked_fill_(~key_mask_BS, float("-inf"))
    return bias_BS.as_strided((batch, heads, queries, keys), (row, 0, 0, 1))


BACKENDS = (
    AttentionBackend("sdpa", None, _anything, _sdpa),
    AttentionBackend(
        "sdpa_flash", None, _supports_sdpa_flash, _sdpa_with(SDPBackend.FLASH_ATTENTION)
    ),
    AttentionBackend(
        "sdpa_cudnn", None, _supports_sdpa_cudnn, _sdpa_with(SDPBackend.CUDNN_ATTENTION)
    ),
    AttentionBackend(
        "sdpa_efficient", None, _supports_sdpa_efficient, _sdpa_with(SDPBackend.EFFICIENT_ATTENTION)
    ),
    AttentionBackend("sdpa_math", None, _anything, _sdpa_with(SDPBackend.MATH)),
    AttentionBackend("flash_attn_2", "flash_attn", _supports_flash_attn_2, _flash_attn_2),
    AttentionBackend("flash_attn_3", "flash_attn_3", _supports_flash_attn_3, _flash_attn_3),
    AttentionBackend("flash_attn_4", "flash_attn_4", _supports_flash_attn_4, _flash_attn_4),
    AttentionBackend("xformers", "xformers", _supports_xformers, _xformers),
)
