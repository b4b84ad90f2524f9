"""Named ranges for profilers: NVTX for Nsight, and the same names in PyTorch's Chrome trace.

Off unless `ranges`, `heard_by` or `trace` is entered; off, `annotate` costs two looks. Names:
"outer step k", inside it "encoder", "decoder" and "level i" with "head" (training: "head" alone),
and "decode" for the tokenizer. A CUDA graph replays kernels without ranges: its replay is one
range, "graph" (or "graph of outer step k"); to see inside, sample under `graphs.disabled()`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch

from fastfar import backend
from fastfar._files import atomic_write

Listener = Callable[[str], AbstractContextManager[object]]

_users = 0  # of `ranges`, in all threads
_counting = threading.Lock()
_listeners: tuple[Listener, ...] = ()


_OFF = nullcontext()  # one object for all calls


def annotate(name: str, number: int | None = None) -> AbstractContextManager[None]:
    """A range called `name`, or "name number", around a with block.

    Nothing at all while ranges are off, and in code that torch.compile traces.
    """
    # In this order: compiled code that had seen the count would be compiled again when it changes.
    if torch.compiler.is_compiling() or not _users:
        return _OFF
    return _range(name if number is None else f"{name} {number}")


@contextmanager
def _range(name: str) -> Iterator[None]:
    nvtx = backend.nvtx()
    with torch.profiler.record_function(name), ExitStack() as stack:
        if nvtx is not None:
            push, pop = nvtx
            push(name)
            stack.callback(pop)
        for listener in _listeners:
            stack.enter_context(listener(name))
        yield


@contextmanager
def ranges() -> Iterator[None]:
    """Turn `annotate` on inside, in all threads: for a profiler that is attached from outside."""
    global _users
    with _counting:
        _users += 1
    try:
        yield
    finally:
        with _counting:
            _users -= 1


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """`ranges`, and each range that is opened inside also enters `listener(name)`: to time it."""
    global _listeners
    with ranges():
        with _counting:
            _listeners = (*_listeners, listener)
        try:
            yield
        finally:
            with _counting:
                _listeners = tuple(each for each in _listeners if each is not listener)


@contextmanager
def trace(path: str | Path | None) -> Iterator[None]:
    """Profile what runs inside and write a Chrome trace to `path`; None does nothing.

    Open it in chrome://tracing or ui.perfetto.dev. Written in one piece, and also where the block
    raises: what ran until then is in it.

    Raises:
        OSError: the file cannot be written.
    """
    if path is None:
        yield
        return
    activities = torch.profiler.supported_activities()  # type: ignore[no-untyped-call]
    profile = torch.profiler.profile(activities=activities)
    try:
        with ranges(), profile:
            yield
    finally:
        with atomic_write(path) as temporary:
            profile.export_chrome_trace(str(temporary))
