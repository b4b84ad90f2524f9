"""`fastfar bench ops`: every path is gated and counted before it is timed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Captured, fails
from example_rows import row as example
from tiny_far import SMALL_VAE
from tolerances import relative

from fastfar import _native, cli, config, ops, reference
from fastfar.bench import decoder, peak, report
from fastfar.bench import ops as single
from fastfar.bench.cases import CASES, STEPS
from fastfar.bench.compiled_head import compiled_denoise_loop
from fastfar.bench.rows import Row
from fastfar.config import FARConfig
from fastfar.kl_vae import KLVAE

SMALL = FARConfig(
    width=32, encoder_depth=1, decoder_depth=1, num_heads=2, head_depth=1, head_width=32,
    latent_channels=4, latent_size=4, buffer_size=3, num_classes=5,
)  # fmt: skip
OPTIONS = single.Options("a run", repeats=2)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(single, "bandwidth", lambda device, threads: 1e10)


def measured(name: str, **changes: Any) -> list[Row]:
    (problem,) = single.problems([name], {"small": SMALL})
    return single.measure(problem, dataclasses.replace(OPTIONS, **changes))


@pytest.mark.parametrize("name", ["attention", "linear", "denoise_loop", "hybrid_loss"])
def test_every_path_is_right_and_counted(name: str) -> None:
    found = measured(name, paths=single.PATHS)
    case = CASES[name]
    paths = {(row.form, row.dtype) for row in found if row.samples_s}
    expected = {
        (path, dtype) for path in ("reference", "torch", "compile") for dtype in ("bfloat16",
                                                                                  "float32")
    } | {("autocast", "bfloat16")}  # fmt: skip
    if _native.reason() is None:
        expected |= {("native", "bfloat16"), ("native", "float32")}
    assert paths == expected
    for row in found:
        if not row.samples_s:
            assert row.note.startswith("not available: ") and "GPU" in row.note
            continue
        assert row.gate == "green", row
        assert len(row.samples_s) == len(row.peak_flops_per_s) == OPTIONS.repeats
        assert row.reference_flops == case.flops(SMALL, 1) and row.run == "a run"
        path = "reference" if row.form == "autocast" else row.form
        assert row.executed_flops == case.executed_flops(SMALL, 1, path)
        assert (row.share_of_peak is not None) == bool(row.executed_flops)
        assert row.cold_s is not None and row.extra["timer"] == "wall" and row.bandwidth == 1e10
        assert ("T=" in row.shape) == (name == "denoise_loop")
        assert Row.from_dict(json.loads(json.dumps(row.to_dict()))).key == row.key
    by_dtype = {row.dtype: row.bytes for row in found}
    assert by_dtype["float32"] == 2 * by_dtype["bfloat16"]


def test_a_wrong_path_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.linear.implementations["torch"]
    wrong = {"torch": lambda *args: 1.2 * right(*args)}
    monkeypatch.setattr(ops.linear, "implementations", wrong)
    found = measured("linear", paths=("reference", "torch"))
    assert {row.form: row.gate for row in found} == {"reference": "green", "torch": "red"}
    assert set(column(found, "over torch")) == {"-"}, "nothing is set against a wrong result"


def test_the_table_sets_every_path_against_torch() -> None:
    def row(form: str, seconds: float, dtype: str = "bfloat16") -> Row:
        return example(f"linear/{form}", seconds, op="linear", form=form, dtype=dtype,
                       shape="small", samples_s=(seconds,))  # fmt: skip

    found = [row("autocast", 4.0), row("torch", 2.0), row("native", 1.0),
             row("native", 1.0, "float32")]  # fmt: skip
    assert column(found, "over torch") == ["0.50 x", "1.00 x", "2.00 x", "-"]


def column(found: list[Row], name: str) -> list[str]:
    table = report.single_ops(found)
    return [line[table.header.index(name)] for line in table.lines]


def test_the_compiled_loop_is_the_reference() -> None:
    """What the compiler makes of it is the gate's business."""
    args, kwargs = CASES["denoise_loop"].inputs(SMALL, 2, torch.float32)
    out = compiled_denoise_loop(*args, **kwargs)()
    assert relative(out, reference.denoise_loop(*args, **kwargs)) < 1e-5
    assert len(args[-1]) == STEPS


def test_problems() -> None:
    found = single.problems(["attention", "linear"], {"small": SMALL}, (1, 2), (64, 320))
    assert len(found) == 2 * (1 + 2 * 2) + 2
    longer = [each for each in found if each.shape.startswith("320 positions")]
    assert {each.config.width // each.config.num_heads for each in longer} == {64, 80}
    for each in longer:
        (qkv,), _ = each.case.inputs(each.config, 1, torch.float32)
        assert qkv.shape[:2] == (2, 320)
    with pytest.raises(ValueError, match="allowed: adaln_mlp_block"):
        single.problems(["magic"], {"small": SMALL})
    with pytest.raises(ValueError, match="allowed: reference"):
        single.Options("a run", paths=("magic",))


def test_the_decoder_and_its_convolutions() -> None:
    vae = KLVAE(SMALL_VAE)
    found = decoder.measure(OPTIONS, 2, 4, vae)
    expected = {"autocast", "torch", "convolutions"} | (
        {"native"} if _native.reason() is None else set()
    )
    assert {row.form for row in found if row.samples_s} == expected
    for row in found:
        assert row.gate == ("none" if row.form == "convolutions" else "green"), row
        assert row.shape == "4 x 4 to 8 x 8" and row.batch == 2
    calls = decoder.Convolutions(vae, torch.randn(1, 6, 4, 4), torch.float32).calls
    layers = [
        name for name, layer in vae.named_modules()
        if isinstance(layer, torch.nn.Conv2d) and not name.startswith(("encoder", "quant_conv"))
    ]  # fmt: skip
    assert len(calls) == len(layers)
    assert [x.shape[-1] for x, _, _ in calls][-1] == 8, "the last one sees the whole image"


def test_the_command(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(config.PRESETS, "demo", SMALL)
    monkeypatch.setattr(peak, "MEMORY_BYTES", 1 << 20)
    path = tmp_path / "rows.jsonl"
    arguments = ["bench", "ops", "--preset", "demo", "--ops", "linear", "peak", "--backends",
                 "torch", "--dtype", "float32", "--quick"]  # fmt: skip
    trace = tmp_path / "trace.json"
    assert cli.main([*arguments, "--save", str(path), "--trace", str(trace)]) == 0
    assert "torch float32" in {e.get("name") for e in json.loads(trace.read_text())["traceEvents"]}
    out = capsys.readouterr().out
    assert "linear" in out and "green" in out and "FLOP/s" in out and "rows in" in out
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["op"] for row in found} == {"linear", "peak"}
    assert len({row["run"] for row in found}) == 1
    assert "allowed: " in fails(capsys, "bench", "ops", "--ops", "magic")
    assert "--resume" in fails(capsys, "bench", "ops", "--resume", "--save", str(path))
    assert "--preset" in fails(capsys, "bench", "ops", "--subjects", "demo")
