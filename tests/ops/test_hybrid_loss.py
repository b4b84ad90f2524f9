"""hybrid_loss against its reference."""

from __future__ import annotations

import pytest
import torch
from tolerances import EXACT_DTYPES, HALF_DTYPES, assert_close_to_reference, relative, with_gap
from torch import Tensor

from fastfar import reference
from fastfar.ops import hybrid_loss

OPS = (hybrid_loss, reference.hybrid_loss)
SHAPES = [(1, 1), (7, 5), (31, 16), (3, 13)]  # N, P


def inputs(rows: int, numbers: int, num_timesteps: int = 1000) -> tuple[Tensor, ...]:
    """Rows at both ends of the schedule and between; targets also beyond the bins at -1 and 1."""
    timestep = torch.randint(num_timesteps, (rows,))
    timestep[::3], timestep[1::5] = 0, num_timesteps - 1
    output = torch.randn(rows, 2 * numbers, dtype=torch.float64)
    target, noise = torch.randn(2, rows, numbers, dtype=torch.float64)
    schedule = reference.make_schedule(num_timesteps)
    noised = reference.q_sample(target, noise, timestep, schedule)
    return output, target, noise, noised, timestep


@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
@pytest.mark.parametrize("num_timesteps", [1000, 37])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(
    shape: tuple[int, int], num_timesteps: int, dtype: torch.dtype
) -> None:
    args = inputs(*shape, num_timesteps)
    assert_close_to_reference(*OPS, *args, dtype=dtype, num_timesteps=num_timesteps)


@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
def test_not_contiguous(dtype: torch.dtype) -> None:
    assert_close_to_reference(*OPS, *inputs(7, 5), dtype=dtype, layout=with_gap)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_precision_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    *tensors, timestep = inputs(31, 16)
    timestep.clamp_(min=20)  # the bound divides by a tiny variance at the first steps
    rounded = [x.to(dtype) for x in tensors]
    loss = hybrid_loss(*rounded, timestep)
    truth = reference.hybrid_loss(*(x.double() for x in rounded), timestep)
    assert loss.dtype is torch.float32
    assert relative(loss, truth) < 1e-4


def test_one_timestep_at_a_time() -> None:
    for value in (0, 1, 500, 999):
        *tensors, timestep = inputs(5, 4)
        timestep.fill_(value)
        assert_close_to_reference(*OPS, *tensors, timestep, dtype=torch.float64)


def test_gradcheck_of_the_variance_channel() -> None:
    """eps is detached in the bound, on purpose: only v and the squared error can be checked."""
    output, *rest = inputs(3, 2)
    eps, v = output.chunk(2, dim=-1)
    v.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: hybrid_loss(torch.cat([eps, x], -1), *rest), v)
