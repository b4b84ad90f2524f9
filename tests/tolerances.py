"""How close is close enough: one rule, one table.

An op that runs in some dtype may be at most `FACTOR` times as far from the float64 reference as the
reference is when PyTorch runs it in that dtype, plus a few rounding errors. So the tolerance scales
itself with size and conditioning of the problem, and in float64 only the floor is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

FACTOR = 2.0
FLOOR = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1.25e-4,
    torch.bfloat16: 1e-3,
}
EXACT_DTYPES = (torch.float64, torch.float32)
HALF_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (*EXACT_DTYPES, *HALF_DTYPES)
GOLDEN = 1e-4  # float32 against the recorded tensors, per tensor

Outcome = dict[str, Tensor]


def relative(out: Tensor, truth: Tensor) -> float:
    """||out - truth|| / ||truth||; infinite where the result is not finite."""
    assert out.shape == truth.shape, f"shape {tuple(out.shape)}, expected {tuple(truth.shape)}"
    difference = (out.detach().double() - truth.detach().double()).norm()
    error = float(difference / truth.detach().double().norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def is_float(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def joined(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Several results of one shape as one tensor."""
    return out if isinstance(out, Tensor) else torch.stack(out)


def with_gap(x: Tensor) -> Tensor:
    """The same values in rows with a gap between them: not contiguous."""
    if x.ndim == 0:
        return x
    out = torch.cat([x, torch.full_like(x[..., :1], float("nan"))], dim=-1)[..., :-1]
    assert not out.is_contiguous() or out.numel() == out.shape[-1]
    return out


def evaluate(
    function: Callable[..., Any],
    args: Any,
    kwargs: dict[str, Any],
    *,
    gradients: bool,
    layout: Callable[[Tensor], Tensor],
) -> Outcome:
    """Value without and with a graph, and the gradient of a fixed random projection."""

    def leaf(x: Any) -> Any:
        return layout(x.detach()).requires_grad_(gradients) if is_float(x) else x

    args = tree_map(leaf, args)
    with torch.no_grad():
        outcome = {"value without gradients": joined(function(*args, **kwargs))}
    if gradients:
        out = joined(function(*args, **kwargs))
        generator = torch.Generator().manual_seed(0)
        cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        leaves = [x for x in tree_leaves(args) if is_float(x)]
        grads = torch.autograd.grad(out, leaves, cotangent.to(out), allow_unused=True)
        outcome["value"] = out
        outcome |= {
            f"gradient {i} of shape {tuple(x.shape)}": torch.zeros_like(x) if g is None else g
            for i, (x, g) in enumerate(zip(leaves, grads, strict=True))
        }
    return outcome


def assert_close_to_reference(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    *args: Any,
    dtype: torch.dtype,
    gradients: bool = True,
    layout: Callable[[Tensor], Tensor] = torch.Tensor.contiguous,
    layers: int = 1,
    **kwargs: Any,
) -> None:
    """`op(*args, **kwargs)` in `dtype` meets the rule, in value and in every gradient.

    Tensors of `args` (also those inside dictionaries) are rounded to `dtype` first, so that all
    three computations have the same inputs. `layers` computed in series raise the floor.
    """
    rounded = tree_map(lambda x: x.to(dtype) if is_float(x) else x, args)
    doubled = tree_map(lambda x: x.double() if is_float(x) else x, rounded)
    contiguous = torch.Tensor.contiguous
    ours = evaluate(op, rounded, kwargs, gradients=gradients, layout=layout)
    truth = evaluate(reference, doubled, kwargs, gradients=gradients, layout=contiguous)
    plain = evaluate(reference, rounded, kwargs, gradients=gradients, layout=contiguous)
    for name, expected in truth.items():
        error, allowed = relative(ours[name], expected), relative(plain[name], expected)
        limit = FACTOR * allowed + layers * FLOOR[dtype]
        assert error <= limit, f"{name}: error {error:.2e}, PyTorch's {allowed:.2e} ({dtype})"
