"""The batches of a training run, read ahead by worker processes.

Which rows step n takes is a function of n alone, asked in this process, and PyTorch's loader gives
results back in the order in which they were asked: neither the number of workers nor their speed
can change what step n gets.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastfar.data.images import Examples

MAX_RESTARTS = 3  # in a row, without a batch in between

Batch = tuple[Tensor, Tensor]
Rows = Callable[[int], tuple[Tensor | None, ...]]

_log = logging.getLogger("fastfar")


class Batches:
    """Iterator over optimiser steps (or micro-batches): images (B, C, H, W) and labels (B,).

        with Batches(data, lambda step: (rows_of(step), None), first_step=run.step) as batches:
            for images_BCHW, labels_B in batches:  # without end: the run knows its last step

    Args:
        data: what is read; worker processes get a copy (forked, else pickled).
        rows: step -> the arguments of `data.take`: (rows_B, flip_B), or (rows_B, flip_B, seed_B).
            It is asked ahead of time, in this process, also for steps that are never used.
        first_step: where to begin.
        workers: processes; 0 reads in this one, when a batch is asked for.
        prefetch: batches that each worker keeps ready.
        pin: put batches into pinned memory, for copies to a GPU beside the computation.

    A worker that dies (killed, out of memory) is replaced, with a warning, and its batches are read
    again: nothing is lost or repeated.

    Raises:
        ValueError: workers or prefetch is out of range.
        RuntimeError: on `next`, where new workers died `MAX_RESTARTS` times in a row.
        Exception: on `next`, what `data.take` raised in a worker, with its traceback.
    """

    def __init__(
        self,
        data: Examples,
        rows: Rows,
        first_step: int = 0,
        *,
        workers: int = 0,
        prefetch: int = 2,
        pin: bool = False,
    ) -> None:
        if workers < 0 or prefetch < 1:
            raise ValueError(
                f"workers must be at least 0 and prefetch at least 1, got {workers} and {prefetch}"
            )
        self.data, self.rows, self.step = data, rows, first_step
        self.workers, self.prefetch, self.pin = workers, prefetch, pin
        self._loaded: Iterator[Batch] | None = None

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        if not self.workers:
            images, labels = _Take(self.data)[self.rows(self.step)]
            batch = (images.pin_memory(), labels.pin_memory()) if self.pin else (images, labels)
        else:
            batch = self._next_of_workers()
        self.step += 1
        return batch

    def close(self) -> None:
        """End the workers; iterating again starts new ones."""
        # The loader's iterator ends its processes when it is let go.
        self._loaded = None

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _next_of_workers(self) -> Batch:
        for attempt in range(MAX_RESTARTS + 1):
            try:
                if self._loaded is None:
                    self._loaded = self._start()
                return next(self._loaded)
            except (RuntimeError, OSError, EOFError) as error:
                self.close()
                if not _worker_died(error):
                    raise
                if attempt == MAX_RESTARTS:
                    raise RuntimeError(
                        f"the processes that read step {self.step} died {attempt + 1} times in a "
                        f"row ({error}). They may be out of memory: use fewer workers or a smaller "
                        "prefetch; workers=0 reads in the main process and shows what is wrong"
                    ) from error
                _log.warning("reading step %d again, with new workers: %s", self.step, error)
        raise AssertionError("unreachable")

    def _start(self) -> Iterator[Batch]:
        loader = DataLoader(
            _Take(self.data),
            batch_size=None,  # an index is a whole batch already
            sampler=_Steps(self.rows, self.step),
            num_workers=self.workers,
            prefetch_factor=self.prefetch,
            collate_fn=_as_it_is,
            pin_memory=self.pin,
            worker_init_fn=_quiet_worker,
            generator=torch.Generator(),  # else it draws from the generator of the whole process
        )
        with _own_child_handler():
            return iter(loader)


def read(
    data: Examples, batches: Sequence[Tensor], workers: int = 0
) -> Generator[Batch, None, None]:
    """Images and labels of every batch of rows, in order, then no more; as `Batches`."""

    def rows_of(step: int) -> tuple[Tensor]:  # also asked for steps after the last, unused
        return (batches[min(step, len(batches) - 1)],)

    with Batches(data, rows_of, workers=workers) as loader:
        for _ in batches:
            yield next(loader)


class _Take(Dataset[Batch]):
    """A data set for PyTorch's loader whose index is the arguments of `take`."""

    def __init__(self, data: Examples) -> None:
        self.data = data

    def __getitem__(self, arguments: Any) -> Batch:
        return self.data.take(*arguments)


class _Steps:
    """A sampler without end: the arguments of `take`, step by step."""

    def __init__(self, rows: Rows, first_step: int) -> None:
        self.rows, self.step = rows, first_step

    def __iter__(self) -> Iterator[tuple[Tensor | None, ...]]:
        step = self.step
        while True:
            yield self.rows(step)
            step += 1


def _as_it_is(batch: Any) -> Any:
    return batch


def _quiet_worker(number: int) -> None:
    """Ctrl-C is the main process's to handle; a forked handler of SIGTERM must not stay either."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _own_child_handler() -> Iterator[None]:
    """Undo the loader's handler of SIGCHLD.

    It raises wherever the main thread is when a worker dies, in the middle of an optimiser step for
    example. Without it the loader finds the dead worker when it next waits for a batch.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGCHLD, before)


def _worker_died(error: Exception) -> bool:
    """Whether an error is that of a dead worker: PyTorch has no type of its own for it.

    A worker that dies while it hands over a batch leaves a broken connection (OSError, EOFError).
    What `take` raised, of whatever type, comes back with the worker's traceback in its text.
    """
    text = str(error)
    if "in DataLoader worker process" in text:
        return False
    # The thread that pins memory ends with the connection that it reads from.
    died = ("DataLoader worker", "Pin memory thread exited")
    return not isinstance(error, RuntimeError) or text.startswith(died)
