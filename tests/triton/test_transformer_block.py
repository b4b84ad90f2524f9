"""transformer_block by Triton's kernels, in the interpreter, against the float64 reference."""

from __future__ import annotations

from collections import Counter
from typing import Any

import interpreter
import pytest
import torch
from tolerances import assert_close_to_reference, relative, with_gap
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastfar import reference
from fastfar.ops import transformer_block

interpreter.need()
HEADS = 3
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def run(*args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = transformer_block.implementations["triton"](*args, **kwargs)
    return result


def inputs(
    batch: int, length: int, width: int, hidden: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    def normal(*shape: int, scale: float = 0.2) -> Tensor:
        return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype)

    def linear(out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        return normal(out_features, in_features, scale=in_features**-0.5), normal(out_features)

    return [
        normal(batch, length, width, scale=1.0),
        *(1 + normal(width), normal(width)),
        *linear(3 * width, width),
        *linear(width, width),
        *(1 + normal(width), normal(width)),
        *linear(hidden, width),
        *linear(width, hidden),
    ]


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 6, 10), (2, 5, 24, 40), (3, 1, 33, 70)], ids=str)
def test_values_and_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    layout = with_gap if shape[0] == 3 else torch.Tensor.contiguous
    assert_close_to_reference(
        run, reference.transformer_block, *inputs(*shape), dtype=dtype, num_heads=HEADS,
        layers=8, layout=layout,
    )  # fmt: skip


@DTYPES
def test_key_mask(dtype: torch.dtype) -> None:
    mask_BS = torch.tensor([[True, False, True, True], [True, True, False, False]])
    assert_close_to_reference(
        run, reference.transformer_block, *inputs(2, 4, 12, 20), mask_BS, dtype=dtype,
        num_heads=HEADS, layers=2,
    )  # fmt: skip


class Calls(TorchDispatchMode):
    """Counts the operators that compute something."""

    FREE = ("view", "reshape", "transpose", "t", "permute", "unbind", "slice", "detach", "alias",
            "new_empty", "empty", "_unsafe_view", "empty_like")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@DTYPES
def test_nine_kernels_without_gradients(dtype: torch.dtype) -> None:
    args = inputs(2, 4, 12, 20, dtype)
    with torch.no_grad():
        expected = run(*args, num_heads=HEADS)
        with Calls() as calls:
            out = run(*args, num_heads=HEADS)
    assert torch.equal(out, expected), "traced, it is the same"
    attention = calls.counts.pop("_scaled_dot_product_flash_attention_for_cpu")
    assert attention == 1
    assert calls.counts == {"residual_layernorm": 2, "addmm": 4, "gelu": 1, "add": 1}


@pytest.mark.parametrize("gradients", [False, True])
def test_autocast(gradients: bool) -> None:
    """float16 products, a float32 residual stream, float32 gradients."""
    args = [x.requires_grad_(gradients) for x in inputs(2, 4, 24, 40, torch.float32)]
    doubles = [x.detach().double().requires_grad_(gradients) for x in args]
    with torch.autocast("cpu", torch.float16):
        out = run(*args, num_heads=HEADS)
    truth = reference.transformer_block(*doubles, num_heads=HEADS)
    assert out.dtype is torch.float32 and 1e-5 < relative(out, truth) < 1e-3
    if gradients:
        grads = torch.autograd.grad(out.sin().sum(), args)
        exact = torch.autograd.grad(truth.sin().sum(), doubles)
        for ours, theirs in zip(grads, exact, strict=True):
            assert ours.dtype is torch.float32
            assert float((ours - theirs).norm()) < 5e-3 * (1 + float(theirs.norm()))


@pytest.mark.parametrize(("place", "kept"), [("proj", 0.8), ("fc2", 0.8), ("gelu", 0.64)])
def test_dropout_acts_in_every_place(place: str, kept: float) -> None:
    """With all matrices zero one bias is added, or nothing where it is dropped."""
    args = inputs(2, 12, 6, 6, torch.float32)
    for index in (3, 4, 5, 6, 9, 10, 11, 12):
        args[index].zero_()
    expected = 1.0
    if place == "gelu":  # dropped after the GELU, and again after the second layer
        args[10].fill_(1.0)
        args[11].copy_(torch.eye(6))
        expected = float(torch.nn.functional.gelu(torch.ones(1)))
    else:
        args[6 if place == "proj" else 12].fill_(1.0)
    added = run(*args, num_heads=HEADS, dropout=0.2) - args[0]
    there = added.abs() > 1e-6
    torch.testing.assert_close(added[there].mean(), torch.tensor(expected / kept))
    assert abs(float(there.float().mean()) - kept) < 0.12


def test_what_is_not_taken() -> None:
    args = inputs(1, 2, 6, 8, torch.float32)
    with pytest.raises(ValueError, match="4 heads do not share"):
        run(*args, num_heads=4)
    with pytest.raises(ValueError, match=r"fc1_weight is \(7, 6\), expected \(8, 6\)"):
        run(*args[:9], args[9][1:], *args[10:], num_heads=HEADS)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        run(args[0].double(), *args[1:], num_heads=HEADS)
    with pytest.raises(ValueError, match="attention='none'"):
        run(*args, num_heads=HEADS, attention="none")
