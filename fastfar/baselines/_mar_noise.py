"""Where the random numbers of MAR's sampling come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MARNoise:
    """The draws of a sampling run.

    Attributes:
        order_BL: (B, L) int64, a random order of the tokens of each image; the last ones are
            predicted first.
        drawn: float32 tensors in the order drawn: for each outer step the start noise (N, P) of
            the N tokens that it predicts, image by image and in the order of their positions, then
            one tensor per diffusion step, whose first N rows are used.
    """

    order_BL: Tensor
    drawn: Sequence[Tensor]


class Draws:
    """Fresh random numbers.

    Args:
        device: of the results, and of the generator.
        generator: None is PyTorch's own.
    """

    def __init__(self, device: torch.device, generator: torch.Generator | None) -> None:
        self.device, self.generator = device, generator

    def order(self, batch: int, num_tokens: int) -> Tensor:
        """(B, L) int64, a random permutation in each row."""
        shape = (batch, num_tokens)
        return torch.rand(shape, device=self.device, generator=self.generator).argsort(dim=1)

    def next(self, rows: int, width: int) -> Tensor:
        """(rows, width) standard normal."""
        return torch.randn(rows, width, device=self.device, generator=self.generator)

    def several(self, count: int, rows: int, width: int) -> Tensor:
        """(count, rows, width): on a CPU what `next` would give in as many calls."""
        shape = (count, rows, width)
        return torch.randn(shape, device=self.device, generator=self.generator)

    def go_to(self, number: int) -> None:
        """Nothing: fresh numbers have no place."""


class Injected(Draws):
    """The draws of a `MARNoise`, one after the other."""

    def __init__(self, noise: MARNoise, device: torch.device) -> None:
        super().__init__(device, None)
        self.noise, self.number = noise, 0

    def order(self, batch: int, num_tokens: int) -> Tensor:
        """See `MARNoise`."""
        return self.noise.order_BL.to(self.device)

    def next(self, rows: int, width: int) -> Tensor:
        """The next draw; twice, where it has no rows for an unconditional half."""
        drawn = self.noise.drawn[self.number].to(self.device)
        self.number += 1
        # A copy: for a tensor from outside of inference mode code would be compiled anew.
        return torch.cat([drawn, drawn]) if 2 * len(drawn) == rows else drawn[:rows].clone()

    def several(self, count: int, rows: int, width: int) -> Tensor:
        """The next `count` draws."""
        return torch.stack([self.next(rows, width) for _ in range(count)])

    def go_to(self, number: int) -> None:
        """Take draw `number` next."""
        self.number = number
