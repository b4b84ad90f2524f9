"""`fastfar bench`: predictions, measurements at tiny sizes, errors that say what is allowed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Captured, fails
from tolerances import relative

from fastfar import baselines, cli, config
from fastfar.bench import far, rows, subjects
from fastfar.bench.far import FARSubject
from fastfar.cli import bench as bench_command
from fastfar.config import FARConfig
from fastfar.costs import gpus, image, published
from fastfar.sampling import sample_latents

CPU = torch.device("cpu")


@pytest.fixture
def tiny_preset(tiny_config: FARConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset "demo" becomes very small."""
    monkeypatch.setitem(config.PRESETS, "demo", tiny_config)


def bench(capsys: Captured, *arguments: str) -> str:
    assert cli.main(["bench", *arguments]) == 0
    return capsys.readouterr().out


def test_prediction(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAR-B with the head of the others, T = 40: as a table and, traced once only, as data."""
    results: dict[str, Any] = {}

    def once(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            if name not in results:
                results[name] = function(*args)
            return results[name]

        return call

    monkeypatch.setattr(image, "predict", once("ours", image.predict))
    monkeypatch.setattr(published, "published", once("theirs", published.published))
    arguments = ["--predict", "h100", "--preset", "far_base", "--head-depth", "3",
                 "--diffusion-steps", "40"]  # fmt: skip
    out = bench(capsys, *arguments)
    assert out.startswith("expected, not measured: far_base with head depth 3, nomask")
    for text in ("on H100 SXM", "encoder", "head chain", "decode", "bound", "modulations of",
                 "published", "kernels of a diffusion step", "roofline"):  # fmt: skip
        assert text in out, text
    found = json.loads(bench(capsys, *arguments, "--json"))
    assert found["expected"] is True and found["gpu"]["name"] == "h100"
    (bar,) = [bar for bar in found["bars"] if bar["name"] == "image"]
    assert bar["target"] == "<= 20.0 ms" and bar["reached"] == (found["seconds"] <= 0.020)
    # 13 and 3 a chunk: 3 in the first outer step, which has no guidance, 5 in each of the others.
    assert found["launches_per_step"] == pytest.approx(13 + 3 * (0.1 * 3 + 0.9 * 5) / 40)
    assert found["published"]["launches_per_step"] > 5 * found["launches_per_step"]
    assert found["reference_flops"] == pytest.approx(9.9e12, rel=0.01)
    # Padding and folding: what is executed is near what is published.
    assert 0.85 < found["executed_flops"] / found["reference_flops"] < 1.1


def test_measurement(capsys: Captured, tmp_path: Path, tiny_preset: None) -> None:
    path, trace = tmp_path / "rows" / "x.jsonl", tmp_path / "trace.json"
    arguments = ["--preset", "demo", "--diffusion-steps", "2", "--repeats", "1", "--batch", "1",
                 "2", "--backends", "reference", "torch", "--dtype", "float32"]  # fmt: skip
    assert cli.main(["bench", *arguments, "--save", str(path), "--trace", str(trace)]) == 0
    out, told = capsys.readouterr()
    assert "one image" in out and "several images" in out and "red" not in out
    assert "where the time goes" in out and "4 rows in" in out
    assert "2 subjects, each called once and then 1 times in turn: about" in told
    found = rows.read(path)
    assert [(row.form, row.batch) for row in found] == [
        ("reference", 1), ("torch", 1), ("reference", 2), ("torch", 2)
    ]  # fmt: skip
    for row in found:
        assert row.mode == "parity" and row.gate == "green" and row.random_weights
        assert row.plan_mode == "changed: diffusion_steps, x0_range" and row.plan_name == "T=2"
        assert row.samples_s[0] == row.tokens_samples_s[0] + row.decode_samples_s[0] > 0
        assert len(row.peak_flops_per_s) == 1 and row.share_of_peak is not None
        assert row.environment["torch"] == torch.__version__ and row.environment["command"]
        if row.batch == 1:
            assert row.stages_s["head"] > 0 and row.cold_s is not None and row.cold_s > 0
    assert json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]


def test_measurement_as_data(capsys: Captured, tiny_preset: None) -> None:
    arguments = ["--preset", "demo", "--diffusion-steps", "1", "--repeats", "1"]
    out = bench(capsys, *arguments, "--dtype", "float32", "--backends", "torch", "--json")
    (row,) = json.loads(out)
    assert row["form"] == "torch" and row["gate"] == "green" and row["median_s"] > 0


def test_a_wrong_result_gets_no_ratio(
    capsys: Captured, tiny_preset: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        shift = 0.0 if kwargs["backend"] == "reference" else 1.0
        return sample_latents(*args, **kwargs) + shift

    monkeypatch.setattr(far, "sample_latents", wrong)
    arguments = ["bench", "--preset", "demo", "--diffusion-steps", "1", "--repeats", "1",
                 "--backends", "reference", "torch"]  # fmt: skip
    assert cli.main(arguments) == 1
    out, told = capsys.readouterr()
    assert "red: wrong result" in out and " x " not in out and "THE GATE IS RED" in told


def test_paths_that_cannot_run_say_why(capsys: Captured, tiny_preset: None) -> None:
    arguments = ["--preset", "demo", "--diffusion-steps", "1", "--repeats", "1"]
    out = bench(capsys, *arguments, "--backends", "reference", "triton")
    assert "not available: " in out and "GPU" in out.split("not available: ")[1]


def test_compiled_path(tiny_preset: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loop is the published one; what the compiler makes of it is the gate's business."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    weights = far.load("demo")
    plan = weights.official().with_changes(diffusion_steps=3)
    compiled = FARSubject(weights, "compile", torch.float32, plan)
    labels_B, noise = torch.tensor([1, 4]), compiled.draw(2)
    truth = sample_latents(weights.model, labels_B, plan, noise, backend="reference")
    assert relative(compiled.run(labels_B, noise), truth) < 1e-4
    with pytest.raises(ValueError, match="knows the published sampler"):
        FARSubject(weights, "compile", torch.float32, weights.official("mask"))


def test_the_parser_knows_all_names() -> None:
    """It has copies, as --help does not import PyTorch."""
    assert tuple(gpus.GPUS) == bench_command._GPUS
    assert far.FORMS == bench_command._FORMS
    assert sorted(config.PRESETS) == sorted(bench_command._PRESETS)
    for name in (*far.FORMS, *config.PRESETS, *baselines.NAMES, *baselines.FORMS):
        assert re.search(rf"\b{name}\b", bench_command._EPILOG), name


def test_errors(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--predict", "v100"])
    message = capsys.readouterr().err
    assert "h100" in message and "rtx4090" in message
    assert "--batch must be at least 1, got 0" in fails(capsys, "bench", "--batch", "0")
    assert "--repeats must be" in fails(capsys, "bench", "--repeats", "0")
    message = fails(capsys, "bench", "--predict", "h100", "--checkpoint", "demo")
    assert "give --preset instead" in message
    assert "belongs to a --preset" in fails(capsys, "bench", "--head-depth", "2")
    assert "one --batch" in fails(capsys, "bench", "--predict", "h100", "--batch", "1", "2")
    if not torch.cuda.is_available():
        assert "cannot be used" in fails(capsys, "bench", "--device", "cuda")
    with pytest.raises(ValueError, match="allowed: reference, autocast, torch"):
        subjects.far_recipes(None, ["magic"], CPU, subjects.Choice())
    message = fails(capsys, "bench", "magic")
    assert "'magic'" in message and "table3" in message
    assert "takes no file" in fails(capsys, "bench", "latency", "x.jsonl")
    assert "--save FILE" in fails(capsys, "bench", "--resume")
    assert "leave --preset" in fails(capsys, "bench", "--subjects", "demo", "--preset", "demo")
    assert "own subjects" in fails(capsys, "bench", "table3", "--preset", "demo")
    assert "one image at a time" in fails(capsys, "bench", "table3", "--batch", "2")
