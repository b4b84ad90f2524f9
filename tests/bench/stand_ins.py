"""Subjects that make no images, for tests of what runs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastfar.bench.estimate import Machine, Need
from fastfar.bench.gate import Gate
from fastfar.bench.subjects import Recipe, Subject


class StandIn:
    """Notes its calls in a list that all subjects of a test share."""

    def __init__(
        self, key: str, calls: list[str], gate: Gate | None = None, fails_at: int | None = None
    ) -> None:
        self.key = self.title = key
        self.calls, self.gate, self.fails_at = calls, gate or Gate(1e-3, 1e-2, "given"), fails_at
        self.model, self.form, self.mode = key, "native", "exact"
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.steps, self.num_parameters, self.random_weights = 10, 1000, True
        self.ways, self.shape, self.plan_name, self.plan_mode = "stands in", "none", "none", "none"
        self.extrapolation: str | None = None
        self.plan: dict[str, Any] | None = None

    def labels(self, batch: int) -> Tensor:
        return torch.arange(batch)

    def draw(self, batch: int) -> None:
        return None

    def run(self, labels_B: Tensor, source: Any) -> Tensor:
        self.calls.append(self.key)
        if self.fails_at is not None and self.calls.count(self.key) > self.fails_at:
            raise KeyboardInterrupt
        return labels_B

    def decode(self, tokens: Tensor) -> Tensor:
        return tokens.float()

    def check(self) -> Gate:
        self.calls.append(f"check {self.key}")
        return self.gate

    def reference_flops(self, batch: int) -> int:
        return batch * 1000

    def executed_flops(self, batch: int) -> int | None:
        return batch * 1000


def recipe(subject: StandIn, family: str | None = None, reason: str | None = None) -> Recipe:
    """A recipe of a subject that stands already."""

    def build(shared: dict[str, Any]) -> Subject:
        subject.calls.append(f"build {subject.key}")
        return subject

    return Recipe(subject, build, family or subject.key, reason)


def need_of_gigabytes(subject: Subject, machine: Machine) -> Need:
    """The key says how many: "a 3"."""
    return Need(1.0, 0.5, 1.0, int(subject.key.split()[1]) << 30, 0, 0)
