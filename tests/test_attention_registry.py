"""Which back end of attention serves what, how it is called, and what is said where none can."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_packages import BASE, STAND_INS, Calls, forget_choices, installed
from tolerances import relative
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastfar import _packages, backend, reference
from fastfar.backend import described_gpu
from fastfar.cli import main
from fastfar.config import FARConfig
from fastfar.model import FAR
from fastfar.ops import _attention, attention, layernorm_attention_residual, use_backend
from fastfar.ops._attention import REGISTRY, choose
from fastfar.ops._attention_backends import AttentionRequest
from fastfar.plan import SamplingPlan
from fastfar.prepared import prepare_native
from fastfar.sampling import sample_latents

CPU = replace(BASE, device="cpu", architecture=0, dtype=torch.float32)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FASTFAR_ATTENTION", raising=False)
    forget_choices()
    yield
    forget_choices()


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    with installed(monkeypatch) as calls:
        yield calls


def qkv_on_the_cpu(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 13, 3, 4, 8, dtype=dtype)


# --- the choice --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        BASE,
        replace(BASE, dropout=0.1, needs_gradient=True),
        replace(BASE, key_padding=True),
        replace(BASE, dtype=torch.float32),
        replace(BASE, architecture=70),
        replace(BASE, architecture=942),
        CPU,
        replace(CPU, device="meta"),
    ],
    ids=str,
)
def test_auto_takes_everything(request_: AttentionRequest) -> None:
    chosen, why = choose("auto", "", request_)
    assert (chosen.name, why) == ("sdpa", "auto") and chosen.supports(request_) is None


def test_a_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fastfar")
    for length in (5, 6, 5):
        attention(torch.randn(1, length, 3, 2, 4))
    assert [each.message for each in caplog.records] == ["attention sdpa on cpu (auto)"]
    for _ in range(2):
        attention(torch.randn(1, 5, 3, 2, 4), implementation="sdpa_math")
    assert caplog.messages[1:] == ["attention sdpa_math on cpu (attention)"]


def test_what_cannot_be_served_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    message = (
        r"attention='sdpa_cudnn' cannot be used: it runs on NVIDIA GPUs, the tensors are on cpu; "
        r"use sdpa. For this call: auto, sdpa, sdpa_flash, sdpa_math$"
    )
    with pytest.raises(ValueError, match=message):
        attention(qkv_on_the_cpu(), implementation="sdpa_cudnn")
    with pytest.raises(ValueError, match=r"attention='fast' is not known; allowed: auto, sdpa, "):
        attention(qkv_on_the_cpu(), implementation="fast")
    with pytest.raises(ValueError, match=r"'sdpa_flash' cannot be used: it has no dropout on the"):
        attention(qkv_on_the_cpu(), dropout=0.1, implementation="sdpa_flash")
    monkeypatch.setenv("FASTFAR_ATTENTION", "sdpa_efficient")
    with pytest.raises(ValueError, match=r"FASTFAR_ATTENTION='sdpa_efficient' cannot be used: it "):
        attention(qkv_on_the_cpu())


def test_the_variable_is_beaten_by_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("sdpa", "sdpa_math", "sdpa_flash"):
        spied = replace(REGISTRY[name], run=lambda qkv, *_, name=name: called.append(name))
        monkeypatch.setitem(REGISTRY, name, spied)
    attention(qkv_on_the_cpu())
    monkeypatch.setenv("FASTFAR_ATTENTION", "sdpa_math")
    attention(qkv_on_the_cpu())
    attention(qkv_on_the_cpu(), implementation="sdpa_flash")
    assert called == ["sdpa", "sdpa_math", "sdpa_flash"]
    monkeypatch.setenv("FASTFAR_ATTENTION", "flash")
    with pytest.raises(ValueError, match="FASTFAR_ATTENTION=flash is not known; allowed: auto, sd"):
        attention(qkv_on_the_cpu())


# --- packages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", STAND_INS)
def test_packages_get_views(name: str, deterministic: bool, packages: Calls) -> None:
    qkv = qkv_on_the_cpu()
    out = REGISTRY[name].run(qkv, None, 0.0, deterministic)
    assert relative(out, reference.attention(qkv)) < 1e-6
    (call,) = packages.made
    assert call["function"] == name and call["scale"] is None and call["dropout"] == 0
    assert call.get("deterministic", deterministic) == deterministic
    for index, part in enumerate("qkv"):
        assert call[part].shape == (2, 13, 4, 8) and call[part].stride() == (1248, 96, 8, 1)
        assert call[part].data_ptr() == qkv[:, :, index].data_ptr(), "a copy"


@pytest.mark.parametrize("name", ["flash_attn_2", "xformers"])
def test_dropout_reaches_the_package(name: str, packages: Calls) -> None:
    REGISTRY[name].run(qkv_on_the_cpu(), None, 0.25, False)
    assert packages.made[0]["dropout"] == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("length", "heads"), [(13, 4), (13, 1), (1, 4), (16, 2)])
def test_key_padding_is_an_aligned_bias_of_xformers(
    length: int, heads: int, dtype: torch.dtype, packages: Calls
) -> None:
    qkv, mask = torch.randn(2, length, 3, heads, 8, dtype=dtype), torch.rand(2, length) < 0.5
    mask[:, 0] = True
    out = REGISTRY["xformers"].run(qkv, mask, 0.0, False)
    assert relative(out, reference.attention(qkv.double(), mask)) < (1e-6, 1e-3)[dtype.itemsize < 4]
    bias = packages.made[0]["bias"]
    stored = 2 * (8 if length == 1 else 16)
    assert bias.untyped_storage().nbytes() == stored * dtype.itemsize, "not B S numbers"
    assert torch.equal(bias[:, -1, -1] == 0, mask)
    assert torch.isneginf(bias[:, 0, 0][~mask]).all()


@pytest.mark.parametrize("name", STAND_INS)
def test_the_op_reaches_the_package_on_a_gpu(
    name: str, packages: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On fake tensors of an H100, deterministic where PyTorch is."""
    with described_gpu(90), FakeTensorMode():
        qkv = torch.empty(2, 320, 3, 16, 80, dtype=torch.bfloat16, device="cuda")
        out = attention(qkv, implementation=name)
        assert out.shape == (2, 320, 1280) and out.dtype == qkv.dtype and out.device == qkv.device
        attention(qkv)
        assert len(packages.made) == 1, "auto takes PyTorch's own"
        monkeypatch.setenv("FASTFAR_ATTENTION", name)
        torch.use_deterministic_algorithms(True)
        try:
            attention(qkv)
        finally:
            torch.use_deterministic_algorithms(False)
    assert [call.get("deterministic", True) for call in packages.made] == [name == "xformers", True]
    storage = packages.made[0]["q"].untyped_storage()._cdata
    assert storage == packages.made[0]["v"].untyped_storage()._cdata == qkv.untyped_storage()._cdata


@pytest.mark.parametrize("name", STAND_INS)
def test_a_package_that_is_not_there(name: str) -> None:
    reason = backend.attention_reason(name)
    if reason is None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(ValueError, match=re.escape(f"cannot be used: {reason}. Use auto or sdpa")):
        backend.require_attention(name)


def test_flash_attn_2_and_4_share_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(monkeypatch, "flash_attn_4"):
        assert backend.attention_reason("flash_attn_4") is None
        assert "not installed; pip install" in str(backend.attention_reason("flash_attn_2"))
    with installed(monkeypatch, "flash_attn_2"):
        assert backend.attention_reason("flash_attn_2") is None
        reason = str(backend.attention_reason("flash_attn_4"))
        assert "not installed; pip install 'fastfar[flash4]'" in reason
    with installed(monkeypatch):
        assert all(backend.attention_reason(name) is None for name in STAND_INS)


def test_a_package_without_its_function_or_broken_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(monkeypatch), monkeypatch.context() as patch:
        patch.delattr("flash_attn_interface.flash_attn_func")
        assert "has no flash_attn_func; build" in str(backend.attention_reason("flash_attn_3"))

        def broken(name: str) -> ModuleType:
            raise OSError(f"{name}: undefined symbol in flash_attn")

        patch.setattr(_packages.importlib, "import_module", broken)
        assert "OSError: flash_attn: undef" in str(backend.attention_reason("flash_attn_2"))
        assert "takes the folder of flash-attn 4" in str(backend.attention_reason("xformers"))
        patch.setattr(_packages, "cuda_reason", lambda: "no CUDA device")
        _packages.package_reason.cache_clear()
        assert backend.attention_reason("xformers") == "no CUDA device"


# --- the model ---------------------------------------------------------------------------------


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often sdpa_math ran since it was asked last."""
    made: list[int] = []
    run = REGISTRY["sdpa_math"].run
    spied = replace(REGISTRY["sdpa_math"], run=lambda *args: made.append(1) or run(*args))
    monkeypatch.setitem(REGISTRY, "sdpa_math", spied)

    def counted() -> int:
        number = len(made)
        made.clear()
        return number

    return counted


def test_set_attention_backend(tiny_model: FAR, count: Callable[[], int]) -> None:
    config = tiny_model.config
    tokens = torch.randn(2, config.num_tokens, config.token_dim)
    inputs = (tokens, tiny_model.class_embedding(torch.tensor([0, 1])))
    before = tiny_model(*inputs)
    assert count() == 0 and tiny_model.attention_backend == "auto"
    assert tiny_model.set_attention_backend("sdpa_math") is tiny_model
    assert relative(tiny_model(*inputs), before) < 1e-6 and count() == 3
    assert copy.deepcopy(tiny_model)(*inputs).shape == before.shape and count() == 3
    tiny_model.set_attention_backend("auto")(*inputs)
    assert count() == 0
    with pytest.raises(ValueError, match="attention='flash' is not known; allowed: auto, sdpa, sd"):
        tiny_model.set_attention_backend("flash")
    if backend.attention_reason("xformers") is not None:
        with pytest.raises(ValueError, match=r"attention='xformers' cannot be used: .* Use auto"):
            tiny_model.set_attention_backend("xformers")
    assert tiny_model.attention_backend == "auto", "a refused one changes nothing"


def test_sampling_keeps_it_and_notices_a_change(
    tiny_model: FAR, count: Callable[[], int], tiny_plan: SamplingPlan
) -> None:
    def sample() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "backend": "torch"}
        return sample_latents(tiny_model, [1], tiny_plan, dtype=torch.float64, **options)

    before = sample()  # by a copy in float64, which is kept
    tiny_model.set_attention_backend("sdpa_math")
    assert count() == 0
    assert relative(sample(), before) < 1e-10 and count() > 0


@pytest.fixture
def tiny_plan() -> SamplingPlan:
    return SamplingPlan.official("nomask", diffusion_steps=2)


@pytest.mark.usefixtures("library")
def test_by_name_pytorch_computes_it_on_the_native_back_end(
    tiny_model: FAR, count: Callable[[], int]
) -> None:
    qkv = qkv_on_the_cpu()
    with use_backend("native"):
        own = attention(qkv)
        assert count() == 0
        assert relative(attention(qkv, implementation="sdpa_math"), own) < 1e-5 and count() == 1
        block = dict(tiny_model.encoder_blocks[0].named_parameters())
        weights = list(block.values())[:6]
        x_BSD = torch.randn(2, 5, tiny_model.config.width)
        with torch.no_grad():
            own = layernorm_attention_residual(x_BSD, *weights, num_heads=3)
            assert count() == 0
            other = layernorm_attention_residual(
                x_BSD, *weights, num_heads=3, attention="sdpa_math"
            )
        assert relative(other, own) < 1e-5 and count() == 1


@pytest.mark.usefixtures("library")
def test_a_packed_model_keeps_it(tiny_config: FARConfig, count: Callable[[], int]) -> None:
    model = FAR(replace(tiny_config, head_width=16)).eval()
    tokens = torch.randn(1, tiny_config.num_tokens, tiny_config.token_dim)
    inputs = (tokens, model.class_embedding(torch.tensor([0])))
    own = prepare_native(model, torch.float32)(*inputs)
    assert count() == 0
    packed = prepare_native(model.set_attention_backend("sdpa_math"), torch.float32)
    assert relative(packed(*inputs), own) < 1e-5 and count() == 3


# --- doctor ------------------------------------------------------------------------------------


def test_doctor_shows_every_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["attention"]
    assert set(report["backends"]) == set(REGISTRY) and report["backends"]["sdpa"] is None
    if not torch.cuda.is_available():
        assert report["auto"]["sampling"] == {"name": "sdpa", "why": "auto"}
        assert "NVIDIA GPUs" in report["backends"]["sdpa_cudnn"]
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*REGISTRY, "auto, sampling", "auto, training"))


def test_the_report_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "best_dtype", lambda *_: torch.bfloat16)
    with installed(monkeypatch, "flash_attn_2"), described_gpu(80):
        report = _attention.report("cuda")
    assert report["auto"]["sampling"] == {"name": "sdpa", "why": "auto"}
    usable = {name for name, reason in report["backends"].items() if reason is None}
    assert usable == {each for each in REGISTRY if each.startswith("sdpa")} | {"flash_attn_2"}
    assert "9.0" in report["backends"]["flash_attn_3"]
    assert "not installed" in report["backends"]["xformers"]
