"""Where the tests of this folder run: on the GPU (`make test-gpu`), and small in the interpreter.

The same test bodies run in both places, so that what waits for a GPU has been run before.
"""

from __future__ import annotations

import interpreter
import pytest
import torch
from places import CONFIGS, DTYPES, Place

from fastfar import FARConfig

GPU = pytest.mark.gpu


def _device(name: str) -> torch.device:
    if name == "cpu":
        interpreter.need()
    else:
        pytest.importorskip("triton", minversion="3.2")
    return torch.device(name)


@pytest.fixture(params=[pytest.param("cuda", marks=GPU), "cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU, and the CPU under Triton's interpreter."""
    return _device(request.param)


@pytest.fixture(
    params=[
        *(pytest.param(("cuda", name), id=f"cuda-{name}", marks=GPU) for name in DTYPES),
        pytest.param(("cpu", "fp32"), id="cpu-fp32"),
    ]
)
def place(request: pytest.FixtureRequest) -> Place:
    """The GPU in three dtypes, the interpreter in one: tests/triton has the other."""
    name, dtype = request.param
    return Place(_device(name), DTYPES[dtype])


@pytest.fixture(params=["odd", pytest.param("far_base", marks=GPU)])
def config(request: pytest.FixtureRequest) -> FARConfig:
    """A model of odd sizes; on a GPU FAR-B, too."""
    return CONFIGS[request.param]
