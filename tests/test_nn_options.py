"""fastfar.nn: options, back ends, activation checkpointing, the worked example."""

from __future__ import annotations

import importlib.util
import inspect
import re
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from nn_cases import CASES, ROWS, WIDTH, build, norm, value_and_gradients
from stand_in_apex import apex as apex
from tolerances import relative
from torch import Tensor, nn

import fastfar.nn
from fastfar import backend
from fastfar._native import NativeLibrary
from fastfar.model import FAR
from fastfar.nn import Block, ResBlock
from fastfar.ops import use_backend

ROOT = Path(__file__).resolve().parents[1]


# --- the transformer block -------------------------------------------------------------------


def block(**options: Any) -> Block:
    return Block(WIDTH, 2, 2.0, **{"qkv_bias": True, "norm_layer": norm, **options})


def test_the_same_without_a_bias_of_qkv() -> None:
    plain, biased = block(qkv_bias=False), block()
    state = {**plain.state_dict(), "attn.qkv.bias": torch.zeros(3 * WIDTH)}
    biased.load_state_dict(state)
    x = torch.randn(2, ROWS, WIDTH)
    assert torch.equal(plain(x), biased(x))


def test_eps_is_that_of_the_norm_layer() -> None:
    x = 1e-3 * torch.randn(2, ROWS, WIDTH)
    small, large = block(), block(norm_layer=partial(nn.LayerNorm, eps=1e-1))
    large.load_state_dict(small.state_dict())
    assert relative(large(x), small(x)) > 0.1
    stock = Block(WIDTH, 2)
    assert stock.norm1.eps == 1e-5 and stock.attn.qkv.bias is None  # timm's defaults


def test_dropout_in_training_only() -> None:
    module, x = block(proj_drop=0.5, attn_drop=0.5), torch.randn(2, ROWS, WIDTH)
    plain = block()
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module.eval()(x), plain(x))
    assert not torch.equal(module.train()(x), plain(x))


def test_a_back_end_of_attention() -> None:
    module, x = block(), torch.randn(2, ROWS, WIDTH)
    other = block(attention="sdpa_math")
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(x), module(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide dim, got 3 heads for 8"),
        ({"proj_drop": 0.1}, r"must be equal, got 0\.1 and 0\.0"),
        ({"norm_layer": partial(nn.LayerNorm, elementwise_affine=False)}, "weight and bias"),
        ({"norm_layer": nn.Identity}, "must make a LayerNorm"),
        ({"norm": "rms"}, "norm='rms' is not known; allowed: torch, apex"),
        ({"norm": "apex"}, "norm='apex' cannot be used: .*Use norm='torch'"),
        ({"attention": "flex"}, "attention='flex' is not known"),
        ({"attention": "xformers"}, "attention='xformers' cannot be used"),
    ],
)
def test_wrong_blocks(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Block(WIDTH, **{"num_heads": 2, **options})


def test_apex_norms(apex: ModuleType) -> None:
    fused, plain = block(norm="apex"), block()
    assert type(fused.norm1).__name__ == type(fused.norm2).__name__ == "FusedLayerNorm"
    assert fused.norm1.eps == 1e-6
    plain.load_state_dict(fused.state_dict())
    x, key_mask = torch.randn(2, ROWS, WIDTH), torch.rand(2, ROWS) < 0.7
    torch.testing.assert_close(fused(x, key_mask), plain(x, key_mask))
    assert fused.norm1.calls == fused.norm2.calls == 1


# --- back ends -------------------------------------------------------------------------------


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Back ends on which the op of ResBlock runs, call by call."""
    operation, calls = fastfar.head.adaln_mlp_block, []
    for name, function in dict(operation.implementations).items():

        def run(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setitem(operation.implementations, name, run)
    return calls


def res_block(**options: Any) -> Tensor:
    out: Tensor = ResBlock(WIDTH, **options)(torch.randn(2, WIDTH), torch.randn(2, WIDTH))
    return out


def test_which_back_end(monkeypatch: pytest.MonkeyPatch, library: NativeLibrary) -> None:
    calls = calls_of(monkeypatch)
    res_block()
    res_block(backend="native")
    with use_backend("native"):
        res_block()  # its own choice
        res_block(backend=None)  # the caller's
    monkeypatch.setenv("FASTFAR_BACKEND", "native")
    res_block()
    res_block(backend="torch")
    assert calls == ["torch", "native", "torch", "native", "native", "torch"]
    monkeypatch.delenv("FASTFAR_BACKEND")
    monkeypatch.setattr(backend, "_cuda_reason", lambda: "no CUDA device")
    assert backend.by_device() == {"cuda": "torch", "": "torch"}
    monkeypatch.setattr(backend, "_cuda_reason", lambda: None)
    triton = backend.backends()["triton"] is None
    assert backend.by_device()["cuda"] == ("triton" if triton else "torch")


@pytest.mark.parametrize("name", CASES)
def test_back_ends_that_cannot_be(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = CASES[name][0]
    with pytest.raises(ValueError, match="backend='cuda' is not known; allowed: auto"):
        make(backend="cuda")
    with pytest.raises(ValueError, match="'reference' cannot be used"):
        make(backend="reference")
    monkeypatch.setattr(
        backend, "backends", lambda: {"torch": None, "native": None, "triton": "no CUDA device"}
    )
    with pytest.raises(ValueError, match="'triton' cannot be used: no CUDA device"):
        make(backend="triton")
    module, inputs = make(backend="native").to("meta"), build(name, torch.float32)[1]
    with pytest.raises(ValueError, match="runs on cpu, the input is on meta"):
        module(**{key: x.to("meta") for key, x in inputs.items()})


# --- activation checkpointing ----------------------------------------------------------------


def forwards(module: nn.Module, kind: type[nn.Module]) -> list[int]:
    """One entry for each forward of the modules of a kind, from now on."""
    calls: list[int] = []
    for each in module.modules():
        if isinstance(each, kind):
            each.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("backend_name", ["torch", "native"])
def test_a_head_with_checkpointing(backend_name: str, library: NativeLibrary) -> None:
    module, inputs = build("SimpleMLPAdaLN", torch.float32, backend=backend_name)
    expected = value_and_gradients(module, module, inputs)
    same, _ = build(
        "SimpleMLPAdaLN", torch.float32, backend=backend_name, grad_checkpointing=True
    )
    calls = forwards(same, ResBlock)
    for one, other in zip(value_and_gradients(same, same, inputs), expected, strict=True):
        assert torch.equal(one, other)
    assert len(calls) == 4  # two blocks, twice
    with torch.no_grad():
        same(**inputs)
    assert len(calls) == 6


def gradients(model: FAR, autocast: bool) -> list[Tensor]:
    """Of a training step with dropout and masks; the random numbers repeat."""
    torch.manual_seed(1)
    config = model.config
    tokens = torch.randn(2, config.num_tokens, config.token_dim)
    mask = torch.rand(2, config.num_tokens) < 0.5
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z = model(tokens, model.class_embedding(torch.tensor([1, 2])), mask).flatten(0, 1)
        rows = torch.arange(len(z))
        out = model.head(tokens.flatten(0, 1), rows, z, rows % 3)
    model.zero_grad()
    out.square().mean().backward()
    return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend_name", ["torch", "native"])
def test_a_model_with_checkpointing(
    backend_name: str, autocast: bool, tiny_model: FAR, library: NativeLibrary
) -> None:
    model = tiny_model.train()
    with use_backend(backend_name):
        expected = gradients(model, autocast)
        model.set_grad_checkpointing()
        calls = forwards(model, Block)
        found = gradients(model, autocast)
    assert len(calls) == 2 * 3
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    model.set_grad_checkpointing(False)
    gradients(model, autocast)
    assert len(calls) == 9


# --- the worked example ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = ROOT / "examples" / "replace_modules.py"
    spec = importlib.util.spec_from_file_location("replace_modules", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_has_equal_losses(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    stock, fused = example.main(["--steps", "3", "--device", "cpu"])
    assert len(stock) == 3 and len(set(stock)) == 3
    assert stock == pytest.approx(fused, rel=1e-5)
    assert "largest difference" in capsys.readouterr().out


def test_state_dicts_load_both_ways(example: ModuleType) -> None:
    stock, fused = example.Model(), example.Model()
    example.replace_modules(fused)
    fused.load_state_dict(stock.state_dict())
    stock.load_state_dict(fused.state_dict())
    assert isinstance(fused.blocks[1], Block) and not isinstance(stock.blocks[1], Block)


def code(text: str) -> list[str]:
    """Its lines of code, without names that differ from program to program."""
    lines = [line.strip() for line in textwrap.dedent(text).splitlines()]
    return [re.sub(r"\(.*\)", "(...)", line) for line in lines if line]


def test_the_ten_lines_of_the_documentation(example: ModuleType) -> None:
    documented = re.search(r"training loop.*?:\n\n(.*?)\n\nMAR", fastfar.nn.__doc__ or "", re.S)
    assert documented is not None
    function: Callable[..., Any] = example.replace_modules
    _, _, body = inspect.getsource(function).partition('parameters are new."""')
    assert code(documented[1]) == code(body) and len(code(body)) == 9
