"""Constant tables: made once per device and dtype, so that no run copies them there again.

A CUDA graph cannot hold a copy from the host, and torch.compile cannot trace a cache. So a table
lies on its device before a capture starts (the warm-up puts it there), and a compiler sees a
look-up as one op that it does not look into.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ParamSpec

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

Params = ParamSpec("Params")


def lookup(
    name: str, shape: Callable[Params, Tensor]
) -> Callable[[Callable[Params, Tensor]], Callable[Params, Tensor]]:
    """Decorator: a function that reads a cached table; for torch.compile it is `fastfar::<name>`.

    shape: the shape function, an empty tensor like the result. The result must be a fresh tensor:
    compiled code may write over it. Arguments need annotations that torch.library understands.
    """

    def decorate(function: Callable[Params, Tensor]) -> Callable[Params, Tensor]:
        op = torch.library.custom_op(f"fastfar::{name}", function, mutates_args=())
        op.register_fake(shape)

        @functools.wraps(function)
        def call(*args: Params.args, **kwargs: Params.kwargs) -> Tensor:
            run = op if torch.compiler.is_compiling() else function
            result: Tensor = run(*args, **kwargs)
            return result

        return call

    return decorate


@contextmanager
def real_tensors() -> Iterator[None]:
    """Tensors made inside outlive who asks for them first: they have numbers, gradients may flow.

    The caller may be in inference mode, or trace a run on fake tensors.
    """
    with torch.inference_mode(False), unset_fake_temporarily():
        yield


def fingerprint(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Changes when a tensor is replaced or written to; made in inference mode, when replaced."""
    return tuple(x.data_ptr() + (0 if x.is_inference() else x._version) for x in tensors)


def finish(device: torch.device) -> None:
    """Wait for the work of the current stream of a GPU that is there; nothing elsewhere."""
    if device.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.current_stream(device).synchronize()
