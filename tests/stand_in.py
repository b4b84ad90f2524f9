"""A stand-in for a trained pipeline, quick and repeatable."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from fastfar.plan import SamplingPlan


class StandIn:
    """A pipeline whose images depend on label and generator alone; stops after `limit` calls."""

    def __init__(self, limit: int | None = None) -> None:
        self.model = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(self.model.weight)
        torch.nn.init.zeros_(self.model.bias)
        self.plan = SamplingPlan.official()
        self.limit, self.batches, self.calls = limit, list[int](), list[dict[str, Any]]()

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
        self.calls.append(call)
        images = [torch.rand((1, 32, 32), generator=g) for g in generator]
        return SimpleNamespace(
            images=torch.stack(images) * torch.tensor(class_labels).view(-1, 1, 1, 1) / 9
        )
