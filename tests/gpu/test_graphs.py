"""CUDA graphs of whole images: equal to eager sampling bit for bit, and captured when they must be.

On a CPU the same bodies run through a recorder of PyTorch's ops (tests/recorder.py).
"""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from recorder import RecordingCapturer
from tiny_far import tiny_model
from torch import Tensor

from fastfar import FAR, SamplingPlan, graphs, sample_latents, sampling
from fastfar.graphs import CudaCapturer, GraphCache
from fastfar.ops import use_backend

NOMASK = SamplingPlan.official("nomask", guidance_scale=2.0, diffusion_steps=2).with_changes(
    x0_range=(-3.0, 3.0)
)
MASK = SamplingPlan.official("mask", guidance_scale=2.0, diffusion_steps=2).with_changes(
    x0_range=(-3.0, 3.0)
)
PLANS = pytest.mark.parametrize("plan", [NOMASK, MASK], ids=["nomask", "mask"])


class Captures:
    """The graphs of `sample_latents`, counted."""

    def __init__(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = device
        self.count = 0
        kind = CudaCapturer if device.type == "cuda" else RecordingCapturer

        def make(where: torch.device) -> Any:
            self.count += 1
            return kind(where)

        monkeypatch.setattr(graphs, "_cache", GraphCache(make))
        if device.type == "cpu":  # PyTorch's ops, as if they were Triton's
            monkeypatch.setattr(graphs, "wanted", lambda device: graphs._enabled.get())
            monkeypatch.setattr(sampling, "use_backend", lambda name: use_backend("torch"))
            monkeypatch.setattr(sampling, "FOLDED_DTYPES", ())
        self.model = tiny_model().to(device)

    def sample(self, labels: list[int], plan: SamplingPlan, seed: int = 0, **more: Any) -> Tensor:
        more = {"model": self.model, "dtype": torch.float32, **more}
        model: FAR = more.pop("model")
        return sample_latents(model, labels, plan, generator=seed, backend="triton", **more)

    def eager(self, *args: Any, **more: Any) -> Tensor:
        with graphs.disabled():
            return self.sample(*args, **more)


@pytest.fixture
def captures(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Captures:
    return Captures(device, monkeypatch)


@PLANS
@pytest.mark.parametrize("by_level", [False, True], ids=["whole", "by level"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_to_eager_bit_for_bit(
    captures: Captures, plan: SamplingPlan, by_level: bool, dtype: torch.dtype
) -> None:
    """Other labels and noise than those of the capture. Each class once, in ascending order, so
    that the first outer step multiplies the same rows."""
    seen: list[Tensor] = []
    expected: list[Tensor] = []
    for labels, seed in (([1, 7], 0), ([2, 5], 3), ([1, 7], 4)):
        seen.clear()
        expected.clear()
        # Both look at latents or none does: whole latents are products of more rows.
        to_seen = (lambda step, x: seen.append(x)) if by_level else None
        to_expected = (lambda step, x: expected.append(x)) if by_level else None
        ours = captures.sample(labels, plan, seed, dtype=dtype, on_level=to_seen)
        truth = captures.eager(labels, plan, seed, dtype=dtype, on_level=to_expected)
        assert bool(ours.isfinite().all()) and torch.equal(ours, truth)
        assert len(seen) == (len(plan) if by_level else 0)
        for x, y in zip(seen, expected, strict=True):
            assert torch.equal(x, y)
    assert captures.count == 1


def test_equal_classes(captures: Captures) -> None:
    """Eager sampling computes the first condition of a class once, a graph for every image."""
    ours, truth = captures.sample([3, 3], MASK), captures.eager([3, 3], MASK)
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_changed_weights(captures: Captures) -> None:
    first = captures.sample([1], NOMASK)
    with torch.no_grad():
        captures.model.head.input_proj.weight.mul_(2.0)
        captures.model.class_emb.weight.add_(1.0)
    second = captures.sample([1], NOMASK)
    assert captures.count == 2
    assert torch.equal(second, captures.eager([1], NOMASK)) and not torch.equal(first, second)


def test_what_is_kept(captures: Captures) -> None:
    for plan, labels in ((NOMASK, [1]), (MASK, [1]), (NOMASK, [1, 2]), (NOMASK, [4]), (MASK, [4])):
        captures.sample(labels, plan)
    assert captures.count == 3
    other = copy.deepcopy(captures.model)
    captures.sample([1], NOMASK, model=other)
    assert captures.count == 4 and len(graphs._cache._kept) == 2
    del other
    gc.collect()
    assert len(graphs._cache._kept) == 1


def test_another_attention_back_end_is_another_graph(captures: Captures) -> None:
    first = captures.sample([1], NOMASK)
    captures.model.set_attention_backend("sdpa_math")
    second = captures.sample([1], NOMASK)
    assert captures.count == 2
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    if device.type == "cpu":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def test_two_threads(captures: Captures) -> None:
    """On a stream each, with the same graph: they take turns, on the device as on the host."""
    expected = {seed: captures.sample([seed], NOMASK, seed) for seed in (1, 2)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        with own_stream(captures.device):
            for _ in range(10 if captures.device.type == "cuda" else 1):
                if not torch.equal(captures.sample([seed], NOMASK, seed), expected[seed]):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and captures.count == 1


def test_a_capture_while_another_thread_works(captures: Captures) -> None:
    """Allocations and copies of another thread do not disturb it."""
    stop = threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with own_stream(captures.device):
                while not stop.is_set():
                    torch.randn(64, 64).to(captures.device).square().sum()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        ours = captures.sample([1], NOMASK)
    finally:
        stop.set()
        thread.join()
    assert not failed and torch.equal(ours, captures.eager([1], NOMASK))


@pytest.mark.gpu
def test_sampling_inside_a_capture_is_refused() -> None:
    model = tiny_model().to("cuda")
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=side), pytest.raises(ValueError, match="captured already"):
        sample_latents(model, [1], NOMASK, generator=0, backend="triton", dtype=torch.float32)
    sample_latents(model, [1], NOMASK, generator=0, backend="triton", dtype=torch.float32)


@pytest.mark.gpu
def test_what_cannot_be_captured_says_so() -> None:
    x = torch.ones(3, device="cuda")

    def body() -> None:
        x.mul_(float(x.sum()))

    with pytest.raises(ValueError, match=r"graphs\.disabled"):
        CudaCapturer(x.device).capture([body])
    torch.cuda.synchronize()
    assert bool(x.isfinite().all())
    assert bool(torch.randn(3, device="cuda").isfinite().all()), "eager code draws as before"
