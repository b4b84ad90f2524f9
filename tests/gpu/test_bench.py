"""What `fastfar bench` does on a GPU only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastfar import cli
from fastfar.bench import far, peak, rows
from fastfar.bench.far import FARSubject
from fastfar.bench.head_kernels import head_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_every_path_is_right_and_fast(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    arguments = ["bench", "--device", "cuda", "--preset", "demo", "--diffusion-steps", "8",
                 "--repeats", "2", "--batch", "1", "4", "--save", str(path)]  # fmt: skip
    assert cli.main(arguments) == 0, capsys.readouterr()
    out = capsys.readouterr().out
    assert "not available" not in out and "gate is red" not in out, out
    found = rows.read(path)
    assert {row.form for row in found} == {"autocast", "torch", "compile", "eager", "triton"}
    median = {row.form: row.median_s or 0.0 for row in found if row.batch == 1}
    assert median["triton"] < median["autocast"]
    for row in found:
        assert row.environment["gpu"]["name"] and (row.peak_memory_bytes or 0) > 0
        assert row.batch > 1 or row.stages_s["head"] > 0
        assert ("head_kernels" in row.extra) == (row.form in ("eager", "triton"))


@pytest.mark.parametrize("cold", [False, True])
def test_kernels_of_the_head(cold: bool) -> None:
    weights = far.load("far_base", device="cuda", head_depth=3)
    subject = FARSubject(weights, "triton", torch.bfloat16, weights.official())
    times = head_kernels(subject, 1, cold, repeats=10)
    names = {time.name for time in times}
    assert names == {"activate", "add_silu", "gate_layernorm", "step"}
    most = peak.peak_flops(torch.bfloat16, "cuda")
    for time in times:
        assert 1e-7 < time.seconds < 1e-3
        assert time.flops / time.seconds < 1.05 * most
