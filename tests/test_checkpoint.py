"""Published checkpoints in, own format both ways, and everything that can be wrong with a file."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import pickle
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from formula import fill_by_formula
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastfar import checkpoint
from fastfar._files import atomic_write, atomic_writes
from fastfar._weights import Weights, open_weights, skeleton
from fastfar.checkpoint import (
    infer_config,
    load_official,
    load_pretrained,
    save_pretrained,
)
from fastfar.cli import convert
from fastfar.config import FARConfig
from fastfar.kl_vae import KLVAE, KLVAEConfig
from fastfar.model import FAR
from fastfar.plan import SamplingPlan
from fastfar.tokenizer import PixelTokenizer

HERE = Path(__file__).parent
TINY = FARConfig(
    width=32,
    encoder_depth=2,
    decoder_depth=1,
    num_heads=2,
    head_depth=3,
    head_width=48,
    latent_channels=6,
    latent_size=4,
    buffer_size=5,
    num_classes=10,
)
SMALL_VAE = KLVAEConfig(channels=32, channel_mults=(1, 2), blocks=1, latent_channels=6)
State = dict[str, torch.Tensor]


@pytest.fixture
def model() -> FAR:
    torch.manual_seed(0)
    model = FAR(TINY).eval()
    fill_by_formula(model)
    return model


@pytest.fixture
def state(model: FAR) -> State:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def training_checkpoint(state: State) -> dict[str, object]:
    """The published training dictionary; the moving average is 1 less than the weights."""
    return {
        "model": state,
        "model_ema": {key: value - 1 for key, value in state.items()},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}},
            "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "params": [0]}],
        },
        "args": argparse.Namespace(model="far_tiny", lr=1e-4, resume=None, diffloss_d=3),
        "epoch": 12,
    }


def assert_same(loaded: torch.nn.Module, state: State) -> None:
    found = loaded.state_dict()
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


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


# --- the own format ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_bit_exact(model: FAR, tmp_path: Path, dtype: torch.dtype) -> None:
    model.to(dtype)
    with torch.no_grad():  # numbers that a detour through another dtype would change
        model.mask_token.view(-1)[:3] = torch.tensor([float("nan"), -0.0, 1e-7], dtype=dtype)
    folder = tmp_path / "new" / "far"
    model.save_pretrained(folder)
    loaded = FAR.from_pretrained(folder)
    assert loaded.config == TINY and not loaded.training
    found = loaded.state_dict()
    for key, value in model.state_dict().items():
        same = found[key].view(torch.uint8) if value.dim() else found[key]
        assert found[key].dtype == dtype and torch.equal(same, value.view(torch.uint8)), key
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    values = json.loads((folder / "config.json").read_text())
    assert values == {
        "format": "fastfar",
        "format_version": 1,
        "model": TINY.to_dict(),
        "tokenizer": None,
        "plan": None,
        "class_names": None,
    }


def test_dtypes_may_be_mixed_or_asked_for(model: FAR, tmp_path: Path) -> None:
    model.encoder_blocks.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_same(FAR.from_pretrained(tmp_path), model.state_dict())
    loaded = FAR.from_pretrained(str(tmp_path), dtype=torch.float32)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_everything_round_trips(model: FAR, tmp_path: Path) -> None:
    tokenizer = PixelTokenizer(mean=-0.4, std=0.7)
    plan = SamplingPlan.paper("mask", guidance_scale=2.5).with_changes(x0_range=(-1.5, 2.25))
    names = [f"class {i}" for i in range(10)]
    save_pretrained(tmp_path, model, tokenizer, plan, names)
    loaded = load_pretrained(tmp_path)
    assert_same(loaded.model, model.state_dict())
    assert loaded.tokenizer == tokenizer
    assert loaded.plan == plan
    assert loaded.class_names == tuple(names)


def test_autoencoder_round_trips(model: FAR, tmp_path: Path) -> None:
    vae = KLVAE(SMALL_VAE)
    save_pretrained(tmp_path, model, vae)
    loaded = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert isinstance(loaded.tokenizer, KLVAE) and loaded.tokenizer.config == SMALL_VAE
    assert_same(loaded.tokenizer, vae.state_dict())  # dtype is for the model
    (tmp_path / "tokenizer.safetensors").unlink()
    with pytest.raises(ValueError, match="needs its weights"):
        load_pretrained(tmp_path)


def test_saving_over_what_was_loaded(model: FAR, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = FAR.from_pretrained(tmp_path)
    with torch.no_grad():
        loaded.mask_token.add_(1)
    loaded.save_pretrained(tmp_path)
    assert torch.equal(FAR.from_pretrained(tmp_path).mask_token, model.mask_token + 1)


@pytest.mark.skipif(os.name == "nt", reason="rights are POSIX")
def test_files_have_ordinary_rights(model: FAR, tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    model.save_pretrained(tmp_path)
    modes = {path.name: oct(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 3 and len(set(modes.values())) == 1, modes


def test_save_errors(model: FAR, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"fastfar\.FAR, got Linear"):
        save_pretrained(tmp_path, torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    for names in (["a"] * 11, "ten class names", [1, 2]):
        with pytest.raises(ValueError, match="at most 10 strings"):
            save_pretrained(tmp_path, model, class_names=names)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def _full_fsync(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_save(*args: object, **kwargs: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")


@pytest.mark.parametrize("where", ["fsync", "safetensors", "real"])
def test_full_disk_keeps_the_old_model(
    model: FAR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with torch.no_grad():
        model.mask_token.add_(1)
    with monkeypatch.context() as patch:
        if where == "fsync":
            patch.setattr(os, "fsync", _full_fsync)
        elif where == "safetensors":
            patch.setattr(checkpoint, "save_file", _full_save)
        else:  # files cannot grow beyond 10 kB: a write that really fails half-way
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with pytest.raises(OSError, match="is unchanged: free space") as error:
                save_pretrained(tmp_path, model, PixelTokenizer(0.0, 1.0))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == (errno.EFBIG if where == "real" else errno.ENOSPC)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_atomic_write(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "state.bin"
    with atomic_write(target) as temporary:
        temporary.write_bytes(b"old")
        assert temporary.parent == target.parent and not target.exists()
    with pytest.raises(RuntimeError, match="stop"), atomic_write(target) as temporary:
        temporary.write_bytes(b"half of the n")
        raise RuntimeError("stop")
    assert target.read_bytes() == b"old"
    with pytest.raises(OSError, match="could not write"), atomic_write(target):
        pass  # nothing was written
    other = tmp_path / "other.bin"
    with pytest.raises(OSError), atomic_writes(target, other) as (first, _):
        first.write_bytes(b"new")
    assert target.read_bytes() == b"old" and not other.exists()
    assert [path.name for path in target.parent.iterdir()] == ["state.bin"]


@pytest.mark.parametrize(
    "change, text",
    [
        ({"format": "diffusers"}, "fastfar did not write it"),
        ({"format_version": 2}, "format_version is 2"),
        ({"model": None}, 'no "model" entry'),
        ({"model": {"width": 32, "colour": 1}}, "unknown FARConfig entries"),
        ({"model": {**TINY.to_dict(), "width": "wide"}}, "width must be an int"),
        ({"model": {**TINY.to_dict(), "head_depth": 2}}, "unexpected .*res_blocks.2"),
        ({"plan": {"levels": [0]}}, "argument"),
        ({"tokenizer": {"type": "vq"}}, "unknown tokenizer type"),
    ],
)
def test_damaged_config(model: FAR, tmp_path: Path, change: dict[str, object], text: str) -> None:
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=text):
        load_pretrained(tmp_path)


def test_damaged_folders(model: FAR, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors.*truncated"):
        FAR.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        FAR.from_pretrained(tmp_path)
    config.write_text('{"format": "fastf')
    with pytest.raises(ValueError, match=r"config\.json: "):
        FAR.from_pretrained(tmp_path)


def test_names(model: FAR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        FAR.from_pretrained("user/name")
    model.save_pretrained("user/name")  # an existing folder wins over the hub
    assert_same(FAR.from_pretrained("user/name"), model.state_dict())
    with pytest.raises(FileNotFoundError, match=r"no folder 'nothing'.*demo"):
        FAR.from_pretrained("nothing")
    with pytest.raises(FileNotFoundError):
        FAR.from_pretrained(Path("user/other"))  # a Path is never a hub name
    with pytest.raises(ValueError, match="load_official"):
        FAR.from_pretrained("user/name/model.safetensors")
    with pytest.raises(TypeError, match="got NoneType"):
        FAR.from_pretrained(None)  # type: ignore[arg-type]


def test_hub_names(model: FAR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.save_pretrained(tmp_path)

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        if name != "user/far-b":
            raise OSError("404")
        assert "model.safetensors" in allow_patterns
        return str(tmp_path)

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert_same(FAR.from_pretrained("user/far-b"), model.state_dict())
    with pytest.raises(FileNotFoundError, match="hub did not give"):
        FAR.from_pretrained("user/typo")


def test_demo_is_a_name(model: FAR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_ASSETS", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder of the same name does not get in the way
    model.save_pretrained(tmp_path / "assets" / "demo")
    assert_same(FAR.from_pretrained("demo"), model.state_dict())
    with pytest.raises(FileNotFoundError):
        FAR.from_pretrained("./demo")


# --- fastfar convert --------------------------------------------------------------------------


def run_convert(*arguments: object) -> int:
    parser = argparse.ArgumentParser(prog="fastfar")
    convert.add_parser(parser.add_subparsers())
    args = parser.parse_args(["convert", *map(str, arguments)])
    code: int = args.run(args)
    return code


def test_convert(state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, dest = tmp_path / "checkpoint-last.pth", tmp_path / "far"
    torch.save(training_checkpoint(state), source)
    assert run_convert(source, dest, "--num-heads", 2) == 0
    text = capsys.readouterr().out
    parameters = sum(value.numel() for value in state.values())
    assert "moving average (EMA)" in text and f"{parameters / 1e6:.1f} M parameters" in text
    assert "width 32" in text
    assert FAR.from_pretrained(dest).config == TINY
    assert_same(FAR.from_pretrained(dest), {key: value - 1 for key, value in state.items()})

    assert run_convert(source, dest, "--no-ema", "--dtype", "bfloat16", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["moving_average"] is False and found["dtype"] == "bfloat16"
    assert found["parameters"] == parameters and found["sizes"]["num_heads"] == 1
    assert_same(FAR.from_pretrained(dest), {key: v.bfloat16() for key, v in state.items()})


def test_convert_adds_the_autoencoder(
    state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = KLVAE(SMALL_VAE)
    torch.save({"model": vae.state_dict()}, tmp_path / "kl16.ckpt")
    torch.save(state, tmp_path / "far.pth")
    dest = tmp_path / "far"
    with pytest.raises(FileNotFoundError, match="convert the FAR checkpoint into it first"):
        run_convert(tmp_path / "kl16.ckpt", dest)
    run_convert(tmp_path / "far.pth", dest)
    run_convert(tmp_path / "kl16.ckpt", dest)
    run_convert(tmp_path / "far.pth", dest)  # once more: the autoencoder stays
    assert "kl16, plain weights" in capsys.readouterr().out
    loaded = load_pretrained(dest)
    assert isinstance(loaded.tokenizer, KLVAE)
    assert_same(loaded.tokenizer, vae.state_dict())
    assert_same(loaded.model, state)
    with pytest.raises(ValueError, match="one head"):
        run_convert(tmp_path / "kl16.ckpt", dest, "--num-heads", 4)
    with pytest.raises(ValueError, match=r"KLVAE\.load_official"):
        run_convert(tmp_path / "kl16.ckpt", dest, "--kind", "far")


def test_convert_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_convert("--help")
    assert stop.value.code == 0
    assert "fastfar convert checkpoint-last.pth far_huge" in capsys.readouterr().out


def test_opening_copies_nothing(state: State) -> None:
    """`open_weights` of a dictionary hands out the very tensors."""
    weights = open_weights(state)
    assert weights.read(["mask_token"])["mask_token"] is state["mask_token"]
    assert not weights.ema
