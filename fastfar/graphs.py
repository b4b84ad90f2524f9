"""CUDA graphs of whole images: hundreds of thousands of launches become one.

A graph replays recorded kernels on the same memory. So everything that differs between two runs of
one plan and batch size lies in static buffers, which are filled before the replay: labels, token
order, and all noise, drawn ahead on the host.

One graph holds all outer steps. Where `on_level` is given, or where the noise of all steps would
take more than `MAX_NOISE_BYTES`, there is one graph per outer step; they share memory and buffers.
Decoding is another graph (fastfar/decoding.py): the tokenizer is a model with a life of its own.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fastfar import backend
from fastfar._tables import fingerprint
from fastfar.model import FAR
from fastfar.noise import NoiseSource, draws
from fastfar.outer_step import Inputs, OuterStep
from fastfar.plan import SamplingPlan
from fastfar.profiling import annotate
from fastfar.rows import Rows

OnLevel = Callable[[int, Tensor], object]
Body = Callable[[], None]

MAX_GRAPHS = 8  # kept per model
MAX_NOISE_BYTES = 512 * 2**20  # of the noise buffers of one graph

_enabled: ContextVar[bool] = ContextVar("fastfar_graphs", default=True)


@contextmanager
def disabled() -> Iterator[None]:
    """Sample without graphs inside (in this thread or task only): to profile or to debug."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def wanted(device: torch.device) -> bool:
    """Whether sampling on `device` uses graphs."""
    return device.type == "cuda" and _enabled.get()


def refuse_inside_capture(device: torch.device) -> None:
    """ValueError where a CUDA graph is being captured.

    Asked before weights are prepared: what is made inside a capture is recorded, not computed.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "a CUDA graph is being captured already, and sampling draws its noise on the host: "
            "capture the model's forward, or call sample_latents outside of the capture"
        )


# --- what captures ---------------------------------------------------------------------------


class Capturer(Protocol):
    """What is asked of a device, so that tests can stand in for one."""

    def capture(self, bodies: Sequence[Body]) -> list[Body]:
        """Run each body once, then record each; calling a result replays its record.

        The bodies are replayed in their order, and may share memory for what they make.
        """

    def fill(self, buffer: Tensor, value: Tensor) -> None:
        """Copy `value` into `buffer`, after what was asked of the device so far."""

    def in_turn(self) -> AbstractContextManager[None]:
        """What is asked of the device inside starts when the last such block's work is done."""


class CudaCapturer:
    """CUDA graphs on one device, sharing one memory pool.

    Raises:
        ValueError: no graph can be captured on that device, or what is to be captured waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"CUDA graphs need a model on a CUDA device, this one is on {str(device)!r}; move "
                "it there, or sample under fastfar.graphs.disabled()"
            )
        self._device = device
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def capture(self, bodies: Sequence[Body]) -> list[Body]:
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for body in bodies:  # compiles kernels, makes tables and workspaces
                    body()
            torch.cuda.current_stream().wait_stream(side)
            pool = torch.cuda.graph_pool_handle()
            return [self._record(body, side, pool) for body in bodies]

    def _record(self, body: Body, side: torch.cuda.Stream, pool: Any) -> Body:
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream()
        try:
            # Other threads may go on allocating and copying meanwhile.
            with torch.cuda.graph(
                graph, pool=pool, stream=side, capture_error_mode="thread_local"
            ):
                body()
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own behind
            _end_capture(side)
            raise ValueError(
                f"sampling could not be captured as a CUDA graph: {error}. Choose another "
                "attention back end, or sample under fastfar.graphs.disabled()"
            ) from error
        replay: Body = graph.replay
        return replay

    def fill(self, buffer: Tensor, value: Tensor) -> None:
        # PyTorch reuses pinned memory only when the copies from it are done.
        staged = value.pin_memory() if value.device.type == "cpu" else value
        buffer.copy_(staged, non_blocking=True)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done.record(stream)


def _end_capture(side: torch.cuda.Stream) -> None:
    """An empty capture: only one that succeeds gives the default generator back to eager code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side):
            pass


class Graphed:
    """function(*tensors) -> tensor, recorded once and replayed on every call.

    Args:
        function: reads nothing that changes between calls but its arguments.
        examples: arguments of the shapes, dtypes and device of all later ones.
        capturer: None is the device's own.

    Raises:
        ValueError: the examples are not on a CUDA device, or the function waits for it.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        examples: Sequence[Tensor],
        capturer: Capturer | None = None,
    ) -> None:
        self._capturer = capturer or CudaCapturer(examples[0].device)
        self._running = threading.Lock()
        self._buffers = [example.clone() for example in examples]
        self._out = examples[0]

        def body() -> None:
            self._out = function(*self._buffers)

        (self._replay,) = self._capturer.capture([body])

    def __call__(self, *arguments: Tensor) -> Tensor:
        """A copy of the result, which the next call would write over."""
        with self._running, self._capturer.in_turn():
            for buffer, value in zip(self._buffers, arguments, strict=True):
                self._capturer.fill(buffer, value)
            self._replay()
            return self._out.clone()


# --- what is captured ------------------------------------------------------------------------


class ImageGraph:
    """The outer steps of one plan and batch size, captured, with their buffers.

    Args:
        step: what is captured; not kept, so that a graph does not hold its model.
        batch: B.
        whole: one graph for all outer steps, or one for each.
        capturer: of the model's device.
    """

    def __init__(self, step: OuterStep, batch: int, whole: bool, capturer: Capturer) -> None:
        self.whole = whole
        self._plan = plan = step.plan
        self._capturer = capturer
        self._running = threading.Lock()
        self._owner: int | None = None
        # Held, so that their memory is not handed to others: an equal fingerprint means the same
        # weights.
        self._weights = (*step.model.parameters(), step.head, step.moments)
        self._fingerprint = _weights_of(step)

        device, dtype = step.model.fake_latent.device, step.state_dtype
        labels_B = torch.zeros(batch, dtype=torch.int64, device=device)
        order_BL = None
        if plan.mask_ratios is not None:
            length = torch.arange(step.model.config.num_tokens, device=device)
            order_BL = length.repeat(batch, 1)
        # One class per image: the number of distinct ones is no constant.
        self._inputs = Inputs(labels_B, torch.arange(batch, device=device), order_BL)
        self._latent_BCHH = torch.zeros(step.latent_shape(batch), dtype=dtype, device=device)
        shapes = [step.noise_shape(k, batch) for k in range(len(plan))]
        self._ahead = fits_whole(step, batch)  # all of it on the host at once
        if whole:
            self._noise = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
            self._initial = [torch.zeros_like(noise_TNP[0]) for noise_TNP in self._noise]
        else:  # one buffer, filled anew for every outer step
            longest = torch.zeros(max(shapes), dtype=dtype, device=device)
            self._noise = [longest[:count] for count, _, _ in shapes]
            self._initial = [torch.zeros_like(longest[0])] * len(plan)

        def body(steps: Sequence[int]) -> None:
            for k in steps:
                noise = self._initial[k], self._noise[k]
                self._latent_BCHH.copy_(step(k, self._inputs, self._latent_BCHH, *noise))

        parts = [range(len(plan))] if whole else [range(k, k + 1) for k in range(len(plan))]
        self._replays = capturer.capture([partial(body, part) for part in parts])

    def is_of(self, step: OuterStep) -> bool:
        """Whether the weights that it reads are still those of `step`."""
        return self._fingerprint == _weights_of(step)

    def run(self, labels_B: Tensor, noise: NoiseSource, on_level: OnLevel | None) -> Tensor:
        """Sample: (B,) labels -> (B, C, H, H), a tensor of its own, as are those of `on_level`."""
        if self._owner == threading.get_ident():
            raise ValueError(
                "on_level was called from a CUDA graph and samples with the same graph again; "
                "sample inside it under fastfar.graphs.disabled()"
            )
        with self._running, self._capturer.in_turn():
            self._owner = threading.get_ident()
            try:
                return self._run(labels_B, noise, on_level)
            finally:
                self._owner = None

    def _run(self, labels_B: Tensor, noise: NoiseSource, on_level: OnLevel | None) -> Tensor:
        fill = self._capturer.fill
        fill(self._inputs.classes_C, labels_B)
        if self._inputs.order_BL is not None:
            fill(self._inputs.order_BL, noise.order())
        pinned = self._latent_BCHH.is_cuda
        with closing(draws(noise, self._plan.diffusion_steps, self._ahead, pinned)) as drawn:
            for k, (initial_NP, noise_TNP) in enumerate(drawn):
                fill(self._initial[k], initial_NP)
                fill(self._noise[k], noise_TNP)
                if not self.whole:
                    with annotate("graph of outer step", k):
                        self._replays[k]()
                    if on_level is not None:
                        on_level(k, self._latent_BCHH.clone())
        if self.whole:
            with annotate("graph"):
                self._replays[0]()
        return self._latent_BCHH.clone()


def _weights_of(step: OuterStep) -> tuple[int, ...]:
    moments = () if step.moments is None else step.moments.state_dict().values()
    return fingerprint((*step.model.parameters(), *step.head.values(), *moments))


# --- which are kept --------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """What a graph is made for, besides model and weights."""

    plan: SamplingPlan
    batch: int
    dtype: torch.dtype
    device: torch.device
    attention: tuple[object, ...]
    float32_precision: str
    rows: Rows
    whole: bool


def _attention(model: FAR) -> tuple[object, ...]:
    """What the choice of attention's implementation depends on, besides shapes and device."""
    return (
        model.attention_backend,
        backend.attention(),
        torch.are_deterministic_algorithms_enabled(),
    )


class GraphCache:
    """The graphs of every model that were used last, `limit` of each; they go with their model."""

    def __init__(
        self, capturer: Callable[[torch.device], Capturer], limit: int = MAX_GRAPHS
    ) -> None:
        self._capturer = capturer
        self._limit = limit
        self._lock = threading.Lock()
        self._kept: weakref.WeakKeyDictionary[FAR, OrderedDict[Key, ImageGraph]] = (
            weakref.WeakKeyDictionary()
        )

    def get(self, step: OuterStep, batch: int, whole: bool) -> ImageGraph:
        """The graph of `step`; captured where there is none, or where weights have changed."""
        model = step.model
        device = model.fake_latent.device
        precision = torch.get_float32_matmul_precision()
        key = Key(
            step.plan, batch, step.dtype, device, _attention(model), precision, step.rows, whole
        )
        with self._lock:
            graphs = self._kept.setdefault(model, OrderedDict())
            graph = graphs.pop(key, None)
            if graph is None or not graph.is_of(step):
                graph = None  # frees the old one's memory first
                while len(graphs) >= self._limit:
                    graphs.popitem(last=False)
                graph = ImageGraph(step, batch, whole, self._capturer(device))
            graphs[key] = graph
            return graph


_cache = GraphCache(CudaCapturer)


def fits_whole(step: OuterStep, batch: int) -> bool:
    """Whether the noise of all outer steps fits into `MAX_NOISE_BYTES`."""
    _, rows, numbers = step.noise_shape(0, batch)
    count = (step.plan.head_calls + len(step.plan)) * rows * numbers
    return count * step.state_dtype.itemsize <= MAX_NOISE_BYTES


def sample(
    step: OuterStep,
    labels_B: Tensor,
    noise: NoiseSource,
    on_level: OnLevel | None,
    cache: GraphCache | None = None,
) -> Tensor:
    """`sample_latents` through a graph, captured at the first call for this plan and batch size.

    Raises:
        ValueError: outside CUDA, inside another capture, or where the steps cannot be captured.
    """
    refuse_inside_capture(step.model.fake_latent.device)
    whole = on_level is None and fits_whole(step, len(labels_B))
    graph = (_cache if cache is None else cache).get(step, len(labels_B), whole)
    return graph.run(labels_B, noise, on_level)
