"""Stand-ins of the attention packages: their signatures, PyTorch's arithmetic, a record of calls.

tests/attention_libs holds the signatures against the real packages.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastfar import _packages
from fastfar.ops import _attention
from fastfar.ops._attention_backends import AttentionRequest

# FAR-H, one image with guidance, on an H100
BASE = AttentionRequest(
    batch=2, queries=320, keys=320, heads=16, head_dim=80, dtype=torch.bfloat16, device="cuda",
    architecture=90, dropout=0.0, deterministic=False, key_padding=False, needs_gradient=False,
)  # fmt: skip


@dataclass
class Calls:
    """What the stand-ins were called with, one dictionary a call, "function" is the package."""

    made: list[dict[str, Any]] = field(default_factory=list)


calls = Calls()


def _attend(
    function: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """From and to (B, S, heads, E), as all packages have it."""
    calls.made.append({"function": function, "q": q, "k": k, "v": v, "bias": bias, **options})
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias, scale=options["scale"]
    )
    return out.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def flash_attn_2(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """flash_attn.flash_attn_func of flash-attn 2.8."""
    assert not causal and window_size == (-1, -1) and softcap == 0 and not return_attn_probs
    assert alibi_slopes is None
    options = {"dropout": dropout_p, "scale": softmax_scale, "deterministic": deterministic}
    return _attend("flash_attn_2", q, k, v, **options)


def flash_attn_3(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    """flash_attn_interface.flash_attn_func of flash-attention's folder hopper."""
    assert not causal and window_size == (-1, -1) and softcap == 0 and not return_attn_probs
    assert all(x is None for x in (qv, q_descale, k_descale, v_descale, pack_gqa))
    assert (attention_chunk, num_splits, sm_margin) == (0, 1, 0)
    options = {"dropout": 0.0, "scale": softmax_scale, "deterministic": deterministic}
    return _attend("flash_attn_3", q, k, v, **options)


def flash_attn_4(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
    deterministic=False,
):  # fmt: skip
    """flash_attn.cute.flash_attn_func of flash-attn-4: the log-sum-exp, or None, comes with it."""
    assert not causal and window_size == (None, None) and softcap == 0 and num_splits == 1
    assert all(x is None for x in (qv, gather_kv_indices, learnable_sink, pack_gqa))
    options = {"dropout": 0.0, "scale": softmax_scale, "deterministic": deterministic}
    return _attend("flash_attn_4", q, k, v, **options), None


def xformers(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    """xformers.ops.memory_efficient_attention, with what it demands of a bias."""
    assert op is None and output_dtype is None
    if attn_bias is not None:
        batch, length, heads, _ = query.shape
        assert attn_bias.shape == (batch, heads, length, key.shape[1])
        assert attn_bias.dtype == query.dtype
        alignment = 128 // torch.finfo(attn_bias.dtype).bits
        assert all(stride % alignment == 0 for stride in attn_bias.stride()[:-1])
        assert attn_bias.stride(-1) == 1
    return _attend("xformers", query, key, value, attn_bias, dropout=p, scale=scale)


# back end -> (module, function in it, stand-in)
STAND_INS = {
    "flash_attn_2": ("flash_attn", "flash_attn_func", flash_attn_2),
    "flash_attn_3": ("flash_attn_interface", "flash_attn_func", flash_attn_3),
    "flash_attn_4": ("flash_attn.cute", "flash_attn_func", flash_attn_4),
    "xformers": ("xformers.ops", "memory_efficient_attention", xformers),
}


def forget_choices() -> None:
    """What was looked up once is looked up again."""
    _packages.package_reason.cache_clear()
    _attention._chosen.cache_clear()
    _attention._announce.cache_clear()


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[Calls]:
    """The stand-ins of these back ends (all if none is named) are importable, and a GPU is there.

    The rest of the packages is not installed.
    """
    names = names or tuple(STAND_INS)
    modules: dict[str, ModuleType] = {}
    for name in names:
        path, function, stand_in = STAND_INS[name]
        for prefix in (path.split(".")[0], path):
            module = modules.setdefault(prefix, ModuleType(prefix))
            module.__spec__ = ModuleSpec(prefix, None, origin="a stand-in")
            module.__path__ = []
        setattr(modules[path], function, stand_in)
    if "flash_attn_4" in names and "flash_attn_2" not in names:
        assert modules["flash_attn"].__spec__ is not None
        modules["flash_attn"].__spec__.origin = None  # a bare folder, as that package leaves it

    def version(name: str) -> str:
        if name == "flash-attn-4" and "flash_attn_4" in names:
            return "4.0.0b36"
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        for path, *_ in STAND_INS.values():
            for prefix in (path.split(".")[0], path):
                # None: not installed, even where the real one is
                patch.setitem(sys.modules, prefix, modules.get(prefix))  # type: ignore[arg-type]
        patch.setattr(_packages, "cuda_reason", lambda: None)
        patch.setattr(_packages.importlib.metadata, "version", version)
        forget_choices()
        calls.made.clear()
        yield calls
    forget_choices()
