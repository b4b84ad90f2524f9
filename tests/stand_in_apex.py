"""A stand-in for NVIDIA's apex, as far as it is used: signatures and states as in its source."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastfar import _packages


class FusedLayerNorm(nn.LayerNorm):
    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class FusedAdam(torch.optim.Optimizer):
    """One step count for a group, no "step" among the states of the parameters."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        assert bias_correction and adam_w_mode and not (amsgrad or capturable or master_weights)
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), count = group["betas"], group["step"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                assert set(state) == {"exp_avg", "exp_avg_sq"}
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(p.grad, 1 - beta1)
                square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                denominator = (square / (1 - beta2**count)).sqrt() + group["eps"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(mean / (1 - beta1**count), denominator, value=-group["lr"])


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`import apex` finds it, and there seems to be a GPU for it."""
    names = ("apex", "apex.normalization", "apex.optimizers", "apex.multi_tensor_apply", "amp_C")
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None, origin=name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    modules["apex.normalization"].FusedLayerNorm = FusedLayerNorm  # type: ignore[attr-defined]
    modules["apex.optimizers"].FusedAdam = FusedAdam  # type: ignore[attr-defined]
    monkeypatch.setattr(_packages, "cuda_reason", lambda: None)
    _packages.package_reason.cache_clear()
    yield modules["apex"]
    _packages.package_reason.cache_clear()
