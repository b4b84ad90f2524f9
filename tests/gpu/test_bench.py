"""What `fastfar bench` does on a GPU only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastfar import cli
from fastfar.costs import head_kernels, measure, variants

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
    assert "kernel of the head" in out
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert {row["backend"] for row in found} == {"autocast", "torch", "compile", "eager", "triton"}
    median = {row["backend"]: row["median_s"] for row in found if row["batch"] == 1}
    assert median["triton"] < median["autocast"]
    for row in found:
        assert row["gpu"]["name"] and row["peak_memory_bytes"] > 0
        assert row["kernels_per_step"] < 40 and row["stages_s"]["head"] > 0


@pytest.mark.parametrize("cold", [False, True])
def test_kernels_of_the_head(cold: bool) -> None:
    subject = variants.subject("far_base", None, torch.device("cuda"), head_depth=3)
    times = head_kernels.head_kernels(subject, 1, torch.bfloat16, cold, repeats=10)
    names = {time.name for time in times}
    assert {"gemm normalised", "gemm gated", "step", "activate"} <= names
    peak = measure.peak(torch.device("cuda"), torch.bfloat16)
    for time in times:
        assert 1e-7 < time.seconds < 1e-3
        assert time.flops / time.seconds < 1.05 * peak
