"""denoise_loop by Triton's kernels, in the interpreter, against the float64 reference."""

from __future__ import annotations

import math
from typing import Any

import interpreter
import pytest
import torch
from formula import formula_tensor
from guarded import outputs
from solver_cases import OPTIONS, SOLVERS, STEPS, moments, with_moments
from tolerances import assert_close_to_reference, relative, with_gap
from torch import Tensor

from fastfar import reference
from fastfar.config import FARConfig
from fastfar.head import DenoisingMLP
from fastfar.kernels.gpu._configs import config
from fastfar.ops import _denoise_triton, denoise_loop
from fastfar.ops._folded_head import FoldedHead, fold_head, projection_moments
from fastfar.solver import Solver

interpreter.need()
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


def run(*args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = denoise_loop.implementations["triton"](*args, **kwargs)
    return result


def draw(rows: int, steps: int, halves: int, *, width: int = 40, depth: int = 2) -> list[Any]:
    """Head, condition, level, initial and step noise; no size is a multiple of a tile."""
    config = FARConfig(
        width=24, num_heads=1, head_depth=depth, head_width=width, latent_channels=5
    )
    with torch.device("meta"):
        shapes = DenoisingMLP(config).state_dict()
    head = {name: formula_tensor(name, tuple(x.shape)).double() for name, x in shapes.items()}
    head["final_layer.linear.weight"] *= 0.3  # v stays near -1..1, as in a trained head
    return [
        head,
        torch.randn(halves * rows, 24, dtype=torch.float64),
        7,
        torch.randn(rows, 5, dtype=torch.float64),
        torch.randn(steps, rows, 5, dtype=torch.float64),
    ]


@pytest.mark.parametrize(
    ("dtype", "x0_range"),  # without bounds the state leaves float16's range
    [(torch.float32, None), (torch.float32, (-1.5, 2.0)), (torch.float16, (-1.5, 2.0))],
    ids=str,
)
@pytest.mark.parametrize(
    ("rows", "steps", "halves", "scale"),
    [(1, 1, 1, 1.0), (3, 2, 2, 3.0), (35, 2, 2, 2.5)],
)
def test_values(
    rows: int,
    steps: int,
    halves: int,
    scale: float,
    x0_range: tuple[float, float] | None,
    dtype: torch.dtype,
) -> None:
    assert_close_to_reference(
        run,
        reference.denoise_loop,
        *draw(rows, steps, halves),
        dtype=dtype,
        gradients=False,
        layers=4 * steps,
        guidance_scale=scale,
        temperature=0.9,
        x0_range=x0_range,
    )


@pytest.mark.parametrize("name", ["linear", "closure", "SDE-2M", "guidance range"])
def test_solvers(name: str) -> None:
    """Where guidance is switched on and off again there are three loops."""
    args = (*draw(3, STEPS, 2, depth=1), *moments(3, 5))
    assert_close_to_reference(
        with_moments(run),
        with_moments(reference.denoise_loop),
        *args,
        dtype=torch.float32,
        gradients=False,
        layers=4 * STEPS,
        solver=SOLVERS[name],
        **OPTIONS,
    )


def test_outside_the_guidance_range_no_unconditional_half_is_read() -> None:
    head, condition, *data = draw(3, 1, 2, depth=1)
    condition[3:] = math.nan
    data = [x.float() if isinstance(x, Tensor) else x for x in data]
    args = fold_head(head, torch.float32), condition.float(), *data
    for timestep, finite in ((500, True), (501, False)):
        solver = Solver("ddim", timesteps=(timestep,), guidance_range=(501, 999))
        assert bool(run(*args, **OPTIONS, solver=solver).isfinite().all()) == finite


@pytest.mark.parametrize(("width", "depth"), [(64, 3), (200, 1), (17, 2)])
def test_widths_and_strides(width: int, depth: int) -> None:
    assert_close_to_reference(
        run,
        reference.denoise_loop,
        *draw(5, 3, 2, width=width, depth=depth),
        dtype=torch.float32,
        gradients=False,
        layout=with_gap,
        layers=12,
        guidance_scale=2.0,
        temperature=1.0,
    )


@DTYPES
def test_chunks_do_not_change_a_bit(dtype: torch.dtype) -> None:
    head, condition, level, initial, noise = draw(9, 4, 2, depth=1)
    folded = fold_head(head, dtype)
    options: dict[str, Any] = {
        "guidance_scale": 2.0, "temperature": 1.0, "x0_range": (-1.5, 2.0),
        "num_timesteps": 1000,
    }  # fmt: skip

    def denoise(chunk: int) -> Tensor:
        return _denoise_triton.denoise(
            folded, condition.float(), level, initial.float(), noise.float(), **options,
            chunk=chunk,
        )  # fmt: skip

    expected = denoise(3)
    assert bool(expected.isfinite().all())
    for chunk in (1, 2, 8):
        # Chunks are other products on a CPU; the kernels around them are the same.
        assert relative(denoise(chunk), expected) < (1e-6 if dtype is torch.float32 else 1e-3)


@pytest.mark.parametrize(("many", "share"), [(2, 1), (512, 3)])
def test_columns_shared_or_not(many: int, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program takes all columns of the next stream, or several share them: same bits."""
    from fastfar.kernels.gpu import _denoise_step as module

    args = draw(17, 2, 2, width=3 * config("step", 0, 4).tiles["BN"], depth=1)
    args = [x.float() if isinstance(x, Tensor) else x for x in args]
    head = fold_head(args[0], torch.float32)
    options: dict[str, Any] = {"guidance_scale": 2.0, "temperature": 1.0, "x0_range": (-1.5, 2.0)}
    expected = run(head, *args[1:], **options)
    monkeypatch.setattr(module, "MANY_PROGRAMS", many)
    grids: list[tuple[int, ...]] = []
    launch = module.launch

    def noted(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        grids.append(grid)
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(module, "launch", noted)
    assert torch.equal(run(head, *args[1:], **options), expected)
    assert (2, share) in grids


@pytest.mark.parametrize(
    ("rows", "steps", "expected"), [(512, 100, 8), (512, 3, 3), (8192, 100, 1), (2, 100, 100)]
)
def test_steps_ahead(rows: int, steps: int, expected: int) -> None:
    assert _denoise_triton.steps_ahead(rows, steps) == expected


def test_a_folded_head_is_the_same_function() -> None:
    head, *data = draw(6, 4, 2)
    data = [x.float() if isinstance(x, Tensor) else x for x in data]
    head = {name: x.float() for name, x in head.items()}
    options: dict[str, Any] = {"guidance_scale": 2.0, "temperature": 1.0}
    folded = fold_head(head, torch.float32)
    assert isinstance(folded, FoldedHead)
    assert torch.equal(run(folded, *data, **options), run(head, *data, **options))
    with pytest.raises(ValueError, match="no gradients"):
        run(folded, data[0].requires_grad_(), *data[1:], **options)


INF = math.inf


@pytest.mark.parametrize(
    "variance",  # low, high, factor, linear, least and most fraction
    [
        (-3.0, -1.0, 1.0, 0.0, -INF, INF),
        (-3.0, -1.0, 1.0, 0.0, 0.0, 1.0),
        (0.1, 0.4, 0.9, 1.0, 0.0, 1.2),
        (0.1, 0.4, 0.9, 1.0, -INF, INF),  # below 0 for some v
        (0.0, 0.0, 0.7, 0.0, -INF, INF),  # known beforehand
        (-3.0, 1e3, 0.0, 0.0, -INF, INF),  # infinite, and not asked for
    ],
    ids=["log", "clamped", "linear", "linear, unbounded", "known", "none"],
)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")  # NumPy's, of "none"
def test_the_update(variance: tuple[float, ...]) -> None:
    """Every column of the table against the formula; some v are far outside of -1..1."""
    from fastfar.kernels.gpu import denoise_loop as kernels

    tokens, channels, width = 5, 3, 32
    torch.manual_seed(1)
    h, scale = torch.randn(tokens, width), torch.randn(tokens, width)
    addend = torch.randn(tokens, 2 * channels)
    modulations = torch.cat([scale, addend], dim=1)
    final, w = torch.randn(2 * channels, width), torch.randn(width, channels)
    bias = torch.randn(width) + 1.0
    x, before = torch.randn(tokens, channels), torch.randn(tokens, channels)
    noise = torch.randn(tokens, channels)
    table = torch.tensor([1.1, 0.4, 0.9, 0.3, -0.2, *variance])
    new, x0_new = (outputs((tokens, channels), torch.float32) for _ in range(2))
    stream, out = (outputs((tokens, width), torch.float32) for _ in range(2))
    kernels.step(
        h, modulations[:, width:], final, x, new.tensor, before, x0_new.tensor, noise, table, w,
        bias, projection_moments(w, bias), modulations[:, :width], stream.tensor, out.tensor,
        halves=1, guidance=1.0, low=-0.5, high=0.5, eps=1e-6, arch=80,
    )  # fmt: skip
    eps, v = (h.double() @ final.double().T + addend).chunk(2, dim=1)
    assert v.min() < -3 and v.max() > 3
    t = table.double()
    x0 = (t[0] * x - t[1] * eps).clamp(-0.5, 0.5)
    q = t[5] + ((v + 1) / 2).clamp(t[9], t[10]) * (t[6] - t[5])
    deviation = q.clamp(min=0).sqrt() if t[8] else torch.exp(0.5 * q)
    truth = t[2] * x + t[3] * x0 + t[4] * before
    truth = truth + t[7] * deviation * noise if t[7] else truth
    projected = truth @ w.double().T + bias
    normed = torch.nn.functional.layer_norm(projected, (width,), eps=1e-6) * scale
    for output, right in ((x0_new, x0), (new, truth), (stream, projected), (out, normed)):
        output.intact()
        assert relative(output.tensor, right) < 1e-5
