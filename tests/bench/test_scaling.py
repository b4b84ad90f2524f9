"""`fastfar bench scaling`: one axis at a time, every value a row of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from command import Captured, fails
from example_rows import row

from fastfar import cli, config
from fastfar.bench import rows, scaling
from fastfar.bench.run import Options
from fastfar.bench.subjects import Choice
from fastfar.bench.tables import as_text
from fastfar.config import FARConfig

QUICK = Options(repeats=1, stages=False)
TWO_STEPS = Choice(diffusion_steps=2, dtype=torch.float32)


@pytest.fixture(autouse=True)
def tiny_preset(tiny_config: FARConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAR-B becomes very small; it has no autoencoder."""
    monkeypatch.setitem(config.PRESETS, "far_base", tiny_config)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's number of threads, without any thread: tests run on one."""
    count = [1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: count[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: count.__setitem__(0, n))


@pytest.mark.parametrize(
    ("axis", "values"),
    [("threads", (1, 2)), ("batch", (1, 3)), ("steps", (1, 2)), ("tokens", (4, 9))],
)
def test_an_axis(
    axis: str, values: tuple[int, ...], tmp_path: Path, threads: None
) -> None:
    path, before = tmp_path / "rows.jsonl", torch.get_num_threads()
    options = dataclasses.replace(QUICK, save=path)
    outcome = scaling.sweep(axis, values, ["far_base/torch"], options, "cpu", TWO_STEPS)
    assert torch.get_num_threads() == before and not outcome.skipped
    found = rows.read(path)
    assert [scaling.value_of(axis, each) for each in found] == list(values)
    assert len({(each.run, each.key) for each in found}) == len(values), "no row hides another"
    assert len({each.key for each in found}) == len(values)
    for each in found:
        assert each.gate == "green" and each.extra["settings"]["mode"] == f"scaling {axis}"
        assert each.environment["threads"] == (scaling.value_of(axis, each) if axis == "threads"
                                               else before)  # fmt: skip
    if axis == "tokens":
        assert found[0].reference_flops < found[1].reference_flops
    assert f"Scaling with {axis}" == scaling.table(axis, found).title


def test_the_table() -> None:
    def at(threads: int, seconds: float) -> rows.Row:
        base = row(seconds=seconds, samples_s=(seconds,))
        return dataclasses.replace(base, environment={**base.environment, "threads": threads})

    wrong = dataclasses.replace(at(8, 1.0), error=1.0, error_limit=0.1)
    table = scaling.table("threads", [at(1, 8.0), at(4, 2.5), wrong])
    shown = [dict(zip(table.header, line, strict=True)) for line in table.lines]
    assert [line["speed-up per image"] for line in shown] == ["1.00 x", "3.20 x", "-"]
    assert [line["of ideal"] for line in shown] == ["100.0 %", "80.0 %", "-"]
    assert shown[2]["gate"] == "red: wrong result" and "along threads" in as_text(table)
    batches = [dataclasses.replace(at(1, 2.0), batch=1), dataclasses.replace(at(1, 4.0), batch=8)]
    per_image = [line[4] for line in scaling.table("batch", batches).lines]
    assert per_image == ["1.00 x", "4.00 x"]


def test_what_has_no_such_axis_says_so() -> None:
    def message(axis: str, subject: str = "far_base", values: tuple[int, ...] = (4,)) -> str:
        with pytest.raises(ValueError) as caught:
            scaling.sweep(axis, values, [subject], QUICK, "cpu")
        return str(caught.value)

    assert "allowed: threads, batch" in message("colour")
    assert "at least 1" in message("steps", values=(0,))
    assert "give FAR" in message("steps", "var_d16")
    assert "give a preset" in message("tokens", "demo")
    assert "no square" in message("tokens", values=(7,))


def test_default_values() -> None:
    values = scaling.default_values("threads")
    assert values[-1] == torch.get_num_threads() and sorted(set(values)) == list(values)
    assert scaling.default_values("tokens") == (64, 256, 576)


def test_the_command(capsys: Captured) -> None:
    arguments = ["bench", "scaling", "--axis", "steps", "--values", "1", "2", "--quick",
                 "--subjects", "far_base/torch", "--dtype", "float32"]  # fmt: skip
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "along steps" in out and out.count("green") == 2
    assert "--subjects" in fails(capsys, "bench", "scaling", "--preset", "far_base")
    assert "--values" in fails(capsys, "bench", "scaling", "--batch", "2")
