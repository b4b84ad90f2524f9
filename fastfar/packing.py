"""Weights in the order in which the native kernels read them (`fastfar_pack`)."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fastfar import _native


class PackedWeight(Tensor):
    """An (N, K) matrix of weights in tile order: bytes that no other code can read.

    Immutable: copies share its memory, and it cannot be pickled.

    Attributes:
        out_features, in_features: N and K.
        compute_dtype: float32 or bfloat16, of the packed numbers and of the products.
    """

    out_features: int
    in_features: int
    compute_dtype: torch.dtype

    # Operations on one are operations on its bytes: they give plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({self.out_features} x {self.in_features}, {self.compute_dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ValueError(
            "packed weights cannot be saved: they are in the order of the native kernels. Save the "
            "model that they were packed from (loaded without backend=)"
        )


def pack(weight_NK: Tensor, dtype: torch.dtype) -> PackedWeight:
    """Packed copy of a float32 or bfloat16 matrix of any strides, on the CPU.

    Raises TypeError for other dtypes, ValueError for other than two dimensions or another device.
    """
    if weight_NK.dtype not in _native.DTYPES or dtype not in _native.DTYPES:
        raise TypeError(f"cannot pack {weight_NK.dtype} as {dtype}; use float32 or bfloat16")
    if weight_NK.dim() != 2:
        raise ValueError(f"a weight has 2 dimensions, got {tuple(weight_NK.shape)}")
    if weight_NK.device.type != "cpu":
        raise ValueError(f"only weights on the CPU can be packed, got {weight_NK.device}")
    library = _native.load()
    n, k = weight_NK.shape
    packed = torch.empty(library.packed_bytes(dtype, n, k), dtype=torch.uint8)
    library.call(
        "pack",
        dtype=_native.DTYPES[dtype],
        source_dtype=_native.DTYPES[weight_NK.dtype],
        n=n,
        k=k,
        stride_n=weight_NK.stride(0),
        stride_k=weight_NK.stride(1),
        w=weight_NK,
        packed=packed,
        threads=torch.get_num_threads(),
    )
    result = packed.as_subclass(PackedWeight)
    result.out_features, result.in_features, result.compute_dtype = n, k, dtype
    return result


def packed(weight_NK: Tensor, dtype: torch.dtype | None = None) -> PackedWeight:
    """`weight_NK` itself if it is packed already, else a packed copy in `dtype` (None: its own)."""
    if isinstance(weight_NK, PackedWeight):
        return weight_NK
    return pack(weight_NK.detach(), dtype or weight_NK.dtype)
