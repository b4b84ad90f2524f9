"""Scratch for native ops that shows what was read before it was written, and writes beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastfar.ops import _launch

GUARD = 256  # bytes; keeps the alignment of 64


class DirtyScratch:
    """Stands for `_launch.workspace`: every buffer is full of NaN and lies between two guards."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.buffers: list[Tensor] = []
        monkeypatch.setattr(_launch, "workspace", self._workspace)

    def _workspace(self, size: int) -> Tensor:
        buffer = torch.full((size + 2 * GUARD,), 0xFF, dtype=torch.uint8)
        self.buffers.append(buffer)
        return buffer[GUARD : GUARD + size]

    def check(self) -> None:
        """Buffers were used, and nothing beside them was written."""
        assert self.buffers
        for buffer in self.buffers:
            assert bool((buffer[:GUARD] == 0xFF).all() and (buffer[-GUARD:] == 0xFF).all())


def assert_same_on_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[], Tensor]
) -> None:
    """`call` gives the same bits, all finite, on 1 to 4 threads, from clean and dirty scratch."""
    before = torch.get_num_threads()
    expected = call()
    assert bool(expected.isfinite().all())
    scratch = DirtyScratch(monkeypatch)
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            for _ in range(2):
                assert torch.equal(call(), expected), f"{threads} threads"
    finally:
        torch.set_num_threads(before)
    scratch.check()
