"""What the Triton implementations of the ops share: their kernels, and custom ops that launch them.

A launching function writes into tensors that it is given. As a custom op it can be traced: on fake
tensors it does nothing, and torch.compile sees what it reads and writes. Called on real tensors it
is a plain function, since a custom op costs more than a small kernel; and so it is where launches
are recorded (kernels/gpu/_launch.py), on fake tensors too.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastfar import backend
from fastfar.kernels.gpu._launch import is_recording

Params = ParamSpec("Params")


def kernels(name: str) -> Any:
    """The module kernels/gpu/<name>.py; imported on first use, because it needs Triton.

    Raises ImportError where Triton is not installed.
    """
    return importlib.import_module(f"fastfar.kernels.gpu.{name}")


def architecture(x: Tensor) -> int:
    """Of the device that x is on: 10 major + minor (AMD: gfx942 is 942), 0 for the interpreter."""
    return backend.architecture(x.device)


def traced() -> bool:
    """Whether something other than plain execution sees the ops: a compiler or fake tensors."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def kernel_op(
    name: str, *, mutates: tuple[str, ...]
) -> Callable[[Callable[Params, None]], Callable[Params, None]]:
    """Decorator: a launching function that is also the custom op `fastfar::<name>`.

    mutates: names of the arguments that it writes. All arguments need annotations that
    torch.library understands; the function returns None.
    """

    def decorate(function: Callable[Params, None]) -> Callable[Params, None]:
        op = torch.library.custom_op(f"fastfar::{name}", function, mutates_args=mutates)
        op.register_fake(lambda *args, **kwargs: None)

        @functools.wraps(function)
        def call(*args: Params.args, **kwargs: Params.kwargs) -> None:
            # Compiled code is never recorded, and a compiler cannot trace a ContextVar.
            if torch.compiler.is_compiling() or (traced() and not is_recording()):
                op(*args, **kwargs)
            else:
                function(*args, **kwargs)

        return call

    return decorate
