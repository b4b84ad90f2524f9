"""Noise that neighbouring tokens share.

Legend: B image, L token, N = B L, P number of a token, T diffusion step, G side of the token grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfar.config import FARConfig
from fastfar.noise import NoiseSource, seeded_noise
from fastfar.pipeline import FARPipeline
from fastfar.plan import SamplingPlan


def pooled_cells(config: FARConfig, level: int | None) -> Tensor:
    """(L,) int64: the cell of each token, where the low pass to `level` averages whole cells.

    A level of ceil(H level / K) pixels a side that is not coarser than the token grid averages
    within tokens only: then every token is a cell of its own, as it is for None (not filtered).
    """
    grid = math.isqrt(config.num_tokens)
    side = grid
    if level is not None:
        side = min(grid, max(1, math.ceil(config.latent_size * level / config.num_levels)))
    cell_G = ((torch.arange(grid) + 0.5) * side / grid).long()
    return (cell_G[:, None] * side + cell_G).flatten()


class CorrelatedNoise:
    """`source` with correlation r between the tokens of a cell; every token alone stays N(0, 1).

    Within a cell of m tokens, n' = sqrt(1 - r) (n - mean n) + sqrt(1 + (m - 1) r) mean n. The cells
    of outer step k are those that the input of step k + 1 averages; after the last step none.

    Args:
        source: what is asked.
        plan, config: levels and sizes.
        correlation: r in [0, 1].

    Raises:
        ValueError: r out of range.
    """

    def __init__(
        self, source: NoiseSource, plan: SamplingPlan, config: FARConfig, correlation: float
    ) -> None:
        if not 0.0 <= correlation <= 1.0:
            raise ValueError(f"the correlation is {correlation}: it must lie in [0, 1]")
        self._source, self._correlation = source, correlation
        levels = [*plan.input_levels[1:], None]
        self._cells = [pooled_cells(config, level) for level in levels]

    def initial(self, step: int) -> Tensor:
        return self._mixed(self._source.initial(step)[None], step)[0]

    def steps(self, step: int, count: int) -> Tensor:
        return self._mixed(self._source.steps(step, count), step)

    def order(self) -> Tensor:
        return self._source.order()

    def _mixed(self, noise_TNP: Tensor, step: int) -> Tensor:
        cell_L, r = self._cells[step], self._correlation
        if r == 0.0 or int(cell_L.max()) + 1 == len(cell_L):
            return noise_TNP
        member_CL = (torch.unique(cell_L)[:, None] == cell_L).to(noise_TNP)
        count_L = member_CL.sum(dim=1) @ member_CL
        mean_LL = member_CL.mT @ member_CL / count_L
        noise_XLP = noise_TNP.reshape(-1, len(cell_L), noise_TNP.shape[-1])
        mean_XLP = mean_LL @ noise_XLP
        of_mean_L1 = (1.0 + (count_L - 1.0) * r).sqrt()[:, None]
        mixed: Tensor = math.sqrt(1.0 - r) * (noise_XLP - mean_XLP) + of_mean_L1 * mean_XLP
        return mixed.reshape(noise_TNP.shape)


class WithCorrelation:
    """A pipeline whose seeded noise is correlated: what `draw_samples` calls."""

    def __init__(self, pipeline: FARPipeline, correlation: float) -> None:
        self._pipeline, self._correlation = pipeline, correlation

    def __call__(
        self,
        class_labels: list[int],
        *,
        generator: Sequence[torch.Generator],
        plan: SamplingPlan,
        **call: Any,
    ) -> Any:
        config = self._pipeline.model.config
        shape = (len(class_labels), config.num_tokens, config.token_dim)
        source = seeded_noise(generator, *shape)
        noise = CorrelatedNoise(source, plan, config, self._correlation)
        return self._pipeline(class_labels, plan=plan, noise=noise, **call)
