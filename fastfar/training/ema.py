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
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average = {
            name: parameter.detach().float().clone() for name, parameter in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present weights in."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [parameter.detach().float() for parameter in model.parameters()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1.0 - decay)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's weights by the average."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.average[name])

    def state_dict(self) -> dict[str, Tensor | int]:
        return {**self.average, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        self.updates = int(state["updates"])
        for name, value in self.average.items():
            value.copy_(torch.as_tensor(state[name]))
