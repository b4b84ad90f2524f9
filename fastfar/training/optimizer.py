"""AdamW: PyTorch's, or apex's FusedAdam. A run may change from one to the other."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastfar.backend import require_package
from fastfar.training.recipe import Recipe

APEX_DEVICES = ("cuda",)


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


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Moments and steps of a saved state, whichever of the two optimizers it is of.

    Learning rate, betas and weight decay stay the optimizer's own. AdamW counts the steps of each
    parameter, FusedAdam those of a group.

    Raises:
        ValueError: the state is of other parameters; or FusedAdam is to go on with parameters of
            one group that AdamW stepped differently often.
    """
    fused = not isinstance(optimizer, torch.optim.AdamW)
    moments = {index: dict(values) for index, values in state["state"].items()}
    groups = []
    for own, saved in zip(
        optimizer.state_dict()["param_groups"], state["param_groups"], strict=True
    ):
        group = {**own, "params": saved["params"]}
        entries = [moments[index] for index in saved["params"] if index in moments]
        counts = {float(each.get("step", saved.get("step", 0))) for each in entries}
        if fused and len(counts) > 1:
            raise ValueError(
                f"optimizer='apex' cannot go on with this run: it counts one step for a group, and "
                f"parameters of one have {min(counts):.0f} to {max(counts):.0f}. Use "
                "optimizer='torch'"
            )
        for entry in entries:
            step = entry.pop("step", None)
            if not fused:
                entry["step"] = torch.tensor(float(saved["step"])) if step is None else step
        if fused and counts:
            group["step"] = int(counts.pop())
        groups.append(group)
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
