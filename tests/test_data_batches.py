"""The loader: what a step gets depends on nothing but the step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_data
from torch import Tensor

from fastfar.data import Batches, Examples, ImageDataset
from fastfar.data import batches as batches_module


def rows(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    picked = torch.randint(0, 20, (4,), generator=generator)
    return picked, torch.rand(4, generator=generator) < 0.5


class Odd(ImageDataset):
    """Images of which one is late, one is broken, or one kills its reader until a file is there."""

    late = broken = deadly = -1
    marker: Path

    def take(
        self, rows_B: Tensor, flip_B: Tensor | None = None, seed_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.broken in rows_B:
            raise ValueError(f"image {self.broken} is broken")
        if self.late in rows_B:
            time.sleep(0.2)
        if self.deadly in rows_B and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().take(rows_B, flip_B, seed_B)


def odd(**settings: object) -> Odd:
    data = tiny_data()
    dataset = Odd(data.images, data.labels, data.class_names)
    for name, value in settings.items():
        object.__setattr__(dataset, name, value)
    return dataset


def in_order(step: int) -> tuple[Tensor, None]:
    return torch.tensor([step % 20]), None


def read(batches: Iterator[tuple[Tensor, Tensor]], count: int) -> list[Tensor]:
    return [next(batches)[0] for _ in range(count)]


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    data: Examples = tiny_data()
    return [data.take(*rows(step))[0] for step in range(12)]


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 2), (1, 1), (3, 2)])
def test_order_depends_on_steps_only(expected: list[Tensor], workers: int, prefetch: int) -> None:
    with Batches(tiny_data(), rows, 5, workers=workers, prefetch=prefetch) as batches:
        found = read(batches, 7)
        assert batches.step == 12
    assert all(map(torch.equal, found, expected[5:]))
    assert not torch.equal(expected[5], expected[6])


def test_a_slow_worker_is_waited_for() -> None:
    with Batches(odd(late=1), in_order, workers=2) as batches:
        labels = [int(next(batches)[1]) for _ in range(6)]
    assert labels == [0, 1, 2, 3, 0, 1]


def test_the_draws_of_the_process_are_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    handler = signal.getsignal(signal.SIGCHLD)
    with Batches(tiny_data(), rows, workers=1) as batches:
        next(batches)
        assert signal.getsignal(signal.SIGCHLD) == handler
    assert torch.equal(torch.get_rng_state(), before)


def test_a_killed_worker_is_replaced_and_nothing_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = odd(deadly=3, marker=tmp_path / "died")
    with Batches(data, in_order, workers=2) as batches:
        found = read(batches, 8)
    assert (tmp_path / "died").exists(), "nothing died"
    assert all(map(torch.equal, found, [data.take(*in_order(step))[0] for step in range(8)]))
    assert "with new workers" in caplog.text


def test_workers_that_always_die_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastfar.data.batches.MAX_RESTARTS", 0)
    marker = Path("/nowhere") / "at" / "all"
    monkeypatch.setattr(Path, "touch", lambda self: None)
    with (
        Batches(odd(deadly=0, marker=marker), in_order, workers=1) as batches,
        pytest.raises(RuntimeError, match=r"died 1 times in a row.*fewer workers"),
    ):
        next(batches)


def test_a_broken_connection_is_a_dead_worker_and_an_error_of_the_data_is_none() -> None:
    for error in (
        ConnectionResetError(),
        EOFError(),
        RuntimeError("DataLoader worker (pid 1) ..."),
        RuntimeError("Pin memory thread exited unexpectedly"),
    ):
        assert batches_module._worker_died(error)
    caught = "Caught FileNotFoundError in DataLoader worker process 0."
    for error in (FileNotFoundError(caught), RuntimeError(caught), RuntimeError("CUDA")):
        assert not batches_module._worker_died(error)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_data_comes_through(workers: int) -> None:
    with Batches(odd(broken=1), in_order, workers=workers) as batches:
        next(batches)
        with pytest.raises(ValueError, match="image 1 is broken"):
            next(batches)


def test_wrong_numbers_are_refused() -> None:
    for workers, prefetch in ((-1, 1), (1, 0)):
        with pytest.raises(ValueError, match="workers must be"):
            Batches(tiny_data(), rows, workers=workers, prefetch=prefetch)
