"""fastfar.nn: drop-in for the published modules, right on every back end, and differentiable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import interpreter
import pytest
import torch
from formula import fill_by_formula
from nn_cases import (
    CASES,
    CONDITION,
    ROWS,
    TOKEN,
    WIDTH,
    assert_right,
    build,
    leaves,
    value_and_gradients,
)
from tolerances import relative
from torch import Tensor

from fastfar import reference
from fastfar._native import NativeLibrary
from fastfar._weights import skeleton
from fastfar.nn import Block, DiffLoss, FilterMaskPatchify, ResBlock, SimpleMLPAdaLN

MANIFESTS = Path(__file__).parent / "manifests"
each_module = pytest.mark.parametrize("name", CASES)


# --- values and gradients --------------------------------------------------------------------


@each_module
def test_pytorch(name: str) -> None:
    assert_right(name, torch.float64, 1e-10)
    assert_right(name, torch.float32, 2e-5, backend="torch")


@each_module
def test_native(name: str, library: NativeLibrary) -> None:
    assert_right(name, torch.float32, 2e-5, backend="native")


@each_module
def test_triton(name: str) -> None:
    interpreter.need()
    assert_right(name, torch.float32, 2e-5, backend="triton")
    if name in ("Block", "DiffLoss"):  # they hold most of the others
        assert_right(name, torch.float16, 2e-2, backend="triton")


@pytest.mark.parametrize("backend_name", ["torch", "native"])
@each_module
def test_autocast(name: str, backend_name: str, library: NativeLibrary) -> None:
    """bfloat16 products, float32 parameters and gradients of them."""
    module, inputs = build(name, torch.float32, backend=backend_name)
    expected = value_and_gradients(module, module, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(module, module, inputs)
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 0.05
    assert all(x.dtype is torch.float32 for x in found[1:])


@pytest.mark.parametrize("name", [name for name in CASES if name != "DiffLoss"])
def test_gradcheck(name: str) -> None:
    """Not of the loss: its variational bound is made of a detached eps, by design."""
    module, inputs = build(name, torch.float64)
    wanted = leaves(module, inputs)
    assert torch.autograd.gradcheck(lambda *_: module(**inputs), wanted, fast_mode=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [("Block", {}), ("DiffLoss", {"grad_checkpointing": True}), ("FilterMaskPatchify", {})],
    ids=str,
)
def test_compiled_in_one_graph(name: str, options: dict[str, Any]) -> None:
    """DiffLoss holds the other modules. What inductor makes of them, the tests of FAR show."""
    torch.compiler.reset()
    module, inputs = build(name, torch.float32, **options)
    expected = value_and_gradients(module, module, inputs)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for one, other in zip(value_and_gradients(compiled, module, inputs), expected, strict=True):
        assert relative(one, other) < 1e-5


@each_module
def test_any_leading_dimensions_and_an_empty_batch(name: str) -> None:
    module, inputs = build(name, torch.float32)
    if name in ("ResBlock", "FinalLayer"):
        wide = module(**{key: x.view(1, ROWS, WIDTH) for key, x in inputs.items()})
        assert torch.equal(wide[0], module(**inputs))
    if name != "DiffLoss":  # the mean of no rows is not a number, as in PyTorch
        assert len(module(**{key: x[:0] for key, x in inputs.items()})) == 0


# --- parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["far_base", "mar_base"])
def test_parameters_are_the_published_ones(model: str) -> None:
    manifest = json.loads((MANIFESTS / f"{model}.json").read_text())
    with skeleton():
        modules = {
            "diffloss.": DiffLoss(16, 768, 6, 1024, "100", level_input=model == "far_base"),
            "diffloss.net.": SimpleMLPAdaLN(16, 1024, 32, 768, 6, level_input=model == "far_base"),
            "diffloss.net.res_blocks.5.": ResBlock(1024),
            "encoder_blocks.11.": Block(768, 12, 4.0, qkv_bias=True),
        }
    for prefix, module in modules.items():
        shapes = {key: list(value.shape) for key, value in module.state_dict().items()}
        length = len(prefix)
        expected = {k[length:]: v for k, v in manifest.items() if k.startswith(prefix)}
        assert shapes == expected and shapes, prefix
    assert not FilterMaskPatchify().state_dict()


def test_a_new_head_predicts_nothing() -> None:
    """Zero gates and output, as published; the other layers are not zero."""
    module = SimpleMLPAdaLN(TOKEN, WIDTH, 2 * TOKEN, CONDITION, 2)
    x, t, c = torch.randn(ROWS, TOKEN), torch.arange(ROWS), torch.randn(ROWS, CONDITION)
    assert not module(x, t, c).any()
    assert all(layer.weight.any() for layer in (module.input_proj, module.cond_embed))


# --- head ------------------------------------------------------------------------------------


def test_levels() -> None:
    module, inputs = build("SimpleMLPAdaLN", torch.float64)
    flat = module(**{**inputs, "index": inputs["index"].flatten().half()})
    assert torch.equal(flat, module(**inputs))
    without = SimpleMLPAdaLN(TOKEN, WIDTH, 2 * TOKEN, CONDITION, 2, level_input=False).double()
    state = {k: v for k, v in module.state_dict().items() if not k.startswith("index_cond_embed")}
    without.load_state_dict(state)
    inputs.pop("index")
    assert torch.equal(without(**inputs), module(**inputs))
    with pytest.raises(ValueError, match="no level input"):
        without(**inputs, index=torch.zeros(ROWS))
    with pytest.raises(ValueError, match=r"5 rows, got shape \(1,\)"):
        module(**inputs, index=torch.zeros(1))


def test_guidance() -> None:
    """Both halves see the first one's x and get the mixed eps; the variance stays their own."""
    module, inputs = build("SimpleMLPAdaLN", torch.float64)
    inputs = {key: x[:4] for key, x in inputs.items()}
    x, scale = inputs.pop("x"), 3.0
    out = module.forward_with_cfg(x, cfg_scale=scale, **inputs)
    plain = module(torch.cat([x[:2], x[:2]]), **inputs)
    (eps_c, eps_u), variance = plain[:, :TOKEN].chunk(2), plain[:, TOKEN:]
    mixed = eps_u + scale * (eps_c - eps_u)
    torch.testing.assert_close(out, torch.cat([torch.cat([mixed, mixed]), variance], dim=1))


# --- loss and sampling -----------------------------------------------------------------------


def test_the_loss_draws_as_the_published_one() -> None:
    module, inputs = build("DiffLoss", torch.float32)
    target, z, index = (inputs[key] for key in ("target", "z", "index"))
    torch.manual_seed(3)
    loss = module(target, z, index)
    torch.manual_seed(3)
    timestep = torch.randint(0, 1000, (ROWS,))
    expected = module(target, z, index, timestep=timestep, noise=torch.randn(ROWS, TOKEN))
    assert torch.equal(loss, expected)


def test_masks_and_weights_of_the_loss() -> None:
    module, inputs = build("DiffLoss", torch.float64)
    mask, weight = inputs.pop("mask"), inputs.pop("loss_weight")
    plain = module(**inputs)
    assert torch.equal(module(**inputs, loss_weight=False), plain)  # FAR's default
    torch.testing.assert_close(module(**inputs, mask=torch.ones(ROWS)), plain)
    torch.testing.assert_close(module(**inputs, loss_weight=torch.full((ROWS,), 2.0)), 2 * plain)
    part = {key: x[mask.bool()] for key, x in inputs.items()}
    torch.testing.assert_close(module(**inputs, mask=mask), module(**part))
    torch.testing.assert_close(
        module(**inputs, mask=mask, loss_weight=weight),
        module(**part, loss_weight=weight[mask.bool()]),
    )
    with pytest.raises(TypeError, match=r"loss_weight must be a tensor or None, got 2\.0"):
        module(**inputs, loss_weight=2.0)


@pytest.mark.parametrize("backend_name", ["torch", "native", "triton"])
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_sampling(cfg: float, backend_name: str, library: NativeLibrary) -> None:
    if backend_name == "triton":
        interpreter.need()
    # The native loop takes widths that are a multiple of 16.
    module = DiffLoss(TOKEN, CONDITION, 2, 16, "4", backend=backend_name)
    fill_by_formula(module)
    with torch.no_grad():  # a variance channel far outside [-1, 1] would overflow
        module.net.final_layer.linear.weight *= 0.2
    z, tokens = torch.randn(4, CONDITION), 4 if cfg == 1 else 2
    initial, noise = torch.randn(tokens, TOKEN), torch.randn(2, tokens, TOKEN)
    head = {key: value.detach().double() for key, value in module.net.named_parameters()}
    expected = reference.denoise_loop(
        head, z.double(), 2, initial.double(), noise.double(), guidance_scale=cfg, temperature=0.9
    )
    index = torch.full((4, 1), 2).half()  # as the published code gives it
    out = module.sample(z, 0.9, cfg, index, initial=initial, noise=noise)
    assert len(out) == 4 and not out.requires_grad
    assert relative(out[:tokens], expected) < 1e-5
    assert torch.equal(out.chunk(2)[0], out[:tokens]) or cfg == 1
    again = module.sample(z, 0.9, cfg, 2, initial=initial, noise=noise)
    assert torch.equal(again, out)


def test_sampling_draws_from_its_generator() -> None:
    module, _ = build("DiffLoss", torch.float32)
    z = torch.randn(2, CONDITION)

    def sample(seed: int) -> Tensor:
        out: Tensor = module.sample(z, index=1, generator=torch.Generator().manual_seed(seed))
        return out

    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))


def test_sampling_without_level() -> None:
    with_level, _ = build("DiffLoss", torch.float32)
    without = DiffLoss(TOKEN, CONDITION, 2, WIDTH, 4, level_input=False)
    state = {k: v for k, v in with_level.state_dict().items() if "index_cond_embed" not in k}
    without.load_state_dict(state)
    draws = {"initial": torch.randn(2, TOKEN), "noise": torch.randn(4, 2, TOKEN)}
    z = torch.randn(2, CONDITION)
    assert torch.equal(without.sample(z, **draws), with_level.sample(z, **draws))
    with pytest.raises(ValueError, match="no level input"):
        without.sample(z, index=1)
    with pytest.raises(ValueError, match=r"one level, got \[1, 2\]"):
        with_level.sample(z, index=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="got 3 rows"):
        with_level.sample(torch.randn(3, CONDITION), cfg=2.0)


@pytest.mark.parametrize("steps", ["ddim50", "", 0, 1001, -1, 2.5, None])
def test_sampling_steps_that_are_none(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"whole number in 1\.\.1000"):
        DiffLoss(TOKEN, CONDITION, 1, WIDTH, steps)
