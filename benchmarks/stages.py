"""Where the time of a sampling run goes: seconds inside the transformer, the head, the rest."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from fastfar import FAR, ops
from fastfar.ops import Op

STAGES = {"denoise_loop": "head", "filter_mask_patchify": "filter"}  # ops; others: transformer


class StageClock:
    """While it is entered, adds up the seconds of each stage; a stage within another is not told.

    `seconds` maps "transformer" (a FAR model's forward, or its ops alone), "head", "filter" and the
    names given to `timed` to what they took in this thread.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[str] = []
        self._start = 0.0
        self._undo = ExitStack()

    def __enter__(self) -> StageClock:
        for name in dir(ops):
            op = getattr(ops, name)
            if isinstance(op, Op):
                self._replace(op, STAGES.get(op.name, "transformer"))
        for handle in (
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after),
        ):
            self._undo.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, counted as `stage`."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._enter(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self._leave()

        return run

    def _replace(self, op: Op[..., Any], stage: str) -> None:
        before = dict(op.implementations)
        op.implementations.update({k: self.timed(stage, f) for k, f in before.items()})
        self._undo.callback(op.implementations.update, before)

    def _before(self, module: nn.Module, _: Any) -> None:
        if isinstance(module, FAR):
            self._enter("transformer")

    def _after(self, module: nn.Module, _: Any, __: Any) -> None:
        if isinstance(module, FAR):
            self._leave()

    def _enter(self, stage: str) -> None:
        if not self._inside:
            self._start = time.perf_counter()
        self._inside.append(stage)

    def _leave(self) -> None:
        stage = self._inside.pop()
        if not self._inside:
            taken = time.perf_counter() - self._start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + taken
