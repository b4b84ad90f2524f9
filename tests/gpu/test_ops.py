"""Every op that has a Triton implementation against its float64 reference, as benchmarks call it.

`benchmarks/cases/` makes the inputs, `tolerances.py` says how close is close enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from places import CONFIGS, ODD, Place
from tolerances import assert_close_to_reference, evaluate, is_float
from torch import Tensor
from torch.utils._pytree import tree_map

from fastfar import FARConfig
from fastfar.bench.cases import CASES, STEPS, Case
from fastfar.ops import use_backend

TRITON = [case for case in CASES.values() if "triton" in case.op.implementations]
LAYERS = {"denoise_loop": 4 * STEPS, "transformer_block": 4}
# No gradients, or PyTorch's (those of float32 convolutions in TF32, in no fixed order).
SAMPLING_ONLY = ("denoise_loop", "convolution_residual", "upsample_convolution")

each_case = pytest.mark.parametrize("case", TRITON, ids=lambda case: case.name)


def single(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """The function with one result: several become one."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        out = function(*args, **kwargs)
        return out if isinstance(out, Tensor) else torch.stack(out)

    return run


def arguments(case: Case, config: FARConfig, place: Place) -> tuple[Any, dict[str, Any]]:
    """As sampling and training call the op, in float32; little of it for the interpreter."""
    args, kwargs = case.inputs(config, 3 if place.real else 1, torch.float32)
    if case.name == "denoise_loop" and not place.real:
        *args, noise_TNP = args
        args = (*args, noise_TNP[:2])
    return place.move(args), kwargs


def test_the_cases_are_the_ops_with_triton_kernels() -> None:
    names = {case.name for case in TRITON}
    assert names >= {"denoise_loop", "filter_mask_patchify", "hybrid_loss", "adaln_mlp_block"}


@each_case
def test_values_and_gradients(case: Case, config: FARConfig, place: Place) -> None:
    args, kwargs = arguments(case, config, place)
    with use_backend("triton"):
        assert_close_to_reference(
            single(case.op),
            single(case.reference),
            *args,
            dtype=place.dtype,
            gradients=case.name not in SAMPLING_ONLY,
            layers=LAYERS.get(case.name, 1),
            **kwargs,
        )


@each_case
def test_repeats_are_equal_bit_by_bit(case: Case, device: torch.device) -> None:
    """Values and gradients: no atomic additions in any kernel of ours."""
    on_gpu = device.type == "cuda"
    if not on_gpu and case.name != "hybrid_loss":
        pytest.skip("the interpreter runs programs one after the other")
    place = Place(device, torch.bfloat16 if on_gpu else torch.float32)
    args, kwargs = arguments(case, CONFIGS["far_base"] if on_gpu else ODD, place)
    args = tree_map(lambda x: x.to(place.dtype) if is_float(x) else x, args)
    options: dict[str, Any] = {
        "gradients": case.name not in SAMPLING_ONLY,
        "layout": torch.Tensor.contiguous,
    }
    if case.name == "transformer_block" and on_gpu:
        kwargs = {**kwargs, "attention": "sdpa_efficient"}  # cuDNN's backward does not repeat
    with use_backend("triton"):
        first, second = (evaluate(single(case.op), args, kwargs, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(bool(x.isfinite().all()) for x in first.values())


@each_case
def test_the_kernels_are_what_runs(case: Case, device: torch.device) -> None:
    """Not PyTorch's implementation in their place."""
    from fastfar.kernels.gpu._launch import recording

    args, kwargs = arguments(case, ODD, Place(device, torch.float32))
    with use_backend("triton"), torch.no_grad(), recording() as launches:
        case.op(*args, **kwargs)
    assert launches
