"""graphs.py without a GPU: buffers, keys, cache, whole or by level, and what it refuses.

A recorder of PyTorch's ops stands in for CUDA graphs (tests/recorder.py); tests/gpu/test_graphs.py
has the real ones.
"""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorder import RecordingCapturer
from tiny_run import tiny_pipeline
from torch import Tensor

import fastfar
from fastfar import FAR, SamplingPlan, SeededNoise, graphs, pipeline
from fastfar import noise as noises
from fastfar.graphs import GraphCache
from fastfar.levels import filter_table
from fastfar.noise import CheckedNoise, NoiseSource
from fastfar.ops import _denoise_triton, use_backend
from fastfar.outer_step import OuterStep
from fastfar.rows import Rows
from fastfar.solver import PUBLISHED

SHORT = SamplingPlan.official("nomask", diffusion_steps=2).with_changes(
    levels=(0, 3, 6), input_levels=(None, 3, 6), guidance_ramp=(0.0, 0.5, 0.9),
    temperatures=(0.9, 0.95, 1.0), diffusion_steps=(2, 3, 1), x0_range=(-2.0, 2.0),
)  # fmt: skip
MASKED = SHORT.with_changes(mask_ratios=(1.0, 0.6, 0.2), guidance_ramp=(1.0, 0.5, 0.9))
# The head of its first two steps runs on the tokens alone that stay visible.
UNFILTERED = MASKED.with_changes(input_levels=(None, None, 16))
PLANS = pytest.mark.parametrize(
    "plan", [SHORT, MASKED, UNFILTERED], ids=["nomask", "mask", "mask, not filtered"]
)


class Captures:
    """A cache of recorded graphs, and what it captured."""

    def __init__(self, limit: int = 4) -> None:
        self.made: list[RecordingCapturer] = []
        self.cache = GraphCache(self._make, limit)

    def _make(self, device: torch.device) -> RecordingCapturer:
        self.made.append(RecordingCapturer(device))
        return self.made[-1]

    def sample(
        self,
        model: FAR,
        labels: list[int],
        plan: SamplingPlan,
        seed: int = 0,
        on_level: Callable[[int, Tensor], object] | None = None,
        noise: NoiseSource | None = None,
    ) -> Tensor:
        with torch.inference_mode(), use_backend("torch"):
            rows: Rows = "fixed" if on_level is None else "all"
            step = OuterStep(model, model.head_weights, plan, torch.float32, rows)
            noise = noise or seeded(model, seed, len(labels))
            return graphs.sample(step, torch.tensor(labels), noise, on_level, self.cache)


def seeded(model: FAR, seed: int, batch: int) -> SeededNoise:
    config = model.config
    keys = [(seed, image) for image in range(batch)]
    return SeededNoise(keys, config.num_tokens, config.token_dim)


def eager(model: FAR, labels: list[int], plan: SamplingPlan, seed: int = 0, **more: Any) -> Tensor:
    return fastfar.sample_latents(
        model, labels, plan, generator=seed, backend="torch", dtype=torch.float32, **more
    )


@pytest.fixture
def captures() -> Captures:
    return Captures()


# --- what a replay computes ------------------------------------------------------------------


@PLANS
@pytest.mark.parametrize("by_level", [False, True], ids=["whole", "by level"])
def test_a_replay_equals_eager_sampling(
    tiny_model: FAR, captures: Captures, plan: SamplingPlan, by_level: bool
) -> None:
    """Of other labels, noise and order than those of the capture: all are read from buffers."""
    seen: list[Tensor] = []

    def on_level(step: int, latent: Tensor) -> None:
        assert step == len(seen)
        seen.append(latent)

    expected: list[Tensor] = []
    for labels, seed in (([0, 4], 0), ([2, 2], 5), ([4, 0], 0)):
        seen.clear()
        expected.clear()
        truth = eager(tiny_model, labels, plan, seed, on_level=lambda k, x: expected.append(x))
        ours = captures.sample(tiny_model, labels, plan, seed, on_level if by_level else None)
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)
        assert len(seen) == (len(plan) if by_level else 0)
        for step, x in enumerate(seen):
            torch.testing.assert_close(x, expected[step], rtol=1e-5, atol=1e-6)
    assert len(captures.made) == 1
    runs = list(range(len(plan))) if by_level else [0]
    assert captures.made[0].replays == 3 * runs


def test_a_graph_of_one_image_is_exactly_eager(tiny_model: FAR, captures: Captures) -> None:
    """One class, and as many rows, so that both do the same products."""
    for label, seed in ((1, 3), (4, 3), (1, 4)):
        ours = captures.sample(tiny_model, [label], UNFILTERED, seed)
        assert torch.equal(ours, eager(tiny_model, [label], UNFILTERED, seed))
    assert len(captures.made) == 1


def test_results_are_copies(tiny_model: FAR, captures: Captures) -> None:
    seen: list[Tensor] = []
    first = captures.sample(tiny_model, [1], SHORT, 0)
    kept = first.clone()
    captures.sample(tiny_model, [2], SHORT, 1)
    assert torch.equal(first, kept)
    captures.sample(tiny_model, [1], SHORT, 0, lambda k, x: seen.append(x))
    assert len({x.data_ptr() for x in seen}) == len(SHORT) and torch.equal(seen[-1], kept)


def test_the_stand_in_shows_what_was_baked_in() -> None:
    """The test of the test: a number computed by Python at the capture stays what it was."""
    x, out = torch.zeros(3), torch.zeros(3)
    factor = [2.0]

    def body() -> None:
        out.copy_(x * factor[0] + 1.0)

    (replay,) = RecordingCapturer(torch.device("cpu")).capture([body])
    x.fill_(5.0)
    factor[0] = 100.0
    replay()
    assert out.tolist() == [11.0] * 3

    def sync() -> None:
        out.fill_(float(x.sum()))

    with pytest.raises(AssertionError, match="host sync"):
        RecordingCapturer(torch.device("cpu")).capture([sync])


# --- keys and the cache ----------------------------------------------------------------------


def test_what_makes_another_graph(tiny_model: FAR, captures: Captures) -> None:
    def count(*args: Any, **more: Any) -> int:
        captures.sample(tiny_model, *args, **more)
        return len(captures.made)

    assert count([1], SHORT) == 1
    assert count([3], SHORT, 7) == 1, "labels and seeds are data"
    assert count([1], SHORT.with_changes()) == 1, "an equal plan"
    assert count([1, 2], SHORT) == 2, "batch"
    assert count([1], SHORT.with_changes(guidance_scale=2.0)) == 3, "plan"
    assert count([1], SHORT, on_level=lambda k, x: None) == 4, "whole or by level"
    assert count([1], SHORT) == 4, "all four are kept"


def test_the_attention_back_end_is_part_of_the_key(tiny_model: FAR, captures: Captures) -> None:
    captures.sample(tiny_model, [1], SHORT)
    tiny_model.set_attention_backend("sdpa")
    captures.sample(tiny_model, [1], SHORT)
    assert len(captures.made) == 2


def test_the_least_recently_used_graph_goes(tiny_model: FAR) -> None:
    captures = Captures(limit=2)
    for labels in ([1], [1, 2], [1], [1, 2, 3], [1]):  # [1, 2] is the oldest when the third comes
        captures.sample(tiny_model, labels, SHORT)
    assert len(captures.made) == 3
    captures.sample(tiny_model, [1, 2], SHORT)
    assert len(captures.made) == 4


def test_graphs_go_with_their_model(tiny_model: FAR, captures: Captures) -> None:
    other = copy.deepcopy(tiny_model)
    captures.sample(tiny_model, [1], SHORT)
    captures.sample(other, [1], SHORT)
    assert len(captures.made) == 2 and len(captures.cache._kept) == 2
    del other
    gc.collect()
    assert len(captures.cache._kept) == 1


def test_changed_weights_are_captured_anew(tiny_model: FAR, captures: Captures) -> None:
    first = captures.sample(tiny_model, [1], SHORT)
    with torch.no_grad():
        tiny_model.head.input_proj.weight.mul_(2.0)
    second = captures.sample(tiny_model, [1], SHORT)
    assert len(captures.made) == 2
    torch.testing.assert_close(second, eager(tiny_model, [1], SHORT), rtol=1e-5, atol=1e-6)
    assert not torch.equal(first, second)
    tiny_model.class_emb.weight = torch.nn.Parameter(tiny_model.class_emb.weight.detach() + 1.0)
    third = captures.sample(tiny_model, [1], SHORT)
    assert len(captures.made) == 3 and not torch.equal(second, third)
    (kept,) = captures.cache._kept.values()
    assert len(kept) == 1, "the old graphs are gone"


def test_a_graph_by_level_where_the_noise_is_large(
    tiny_model: FAR, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = OuterStep(tiny_model, tiny_model.head_weights, SHORT, torch.float32)
    one_image = 4 * 9 * 8 * (sum(SHORT.diffusion_steps) + len(SHORT))
    monkeypatch.setattr(graphs, "MAX_NOISE_BYTES", 2 * one_image)
    assert graphs.fits_whole(step, 2) and not graphs.fits_whole(step, 3)
    captures.sample(tiny_model, [1, 2], SHORT)
    captures.sample(tiny_model, [1, 2, 3], SHORT)
    assert [len(made.recorders) for made in captures.made] == [1, len(SHORT)]


# --- threads ---------------------------------------------------------------------------------


def test_threads_take_turns(tiny_model: FAR, captures: Captures) -> None:
    expected = {seed: captures.sample(tiny_model, [seed], SHORT, seed) for seed in range(4)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(3):
            if not torch.equal(captures.sample(tiny_model, [seed], SHORT, seed), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(captures.made) == 1


def test_sampling_inside_on_level_is_refused(tiny_model: FAR, captures: Captures) -> None:
    """The same graph would overwrite its own buffers."""

    def on_level(step: int, latent: Tensor) -> None:
        captures.sample(tiny_model, [2], SHORT, on_level=on_level)

    with pytest.raises(ValueError, match=r"graphs\.disabled"):
        captures.sample(tiny_model, [1], SHORT, on_level=on_level)
    captures.sample(tiny_model, [1], SHORT, on_level=lambda k, x: None)  # and it still works


def test_an_error_in_on_level_leaves_the_graph_usable(
    tiny_model: FAR, captures: Captures
) -> None:
    def on_level(step: int, latent: Tensor) -> None:
        raise KeyError(step)

    with pytest.raises(KeyError):
        captures.sample(tiny_model, [1], SHORT, on_level=on_level)
    ours = captures.sample(tiny_model, [1], SHORT, on_level=lambda k, x: None)
    assert torch.equal(ours, eager(tiny_model, [1], SHORT))


# --- what is drawn, what is refused ----------------------------------------------------------


def test_noise_is_drawn_by_threads(
    tiny_model: FAR, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeded noise is; a user's source is asked in order, by the thread that samples."""
    alone = captures.sample(tiny_model, [1], SHORT, 3)
    monkeypatch.setattr(noises, "FEW", 0)
    monkeypatch.setattr(noises, "_cores", lambda: 3)
    asked: list[tuple[int, int]] = []

    class Watched(SeededNoise):
        def steps(self, step: int, count: int) -> Tensor:
            asked.append((step, threading.get_ident()))
            return super().steps(step, count)

    config = tiny_model.config
    noise = Watched([(3, 0)], config.num_tokens, config.token_dim)
    assert torch.equal(captures.sample(tiny_model, [1], SHORT, noise=noise), alone)
    assert threading.get_ident() not in {thread for _, thread in asked}
    captures.sample(tiny_model, [1], SHORT, on_level=lambda k, x: None, noise=noise)
    assert threading.get_ident() not in {thread for _, thread in asked}
    monkeypatch.setattr(graphs, "MAX_NOISE_BYTES", 1)  # more than what the host is to hold
    asked.clear()
    fresh = Captures()
    fresh.sample(tiny_model, [1], SHORT, on_level=lambda k, x: None, noise=noise)
    assert asked == [(k, threading.get_ident()) for k in range(len(SHORT))]
    monkeypatch.undo()
    asked.clear()

    class Foreign:
        initial, order = noise.initial, noise.order

        def steps(self, step: int, count: int) -> Tensor:
            return noise.steps(step, count)

    checked = CheckedNoise(Foreign(), 1, config.num_tokens, config.token_dim)
    assert torch.equal(captures.sample(tiny_model, [1], SHORT, noise=checked), alone)
    assert asked == [(k, threading.get_ident()) for k in range(len(SHORT))]


def test_graphs_need_a_cuda_device(tiny_model: FAR) -> None:
    step = OuterStep(tiny_model, tiny_model.head_weights, SHORT, torch.float32)
    with pytest.raises(ValueError, match=r"CUDA device.*'cpu'"):
        graphs.sample(step, torch.tensor([1]), seeded(tiny_model, 0, 1), None)


def test_where_graphs_are_wanted() -> None:
    assert graphs.wanted(torch.device("cuda", 0)) and not graphs.wanted(torch.device("cpu"))
    with graphs.disabled():
        assert not graphs.wanted(torch.device("cuda", 0))
    assert graphs.wanted(torch.device("cuda", 0))


def test_a_pipeline_that_nobody_listens_to_needs_no_graph_by_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listeners: list[tuple[object, bool]] = []

    def sampled(*args: Any, **more: Any) -> Tensor:
        listeners.append((args[7], more["whole_levels"]))
        return torch.zeros(1, 1, 8, 8)

    monkeypatch.setattr(pipeline, "sample_latents", sampled)
    pipe = tiny_pipeline()
    pipe(1, output_type="latent")
    pipe(1, output_type="latent", callback_on_level_end=lambda pipe, step, latents: None)
    pipe.set_progress_bar_config(disable=False, file=io.StringIO())
    pipe(1, output_type="latent")
    assert [on_level is None for on_level, _ in listeners] == [True, False, False]
    assert [whole for _, whole in listeners] == [False, True, False], "a bar shows no latents"


def test_tables_that_a_graph_points_to_are_never_dropped() -> None:
    """A replay does not look them up again, so no cache may forget them."""
    device = torch.device("cpu")
    table = weakref.ref(_denoise_triton._device_update_table(PUBLISHED, 2, 1000, 0.5, device))
    matrices = weakref.ref(filter_table(4, 3, "area_bicubic", device, torch.float32))
    for i in range(100):
        _denoise_triton._device_update_table(PUBLISHED, 2, 1000, 1.0 + i, device)
        filter_table(4, 4 + i, "area_bicubic", device, torch.float32)
    gc.collect()
    assert table() is not None and matrices() is not None
