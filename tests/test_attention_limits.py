"""What each back end of attention takes, and what it says of the rest."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_packages import BASE, STAND_INS

from fastfar import backend
from fastfar.ops._attention import REGISTRY

TRAINING = {"needs_gradient": True}


def test_the_registry_is_what_the_backend_knows() -> None:
    assert {name: each.package for name, each in REGISTRY.items()} == backend.ATTENTIONS
    assert all(each.name == name for name, each in REGISTRY.items())
    assert set(STAND_INS) == {name for name, each in REGISTRY.items() if each.package}


@pytest.mark.parametrize("name", REGISTRY)
def test_every_one_samples_far_on_an_h100(name: str) -> None:
    assert REGISTRY[name].supports(BASE) is None
    assert REGISTRY[name].supports(replace(BASE, head_dim=64, dtype=torch.float16)) is None


def test_who_trains_far_on_an_h100() -> None:
    """With its dropout of 0.1; FlashAttention 3 and 4 have none, cuDNN's is a multiple of 1/16."""
    training = replace(BASE, dropout=0.1, needs_gradient=True)
    cannot = {name for name, each in REGISTRY.items() if each.supports(training) is not None}
    assert cannot == {"sdpa_cudnn", "flash_attn_3", "flash_attn_4"}


NVIDIA = ("sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "flash_attn_2", "flash_attn_3",
          "flash_attn_4", "xformers")  # fmt: skip
FLASH = ("flash_attn_2", "flash_attn_3", "flash_attn_4")
REFUSED: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (NVIDIA, {"architecture": 942}, "for NVIDIA GPUs, this one is AMD's; use sdpa"),
    (NVIDIA[1:], {"device": "cpu", "architecture": 0}, "NVIDIA GPUs, the tensors are on cpu; use"),
    (("sdpa_flash", "sdpa_cudnn", "flash_attn_2"), {"architecture": 75}, "8.0 to 12.1, .* 7.5"),
    (("flash_attn_3",), {"architecture": 80}, r"compute capability 9.0, this GPU has 8.0; use"),
    (("flash_attn_3",), {"architecture": 100}, r"compute capability 9.0, this GPU has 10.0; use"),
    (("flash_attn_4",), {"architecture": 80}, "9.0 to 12.1, this GPU has 8.0; use sdpa"),
    (("sdpa_efficient", "xformers"), {"architecture": 37}, "5.0 to 12.1, this GPU has 3.7"),
    (("sdpa_flash", "sdpa_cudnn", *FLASH), {"dtype": torch.float32}, "not float32; compute in"),
    (("sdpa_efficient", "xformers"), {"dtype": torch.float64}, "not float64; use sdpa"),
    (("sdpa_efficient", "xformers"), {"architecture": 75}, "not bfloat16; use sdpa"),
    (("sdpa_flash", *FLASH[:2]), {"head_dim": 264}, "up to 256 wide.* these have 264; use sdpa"),
    (("sdpa_cudnn",), {"head_dim": 136}, "up to 128 wide in steps of 8, these have 136; use sdpa"),
    (("sdpa_cudnn", "sdpa_efficient", *FLASH, "xformers"), {"head_dim": 20}, "steps of 8, .* 20"),
    (("sdpa_efficient", "xformers"), {"head_dim": 18, "dtype": torch.float32}, "steps of 4, .* 18"),
    (("flash_attn_4",), {"head_dim": 136, "architecture": 100}, "up to 128 wide .* 136"),
    (("sdpa_flash",), {"key_padding": True}, "no mask on a GPU; use sdpa_efficient"),
    (FLASH, {"key_padding": True}, "lengths on the host, a synchronisation; use sdpa_efficient"),
    (("xformers",), {"key_padding": True, "architecture": 100}, "ends at compute capability 9.0"),
    (("xformers",), {"dtype": torch.float32, "architecture": 120}, "masks, float32 .* use sdpa_ef"),
    (FLASH[1:], {"dropout": 0.1}, "no dropout, 0.1 was asked for; use sdpa_flash or flash_attn_2"),
    (("sdpa_cudnn",), {"dropout": 0.1}, "a multiple of 1/16, not 0.1; use sdpa_flash"),
    (("sdpa_cudnn",), {"queries": 1, "keys": 1}, "two positions or more; use sdpa_flash"),
    (("sdpa_cudnn",), {"deterministic": True}, "not deterministic; use sdpa_flash or sdpa_eff"),
    (("xformers",), {**TRAINING, "deterministic": True}, "not always deterministic; use sdpa_fl"),
    (("flash_attn_3",), {**TRAINING, "deterministic": True, "head_dim": 136}, "heads 128 wide; us"),
    (("flash_attn_4",), {**TRAINING, "deterministic": True, "architecture": 120}, "no determinist"),
    (("sdpa_flash", "flash_attn_2"), {**TRAINING, "head_dim": 200, "architecture": 89},
     "no backward for heads 200 wide on this GPU; use sdpa_efficient"),
    (("sdpa_flash", "flash_attn_2"), {**TRAINING, "head_dim": 256, "architecture": 120,
     "dropout": 0.5}, "no backward for heads 256 wide"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "changes", "reason"), REFUSED, ids=str)
def test_a_reason_says_what_and_what_to_do(
    names: tuple[str, ...], changes: dict[str, Any], reason: str
) -> None:
    for name in names:
        given = REGISTRY[name].supports(replace(BASE, **changes))
        assert given is not None and re.search(reason, given), (name, given)
        assert "; use " in given or "; compute in" in given
    if "device" not in changes:  # the two that fit everything
        assert REGISTRY["sdpa"].supports(replace(BASE, **changes)) is None
        assert REGISTRY["sdpa_math"].supports(replace(BASE, **changes)) is None


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sdpa_cudnn", {"dropout": 0.125, **TRAINING}),
        ("sdpa_cudnn", {"key_padding": True}),
        ("sdpa_efficient", {"key_padding": True, "dropout": 0.1, "architecture": 120}),
        ("sdpa_efficient", {"dtype": torch.float16, "architecture": 70}),
        ("sdpa_flash", {"deterministic": True, "dropout": 0.1, **TRAINING}),
        ("sdpa_flash", {"head_dim": 20}),
        ("sdpa_flash", {"head_dim": 256, "architecture": 89, **TRAINING}),
        ("flash_attn_2", {"deterministic": True, "dropout": 0.1, **TRAINING}),
        ("flash_attn_3", {"deterministic": True, "head_dim": 128, **TRAINING}),
        ("flash_attn_4", {"deterministic": True, "architecture": 100, **TRAINING}),
        ("flash_attn_4", {"head_dim": 256, "architecture": 100}),
        ("flash_attn_4", {"head_dim": 256}),
        ("xformers", {"key_padding": True, "dropout": 0.1, **TRAINING}),
        ("xformers", {"dtype": torch.float32, "architecture": 80}),
        ("xformers", {"deterministic": True}),
    ],
    ids=str,
)
def test_what_lies_within_the_limits(name: str, changes: dict[str, Any]) -> None:
    assert REGISTRY[name].supports(replace(BASE, **changes)) is None
