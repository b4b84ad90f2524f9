"""The one door through which every kernel is launched, so that launches can be recorded.

A recorded launch holds what a real one would have: kernel, grid, arguments and constants. The
proofs that need no GPU are made of them: what is recorded is compiled to machine code and held
against its budget, and its tiles and grid feed the cost model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One launch: kernel[grid](*args, **options).

    Attributes:
        kernel: the function under @triton.jit.
        grid: programs along up to three axes.
        args: the run-time arguments, in the kernel's order.
        options: its constants (constexpr) by name, num_warps and num_stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the kernel."""
        name: str = self.kernel.__name__
        return name

    def argument(self, name: str) -> Any:
        """An argument or constant by the name that the kernel gives it."""
        if name in self.options:
            return self.options[name]
        return self.args[self.kernel.arg_names.index(name)]


_recorded: ContextVar[list[Launch] | None] = ContextVar("fastfar_launches", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options), or a note of it inside `recording`.

    args: run-time arguments, in the kernel's order. options: constants by name, num_warps,
    num_stages. An empty grid launches nothing. Runs on the device of the first tensor.
    """
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(Launch(kernel, grid, args, options))
    elif all(grid):
        device = next(x.device for x in args if isinstance(x, torch.Tensor))
        with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: leave it alone
            # Said outright: Triton 3.9 warns of a default that 3.10 changes.
            kernel[grid](*args, enable_fp_fusion=True, **options)


def is_recording() -> bool:
    """Whether launches are being recorded here."""
    return _recorded.get() is not None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches inside are appended to the list instead of run; tensors may be fake ones."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)
