"""noise.py: one image is the same alone or in a batch, on every back end."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastfar.noise import CheckedNoise, SeededNoise, TensorNoise, seeded_noise

L, P = 9, 4


def source(*keys: tuple[int, int]) -> SeededNoise:
    return SeededNoise(keys, L, P)


def test_shapes_and_types() -> None:
    noise = source((1, 0), (1, 1))
    assert noise.initial(3).shape == (2 * L, P) and noise.initial(3).dtype is torch.float32
    assert noise.steps(3, 5).shape == (5, 2 * L, P) and noise.steps(3, 5).dtype is torch.float32
    assert noise.order().shape == (2, L) and noise.order().dtype is torch.int64
    assert noise.order().sort(dim=1).values.tolist() == [list(range(L))] * 2


def test_a_draw_is_a_function_of_its_key_alone() -> None:
    noise = source((5, 1))
    first = noise.initial(2)
    noise.steps(0, 3), noise.order()  # asking for other draws changes nothing
    assert torch.equal(noise.initial(2), first) and torch.equal(source((5, 1)).initial(2), first)


def test_different_keys_and_steps_are_independent() -> None:
    draws = [
        source(key).initial(step).flatten()
        for key in [(0, 0), (0, 1), (1, 0), (2**63, 0), (2**64 - 1, 5)]
        for step in (0, 1, 9)
    ]
    draws += [source((0, 0)).steps(step, 1).flatten() for step in (0, 1, 9)]
    stacked = torch.stack(draws)
    assert len(stacked.unique(dim=0)) == len(draws)
    wide = torch.stack(
        [SeededNoise([key], 4096, 1).initial(0).flatten() for key in [(0, 0), (0, 1), (1, 0)]]
    )
    assert (torch.corrcoef(wide) - torch.eye(3)).abs().max() < 5 / math.sqrt(4096)


def test_more_diffusion_steps_only_append() -> None:
    noise = source((7, 0), (7, 1))
    assert torch.equal(noise.steps(4, 3), noise.steps(4, 11)[:3])


def test_batch_position_does_not_matter() -> None:
    alone, batch = source((3, 2)), source((9, 9), (3, 2), (3, 1))
    rows = slice(L, 2 * L)
    assert torch.equal(batch.initial(1)[rows], alone.initial(1))
    assert torch.equal(batch.steps(1, 4)[:, rows], alone.steps(1, 4))
    assert torch.equal(batch.order()[1:2], alone.order())


def test_standard_normal() -> None:
    x = SeededNoise([(11, 0)], 256, 16).steps(0, 25).double().flatten()
    n = len(x)
    for moment, expected, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        error = abs(float((x**moment).mean()) - expected)
        assert error < 4 * math.sqrt(variance / n), moment


def test_seeded_noise_accepts_what_diffusers_does() -> None:
    def first(generator: object, batch: int = 2) -> Tensor:
        noise = seeded_noise(generator, batch, L, P)  # type: ignore[arg-type]
        return noise.initial(0)

    def new(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    assert torch.equal(first(new(1)), first(new(1)))
    assert not torch.equal(first(new(1)), first(new(2)))
    assert torch.equal(first(5), first(5)) and not torch.equal(first(5)[:L], first(5)[L:])
    assert torch.equal(first(5, batch=1), first(5)[:L])
    per_image = first([new(1), new(2)])
    assert torch.equal(per_image[L:], first([new(2)], batch=1))
    torch.manual_seed(3)
    default = first(None)
    torch.manual_seed(3)
    assert torch.equal(first(None), default)
    generator = new(1)
    assert not torch.equal(first(generator), first(generator)), "a second call goes on"
    for count in (0, 1, 3):
        with pytest.raises(ValueError, match=f"{count} generators for 2 images"):
            first([new(0)] * count)


def tensor_noise(outer: int = 2, steps: int = 3, order: Tensor | None = None) -> TensorNoise:
    return TensorNoise(torch.randn(outer, L, P), torch.randn(outer, steps, L, P), order)


def test_tensor_noise_gives_back_what_it_was_given() -> None:
    initial, step = torch.randn(2, L, P), torch.randn(2, 3, L, P)
    order = torch.randperm(L)[None]
    noise = TensorNoise(initial, step, order)
    assert torch.equal(noise.initial(1), initial[1])
    assert torch.equal(noise.steps(1, 3), step[1]) and torch.equal(noise.steps(1, 2), step[1, :2])
    assert torch.equal(noise.order(), order)
    ragged = TensorNoise(list(initial), [step[0], step[1, :2]])  # T may vary
    assert len(ragged.steps(1, 2)) == 2


def test_tensor_noise_errors() -> None:
    with pytest.raises(ValueError, match="initial holds 2 outer steps and step 3"):
        TensorNoise(torch.randn(2, L, P), torch.randn(3, 3, L, P))
    with pytest.raises(ValueError, match="outer step 0"):
        TensorNoise(torch.randn(2, L, P), torch.randn(2, 3, L, P + 1))
    with pytest.raises(ValueError, match="needs noise for 4 diffusion steps, got 3"):
        tensor_noise().steps(0, 4)
    with pytest.raises(ValueError, match="order"):
        tensor_noise().order()
    for step in (2, -1):
        with pytest.raises(ValueError, match=f"outer step {step}"):
            tensor_noise().initial(step)
        with pytest.raises(ValueError, match=f"outer step {step}"):
            tensor_noise().steps(step, 1)


def test_checked_noise() -> None:
    good = CheckedNoise(tensor_noise(order=torch.randperm(L)[None]), 1, L, P)
    assert good.initial(0).shape == (L, P) and good.steps(0, 3).shape == (3, L, P)
    assert good.order().sort().values.tolist() == [list(range(L))]
    for sizes in [(2, L, P), (1, L + 1, P), (1, L, P + 1)]:
        bad = CheckedNoise(tensor_noise(), *sizes)
        with pytest.raises(ValueError, match=r"initial\(0\) has shape"):
            bad.initial(0)
        with pytest.raises(ValueError, match=r"steps\(0, 3\) has shape"):
            bad.steps(0, 3)
    for order in (torch.zeros(1, L, dtype=torch.int64), torch.arange(1, L + 1)[None]):
        with pytest.raises(ValueError, match="once per image"):
            CheckedNoise(tensor_noise(order=order), 1, L, P).order()
    with pytest.raises(ValueError, match=r"order\(\) has shape"):
        CheckedNoise(tensor_noise(order=torch.arange(L)), 1, L, P).order()
