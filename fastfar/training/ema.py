"""Exponential moving average of the weights, with warm-up."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EMA:
    """average <- d average + (1 - d) weight with d = min(decay, (1 + n) / (10 + n)) at update n.

    The warm-up matters in short runs: at a plain 0.9999 the average needs some 50,000 steps to
    forget the initial weights.

    Args:
        model: its parameters are averaged in float32.
        decay: final d in [0, 1].

    Raises:
        ValueError: decay is out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        self.decay = decay
        self.updates = 0
        self.average = {
            name: parameter.detach().float().clone() for name, parameter in model.named_parameters()
        }

    @property
    def next_decay(self) -> float:
        """d of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present weights in."""
        weights = [parameter.detach().float() for parameter in model.parameters()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1.0 - self.next_decay)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's weights by the average."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.average[name])

    def state_dict(self) -> dict[str, Tensor | int]:
        """The averages by parameter name (not copies), and "updates"."""
        return {**self.average, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Inverse of `state_dict`; ValueError for averages of another model."""
        names = {*self.average, "updates"}
        if differing := sorted(names ^ set(state)):
            raise ValueError(f"these averages are of another model; names that differ: {differing}")
        self.updates = int(state["updates"])
        for name, value in self.average.items():
            value.copy_(torch.as_tensor(state[name]))
