"""LlamaGen's forms on a GPU: the compiled step as CUDA graphs gives the published codes."""

from __future__ import annotations

import pytest
import torch
from tolerances import FACTOR, FLOOR, GOLDEN, relative

from fastfar.baselines._baseline import Settings
from fastfar.baselines.llamagen import LlamaGen, LlamaGenConfig, Optimised, Published

CONFIG = LlamaGenConfig(depth=2, width=256, heads=4)
LABELS = torch.tensor([3, 999])


def made(form: str, dtype: torch.dtype, compile: bool | None = None) -> LlamaGen:
    settings = Settings(form, torch.device("cuda"), dtype, compile=compile)
    return (Published if form == "published" else Optimised)("llamagen_b", settings, CONFIG)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [None, False], ids=["graphs", "eager"])
def test_forms_agree_on_a_gpu(compile: bool | None) -> None:
    exact, well_run = (
        made("published", torch.float32),
        made("well_run", torch.float32, compile),
    )
    assert ("torch.compile" in well_run.ways) == (compile is None)
    seeded = torch.Generator("cuda").manual_seed
    codes = exact.tokens(LABELS, generator=seeded(1))
    for _ in range(2):  # the second time everything is recorded
        same = well_run.tokens(LABELS, generator=seeded(1)) == codes
    # A rounding may decide between two codes, and then all after it differ.
    assert float(same.float().mean()) > 0.5
    given = codes[:, :20]
    truth = exact.logits(LABELS, given)
    assert relative(well_run.logits(LABELS, given), truth) < GOLDEN
    image = exact.decode(codes)
    assert relative(well_run.decode(codes), image) < 1e-2  # convolutions may round to TF32

    allowed = relative(made("published", torch.bfloat16).logits(LABELS, given), truth)
    half = made("well_run", torch.bfloat16, compile)
    error = relative(half.logits(LABELS, given), truth)
    assert error <= FACTOR * allowed + FLOOR[torch.bfloat16]
    assert relative(half.decode(codes), image) < 5e-2
