"""How an op finds its implementation.

`@op` turns the PyTorch implementation of an op into the op: calling it runs the implementation of
the active back end where there is one, and the PyTorch one otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, ParamSpec, TypeVar

import torch

Params = ParamSpec("Params")
Result = TypeVar("Result")

_active: ContextVar[str] = ContextVar("fastfar_backend", default="torch")
_traced = "torch"  # what compiled code sees: a plain global, which it is guarded by


class Op(Generic[Params, Result]):
    """A named function with one implementation per back end."""

    def __init__(self, function: Callable[Params, Result]) -> None:
        functools.update_wrapper(self, function)
        self.name: str = function.__name__
        self.implementations: dict[str, Callable[..., Any]] = {"torch": function}

    def register(self, backend: str, function: Callable[Params, Result]) -> None:
        """Add the implementation of one back end; same signature as the op."""
        self.implementations[backend] = function

    def __call__(self, *args: Params.args, **kwargs: Params.kwargs) -> Result:
        table = self.implementations
        name = _traced if torch.compiler.is_compiling() else _active.get()
        chosen = table.get(name, table["torch"])
        result: Result = chosen(*args, **kwargs)
        return result


def op(function: Callable[Params, Result]) -> Op[Params, Result]:
    """Decorator: the PyTorch implementation becomes the op of the same name."""
    return Op(function)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops called inside on back end `name` (in this thread or task only).

    Code that torch.compile traces takes the back end that was set last in any thread, and is
    compiled again when it changes.
    """
    global _traced
    before = _traced
    # A compiler traces what sets the global, but not a ContextVar.
    token = None if torch.compiler.is_compiling() else _active.set(name)
    _traced = name
    try:
        yield
    finally:
        _traced = before
        if token is not None:
            _active.reset(token)


def active_backend() -> str:
    """The back end on which an op called here would run, where it has an implementation of it."""
    return _traced if torch.compiler.is_compiling() else _active.get()
