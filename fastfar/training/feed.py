"""The micro-batches of a run on one process: images, labels and draws, read and drawn ahead."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfar.data import Batches, Examples
from fastfar.training.draws import Share
from fastfar.training.loss import TrainingDraws


@dataclass(frozen=True)
class MicroBatch:
    """images (B, C, H, W) float32 and labels (B,) on the device; the draws on the CPU."""

    images: Tensor
    labels: Tensor
    draws: TrainingDraws


class Feed:
    """Iterator over the steps of a run: the micro-batches of each, without end.

    Args:
        data: what is trained on.
        share: the images of this process.
        first_step: where to begin.
        device: to which images and labels are copied. For a GPU the draws of the next step are
            made in a thread meanwhile; on a CPU that would only take the time from the model.
        workers: processes that read the data.
    """

    def __init__(
        self, data: Examples, share: Share, first_step: int, device: torch.device, workers: int
    ) -> None:
        self.share, self.step, self.device = share, first_step, device
        self._gpu = device.type == "cuda"
        self._batches = Batches(data, share.rows, first_step, workers=workers, pin=self._gpu)
        self._thread = ThreadPoolExecutor(1, "fastfar-draws") if self._gpu else None
        self._next: Future[list[TrainingDraws]] | None = None

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        images, labels = (
            each.to(self.device, non_blocking=self._gpu) for each in next(self._batches)
        )
        draws = self._draws()
        self.step += 1
        parts = zip(images.chunk(len(draws)), labels.chunk(len(draws)), draws, strict=True)
        return [MicroBatch(*part) for part in parts]

    def _draws(self) -> list[TrainingDraws]:
        if self._thread is None:
            return self.share.draws(self.step)
        if self._next is None:
            self._next = self._thread.submit(self.share.draws, self.step)
        draws = self._next.result()
        self._next = self._thread.submit(self.share.draws, self.step + 1)
        return draws

    def close(self) -> None:
        """End the thread and the worker processes."""
        self._batches.close()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
