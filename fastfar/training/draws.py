"""What step n of a run looks at and draws: functions of the seed, n and an image's number alone.

So a run that goes on repeats nothing, and any number of processes and micro-batches draws the
same numbers as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastfar.training.loss import TrainingDraws, sample_draws
from fastfar.training.recipe import Recipe

# First number of a key: what is drawn from it.
_IMAGE, _BATCH, _EXAMPLE, _DROPOUT = range(4)


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(
        count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    )


def batch_rows(count: int, step: int, size: int, seed: int) -> Tensor:
    """(size,) rows of optimiser step `step`: each epoch is one permutation of `count` images.

    The images that are left over at the end of an epoch, fewer than a batch, are not used in it.
    """
    epoch, position = divmod(step, count // size)
    return _order(count, seed, epoch)[position * size : (position + 1) * size]


@dataclass(frozen=True)
class Share:
    """The images of each step that are one process's: numbers `first` to `last` of the batch.

    Attributes:
        recipe: of the run.
        count: images of the data.
        rank, size: of the process.
    """

    recipe: Recipe
    count: int
    rank: int = 0
    size: int = 1

    @property
    def images(self) -> range:
        """Their numbers within the batch."""
        each = self.recipe.batch_size // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def rows(self, step: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Arguments of `Examples.take`: rows of the data, which are mirrored (None without flips),
        and seeds of what is random in an example."""
        recipe, images = self.recipe, slice(self.images.start, self.images.stop)
        size = recipe.batch_size
        rows_B = batch_rows(self.count, step, size, recipe.seed)[images]
        generator = _generator(_EXAMPLE, recipe.seed, step)
        seed_B = torch.randint(2**62, (size,), generator=generator)[images]
        flip_B = (torch.rand(size, generator=generator) < 0.5)[images]
        return rows_B, flip_B if recipe.flip else None, seed_B

    def draws(self, step: int) -> list[TrainingDraws]:
        """Of every micro-batch of a step."""
        images, parts = self.images, self.recipe.accumulate
        each = len(images) // parts
        return [
            draws_of_images(self.recipe, step, images[k * each : (k + 1) * each])
            for k in range(parts)
        ]


def draws_of_images(recipe: Recipe, step: int, images: Sequence[int]) -> TrainingDraws:
    """The draws of some images of a step, by their numbers within the batch."""
    batch_level = None if recipe.level_per_image else _generator(_BATCH, recipe.seed, step)
    return sample_draws(
        recipe.config,
        len(images),
        mask_rule=recipe.mask_rule,
        batch_multiplier=recipe.batch_multiplier,
        label_dropout=recipe.label_dropout,
        level_per_image=recipe.level_per_image,
        levels=recipe.levels,
        target=recipe.target,
        generator=_generators(recipe, step, images),
        level_generator=batch_level,
    )


def _generators(recipe: Recipe, step: int, images: Sequence[int]) -> list[torch.Generator]:
    """One for each image of a step, by its number alone.

    One sequence gives all of them: mixing a key for every image took longer than what is drawn.
    """
    seeds = _sequence(_IMAGE, recipe.seed, step).generate_state(max(images, default=0) + 1)
    return [torch.Generator().manual_seed(int(seeds[image])) for image in images]


def dropout_seed(recipe: Recipe, step: int, rank: int) -> int:
    """For PyTorch's own generator, from which the model's dropout draws: one per process."""
    return _seed(_DROPOUT, recipe.seed, step, rank)


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(*key))


def _seed(*key: int) -> int:
    """32 bits that mix all of a key: PyTorch's CPU generator starts from no more."""
    return int(_sequence(*key).generate_state(1)[0])


def _sequence(*key: int) -> np.random.SeedSequence:
    """Its first n numbers are the same for every n."""
    return np.random.SeedSequence(key)
