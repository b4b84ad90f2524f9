"""The kernels of a run, recorded on fake tensors of a GPU that need not be there.

`Tracer` sees every ATen call (a TorchDispatchMode) and every launch of a Triton kernel
(`kernels/gpu/_launch.py`), in their order. Custom ops of fastfar are run, so that their launchers
launch; nothing is computed. Tiles and grids are therefore those of the real kernels.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastfar import backend, profiling
from fastfar.costs import kernels
from fastfar.costs.gpus import GPU
from fastfar.costs.kernels import Touch, Work, touch

_aten: Any = torch.ops.aten
# Names of calls that start no kernel. Views are found by their schema.
_FREE = ("empty", "new_empty", "_unsafe_view", "detach", "lift_fresh", "_reshape_alias")
# Calls of several kernels: statistics, then the result; keys, then the sort.
_SEVERAL = {"native_group_norm": 2, "sort": 2, "argsort": 2}
# Calls that read as much of their table as they return.
_GATHERS = ("embedding", "index", "gather", "index_select", "slice", "select")


@dataclass(frozen=True)
class Event:
    """A kernel of the run: the stage in which it ran, and what it does."""

    stage: str
    work: Work


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, kernels of what runs inside go to `events`.

    Use `tracing`, which sets up the rest.

    Attributes:
        events: kernels in their order.
        copies: blocking copies from the host to the GPU, one entry each: the stage.
        syncs: reads of a GPU tensor by the host: the stage.
        stage: under which the next kernels are filed: the innermost range of `fastfar.profiling`.
    """

    def __init__(self, gpu: GPU, launches: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gpu = gpu
        self.events: list[Event] = []
        self.copies: list[str] = []
        self.syncs: list[str] = []
        self.weights: dict[int, Tensor] = {}
        self._launches = launches
        self._ranges: list[str] = []
        self._known: set[int] = set()
        self._kept: list[Tensor] = []  # so that a storage's number is not used again
        self._cast: dict[tuple[int, torch.dtype], Tensor] = {}

    @property
    def stage(self) -> str:
        """The innermost range; "" outside of all."""
        return self._ranges[-1] if self._ranges else ""

    def know(self, tensors: Any, parameters: bool = False) -> None:
        """Tensors that are there before the run; parameters are cast by autocast only once."""
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor):
                self._remember(x)
                if parameters:
                    self.weights[id(x)] = x

    def _remember(self, x: Tensor) -> None:
        self._known.add(x.untyped_storage()._cdata)
        self._kept.append(x)

    def _is_known(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self._known

    def drain(self) -> None:
        """File the launches that were recorded since the last call."""
        for launch in self._launches:
            self._add(kernels.launched(launch, self._is_known))
            for x in launch.args:
                if isinstance(x, Tensor):
                    self._remember(x)
        self._launches.clear()

    def _add(self, work: Work) -> None:
        self.events.append(Event(self.stage, work))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.drain()
        if func.namespace == "profiler":
            return self._profiler(func, args, kwargs)
        if func.namespace == "fastfar":
            return self._custom(func, args, kwargs)
        if _on_host(args, kwargs):
            with unset_fake_temporarily():  # tables: a few real numbers, kept and used again
                return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default:
            self.syncs.append(self.stage)
            return 0.0 if args[0].is_floating_point() else 0
        key = None
        if func is _aten._to_copy.default and id(args[0]) in self.weights:
            key = (id(args[0]), kwargs.get("dtype", args[0].dtype))
            if key in self._cast:
                return self._cast[key]
        out = func(*args, **kwargs)
        if "convolution" in func.__name__ and _channels_last(args[0]):
            out = torch.empty_like(out, memory_format=torch.channels_last)  # as cuDNN answers
        if key is not None:
            self._cast[key] = out
        self._library(func, args, kwargs, out)
        return out

    def _profiler(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Ranges of `fastfar.profiling`."""
        if "enter" in func.__name__:
            self._ranges.append(str(args[0]))
        elif self._ranges:
            self._ranges.pop()
        return func(*args, **kwargs)

    def _custom(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """A custom op of fastfar: what it does on a GPU, on fake tensors."""
        definition = torch._library.custom_ops.OPDEFS.get(func._schema.name)
        if definition is None:
            return func(*args, **kwargs)
        with self:
            out = definition._init_fn(*args, **kwargs)
            self.drain()
        return out

    def _library(self, func: Any, args: tuple[Any, ...], kwargs: Any, out: Any) -> None:
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        name = str(func.overloadpacket.__name__)
        for x in outputs:
            self._kept.append(x)
        if func.is_view or name.startswith(_FREE) or not any(x.is_cuda for x in outputs):
            return
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(not x.is_cuda and x.ndim for x in inputs):
            self.copies.append(self.stage)
            return
        for work in library_works(self.gpu, name, args, inputs, outputs):
            self._add(work)
        for x in outputs:
            self._remember(x)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """PyTorch's fused attention: one kernel. Layout (B, heads, S, E)."""
        self.drain()
        out = torch.empty_like(query)
        touches = (*(touch(x) for x in (query, key, value)), touch(out, writes=True))
        batch, heads, queries, width = query.shape
        self._add(
            kernels.attention(
                "attention",
                batch * heads,
                queries,
                key.shape[2],
                width,
                query.element_size(),
                dtype=query.dtype,
                touches=touches,
            )
        )
        self._remember(out)
        return out


def _on_host(args: tuple[Any, ...], kwargs: Any) -> bool:
    """Whether a call neither reads GPU tensors nor makes one."""
    given = tree_leaves((args, kwargs))
    tensors = [x for x in given if isinstance(x, Tensor)]
    devices = [x for x in given if isinstance(x, torch.device)]
    fake = any(isinstance(x, FakeTensor) or x.is_cuda for x in tensors)
    return not fake and all(x.type != "cuda" for x in devices)


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class _Whole(TorchFunctionMode):
    """Keeps whole what fake tensors would take apart, and what needs a CUDA build of PyTorch."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self.tracer.attention(*args[:3])
        if func is Tensor.__getitem__ and args[0].is_cuda:
            return _indexed(*args)
        if func is Tensor.contiguous and args[0].is_cuda:
            layout = (kwargs or {}).get("memory_format", torch.contiguous_format)
            same = args[0].is_contiguous(memory_format=layout)
            return args[0] if same else args[0].clone(memory_format=layout)
        return func(*args, **(kwargs or {}))


def _indexed(x: Tensor, index: Any) -> Tensor:
    """x[index]; PyTorch's own asks the CUDA driver for the current device."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(entry is ... for entry in entries):
        place = next(i for i, entry in enumerate(entries) if entry is ...)
        named = sum(entry is not None and entry is not ... for entry in entries)
        entries[place : place + 1] = [slice(None)] * (x.ndim - named)
    axis, tensors = 0, list[Tensor | None]()
    for entry in entries:
        if isinstance(entry, Tensor):
            tensors += [None] * (axis - len(tensors)) + [entry]
        elif entry is None:
            x = x.unsqueeze(axis)
        elif isinstance(entry, slice):
            x = _aten.slice(x, axis, entry.start, entry.stop, entry.step or 1)
        else:
            x = _aten.select(x, axis, int(entry))
            continue
        axis += 1
    return x if not tensors else _aten.index(x, tensors)


@contextmanager
def tracing(gpu: GPU, autocast: torch.dtype | None = None) -> Iterator[Tracer]:
    """Fake tensors on a GPU of these figures inside; kernels go to the tracer's `events`.

    autocast: dtype of `torch.autocast` for CUDA, which cannot be turned on as usual without CUDA.
    """
    launching = importlib.import_module("fastfar.kernels.gpu._launch")
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(backend.described_gpu(gpu.arch))
        stack.enter_context(profiling.ranges())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        tracer = Tracer(gpu, stack.enter_context(launching.recording()))
        if autocast is not None:
            stack.enter_context(_autocast(autocast))
        stack.enter_context(_Whole(tracer))
        stack.enter_context(tracer)
        try:
            yield tracer
            tracer.drain()
        finally:
            _forget_tables()


def _forget_tables() -> None:
    """Empty fastfar's caches of tables: fake tensors must not be found by a real run."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fastfar.") and name not in ("fastfar.backend", "fastfar._native"):
            for value in list(vars(module).values()):
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()


@contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


# --- library calls ---------------------------------------------------------------------------


def library_works(
    gpu: GPU, name: str, args: tuple[Any, ...], inputs: list[Tensor], outputs: list[Tensor]
) -> list[Work]:
    """Kernels of an ATen call: products and convolutions by their shapes, the rest by bytes."""
    touches = tuple(touch(x) for x in inputs) + tuple(touch(x, writes=True) for x in outputs)
    if name in _PRODUCTS:
        return [_PRODUCTS[name](gpu, name, args, outputs[0], touches)]
    numbers = max(x.numel() for x in outputs)
    if name in _GATHERS:
        read = touches[len(inputs)].nbytes
        touches = tuple(replace(each, nbytes=min(each.nbytes, read)) for each in touches)
    works = [kernels.stream(name, numbers, touches)]
    for _ in range(_SEVERAL.get(name, 1) - 1):
        works.append(kernels.stream(name, numbers, touches[: len(inputs)]))
    return works


Product = Callable[[GPU, str, tuple[Any, ...], Tensor, tuple[Touch, ...]], Work]


def _mm(
    gpu: GPU, name: str, args: tuple[Any, ...], out: Tensor, touches: tuple[Touch, ...]
) -> Work:
    a, b = args[-2:]
    batch = a.shape[0] if a.ndim == 3 else 1
    return kernels.library_product(
        gpu,
        name,
        a.shape[-2],
        b.shape[-1],
        a.shape[-1],
        a.element_size(),
        batch=batch,
        dtype=a.dtype,
        touches=touches,
    )


def _convolution(
    gpu: GPU, name: str, args: tuple[Any, ...], out: Tensor, touches: tuple[Touch, ...]
) -> Work:
    """An implicit product: pixels by channels out, summed over channels in and taps."""
    weight = args[1]
    pixels = out.shape[0] * out.shape[2:].numel()
    depth = weight.shape[1:].numel()
    return kernels.library_product(
        gpu,
        name,
        pixels,
        out.shape[1],
        depth,
        out.element_size(),
        dtype=out.dtype,
        touches=touches,
    )


_PRODUCTS: Mapping[str, Product] = {
    "mm": _mm,
    "addmm": _mm,
    "bmm": _mm,
    "baddbmm": _mm,
    "convolution": _convolution,
    "_convolution": _convolution,
}
