"""Noise sources: every random number of a sampling run comes from one of these.

A source is asked once per outer step for all the noise of that step, so a captured loop can read
it from buffers that were filled ahead.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

FEW = 2**16  # numbers: drawn by now where a thread would only have been started


class NoiseSource(Protocol):
    """What `sample_latents` asks of its `noise` argument. N = B * L rows, image by image."""

    def initial(self, step: int) -> Tensor:
        """(N, P) float32: the start x_T of outer step `step`."""

    def steps(self, step: int, count: int) -> Tensor:
        """(count, N, P) float32: ancestral noise in the order used, first executed first."""

    def order(self) -> Tensor:
        """(B, L) int64: one random order of the tokens per image; the first ones stay masked."""


class TensorNoise:
    """Injected draws, for parity tests.

    Args:
        initial: (S, N, P), or one (N, P) tensor per outer step.
        step: (S, T, N, P), or one (T, N, P) tensor per outer step where T varies.
        order: (B, L) int64, needed by masked plans only.

    Raises:
        ValueError: the shapes do not fit each other, or masked sampling asks for a missing order.
    """

    def __init__(
        self,
        initial: Tensor | Sequence[Tensor],
        step: Tensor | Sequence[Tensor],
        order: Tensor | None = None,
    ) -> None:
        if len(initial) != len(step):
            raise ValueError(
                f"initial holds {len(initial)} outer steps and step {len(step)}; give one entry "
                "per outer step in both"
            )
        for k, (start, ancestral) in enumerate(zip(initial, step, strict=True)):
            if start.shape != ancestral.shape[1:]:
                raise ValueError(
                    f"outer step {k}: initial noise is {tuple(start.shape)}, step noise is "
                    f"{tuple(ancestral.shape)}; expected (N, P) and (T, N, P)"
                )
        self._initial, self._step, self._order = initial, step, order

    def initial(self, step: int) -> Tensor:
        self._check_step(step)
        return self._initial[step]

    def _check_step(self, step: int) -> None:
        if not 0 <= step < len(self._initial):
            raise ValueError(
                f"no noise for outer step {step}: this TensorNoise holds {len(self._initial)}; "
                "give one entry per outer step of the plan"
            )

    def steps(self, step: int, count: int) -> Tensor:
        self._check_step(step)
        noise_TNP = self._step[step]
        if len(noise_TNP) < count:
            raise ValueError(
                f"outer step {step} needs noise for {count} diffusion steps, got {len(noise_TNP)}"
            )
        return noise_TNP[:count]

    def order(self) -> Tensor:
        if self._order is None:
            raise ValueError("a masked plan needs TensorNoise(..., order=...) of shape (B, L)")
        return self._order


class SeededNoise:
    """Counter-based noise: a function of (seed, image, outer step, diffusion step) alone.

    One image is the same alone or in a batch, at any batch position, on every back end. The
    generator is Philox, keyed by (seed, image) with the counter's high word at the outer step;
    diffusion steps follow each other in its stream, so a prefix of T steps is the same for
    every T.

    Args:
        keys: (seed, image) per image, whole numbers in 0..2**64 - 1.
        num_tokens, token_dim: L and P.
    """

    def __init__(self, keys: Sequence[tuple[int, int]], num_tokens: int, token_dim: int) -> None:
        self._keys = [(seed % 2**64, image % 2**64) for seed, image in keys]
        self._shape = (num_tokens, token_dim)
        self._pinned = False

    def _generator(self, key: tuple[int, int], stream: int) -> np.random.Generator:
        counter = np.array([0, 0, 0, stream], dtype=np.uint64)
        return np.random.Generator(
            np.random.Philox(key=np.array(key, dtype=np.uint64), counter=counter)
        )

    def _draw(self, stream: int, count: int) -> Tensor:
        shape = (count, len(self._keys), *self._shape)
        noise_TBLP = torch.empty(shape, dtype=torch.float32, pin_memory=self._pinned)
        for image, key in enumerate(self._keys):
            generator = self._generator(key, stream)
            part_TLP = noise_TBLP[:, image]
            # In place and in as few pieces as lie together; a stream is the same in any pieces.
            for piece in [part_TLP] if part_TLP.is_contiguous() else part_TLP:
                generator.standard_normal(dtype=np.float32, out=piece.numpy())
        return noise_TBLP.flatten(1, 2)

    @property
    def numbers(self) -> int:
        """N P, of one diffusion step of all images."""
        return len(self._keys) * math.prod(self._shape)

    def pinned(self) -> SeededNoise:
        """The same noise, drawn into page-locked memory: a GPU copies it while others work."""
        other = copy.copy(self)
        other._pinned = True
        return other

    def initial(self, step: int) -> Tensor:
        return self._draw(2 * step + 1, 1)[0]

    def steps(self, step: int, count: int) -> Tensor:
        return self._draw(2 * step + 2, count)

    def order(self) -> Tensor:
        length = self._shape[0]
        orders = [self._generator(key, 0).permutation(length) for key in self._keys]
        return torch.from_numpy(np.stack(orders))


class CheckedNoise:
    """A noise source of the user's, with every answer checked against the run that it is for.

    Args:
        source: what is asked.
        batch, num_tokens, token_dim: B, L and P of the run.

    Raises:
        ValueError: an answer has another shape, or the order is not one permutation per image.
    """

    def __init__(self, source: NoiseSource, batch: int, num_tokens: int, token_dim: int) -> None:
        self.source = source
        self._rows = (batch * num_tokens, token_dim)
        self._order = (batch, num_tokens)

    def initial(self, step: int) -> Tensor:
        return self._checked(self.source.initial(step), self._rows, f"initial({step})")

    def steps(self, step: int, count: int) -> Tensor:
        noise_TNP = self.source.steps(step, count)
        return self._checked(noise_TNP, (count, *self._rows), f"steps({step}, {count})")

    def order(self) -> Tensor:
        order_BL = self._checked(self.source.order(), self._order, "order()")
        counted_L = torch.arange(self._order[1], device=order_BL.device)
        if not bool((order_BL.sort(dim=1).values == counted_L).all()):
            raise ValueError(
                f"noise.order() must hold every number of 0..{self._order[1] - 1} once per image"
            )
        return order_BL.long()

    @staticmethod
    def _checked(answer: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
        if tuple(answer.shape) != shape:
            raise ValueError(
                f"noise.{name} has shape {tuple(answer.shape)}, this run needs {shape} "
                "(N = images * tokens rows, P numbers per token)"
            )
        return answer


def seeded_noise(
    generator: torch.Generator | Sequence[torch.Generator] | int | None,
    batch: int,
    num_tokens: int,
    token_dim: int,
) -> SeededNoise:
    """The noise source for diffusers' `generator` argument.

    Args:
        generator: one generator (each image takes a seed from it in turn), one generator per
            image, a whole number (image i gets the key (seed, i)), or None (PyTorch's default
            generator).

    Raises:
        ValueError: the list's length is not the batch size.
    """
    if isinstance(generator, int):
        return SeededNoise([(generator, i) for i in range(batch)], num_tokens, token_dim)
    if generator is None or isinstance(generator, torch.Generator):
        generators: Sequence[torch.Generator | None] = [generator] * batch
    else:
        generators = list(generator)
        if len(generators) != batch:
            raise ValueError(
                f"got {len(generators)} generators for {batch} images; give one generator, or "
                "one per image"
            )
    seeds = []
    for g in generators:
        device = "cpu" if g is None else g.device
        seeds.append(int(torch.randint(2**63 - 1, (), generator=g, device=device)))
    return SeededNoise([(seed, 0) for seed in seeds], num_tokens, token_dim)


def draws(
    noise: NoiseSource,
    diffusion_steps: Sequence[int],
    ahead: bool = False,
    pinned: bool = False,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """(initial(k), steps(k, T_k)) of every outer step k in turn.

    Args:
        noise: what is asked.
        diffusion_steps: T_k.
        ahead: seeded noise is drawn for all outer steps at once, by a thread each as far as there
            are cores, the first ones first. Other sources are asked step by step, by this thread.
        pinned: seeded noise lies in page-locked memory (which needs a GPU).

    Whatever drawing raises is raised at its outer step. Closing the generator waits for the threads
    that are drawing, and no others start.
    """
    source = noise.source if isinstance(noise, CheckedNoise) else noise
    if pinned and type(source) is SeededNoise:  # one of a subclass may not be copied
        noise = _with_source(noise, source.pinned())

    def draw(k: int) -> tuple[Tensor, Tensor]:
        return noise.initial(k), noise.steps(k, diffusion_steps[k])

    count = len(diffusion_steps)
    threads = min(_cores(), count)
    seeded = source.numbers if isinstance(source, SeededNoise) else 0
    if ahead and threads > 1 and seeded * (sum(diffusion_steps) + count) > FEW:
        # A pool of its own: it costs less than a millisecond, and no thread outlives it, so that
        # a process may fork between two runs.
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(draw, range(count))
    else:
        yield from map(draw, range(count))


def _with_source(noise: NoiseSource, source: SeededNoise) -> NoiseSource:
    """`source`, checked as `noise` is."""
    if not isinstance(noise, CheckedNoise):
        return source
    other = copy.copy(noise)
    other.source = source
    return other


def _cores() -> int:
    """Cores that this process may run on; more of them than PyTorch's threads, as a rule."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
