"""What the tests of ops with a native backward share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tolerances import assert_close_to_reference
from torch import Tensor

from fastfar.ops import use_backend


def assert_native(
    op: Callable[..., Tensor], reference: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> None:
    """`assert_close_to_reference` of the op on the native back end."""

    def native(*inner: Any, **options: Any) -> Tensor:
        with use_backend("native"):
            return op(*inner, **options)

    assert_close_to_reference(native, reference, *args, **kwargs)


def value_and_gradients(op: Callable[..., Tensor], args: tuple[Tensor, ...]) -> list[Tensor]:
    """The op's value and its gradients, in float32 and under autocast to bfloat16."""
    results = []
    for autocast in (False, True):
        leaves = [x.detach().float().requires_grad_() for x in args]
        with use_backend("native"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = op(*leaves)
        results += [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]
    return results


def assert_same_for_all_threads(op: Callable[..., Tensor], args: tuple[Tensor, ...]) -> None:
    """Bit-equal from call to call, and on one to four threads."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = value_and_gradients(op, args)
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            for one, other in zip(expected, value_and_gradients(op, args), strict=True):
                assert torch.equal(one, other), f"{count} threads"
    finally:
        torch.set_num_threads(threads)


def opcheck_of(name: str, *args: Any) -> None:
    """PyTorch's own checks of the custom op `fastfar::<name>`: schema, fake tensors, autograd."""
    torch.library.opcheck(getattr(torch.ops.fastfar, name).default, args)
