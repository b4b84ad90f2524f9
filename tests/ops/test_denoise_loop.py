"""denoise_loop against its reference: guided and not, bounded and not, one step and many."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from formula import formula_tensor
from solver_cases import OPTIONS, SOLVERS, STEPS, moments, with_moments
from tolerances import EXACT_DTYPES, HALF_DTYPES, assert_close_to_reference, relative, with_gap
from torch import Tensor

from fastfar import reference
from fastfar.config import FARConfig
from fastfar.head import DenoisingMLP
from fastfar.ops import denoise_loop, use_backend
from fastfar.ops._head import pack_head

OPS = (denoise_loop, reference.denoise_loop)
CONFIG = FARConfig(width=12, num_heads=1, head_depth=2, head_width=20, latent_channels=5)


@dataclass(frozen=True)
class Inputs:
    head: dict[str, Tensor]
    condition: Tensor
    initial: Tensor
    noise: Tensor

    def args(self, level: float = 7) -> tuple[object, ...]:
        return self.head, self.condition, level, self.initial, self.noise


def inputs(rows: int, steps: int, halves: int = 2, token_dim: int = 5) -> Inputs:
    config = FARConfig.from_dict({**CONFIG.to_dict(), "latent_channels": token_dim})
    with torch.device("meta"):
        shapes = DenoisingMLP(config).state_dict()
    head = {name: formula_tensor(name, tuple(x.shape)).double() for name, x in shapes.items()}
    # As in a trained head v stays near -1..1: far outside, the noise grows without bound.
    head["final_layer.linear.weight"] *= 0.3
    return Inputs(
        head,
        torch.randn(halves * rows, CONFIG.width, dtype=torch.float64),
        torch.randn(rows, token_dim, dtype=torch.float64),
        torch.randn(steps, rows, token_dim, dtype=torch.float64),
    )


@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
@pytest.mark.parametrize("x0_range", [None, (-1.5, 2.0)], ids=str)
@pytest.mark.parametrize("halves, scale", [(1, 1.0), (1, 3.0), (2, 1.0), (2, 3.0), (2, 0.0)])
@pytest.mark.parametrize("rows, steps", [(1, 1), (3, 2), (13, 7)])
def test_values_and_gradients(
    rows: int,
    steps: int,
    halves: int,
    scale: float,
    x0_range: tuple[float, float] | None,
    dtype: torch.dtype,
) -> None:
    assert_close_to_reference(
        *OPS,
        *inputs(rows, steps, halves).args(),
        dtype=dtype,
        layers=4 * steps,
        guidance_scale=scale,
        temperature=0.9,
        x0_range=x0_range,
    )


@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
def test_not_contiguous(dtype: torch.dtype) -> None:
    assert_close_to_reference(
        *OPS,
        *inputs(5, 3).args(),
        dtype=dtype,
        layout=with_gap,
        layers=12,
        guidance_scale=2.0,
        temperature=1.0,
    )


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 5, 40])
def test_half_precision(steps: int, dtype: torch.dtype) -> None:
    """Weights and condition in half precision; the state stays in float32."""
    data = inputs(17, steps, token_dim=3)
    options = {"guidance_scale": 3.0, "temperature": 1.0, "x0_range": (-2.0, 2.0)}
    assert_close_to_reference(
        *OPS, *data.args(), dtype=dtype, gradients=False, layers=4 * steps, **options
    )
    head = {name: x.to(dtype) for name, x in data.head.items()}
    condition = data.condition.to(dtype)
    out = denoise_loop(head, condition, 7, data.initial.float(), data.noise.float(), **options)
    assert out.dtype is torch.float32
    exact = {name: x.double() for name, x in head.items()}
    truth = reference.denoise_loop(
        exact, condition.double(), 7, data.initial, data.noise, **options
    )
    # Far below what the reference loses in this dtype (its sinusoids are rounded as well).
    assert relative(out, truth) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("num_timesteps, steps", [(10, 10), (50, 7), (1000, 55)])
def test_other_schedules(num_timesteps: int, steps: int) -> None:
    assert_close_to_reference(
        *OPS,
        *inputs(2, steps).args(level=0),
        dtype=torch.float64,
        gradients=False,
        layers=4 * steps,
        guidance_scale=2.5,
        temperature=0.8,
        num_timesteps=num_timesteps,
    )


@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers(name: str, dtype: torch.dtype) -> None:
    assert_close_to_reference(
        *(with_moments(op) for op in OPS),
        *inputs(7, STEPS).args(),
        *moments(7, 5),
        dtype=dtype,
        layers=4 * STEPS,
        solver=SOLVERS[name],
        **OPTIONS,
    )


@pytest.mark.parametrize("op", OPS)
def test_outside_its_range_guidance_reads_no_unconditional_half(op: Any) -> None:
    data = inputs(4, STEPS)
    poisoned = data.condition.clone()
    poisoned[4:] = float("nan")
    args = (7, data.initial, data.noise)
    out = op(data.head, poisoned, *args, solver=SOLVERS["no guidance"], **OPTIONS)
    expected = op(data.head, data.condition[:4], *args, solver=SOLVERS["no guidance"], **OPTIONS)
    assert out.isfinite().all() and relative(out, expected) < 1e-12
    guided = op(*data.args(), solver=SOLVERS["guidance range"], **OPTIONS)
    never = op(data.head, data.condition[:4], *args, solver=SOLVERS["guidance range"], **OPTIONS)
    assert relative(guided, never) > 1e-3


def test_no_guidance_reads_no_unconditional_half() -> None:
    data = inputs(4, 3)
    options = {"guidance_scale": 1.0, "temperature": 1.0}
    poisoned = data.condition.clone()
    poisoned[4:] = float("nan")
    out = denoise_loop(data.head, poisoned, 3, data.initial, data.noise, **options)
    expected = denoise_loop(data.head, data.condition[:4], 3, data.initial, data.noise, **options)
    assert torch.equal(out, expected) and out.isfinite().all()


def test_the_last_noise_and_temperature_zero_are_not_used() -> None:
    data = inputs(4, 3)
    options = {"guidance_scale": 3.0, "temperature": 1.0}
    poisoned = data.noise.clone()
    poisoned[-1] = float("nan")
    out = denoise_loop(data.head, data.condition, 3, data.initial, poisoned, **options)
    assert torch.equal(
        out, denoise_loop(data.head, data.condition, 3, data.initial, data.noise, **options)
    )
    options["temperature"] = 0.0
    still = [
        denoise_loop(data.head, data.condition, 3, data.initial, noise, **options)
        for noise in (data.noise, -data.noise)
    ]
    assert torch.equal(*still)


def test_x0_range_bounds_the_result() -> None:
    data = inputs(13, 5)
    options = {"guidance_scale": 3.0, "temperature": 1.0}
    free = denoise_loop(*data.args(), **options)
    bounded = denoise_loop(*data.args(), x0_range=(-0.25, 0.5), **options)
    assert free.max() > 1.0  # the bound has something to do
    assert bounded.min() >= -0.25 - 1e-9 and bounded.max() <= 0.5 + 1e-9


def test_rows_are_independent() -> None:
    data = inputs(6, 4)
    options = {"guidance_scale": 3.0, "temperature": 1.0, "x0_range": (-2.0, 2.0)}
    together = denoise_loop(*data.args(), **options)
    alone = denoise_loop(
        data.head,
        data.condition[[2, 8]],
        7,
        data.initial[2:3],
        data.noise[:, 2:3],
        **options,
    )
    assert relative(together[2:3], alone) < 1e-12


@pytest.mark.parametrize("halves, scale", [(1, 1.0), (2, 3.0)])
@pytest.mark.parametrize("block", [1, 4, 13, 100])
def test_row_blocks(block: int, halves: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the rows are cut, the last block being shorter, the result is the same."""
    module = importlib.import_module("fastfar.ops.denoise_loop")
    monkeypatch.setattr(module, "CPU_ROW_BLOCK", block)
    assert_close_to_reference(
        *OPS,
        *inputs(13, 3, halves).args(),
        dtype=torch.float64,
        layers=12,
        guidance_scale=scale,
        temperature=1.0,
    )


def test_bad_shapes() -> None:
    data = inputs(4, 3)
    options = {"guidance_scale": 3.0, "temperature": 1.0}
    with pytest.raises(ValueError, match="5 rows for 4"):
        denoise_loop(data.head, data.condition[:5], 3, data.initial, data.noise, **options)
    with pytest.raises(ValueError, match=r"noise must be"):
        denoise_loop(data.head, data.condition, 3, data.initial, data.noise[:, :1], **options)
    with pytest.raises(ValueError, match="diffusion steps"):
        denoise_loop(data.head, data.condition, 3, data.initial, data.noise[:0], **options)


# --- the native kernel ------------------------------------------------------------------------


def native_inputs(
    rows: int, steps: int, halves: int = 2, width: int = 48, depth: int = 2, token_dim: int = 5
) -> Inputs:
    """As `inputs`, with a head whose width the native kernel takes."""
    config = FARConfig(
        width=12, num_heads=1, head_depth=depth, head_width=width, latent_channels=token_dim
    )
    with torch.device("meta"):
        shapes = DenoisingMLP(config).state_dict()
    head = {name: formula_tensor(name, tuple(x.shape)).double() for name, x in shapes.items()}
    head["final_layer.linear.weight"] *= 0.3
    plain = inputs(rows, steps, halves, token_dim)
    return Inputs(head, plain.condition, plain.initial, plain.noise)


def native(*args: Any, **kwargs: Any) -> Tensor:
    with use_backend("native"):
        return denoise_loop(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("halves, scale, x0_range", [(1, 1.0, None), (2, 3.0, (-1.5, 2.0))])
@pytest.mark.parametrize(
    "rows, steps, width, depth, token_dim", [(1, 1, 16, 1, 3), (3, 4, 48, 2, 5), (37, 2, 80, 3, 17)]
)
def test_native_values(
    isa: str,
    rows: int,
    steps: int,
    width: int,
    depth: int,
    token_dim: int,
    halves: int,
    scale: float,
    x0_range: tuple[float, float] | None,
    dtype: torch.dtype,
) -> None:
    data = native_inputs(rows, steps, halves, width, depth, token_dim)
    options = {"guidance_scale": scale, "temperature": 0.9, "x0_range": x0_range}
    for layout in (torch.Tensor.contiguous, with_gap):
        assert_close_to_reference(
            native,
            reference.denoise_loop,
            *data.args(),
            dtype=dtype,
            gradients=False,
            layout=layout,
            layers=4 * steps,
            **options,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_native_solvers(isa: str, name: str, dtype: torch.dtype) -> None:
    assert_close_to_reference(
        with_moments(native),
        with_moments(reference.denoise_loop),
        *native_inputs(9, STEPS).args(),
        *moments(9, 5),
        dtype=dtype,
        gradients=False,
        layers=4 * STEPS,
        solver=SOLVERS[name],
        **OPTIONS,
    )


def test_native_heads_packed_beforehand_give_the_same_bits(isa: str) -> None:
    data = native_inputs(70, 3)
    options = {"guidance_scale": 3.0, "temperature": 1.0}
    for dtype in (torch.float32, torch.bfloat16):
        head = {name: x.to(dtype) for name, x in data.head.items()}
        tensors = (data.condition.float(), 7, data.initial.float(), data.noise.float())
        expected = native(head, *tensors, **options)
        packed_head = pack_head(head, dtype)
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3, 4):
                torch.set_num_threads(threads)
                assert torch.equal(native(packed_head, *tensors, **options), expected), threads
        finally:
            torch.set_num_threads(before)
        assert expected.dtype is torch.float32 and expected.isfinite().all()


@pytest.mark.usefixtures("library")
def test_native_takes_no_noise_from_the_last_step_and_no_unconditional_half() -> None:
    data = native_inputs(4, 3)
    noise, condition = data.noise.clone(), data.condition.clone()
    noise[-1] = float("nan")
    condition[4:] = float("nan")
    head = {name: x.float() for name, x in data.head.items()}
    args = (7, data.initial.float(), noise.float())
    options = {"guidance_scale": 1.0, "temperature": 1.0}
    out = native(head, condition.float(), *args, **options)
    assert out.isfinite().all()
    assert torch.equal(out, native(head, condition[:4].float(), *args, **options))


@pytest.mark.usefixtures("library")
def test_native_differentiates_through_pytorch_and_refuses_the_rest() -> None:
    data = native_inputs(2, 2)
    head = {name: x.float() for name, x in data.head.items()}
    args = (7, data.initial.float(), data.noise.float())
    options = {"guidance_scale": 3.0, "temperature": 1.0}
    condition = data.condition.float().requires_grad_()
    (gradient,) = torch.autograd.grad(native(head, condition, *args, **options).sum(), condition)
    assert gradient.abs().sum() > 0
    with pytest.raises(TypeError, match="float64"):
        native(data.head, data.condition, 7, data.initial, data.noise, **options)
    with pytest.raises(ValueError, match="multiple of 16, got 20"):
        odd = {name: x.float() for name, x in inputs(2, 2).head.items()}
        native(odd, data.condition.float(), *args, **options)
    with pytest.raises(ValueError, match="conditions of 12 and tokens of 5"):
        native(head, data.condition.float()[:, :7], *args, **options)
