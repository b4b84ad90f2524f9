"""Exponential moving average of the weights, with warm-up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastfar.training.distributed import own, whole


class EMA:
    """average <- d average + (1 - d) weight with d = min(decay, (1 + n) / (10 + n)) at update n.

    The warm-up matters in short runs: at a plain 0.9999 the average needs some 50,000 steps to
    forget the initial weights.

    Args:
        model: its parameters are averaged in float32. Those that FSDP has sharded stay sharded:
            every process averages its own part.
        decay: final d in [0, 1].
        device: where the averages are kept; None is beside the weights. "cpu" frees 4 bytes a
            parameter of a GPU, for a copy of its weights to the CPU at every update.

    Raises:
        ValueError: decay is out of range.
    """

    def __init__(
        self, model: nn.Module, decay: float, device: torch.device | str | None = None
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        self.decay, self.updates = decay, 0
        self.average: dict[str, Tensor] = {
            name: parameter.detach().to(device or parameter.device, torch.float32, copy=True)
            for name, parameter in model.named_parameters()
        }

    @property
    def next_decay(self) -> float:
        """d of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present weights in."""
        averages = [own(value) for value in self.average.values()]
        weights = [own(parameter.detach()) for parameter in model.parameters()]
        weights = [
            weight.to(average.device, torch.float32)
            for weight, average in zip(weights, averages, strict=True)
        ]
        torch._foreach_lerp_(averages, weights, 1.0 - self.next_decay)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the weights of a model that is not sharded; all processes must call it."""
        for name, parameter in model.named_parameters():
            parameter.copy_(whole(self.average[name]))

    def state_dict(self) -> dict[str, Tensor | int]:
        """The averages by parameter name (not copies), and "updates"."""
        return {**self.average, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Inverse of `state_dict`; ValueError for averages of another model."""
        names = {*self.average, "updates"}
        if differing := sorted(names ^ set(state)):
            raise ValueError(f"these averages are of another model; names that differ: {differing}")
        self.updates = int(state["updates"])
        for name, value in self.average.items():
            value.copy_(torch.as_tensor(state[name]))
