"""Published checkpoints in, and everything that can be wrong with a file."""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_far import TINY, State, assert_same, tiny_model, tiny_state, training_checkpoint

from fastfar._weights import Weights, open_weights, skeleton
from fastfar.checkpoint import infer_config, load_official
from fastfar.config import FARConfig
from fastfar.model import FAR

HERE = Path(__file__).parent


@pytest.fixture
def model() -> FAR:
    return tiny_model()


@pytest.fixture
def state() -> State:
    return tiny_state()


# --- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_manifests(size: str) -> None:
    """The published shapes give the preset back, and the preset has exactly those shapes."""
    values = json.loads((HERE / "manifests" / f"far_{size}.json").read_text())
    manifest = {key: tuple(shape) for key, shape in values.items()}
    weights = Weights(size, manifest, dict.fromkeys(manifest, torch.float32), lambda keys: {})
    config = infer_config(weights)
    assert config == FARConfig.preset(f"far_{size}")
    with skeleton():
        model = FAR(config)
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == manifest
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == sum(math.prod(shape) for shape in manifest.values())
    assert f"{parameters / 1e6:.1f}" == {"base": "207.9", "large": "426.4", "huge": "811.7"}[size]


@pytest.mark.parametrize("case", ["mask", "nomask"])
def test_golden_weights_load(case: str) -> None:
    tensors = load_file(HERE / "golden" / f"far_tiny_{case}.safetensors")
    state = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model = load_official(state, num_heads=2)
    assert model.config == FARConfig(
        width=64, encoder_depth=2, decoder_depth=2, num_heads=2, head_depth=2, head_width=64
    )
    assert_same(model, state)


def test_sizes_that_shapes_do_not_tell(state: State) -> None:
    assert load_official(state, num_heads=2).config == TINY
    assert load_official(state).config.num_heads == 1
    patched = load_official({**state, **token_dim_24(state)}, patch_size=2).config
    assert (patched.latent_channels, patched.latent_size, patched.num_tokens) == (6, 8, 16)
    with pytest.raises(ValueError, match="patch_size 5 does not fit tokens of 6"):
        load_official(state, patch_size=5)
    with pytest.raises(ValueError, match="num_heads 3"):
        load_official(state, num_heads=3)


def token_dim_24(state: State) -> State:
    """The tensors that depend on the token width, for tokens of 24 numbers."""
    return {
        "z_proj.weight": torch.zeros(32, 24),
        "diffloss.net.input_proj.weight": torch.zeros(48, 24),
        "diffloss.net.final_layer.linear.weight": torch.zeros(48, 48),
        "diffloss.net.final_layer.linear.bias": torch.zeros(48),
    }


# --- published files --------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["flat", "state_dict", "model", "module", "legacy"])
def test_pth_layouts(state: State, tmp_path: Path, layout: str) -> None:
    saved: dict[str, object] = dict(state)
    if layout in ("state_dict", "model"):
        saved = {layout: state, "epoch": 3}
    if layout == "module":
        saved = {f"module.{key}": value for key, value in state.items()}
    path = tmp_path / "far.pth"
    torch.save(saved, path, _use_new_zipfile_serialization=layout != "legacy")
    loaded = load_official(path, num_heads=2)
    assert loaded.config == TINY and not loaded.training
    assert_same(loaded, state)


def test_training_dictionary(state: State, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-last.pth"
    torch.save(training_checkpoint(state), path)
    average = {key: value - 1 for key, value in state.items()}
    assert_same(load_official(path, num_heads=2), average)
    assert_same(load_official(str(path), num_heads=2, use_ema=False), state)
    assert_same(load_official(training_checkpoint(state), num_heads=2), average)


def test_moving_average_is_not_filled_up(state: State) -> None:
    """A key that only "model" has would mix two models: an error instead."""
    saved = training_checkpoint(state)
    del saved["model_ema"]["mask_token"]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"missing \(1\): mask_token.*use_ema"):
        load_official(saved, num_heads=2)
    assert_same(load_official(saved, num_heads=2, use_ema=False), state)
    with pytest.raises(ValueError, match="use_ema=True"):
        load_official({"model_ema": state}, use_ema=False)
    assert_same(load_official({"model": state, "model_ema": None}, num_heads=2), state)


def test_safetensors_and_dtypes(state: State, tmp_path: Path) -> None:
    path = tmp_path / "far.safetensors"
    save_file({f"module.{key}": value for key, value in state.items()}, path)
    assert_same(load_official(path, num_heads=2), state)
    low = load_official(path, num_heads=2, dtype=torch.bfloat16)
    assert_same(low, {key: value.bfloat16() for key, value in state.items()})
    half = {key: value.half() for key, value in state.items()}
    assert_same(load_official(half, num_heads=2), {k: v.float() for k, v in half.items()})


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_model_does_not_depend_on_its_file(state: State, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"far{suffix}"
    save = torch.save if suffix == ".pth" else save_file
    save(state, path)
    loaded = load_official(path, num_heads=2)
    with path.open("r+b") as file:  # in place: the very pages that were mapped
        file.write(b"\xff" * path.stat().st_size)
    assert_same(loaded, state)


def test_the_model_does_not_alias_the_dictionary(state: State) -> None:
    transposed = {
        **state,
        "decoder_embed.weight": state["decoder_embed.weight"].t().contiguous().t(),
    }
    loaded = load_official(transposed, num_heads=2)
    assert loaded.decoder_embed.weight.is_contiguous()
    before = state["mask_token"].clone()
    with torch.no_grad():
        loaded.mask_token.add_(1)
        loaded.decoder_embed.weight.mul_(2)
    assert torch.equal(state["mask_token"], before)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_runs_after_loading(model: FAR, state: State) -> None:
    loaded = load_official(state, num_heads=2)
    tokens = torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 7])
    with torch.no_grad():
        expected = model(tokens, model.class_embedding(labels))
        assert torch.equal(loaded(tokens, loaded.class_embedding(labels)), expected)


# --- what can be wrong ------------------------------------------------------------------------


def test_one_error_lists_all(state: State) -> None:
    for i in range(7):
        state[f"extra.{i}"] = torch.zeros(1)
    del state["encoder_blocks.0.attn.qkv.bias"], state["mask_token"]
    state["z_proj.weight"] = torch.zeros(33, 7)
    state["decoder_norm.bias"] = torch.zeros(1, 32)
    with pytest.raises(ValueError) as error:
        load_official(state, num_heads=2)
    text = str(error.value)
    assert "missing (2): mask_token, encoder_blocks.0.attn.qkv.bias" in text
    assert "unexpected (7): extra.0, extra.1, extra.2, extra.3, extra.4, and 2 more" in text
    assert "decoder_norm.bias is (1, 32) and should be (32,)" in text
    assert "z_proj.weight is (33, 7) and should be (32, " in text


@pytest.mark.parametrize("key", FAR(TINY).state_dict())
def test_every_missing_key_is_named(state: State, key: str) -> None:
    del state[key]
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        load_official(state, num_heads=2)


def test_a_missing_block(state: State) -> None:
    state = {k: v for k, v in state.items() if not k.startswith("encoder_blocks.0.")}
    with pytest.raises(ValueError, match=r"encoder_blocks\.0\."):
        load_official(state, num_heads=2)


def test_quantised_weights_are_refused(state: State) -> None:
    state["z_proj.weight"] = torch.zeros(32, 6, dtype=torch.int8)
    with pytest.raises(
        ValueError, match=r"not floating point \(1\): z_proj\.weight \(torch\.int8\)"
    ):
        load_official(state, num_heads=2)


@pytest.mark.parametrize(
    "source, text",
    [
        ({"context_embed.weight": torch.zeros(2, 2)}, "FAR-T2I"),
        ({"post_quant_conv.weight": torch.zeros(2, 2, 1, 1)}, r"KLVAE\.load_official"),
        ({"fc.weight": torch.zeros(2, 2)}, "not a FAR model"),
        ({"epoch": 3}, "'epoch' is a int"),
        ({}, "empty"),
        ({"model": {}}, "empty"),
        ({"model_ema": [torch.zeros(1)]}, "not a state dict"),
    ],
)
def test_other_dictionaries(source: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_official(source)


def test_sources_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_official(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="is a folder"):
        load_official(tmp_path)
    with pytest.raises(TypeError, match="path or a state dict, got int"):
        load_official(3)  # type: ignore[arg-type]
    (tmp_path / "far.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"suffix '\.onnx'"):
        load_official(tmp_path / "far.onnx")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        load_official(tmp_path / "list.pth")


class Evil:
    """Unpickling runs a command that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("container", ["zip", "legacy", "bare pickle", "in args"])
def test_malicious_pickle_is_refused(state: State, tmp_path: Path, container: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / "evil.pth"
    evil: dict[str, object] = {**state, "evil": Evil(mark)}
    if container == "bare pickle":
        path.write_bytes(pickle.dumps(Evil(mark), protocol=2))
    elif container == "in args":
        args = argparse.Namespace(resume=Evil(mark))
        torch.save({**training_checkpoint(state), "args": args}, path)
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(ValueError, match="never runs code") as error:
        load_official(path, num_heads=2)
    assert not mark.exists()
    # PyTorch's advice to switch the safety off must not reach the user.
    assert "weights_only=False" not in str(error.value) and error.value.__suppress_context__


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_files(state: State, tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"far{suffix}"
    (torch.save if suffix == ".pth" else save_file)(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"truncated|damaged"):
        load_official(path, num_heads=2)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_foreign_bytes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"far{suffix}"
    path.write_bytes(b"<!DOCTYPE html><html>404</html>" * 100)
    with pytest.raises(ValueError, match=r"truncated|damaged"):
        load_official(path)


# --- memory -----------------------------------------------------------------------------------

_MEASURE = """
import sys, torch
from fastfar.checkpoint import load_official
torch.set_num_threads(1)

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

path, tiny, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
load_official(tiny, dtype=dtype)  # imports and buffers of the libraries
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # start the high-water mark afresh
model = load_official(path, dtype=dtype)
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print((status("VmHWM") - before) / weights, weights)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "suffix, dtype, limit",
    # bfloat16 weights are half as large as the stored ones, so an eighth of those is a quarter.
    [(".pth", "float32", 1.3), (".safetensors", "float32", 1.3), (".pth", "bfloat16", 1.5)],
)
def test_peak_memory(state: State, tmp_path: Path, suffix: str, dtype: str, limit: float) -> None:
    """Loading holds less than 1.3 times the weights, mapped pages of the file included.

    The resident high-water mark (VmHWM) counts copies and mapped pages alike; pages of the file
    could be dropped by the system, so this is the stricter of the two ways to count.
    """
    with skeleton():
        big = FAR(
            FARConfig(width=512, encoder_depth=6, decoder_depth=6, num_heads=8, head_width=768)
        )
    tensors = {
        key: torch.full(tuple(value.shape), 0.01 * i)
        for i, (key, value) in enumerate(big.state_dict().items())
    }
    path, tiny = tmp_path / f"big{suffix}", tmp_path / f"tiny{suffix}"
    if suffix == ".pth":
        other = {key: value + 1 for key, value in tensors.items()}
        torch.save({**training_checkpoint(tensors), "model_ema": other}, path)
        torch.save(training_checkpoint(state), tiny)
    else:
        save_file(tensors, path)
        save_file(state, tiny)
    command = [sys.executable, "-c", _MEASURE, str(path), str(tiny), dtype]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    try:
        out = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
    finally:
        path.unlink()
    assert out.returncode == 0, out.stderr
    ratio, weights = map(float, out.stdout.split())
    assert weights > 90e6
    assert 0.9 < ratio < limit, f"peak is {ratio:.2f} times the weights"


def test_opening_copies_nothing(state: State) -> None:
    """`open_weights` of a dictionary hands out the very tensors."""
    weights = open_weights(state)
    assert weights.read(["mask_token"])["mask_token"] is state["mask_token"]
    assert not weights.ema
