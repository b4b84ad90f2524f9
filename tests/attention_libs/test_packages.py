"""The real attention packages, without a GPU: `make test-attention-libs`, not part of `make test`.

Import or the reason why not; the signatures that the stand-ins have; our limits against theirs;
FlashAttention 4 compiled for sm_90 by a call of the op. Numbers come out on a GPU only:
`make test-gpu`.
"""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_packages import BASE, STAND_INS, forget_choices
from torch._subclasses.fake_tensor import FakeTensorMode

from fastfar import _packages
from fastfar.backend import ATTENTIONS, described_gpu
from fastfar.ops import attention
from fastfar.ops._attention import REGISTRY
from fastfar.ops._attention_backends import HALF, _bias


@pytest.fixture(autouse=True)
def as_if_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_packages, "cuda_reason", lambda: None)
    forget_choices()
    yield
    forget_choices()


@pytest.fixture(scope="module")
def cute(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModuleType, Path]]:
    """flash_attn.cute.interface, set to compile for an H100, and the folder of what it makes."""
    made = tmp_path_factory.mktemp("flash_attn_4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASH_ATTENTION_ARCH", "sm_90")  # which kernels
        patch.setenv("FLASH_ATTENTION_NUM_SMS", "132")
        patch.setenv("CUTE_DSL_ARCH", "sm_90a")  # for which target
        patch.setenv("CUTE_DSL_KEEP_PTX", "1")
        patch.setenv("CUTE_DSL_KEEP_CUBIN", "1")
        patch.setenv("CUTE_DSL_DUMP_DIR", str(made))
        yield importlib.import_module("flash_attn.cute.interface"), made


@pytest.fixture(scope="module")
def fmha() -> ModuleType:
    """xformers.ops.fmha, imported as if no flash_attn were there: it takes version 4 for 2."""
    with pytest.MonkeyPatch.context() as patch:
        if "xformers.ops" not in sys.modules:
            hidden = [name for name in sys.modules if name.split(".")[0] == "flash_attn"]
            for name in hidden:
                patch.delitem(sys.modules, name)
            patch.setitem(sys.modules, "flash_attn", None)  # type: ignore[arg-type]
        return importlib.import_module("xformers.ops.fmha")


@pytest.mark.parametrize("name", STAND_INS)
def test_signature(name: str, request: pytest.FixtureRequest) -> None:
    """The stand-in has the real parameters, in order, with their defaults."""
    if name in ("flash_attn_4", "xformers"):
        request.getfixturevalue("cute" if name == "flash_attn_4" else "fmha")
    if (reason := _packages.package_reason(str(ATTENTIONS[name]))) is not None:
        pytest.skip(reason)
    path, function, stand_in = STAND_INS[name]
    real = inspect.signature(getattr(importlib.import_module(path), function)).parameters
    ours = inspect.signature(stand_in).parameters
    shape = [(each.name, each.kind, each.default) for each in ours.values()]
    assert shape == [(each.name, each.kind, each.default) for each in real.values()][: len(shape)]


def test_xformers_beside_flash_attn_4_alone_says_why_it_is_off() -> None:
    if _packages.package_reason("flash_attn") is None:
        pytest.skip("flash-attn 2 is installed too")
    code = (
        "from fastfar import _packages; _packages.cuda_reason = lambda: None;"
        "print(_packages.package_reason('xformers'))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert "flash-attn 4 for flash-attn 2: install that too" in done.stdout, done.stderr


# --- flash-attn-4 ------------------------------------------------------------------------------


def accepts(check: Callable[..., object], *args: Any) -> bool:
    try:
        check(*args)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("architecture", [90, 100])
def test_head_widths_of_flash_attn_4(
    architecture: int, cute: tuple[ModuleType, Path]
) -> None:
    for width in range(4, 300, 4):
        request = replace(BASE, architecture=architecture, head_dim=width)
        ours = REGISTRY["flash_attn_4"].supports(request) is None
        assert ours == accepts(cute[0]._validate_head_dims, width, width, architecture // 10, 8)


def test_flash_attn_4_compiles_the_forward_for_sm_90(cute: tuple[ModuleType, Path]) -> None:
    with described_gpu(90), FakeTensorMode():
        qkv = torch.empty(2, 320, 3, 16, 80, dtype=torch.bfloat16, device="cuda")
        out = attention(qkv, implementation="flash_attn_4")
        assert out.shape == (2, 320, 1280) and out.dtype == qkv.dtype
    assert_made(cute[1], "*flash_fwd_sm90*")


def test_flash_attn_4_compiles_the_backward_for_sm_90(cute: tuple[ModuleType, Path]) -> None:
    """By its own function: autograd has no fake CUDA tensors in a PyTorch without CUDA.

    Not the deterministic one: its semaphores are real tensors on the device.
    """
    with FakeTensorMode():
        qkv = torch.empty(2, 320, 3, 16, 80, dtype=torch.bfloat16, device="cuda")
        out = torch.empty(2, 320, 16, 80, dtype=torch.bfloat16, device="cuda")
        lse = torch.empty(2, 16, 320, device="cuda")
        gradients = cute[0]._flash_attn_bwd(*qkv.unbind(2), out, torch.empty_like(out), lse)
        assert [each.shape for each in gradients[:3]] == [out.shape] * 3
    assert_made(cute[1], "*flash_bwd_sm90*")


def assert_made(folder: Path, pattern: str) -> None:
    """Machine code for sm_90a, by way of warp-group products."""
    (ptx,) = folder.glob(pattern + ".ptx")
    text = ptx.read_text(encoding="utf-8")
    assert ".target sm_90a" in text and "wgmma.mma_async" in text
    (cubin,) = folder.glob(pattern + ".cubin")
    assert cubin.read_bytes()[:4] == b"\x7fELF"


# --- xformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("length", [1, 13, 320])
def test_our_bias_is_one_that_xformers_takes(
    length: int, heads: int, dtype: torch.dtype, fmha: ModuleType
) -> None:
    qkv = torch.randn(3, length, 3, heads, 8, dtype=dtype)
    q, k, v = qkv.unbind(2)
    bias = _bias(torch.rand(3, length) < 0.5, q)
    fmha.Inputs(query=q, key=k, value=v, attn_bias=bias).validate_inputs()
    reasons: list[str] = []
    fmha.cutlass._check_bias_alignment(reasons, bias)
    assert reasons == []


def test_the_limits_of_xformers(fmha: ModuleType) -> None:
    flash, cutlass = fmha.flash.FwOp, fmha.cutlass.FwOp
    assert set(HALF) == flash.SUPPORTED_DTYPES and flash.SUPPORTED_MAX_K == 256
    assert flash.CUDA_MINIMUM_COMPUTE_CAPABILITY == (8, 0) and flash.SUPPORTS_DROPOUT
    assert torch.Tensor not in flash.SUPPORTED_ATTN_BIAS_TYPES
    assert {torch.float32, *HALF} == cutlass.SUPPORTED_DTYPES and cutlass.SUPPORTS_DROPOUT
    assert cutlass.CUDA_MAXIMUM_COMPUTE_CAPABILITY == (9, 0)
    assert torch.Tensor in cutlass.SUPPORTED_ATTN_BIAS_TYPES
    assert not fmha.flash.BwOp.IS_DETERMINISTIC
    on_the_cpu = torch.randn(1, 8, 2, 8)
    with pytest.raises(NotImplementedError, match="device=cpu"):
        fmha.memory_efficient_attention(on_the_cpu, on_the_cpu, on_the_cpu)
