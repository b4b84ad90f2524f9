"""Checkpoints of a training run: damaged files, full disks, what stays, earlier versions."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import flat, tiny_data, tiny_recipe

from fastfar.pipeline import FARPipeline
from fastfar.training import Trainer, export_run
from fastfar.training.checkpoints import Checkpoints, latest
from fastfar.training.loop import tokenizer_of
from fastfar.training.state import read_run, read_state


def trainer(folder: Path, async_save: bool = True, **changes: Any) -> Trainer:
    return Trainer(tiny_recipe(**changes), tiny_data(), folder, async_save=async_save)


def test_a_state_of_an_earlier_version_can_be_exported(tmp_path: Path) -> None:
    """One file, state.pt; the first ones held neither tokenizer nor class names."""
    trainer(tmp_path / "run").run()
    state = read_state(tmp_path / "run")
    old = tmp_path / "old"
    old.mkdir()
    names = ("model", "ema", "step", "recipe")
    torch.save({name: state[name] for name in names}, old / "state.pt")
    with pytest.raises(ValueError, match="earlier version"):
        trainer(old)
    with pytest.raises(ValueError, match="needs its data"):
        export_run(old, tmp_path / "export")
    assert export_run(old, tmp_path / "export", torch.float32, tiny_data) == 6
    pipe = FARPipeline.from_pretrained(tmp_path / "export")
    assert pipe.tokenizer == tokenizer_of(tiny_data())
    assert torch.equal(pipe.model.z_proj.weight, state["ema"]["z_proj.weight"])
    (old / "state.pt").write_bytes(b"PK cut")
    with pytest.raises(ValueError, match=r"state\.pt is damaged"):
        export_run(old, tmp_path / "export")


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "run.json", "../latest.json"])
@pytest.mark.parametrize("content", [b"", b"cut", None])
def test_a_damaged_checkpoint_says_so(tmp_path: Path, name: str, content: bytes | None) -> None:
    trainer(tmp_path, steps=1).run()
    path = latest(tmp_path)
    assert path is not None
    if content is not None:
        (path / name).write_bytes(content)
    elif name.startswith(".."):
        (path / name).write_text('{"folder": "step-000099"}')
    else:
        (path / name).unlink()
    with pytest.raises(ValueError, match="is damaged"):
        trainer(tmp_path)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    trainer(tmp_path, steps=1).run()
    path = latest(tmp_path)
    assert path is not None

    class Bad:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    (path / ".metadata").write_bytes(pickle.dumps(Bad()))
    with pytest.raises(ValueError, match="is damaged"):
        trainer(tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        read_state(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_no_state_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no training run"):
        export_run(tmp_path, tmp_path / "export")


@pytest.mark.parametrize("where", ["simulated", "real", "in the background"])
def test_a_full_disk_keeps_the_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    run = trainer(tmp_path, async_save=where == "in the background")
    run.train_step()
    run.save()
    run.checkpoints.wait()
    before = read_state(tmp_path)
    run.train_step()
    expected = errno.ENOSPC if where == "simulated" else errno.EFBIG
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        if where == "simulated":

            def full(*_: Any) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(torch, "save", full)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match="free space") as error:
            run.save()
            run.checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert error.value.errno == expected
    after = read_state(tmp_path)
    assert flat(before).keys() == flat(after).keys() and after["step"] == 1
    monkeypatch.undo()
    run.save()
    run.checkpoints.wait()
    assert trainer(tmp_path).step == 2


def test_a_full_disk_on_the_way_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save, calls = Checkpoints.save, []

    def full_at_first(self: Checkpoints, step: int, *arguments: Any) -> None:
        calls.append(step)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, step, *arguments)

    monkeypatch.setattr(Checkpoints, "save", full_at_first)
    with caplog.at_level(logging.WARNING, "fastfar"):
        assert trainer(tmp_path).run(save_every=2) == "finished"
    assert calls == [2, 4, 6] and "No space left" in caplog.text
    assert read_run(tmp_path)["step"] == 6


def test_the_last_two_checkpoints_stay(tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints" / "step-000004"
    leftover.mkdir(parents=True)
    (leftover / "__0_0.distcp").write_bytes(b"of a killed save")
    run = trainer(tmp_path)
    assert run.step == 0 and run.run(save_every=2) == "finished"
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest.json", "step-000004", "step-000006"]
    (tmp_path / "checkpoints" / "latest.json").write_text('{"folder": "step-000004"}')
    assert trainer(tmp_path).step == 4


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    assert trainer(tmp_path).run() == "finished"
    path = latest(tmp_path)
    assert path is not None
    before = (path / ".metadata").stat().st_mtime_ns
    again = trainer(tmp_path)
    assert again.run() == "finished" and again.step == 6
    assert (path / ".metadata").stat().st_mtime_ns == before
