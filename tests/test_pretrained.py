"""The own format both ways, atomic files, names, and `fastfar convert`."""

from __future__ import annotations

import argparse
import errno
import json
import os
import resource
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tiny_far import (
    SMALL_VAE,
    TINY,
    State,
    assert_same,
    tiny_model,
    tiny_state,
    training_checkpoint,
)

from fastfar import checkpoint
from fastfar._files import atomic_write, atomic_writes
from fastfar.checkpoint import load_pretrained, save_pretrained
from fastfar.cli import convert
from fastfar.kl_vae import KLVAE
from fastfar.model import FAR
from fastfar.plan import SamplingPlan
from fastfar.tokenizer import PixelTokenizer


@pytest.fixture
def model() -> FAR:
    return tiny_model()


@pytest.fixture
def state() -> State:
    return tiny_state()


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
    with pytest.raises(ImportError, match=r"fastfar\[hub\]"):
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
