"""What every test shares: one thread, fixed seeds, golden files, a small model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import interpreter  # noqa: F401
import pytest
import torch
from formula import fill_by_formula
from safetensors import safe_open
from torch import Tensor

from fastfar import _native, backend
from fastfar._packages import cuda_reason
from fastfar.config import FARConfig
from fastfar.model import FAR

GOLDEN = Path(__file__).parent / "golden"


# The files that take longest: compilers, and processes that start anew.
LONGEST = (
    "test_native.py",
    "test_packaging.py",
    "test_distributed.py",
    "test_compiled_kernels.py",
    "test_compile.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that workers which take a file at a time end together.

    The marker `gpu` skips a test, with the reason, where there is no CUDA device.
    """
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    reason = cuda_reason()
    if reason is not None:
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and lose much where a neighbour is computing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def library() -> _native.NativeLibrary:
    """The native library; without one the test is skipped, unless FASTFAR_REQUIRE_NATIVE is 1."""
    reason = _native.reason()
    if reason is not None and os.environ.get("FASTFAR_REQUIRE_NATIVE") != "1":
        pytest.skip(f"native library: {reason}")
    return _native.load()


@pytest.fixture(params=backend.INSTRUCTION_SETS)
def isa(library: _native.NativeLibrary, request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set in turn, selected; skipped, with the reason, where one is off."""
    reason = library.instruction_sets()[request.param]
    if reason is not None:
        pytest.skip(reason)
    before = library.selected
    yield library.select(request.param)
    library.select(before)


@dataclass(frozen=True)
class Golden:
    """Tensors and metadata of one recorded file."""

    tensors: dict[str, Tensor]
    meta: dict[str, str]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with `prefix`, without it."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """golden(name) reads tests/golden/<name>.safetensors."""

    def read(name: str) -> Golden:
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return Golden(tensors, file.metadata())

    return read


@pytest.fixture(scope="session")
def tiny_config() -> FARConfig:
    """Everything small and odd: 9 tokens of 8 numbers (patch 2), 3 buffer positions."""
    return FARConfig(
        width=24,
        encoder_depth=2,
        decoder_depth=1,
        num_heads=3,
        head_depth=2,
        head_width=20,
        latent_channels=2,
        latent_size=6,
        patch_size=2,
        buffer_size=3,
        num_classes=5,
        dropout=0.1,
    )


@pytest.fixture
def tiny_model(tiny_config: FARConfig) -> FAR:
    """FAR of size `tiny_config`, weights by formula (no zero gates), eval mode, float32."""
    model = FAR(tiny_config).eval()
    fill_by_formula(model)
    return model
