"""hybrid_loss against its reference."""

from __future__ import annotations

from collections.abc import Callable

import interpreter
import pytest
import torch
from guarded import guarded, outputs
from native_training import opcheck_of
from tolerances import EXACT_DTYPES, HALF_DTYPES, assert_close_to_reference, relative, with_gap
from torch import Tensor

from fastfar import reference
from fastfar._native import NativeLibrary
from fastfar.diffusion import device_table
from fastfar.ops import hybrid_loss, use_backend

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


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_weights_and_targets_that_serve_several_rows(
    backend: str, request: pytest.FixtureRequest
) -> None:
    """As the loss of repeated targets, times the weights; gradients of weights and targets, too."""
    if backend == "native":
        request.getfixturevalue("library")
    if backend == "triton":
        interpreter.need()
    output, target, noise, noised, timestep = inputs(12, 5)
    weight = torch.rand(12, dtype=torch.float64) * (torch.arange(12) % 4 > 0)

    def weighted(*tensors: Tensor) -> Tensor:
        *tensors, weight_N = tensors
        return hybrid_loss(*tensors, timestep, weight_N=weight_N)

    def constants_detached(output: Tensor, *rest: Tensor) -> Tensor:
        return weighted(output, *(x.detach() for x in rest))

    def truth(output: Tensor, target: Tensor, *rest: Tensor) -> Tensor:
        *rest, weight_N = rest
        return weight_N * reference.hybrid_loss(output, target.repeat(3, 1), *rest, timestep)

    def truth_detached(output: Tensor, *rest: Tensor) -> Tensor:
        return truth(output, *(x.detach() for x in rest))

    args = (output, target[:4], noise, noised, weight)
    torch.testing.assert_close(
        reference.hybrid_loss(*args[:-1], timestep, weight_N=weight), truth(*args)
    )
    with use_backend(backend):
        for pair in ((weighted, truth), (constants_detached, truth_detached)):
            assert_close_to_reference(*pair, *args, dtype=torch.float32)
        *single, _ = (x.float() for x in args)
        loss, mask = hybrid_loss(*single, timestep), weight > 0.5
        assert torch.equal(hybrid_loss(*single, timestep, weight_N=mask), loss * mask)
        single[1] = target[:5].float()
        with pytest.raises(ValueError, match="no multiple of the 5 rows"):
            hybrid_loss(*single, timestep)


# --- native ----------------------------------------------------------------------------------


def with_gradient(
    function: Callable[..., Tensor], args: tuple[Tensor, ...], timesteps: int, **options: Tensor
) -> list[Tensor]:
    """Loss and gradient of the output, for a fixed cotangent."""
    output, *rest = args
    output = output.detach().requires_grad_()
    loss_N = function(output, *rest, num_timesteps=timesteps, **options)
    cotangent = torch.linspace(0.5, 1.5, len(loss_N)).to(loss_N.dtype)
    return [loss_N.detach(), *torch.autograd.grad(loss_N, output, cotangent)]


@pytest.mark.parametrize("num_timesteps", [1000, 37, 1])
@pytest.mark.parametrize("shape", [*SHAPES, (200, 17), (2, 48)], ids=str)
def test_native(shape: tuple[int, int], num_timesteps: int, isa: str) -> None:
    args = tuple(x.float() if x.is_floating_point() else x for x in inputs(*shape, num_timesteps))
    doubled = tuple(x.double() if x.is_floating_point() else x for x in args)
    plain = with_gradient(reference.hybrid_loss, args, num_timesteps)
    truth = with_gradient(reference.hybrid_loss, doubled, num_timesteps)
    gapped = tuple(with_gap(x) if x.is_floating_point() else x for x in args)
    for given in (args, gapped):
        with use_backend("native"):
            ours = with_gradient(hybrid_loss, given, num_timesteps)
        for one, other, exact in zip(ours, plain, truth, strict=True):
            assert relative(one, exact) <= 2 * relative(other, exact) + 1e-6


def at_each_end_of_the_bins(backend: str) -> None:
    """t = 0, with targets at and beyond the bins at -1 and 1 and means far away and near."""
    target = torch.tensor([[-1.5, -1.0, -0.99, 0.0, 0.5, 0.99, 1.0, 1.5]]).repeat(5, 1)
    offset = torch.tensor([-3.0, -1e-2, 0.0, 1e-2, 3.0])[:, None]
    output = torch.cat([torch.zeros_like(target), torch.linspace(-2, 2, 8).repeat(5, 1)], dim=1)
    args = (output, target, torch.zeros_like(target), target + offset, torch.zeros(5).long())
    doubled = tuple(x.double() if x.is_floating_point() else x for x in args)
    with use_backend(backend):
        ours = with_gradient(hybrid_loss, args, 1000)
    for one, exact in zip(ours, with_gradient(reference.hybrid_loss, doubled, 1000), strict=True):
        assert relative(one, exact) < 1e-4


def test_native_at_each_end_of_the_bins(isa: str) -> None:
    at_each_end_of_the_bins("native")


def test_native_bfloat16_and_threads(isa: str) -> None:
    args = inputs(150, 16)
    rounded = tuple(x.bfloat16() if x.is_floating_point() else x for x in args)
    widened = tuple(x.double() if x.is_floating_point() else x for x in rounded)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3, 4):
            torch.set_num_threads(count)
            with use_backend("native"):
                results.append(with_gradient(hybrid_loss, rounded, 1000))
    finally:
        torch.set_num_threads(threads)
    for each in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, results[0], strict=True))
    loss_N, gradient = results[0]
    truth = with_gradient(reference.hybrid_loss, widened, 1000)
    assert loss_N.dtype is torch.float32 and gradient.dtype is torch.bfloat16
    assert relative(loss_N, truth[0]) < 1e-4 and relative(gradient, truth[1]) < 4e-3


def test_opcheck(isa: str) -> None:
    output, *rest = (x.float() if x.is_floating_point() else x for x in inputs(3, 4))
    opcheck_of("hybrid_loss", output.requires_grad_(), *rest, 1000)


def test_what_native_leaves_to_pytorch(library: NativeLibrary) -> None:
    """A gradient of the target, and float64."""
    output, target, *rest = inputs(4, 3)
    target.requires_grad_()
    with use_backend("native"):
        ours = hybrid_loss(output, target, *rest)
        assert torch.autograd.grad(ours.sum(), target)[0].shape == target.shape
    assert ours.dtype is torch.float64


# --- triton ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_timesteps", [1000, 37, 1])
@pytest.mark.parametrize("shape", [*SHAPES, (100, 17), (2, 200)], ids=str)
def test_triton(shape: tuple[int, int], num_timesteps: int) -> None:
    interpreter.need()
    args = tuple(x.float() if x.is_floating_point() else x for x in inputs(*shape, num_timesteps))
    doubled = tuple(x.double() if x.is_floating_point() else x for x in args)
    weight = torch.rand(shape[0])
    options = (num_timesteps,)
    plain = with_gradient(reference.hybrid_loss, args, *options, weight_N=weight)
    truth = with_gradient(reference.hybrid_loss, doubled, *options, weight_N=weight)
    gapped = tuple(with_gap(x) if x.is_floating_point() else x for x in args)
    columns = tuple(x.t().contiguous().t() if x.ndim == 2 else x for x in args)
    for given in (args, gapped, columns):
        with use_backend("triton"):
            ours = with_gradient(hybrid_loss, given, *options, weight_N=weight)
        for one, other, exact in zip(ours, plain, truth, strict=True):
            assert relative(one, exact) <= 2 * relative(other, exact) + 1e-6


def test_triton_at_each_end_of_the_bins() -> None:
    interpreter.need()
    at_each_end_of_the_bins("triton")


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_triton_in_half_precision_with_targets_in_single(dtype: torch.dtype) -> None:
    """As under autocast: the head's output is rounded, the rest is not; and all of it rounded."""
    interpreter.need()
    output, *rest, timestep = inputs(40, 16)
    for rounding in (torch.float32, dtype):
        rounded = (output.to(dtype), *(x.to(rounding) for x in rest), timestep)
        widened = tuple(x.double() if x.is_floating_point() else x for x in rounded)
        with use_backend("triton"):
            loss, gradient = with_gradient(hybrid_loss, rounded, 1000)
        truth = with_gradient(reference.hybrid_loss, widened, 1000)
        assert loss.dtype is torch.float32 and gradient.dtype is dtype
        assert relative(loss, truth[0]) < 1e-4 and relative(gradient, truth[1]) < 4e-3


@pytest.mark.parametrize("shape", [*SHAPES, (70, 17), (2, 200)], ids=str)
def test_triton_stays_inside_its_tensors(shape: tuple[int, int]) -> None:
    interpreter.need()
    from fastfar.kernels.gpu import hybrid_loss as kernels

    *tensors, timestep = inputs(*shape)
    given = [guarded(x.float()) for x in tensors]
    table = device_table(kernels.COEFFICIENTS, 1000, 1000, timestep.device, torch.float32)
    weight, dloss = guarded(torch.rand(shape[0])), guarded(torch.randn(shape[0]))
    args = (*given, guarded(timestep), weight, guarded(table))
    loss, doutput = outputs(shape[:1], torch.float32), outputs(given[0].shape, torch.float32)
    kernels.hybrid_loss(*args, loss.tensor, arch=0)
    kernels.hybrid_loss_backward(dloss, *args, doutput.tensor, arch=0)
    loss.intact()
    doutput.intact()
    with use_backend("triton"):
        output = given[0].detach().requires_grad_()
        expected = hybrid_loss(output, *given[1:], timestep, weight_N=weight)
    assert torch.equal(loss.tensor, expected)
    assert torch.equal(doutput.tensor, torch.autograd.grad(expected, output, dloss)[0])


def test_triton_takes_a_timestep_that_is_out_of_range_for_the_nearest() -> None:
    interpreter.need()
    *tensors, timestep = (x.float() if x.is_floating_point() else x for x in inputs(6, 3))
    timestep[:] = torch.tensor([-5, 0, 999, 1000, 2**40, 7])
    with use_backend("triton"):
        outs = [hybrid_loss(*tensors, t) for t in (timestep, timestep.clamp(0, 999))]
    assert torch.equal(*outs)


def test_triton_opcheck() -> None:
    interpreter.need()
    output, *rest = (x.float() if x.is_floating_point() else x for x in inputs(3, 4))
    for weight in (None, torch.rand(3)):
        opcheck_of("hybrid_loss_triton", output.requires_grad_(), *rest, weight, 1000)


def test_what_triton_leaves_to_pytorch_and_what_it_refuses() -> None:
    interpreter.need()
    output, target, *rest, timestep = inputs(4, 3)
    with use_backend("triton"):
        ours = hybrid_loss(output, target.requires_grad_(), *rest, timestep)
        assert torch.autograd.grad(ours.sum(), target)[0].shape == target.shape
        assert ours.dtype is torch.float64
        single = [x.detach().float() for x in (output, target, *rest)]
        with pytest.raises(ValueError, match=r"timestep is \(3,\)"):
            hybrid_loss(*single, timestep[:3])
        with pytest.raises(ValueError, match=r"output is \(4, 5\), expected \(4, 6\)"):
            hybrid_loss(single[0][:, :5], *single[1:], timestep)
