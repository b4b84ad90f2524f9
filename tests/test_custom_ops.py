"""torch.library.opcheck of every custom op of fastfar, with the arguments of a real call."""

from __future__ import annotations

from typing import Any

import interpreter
import torch
from nn_cases import CASES, CONDITION, TOKEN, build, leaves
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastfar._native import NativeLibrary
from fastfar.nn import DiffLoss

# What only compiled code calls as ops, and what modules of fastfar.nn do not.
_X_BSC, _VECTOR = torch.randn(1, 4, 6), torch.ones(6)
SAMPLES: dict[str, tuple[Any, Any]] = {
    "groupnorm_silu": (
        (_X_BSC, _VECTOR, _VECTOR, torch.zeros(2, 1, 2, 1), torch.zeros(1, 4, 6), 1e-6, True),
        {},
    ),
    "convolution_residual": ((torch.zeros(4, 6), _VECTOR, _X_BSC[0]), {}),
    "filter_of_level": ((torch.tensor([2, -1]), 4, 6, "area_bicubic", torch.float32), {}),
    "timestep_coefficients": ((torch.tensor([3, 999]), "signal sigma", 1000, torch.float32), {}),
}
CHECKS = ("test_schema", "test_faketensor")  # the rest: test_nn differentiates and compiles


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("fastfar::") for name in names if name.startswith("fastfar::")}


class Recorder(TorchDispatchMode):
    """Copies of the arguments of the first call of each custom op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name.startswith("fastfar::"):
            copies = tree_map(
                lambda x: x.detach().clone() if isinstance(x, Tensor) else x, (args, kwargs)
            )
            self.calls.setdefault(name.removeprefix("fastfar::"), copies)
        return func(*args, **kwargs)


def test_opcheck(library: NativeLibrary) -> None:
    """The modules call every op, forward and backward."""
    interpreter.need()
    recorder = Recorder()
    for backend in ("native", "triton"):
        for name in CASES:
            module, inputs = build(name, torch.float32, backend=backend)
            with recorder:
                torch.autograd.grad(module(**inputs).sum(), leaves(module, inputs))
            with recorder, torch.no_grad():  # another path on Triton
                module(**inputs)
        sampler = DiffLoss(TOKEN, CONDITION, 1, 16, 2, backend=backend)
        with recorder:
            sampler.sample(torch.randn(4, CONDITION), cfg=2.0, index=1)
    calls = recorder.calls | SAMPLES
    assert not (missing := registered() - calls.keys()), f"nothing here calls {sorted(missing)}"
    for name, (args, kwargs) in calls.items():
        operation = getattr(torch.ops.fastfar, name).default
        torch.library.opcheck(operation, args, kwargs, test_utils=CHECKS)
