"""add_noise against its reference: rows at their own t, rows of x0 used repeatedly."""

from __future__ import annotations

import interpreter
import pytest
import torch
from guarded import guarded, outputs
from native_training import opcheck_of
from tolerances import DTYPES, EXACT_DTYPES, assert_close_to_reference, relative, with_gap
from torch import Tensor

from fastfar import reference
from fastfar.diffusion import device_table
from fastfar.ops import add_noise, use_backend

SHAPES = [(1, 1, 1), (5, 7, 3), (16, 3, 1), (200, 17, 2)]  # P, R, batch multiplier


def inputs(numbers: int, given: int, multiplier: int) -> tuple[Tensor, ...]:
    x0 = torch.randn(given, numbers, dtype=torch.float64)
    noise = torch.randn(multiplier * given, numbers, dtype=torch.float64)
    timestep = torch.randint(1000, (multiplier * given,))
    timestep[::3], timestep[1::5] = 0, 999
    return x0, noise, timestep


@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for layout in (Tensor.contiguous, with_gap):
        assert_close_to_reference(
            add_noise, reference.add_noise, *inputs(*shape), dtype=dtype, layout=layout
        )


def test_by_hand() -> None:
    x0, noise, timestep = inputs(3, 7, 2)
    timestep = timestep % 37
    out = add_noise(x0, noise, timestep, num_timesteps=37)
    bar = reference.make_schedule(37).alpha_bar[timestep][:, None]
    torch.testing.assert_close(out, bar.sqrt() * torch.cat([x0, x0]) + (1 - bar).sqrt() * noise)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_that_do_not_repeat(backend: str) -> None:
    x0, noise, timestep = (x.float() if x.is_floating_point() else x for x in inputs(2, 6, 1))
    with use_backend(backend):
        for rows in (4, 0, 5):
            with pytest.raises(ValueError, match=r"no multiple of the \d rows"):
                add_noise(x0[:rows], noise, timestep)


# --- triton ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    interpreter.need()
    layers = 4 if dtype is torch.bfloat16 else 1  # the interpreter rounds to bfloat16 towards zero
    with use_backend("triton"):
        for layout in (Tensor.contiguous, with_gap, lambda x: x.t().contiguous().t()):
            assert_close_to_reference(
                *(add_noise, reference.add_noise, *inputs(*shape)),
                dtype=dtype,
                layout=layout,
                layers=layers,
            )


def test_triton_with_two_dtypes_and_another_schedule() -> None:
    interpreter.need()
    x0, noise, timestep = inputs(5, 4, 3)
    x0, noise, timestep = x0.half(), noise.float(), timestep % 37
    with use_backend("triton"):
        out = add_noise(x0, noise, timestep, num_timesteps=37)
    truth = reference.add_noise(x0.double(), noise.double(), timestep, num_timesteps=37)
    assert out.dtype is torch.float32 and relative(out, truth) < 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_stays_inside_its_tensors(shape: tuple[int, int, int]) -> None:
    interpreter.need()
    from fastfar.kernels.gpu import add_noise as kernels

    x0, noise, timestep = (guarded(x) for x in inputs(*shape))
    x0, noise = guarded(x0.float()), guarded(noise.float())
    table = device_table(("signal", "sigma"), 1000, 1000, x0.device, torch.float32)
    out = outputs(tuple(noise.shape), torch.float32)
    kernels.add_noise(x0, noise, timestep, guarded(table), out.tensor, arch=0)
    out.intact()
    truth = reference.add_noise(x0.double(), noise.double(), timestep)
    assert relative(out.tensor, truth) < 1e-6


def test_triton_opcheck() -> None:
    interpreter.need()
    x0, noise, timestep = inputs(3, 4, 2)
    leaves = (x0.float().requires_grad_(), noise.float().requires_grad_())
    opcheck_of("add_noise_triton", *leaves, timestep, 1000)
