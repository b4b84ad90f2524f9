"""Linear layers for the well run forms: on a CPU, with the weight in oneDNN's own order.

PyTorch's `linear` hands oneDNN a plain weight, which it reorders in every call; for a few rows
that costs as much as the product. What torch.compile's "freezing" does to a weight is done here
directly, without compiling anything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class PreparedLinear:
    """x W^T + b, then GELU (tanh) if asked; the weight is packed where that can be done.

    Args:
        weight, bias: (outputs, inputs) and (outputs,), or no bias. Not kept where they are packed.
        gelu: apply the tanh approximation of GELU to the result.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> None:
        self.packed = can_pack(weight)
        weight = weight.detach().contiguous()
        if self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.weight, self.bias, self.gelu = weight, bias, gelu

    def __call__(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs) in the dtype of x, which must be the weight's."""
        if self.packed:
            after, form = ("gelu", "tanh") if self.gelu else ("none", "")
            packed: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self.weight, self.bias, after, [], form
            )
            return packed
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y, approximate="tanh") if self.gelu else y


def can_pack(weight: Tensor) -> bool:
    """Is it a 16-bit weight on a CPU that oneDNN multiplies in that dtype?"""
    mkldnn = torch.ops.mkldnn
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and hasattr(mkldnn, "_reorder_linear_weight")
        and bool(mkldnn._is_mkldnn_bf16_supported())
    )
