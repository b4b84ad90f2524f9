"""AdamW: PyTorch's, or apex's FusedAdam. A run may change from one to the other."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastfar.backend import require_package
from fastfar.training.recipe import Recipe

APEX_DEVICES = ("cuda",)
MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW without weight decay on vectors (biases, norms) and on the head.

    Raises:
        ValueError: the recipe asks for apex's FusedAdam, and that is not there, or the model is
            not on a GPU.
    """
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or name.startswith("diffloss.")
        (free if plain else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "torch":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)
    require_package("apex", "optimizer")
    if (device := decayed[0].device).type not in APEX_DEVICES:
        raise ValueError(
            f"optimizer='apex' cannot be used: its kernels run on CUDA, the model is on {device}. "
            "Use optimizer='torch'"
        )
    made: torch.optim.Optimizer = importlib.import_module("apex.optimizers").FusedAdam(
        groups, lr=recipe.lr, betas=recipe.betas, eps=1e-8, adam_w_mode=True
    )
    return made


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments by parameter name and their own ("z_proj.weight.exp_avg"); not copies."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def optimizer_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """How often each parameter was stepped, for those that were.

    AdamW counts the steps of each parameter, FusedAdam those of a group.
    """
    group_steps = {
        parameter: group.get("step", 0)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {
        name: int(optimizer.state[parameter].get("step", group_steps[parameter]))
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def prepare_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: Mapping[str, int]
) -> None:
    """Give the optimizer, whichever of the two it is, the steps of a saved state, and moments of
    zero to be overwritten.

    Raises:
        ValueError: FusedAdam is to go on with parameters of one group that AdamW stepped
            differently often.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        stepped = [p for p in group["params"] if names[p] in steps]
        counts = {steps[names[p]] for p in stepped}
        fused = not isinstance(optimizer, torch.optim.AdamW)
        if fused and len(counts) > 1:
            raise ValueError(
                f"optimizer='apex' cannot go on with this run: it counts one step for a group, and "
                f"parameters of one have {min(counts)} to {max(counts)}. Use optimizer='torch'"
            )
        if fused and counts:
            group["step"] = counts.pop()
        for parameter in stepped:
            state = optimizer.state[parameter]
            state |= {moment: torch.zeros_like(parameter.detach()) for moment in MOMENTS}
            if not fused:
                count = float(steps[names[parameter]])
                state["step"] = torch.tensor(count, device=parameter.device)
