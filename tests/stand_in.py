"""A stand-in for a trained pipeline, quick and repeatable."""

from __future__ import annotations

from time import sleep
from types import SimpleNamespace
from typing import Any

import torch

from fastfar.plan import SamplingPlan
from fastfar.tokenizer import PixelTokenizer


class StandIn:
    """A pipeline whose images depend on label and generator alone; stops after `limit` calls.

    shape: (C, H, W) of its images. seconds: that a call takes.
    """

    def __init__(
        self,
        limit: int | None = None,
        shape: tuple[int, int, int] = (1, 32, 32),
        seconds: float = 0.0,
    ) -> None:
        self.model: Any = torch.nn.Linear(2, 2)
        self.model.config = SimpleNamespace(
            num_classes=10, latent_channels=shape[0], latent_size=shape[1]
        )
        self.tokenizer = PixelTokenizer(0.0, 1.0)
        torch.nn.init.ones_(self.model.weight)
        torch.nn.init.zeros_(self.model.bias)
        self.plan = SamplingPlan.official()
        self.limit, self.shape, self.seconds = limit, shape, seconds
        self.batches, self.labels = list[int](), list[int]()
        self.calls = list[dict[str, Any]]()

    def __call__(
        self,
        class_labels: list[int],
        *,
        generator: list[torch.Generator],
        output_type: str,
        **call: Any,
    ) -> Any:
        assert output_type == "pt" and len(class_labels) == len(generator)
        if self.limit == len(self.batches):
            raise KeyboardInterrupt
        self.batches.append(len(class_labels))
        self.labels += class_labels
        self.calls.append(call)
        sleep(self.seconds)
        images = torch.stack([torch.rand(self.shape, generator=g) for g in generator])
        brightness = torch.tensor(class_labels).view(-1, 1, 1, 1) % 10 / 9
        return SimpleNamespace(images=images * brightness)
