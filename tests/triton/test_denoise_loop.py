"""denoise_loop by Triton's kernels, in the interpreter, against the float64 reference."""

from __future__ import annotations

from typing import Any

import interpreter
import pytest
import torch
from formula import formula_tensor
from tolerances import assert_close_to_reference, relative, with_gap
from torch import Tensor

from fastfar import reference
from fastfar.config import FARConfig
from fastfar.head import DenoisingMLP
from fastfar.ops import _denoise_triton, _schedule, denoise_loop
from fastfar.ops._folded_head import FoldedHead, fold_head

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
def test_chunks_and_branches_do_not_change_a_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with two buffers of modulations; the interpreter has one stream, so in order."""
    head, condition, level, initial, noise = draw(9, 4, 2, depth=1)
    folded = fold_head(head, dtype)
    options: dict[str, Any] = {
        "guidance_scale": 2.0, "temperature": 1.0, "x0_range": (-1.5, 2.0),
        "num_timesteps": 1000,
    }  # fmt: skip

    def in_order(items: list[_schedule.Item], execute: Any, device: object) -> None:
        for item in items:
            execute(item)

    def denoise(chunk: int, branches: int) -> Tensor:
        return _denoise_triton.denoise(
            folded, condition.float(), level, initial.float(), noise.float(), **options,
            chunk=chunk, branches=branches,
        )  # fmt: skip

    expected = denoise(3, 1)
    assert bool(expected.isfinite().all())
    monkeypatch.setattr(_schedule, "run", in_order)
    for chunk, branches in ((1, 1), (2, 2), (8, 2)):
        assert torch.equal(denoise(chunk, branches), expected)


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
@pytest.mark.parametrize("branches", [1, 2])
def test_the_schedule_has_no_hazard(steps: int, chunk: int, branches: int) -> None:
    items = _schedule.schedule(steps, chunk, branches)
    before: list[set[int]] = []  # entries that have certainly ended when this one starts
    last = {0: -1, 1: -1}
    for position, item in enumerate(items):
        assert all(other < position for other in item.after), "waits for what is not launched yet"
        direct = {*item.after, *([last[item.branch]] if last[item.branch] >= 0 else [])}
        before.append(direct.union(*(before[other] for other in direct)))
        last[item.branch] = position
    steps_seen = [item.index for item in items if item.kind == _schedule.STEP]
    assert steps_seen == list(range(steps))
    chunks = -(-steps // chunk)
    assert sorted(i.index for i in items if i.kind == _schedule.MODULATE) == list(range(chunks))

    def writer(index: int) -> int:
        return items.index(next(i for i in items if i.kind != _schedule.STEP and i.index == index))

    for position, item in enumerate(items):
        if item.kind == _schedule.STEP:
            own = writer(item.index // chunk)
            assert own in before[position], "reads modulations that may not be there"
            assert items[own].slot == item.slot
            later = [
                p for p, i in enumerate(items) if i.kind == _schedule.MODULATE
                and i.slot == item.slot and i.index > item.index // chunk
            ]  # fmt: skip
            assert all(position in before[p] for p in later), "its modulations may be overwritten"
    slots = {item.slot for item in items}
    assert len(slots) <= branches and {item.branch for item in items} <= set(range(branches))


def test_the_hazard_check_can_fail() -> None:
    """Without its waits a two-branch schedule is caught by the test above."""
    items = [
        _schedule.Item(i.kind, i.index, i.slot, i.branch) for i in _schedule.schedule(7, 2, 2)
    ]
    original = _schedule.schedule
    try:
        _schedule.schedule = lambda *_: items  # type: ignore[assignment]
        with pytest.raises(AssertionError, match="may not be there"):
            test_the_schedule_has_no_hazard(7, 2, 2)
    finally:
        _schedule.schedule = original


@pytest.mark.parametrize(
    ("rows", "l2", "expected"), [(512, 50, 2), (512, 126, 6), (2, 50, 8), (8192, 50, 1)]
)
def test_steps_ahead(rows: int, l2: int, expected: int) -> None:
    assert _denoise_triton.steps_ahead(rows, 10272, 2, l2 * 2**20, 100) == expected
    assert _denoise_triton.steps_ahead(rows, 10272, 2, l2 * 2**20, 1) == 1


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


def test_other_solvers_may_look_back() -> None:
    """x = a x + b x0 + c x0_previous + s noise with c != 0, against the formula."""
    from fastfar.kernels.gpu import denoise_loop as kernels

    tokens, channels, width = 5, 3, 32
    tile = kernels.statistics_tile(80, 4)
    torch.manual_seed(1)
    h, scale = torch.randn(tokens, width), torch.randn(tokens, width)
    addend = torch.randn(tokens, 2 * channels)
    modulations = torch.cat([scale, addend], dim=1)
    final, w = torch.randn(2 * channels, width), torch.randn(width, channels)
    x, before = torch.randn(tokens, channels), torch.randn(tokens, channels)
    noise = torch.randn(tokens, channels)
    table = torch.tensor([1.1, 0.4, 0.9, 0.3, -0.2, -3.0, -1.0, 1.0])
    statistics = torch.stack(
        [h.mean(1), h.var(1, correction=0) * width], dim=-1
    )[:, None].contiguous()
    new, previous = x.clone(), before.clone()
    out, out_statistics = torch.empty(tokens, width), torch.empty(tokens, -(-width // tile), 2)
    kernels.step(
        h, statistics, width, modulations[:, :width], modulations[:, width:], final, new, previous,
        noise, table, w, torch.zeros(width), out, None, out_statistics,
        halves=1, guidance=1.0, low=-0.5, high=0.5, eps=1e-6, arch=80,
    )  # fmt: skip
    normed = torch.nn.functional.layer_norm(h.double(), (width,), eps=1e-6) * scale
    eps, v = (normed @ final.double().T + addend).chunk(2, dim=1)
    t = table.double()
    x0 = (t[0] * x - t[1] * eps).clamp(-0.5, 0.5)
    f = (v + 1) / 2
    sigma = t[7] * torch.exp(0.5 * (f * t[6] + (1 - f) * t[5]))
    truth = t[2] * x + t[3] * x0 + t[4] * before + sigma * noise
    assert relative(previous, x0) < 1e-5 and relative(new, truth) < 1e-5
    assert relative(out, truth @ w.double().T) < 1e-5
