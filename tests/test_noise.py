"""noise.py: one image is the same alone or in a batch, on every back end."""

from __future__ import annotations

import math
import os
import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from fastfar import noise as noises
from fastfar.noise import CheckedNoise, SeededNoise, TensorNoise, draws, seeded_noise

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


# --- drawn ahead -----------------------------------------------------------------------------

COUNTS = (3, 1, 4, 2)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few numbers are drawn by threads, too, and there are cores for three."""
    monkeypatch.setattr(noises, "FEW", 0)
    monkeypatch.setattr(noises, "_cores", lambda: 3)


def equal(ours: list[tuple[Tensor, Tensor]], noise: SeededNoise) -> bool:
    expected = [(noise.initial(k), noise.steps(k, count)) for k, count in enumerate(COUNTS)]
    pairs = zip(ours, expected, strict=True)
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def test_values_are_those_of_one_stream(threads: None) -> None:
    """Drawn in place, in pieces, by threads or not: an image's numbers are NumPy's in one go."""
    noise = source((3, 2), (9, 9))
    key, counter = np.array([9, 9], np.uint64), np.array([0, 0, 0, 2 * 2 + 2], np.uint64)
    stream = np.random.Generator(np.random.Philox(key=key, counter=counter))
    whole = torch.from_numpy(stream.standard_normal((4, L, P), dtype=np.float32))
    assert torch.equal(noise.steps(2, 4)[:, L:], whole)
    assert torch.equal(source((9, 9)).steps(2, 4), whole)
    for each in (noise, CheckedNoise(noise, 2, L, P)):
        for ahead in (False, True):
            assert equal(list(draws(each, COUNTS, ahead)), noise)


def test_no_more_threads_than_cores_or_outer_steps(
    threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watched(SeededNoise):
        used: set[int]

        def initial(self, step: int) -> Tensor:
            self.used.add(threading.get_ident())
            return super().initial(step)

    def used(cores: int, counts: tuple[int, ...]) -> set[int]:
        monkeypatch.setattr(noises, "_cores", lambda: cores)
        noise = Watched([(1, 1)], L, P)
        noise.used = set()
        before = threading.active_count()
        assert len(list(draws(noise, counts, ahead=True))) == len(counts)
        assert threading.active_count() == before, "none is left"
        return noise.used

    here = threading.get_ident()
    assert here not in used(3, COUNTS) and len(used(3, COUNTS)) <= 3
    assert here not in used(8, (1, 1)) and len(used(8, (1, 1))) <= 2
    assert used(1, COUNTS) == {here} and used(8, (1,)) == {here}
    monkeypatch.setattr(noises, "FEW", L * P * (sum(COUNTS) + len(COUNTS)))
    assert used(8, COUNTS) == {here}, "not worth a thread"


def test_what_a_thread_raises_arrives_in_its_turn(threads: None) -> None:
    class Failing(SeededNoise):
        def steps(self, step: int, count: int) -> Tensor:
            if step == 2:
                raise MemoryError("of outer step 2")
            return super().steps(step, count)

    drawn = draws(Failing([(1, 1)], L, P), COUNTS, ahead=True)
    before = [next(drawn), next(drawn)]
    with pytest.raises(MemoryError, match="of outer step 2"):
        next(drawn)
    assert torch.equal(before[1][1], source((1, 1)).steps(1, COUNTS[1]))
    wrong = CheckedNoise(source((1, 1)), 2, L, P)
    with pytest.raises(ValueError, match=r"initial\(0\) has shape"):
        list(draws(wrong, COUNTS, ahead=True))


def test_the_first_outer_step_does_not_wait_for_the_rest(threads: None) -> None:
    """And closing the generator starts no more of them."""
    go, asked = threading.Event(), []

    class Slow(SeededNoise):
        def initial(self, step: int) -> Tensor:
            asked.append(step)
            assert step == 0 or go.wait(60)
            return super().initial(step)

    drawn = draws(Slow([(1, 1)], L, P), tuple(range(1, 9)), ahead=True)
    assert torch.equal(next(drawn)[0], source((1, 1)).initial(0))
    threading.Timer(0.1, go.set).start()
    drawn.close()
    assert set(asked) <= set(range(4)), "three were being drawn at most"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_between_two_runs(threads: None) -> None:
    noise = source((3, 2), (9, 9))
    drawn = draws(noise, COUNTS, ahead=True)
    next(drawn)
    drawn.close()
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if equal(list(draws(noise, COUNTS, ahead=True)), noise) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert equal(list(draws(noise, COUNTS, ahead=True)), noise)


@pytest.mark.gpu
def test_pinned(threads: None) -> None:
    noise = source((3, 2), (9, 9))
    checked = CheckedNoise(noise, 2, L, P)
    ours = list(draws(checked, COUNTS, ahead=True, pinned=True))
    assert equal(ours, noise) and all(x.is_pinned() for pair in ours for x in pair)
    assert checked.source is noise and not noise.initial(0).is_pinned()
