"""More than 2^31 elements: the last rows of a large tensor are what they are alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from places import Place
from tolerances import relative
from torch import Tensor

from fastfar.ops import (
    adaln_mlp_block,
    add_noise,
    filter_mask_patchify,
    hybrid_loss,
    residual_layernorm,
    use_backend,
)

LAST = 3  # rows that are computed again, alone


@dataclass(frozen=True)
class Large:
    """A call of an op whose first arguments have a row for each token, or image.

    Attributes:
        rows: sizes of a row of these arguments; a whole number stands for timesteps or levels
            below it, one for each row.
        shared: sizes of the arguments after them.
        gibibytes: of the call with its gradients at 2^31 elements of the first argument.
        gradients: whether to compute those.
    """

    op: Callable[..., Any]
    rows: tuple[tuple[int, ...] | int, ...]
    shared: tuple[tuple[int, ...], ...]
    gibibytes: float
    gradients: bool
    options: dict[str, Any] = field(default_factory=dict)


W = 1024
CALLS = {
    "residual_layernorm": Large(residual_layernorm, ((W,), (W,)), ((W,), (W,)), 40, True),
    "filter_mask_patchify": Large(
        filter_mask_patchify, ((16, 16, 16), 17), (), 24, True, {"patch_size": 1, "num_levels": 16}
    ),
    "add_noise": Large(add_noise, ((16,), (16,), 1000), (), 20, False),
    "hybrid_loss": Large(hybrid_loss, ((32,), (16,), (16,), (16,), 1000), (), 30, True),
    "adaln_mlp_block": Large(
        adaln_mlp_block, ((W,),) * 4, ((W,), (W,), (W, W), (W,), (W, W), (W,)), 48, False
    ),
}


SMALL = {1024: 24, 32: 16, 16: 8}  # sizes for the interpreter


def draw(rows: int, size: tuple[int, ...] | int, place: Place) -> Tensor:
    """Drawn in place, so that there is no second copy in another dtype."""
    if isinstance(size, int):
        return torch.randint(size, (rows,), device=place.device)
    if not place.real:
        size = tuple(SMALL[each] for each in size)
    return torch.empty(rows, *size, dtype=place.dtype, device=place.device).normal_()


@pytest.mark.parametrize("name", CALLS)
def test_last_rows(name: str, device: torch.device) -> None:
    call = CALLS[name]
    place = Place(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    first = call.rows[0]
    assert isinstance(first, tuple)
    count = 5
    if place.real:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0] / 2**30
        if free < call.gibibytes:
            pytest.skip(f"needs {call.gibibytes} GiB of GPU memory, {free:.0f} are free")
        count = 2**31 // torch.Size(first).numel() + 130
    by_row = [draw(count, size, place) for size in call.rows]
    shared = [0.1 * draw(1, size, place)[0] for size in call.shared]

    def run(by_row: list[Tensor]) -> tuple[Tensor, ...]:
        """Last rows of the results, and of the gradient of the first argument."""
        leaf = by_row[0].requires_grad_(call.gradients)
        with use_backend("triton"), torch.set_grad_enabled(call.gradients):
            out = call.op(*by_row, *shared, **call.options)
        outs = out if isinstance(out, tuple) else (out,)
        found = tuple(x[-LAST:].detach().clone() for x in outs)
        if call.gradients:
            ones = torch.ones((), device=device)
            cotangents = [ones.to(x.dtype).expand(x.shape) for x in outs]
            (gradient,) = torch.autograd.grad(outs, leaf, cotangents)
            found += (gradient[-LAST:].clone(),)
        return found

    alone = run([x[-LAST:].detach().clone() for x in by_row])
    together = run(by_row)
    assert len(alone) == len(together)
    for ours, expected in zip(together, alone, strict=True):
        assert float(expected.double().norm()) > 0
        assert relative(ours, expected) < 1e-2
