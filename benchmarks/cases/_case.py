"""What a case is: an op, its inputs, and the work in it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastfar import FARConfig, ops, reference
from fastfar.ops._convolution import can_pack, pack_convolution
from fastfar.ops._folded_head import fold_head
from fastfar.ops._head import pack_head
from fastfar.ops.upsample_convolution import pack_upsample
from fastfar.packing import packed

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """An op of the model, ready to be called and counted.

    Attributes:
        name: of the op, in `fastfar.ops` and in `fastfar.reference`.
        make: (config, batch, dtype) -> (args, kwargs) of the call that sampling or training makes.
        flops: (config, batch) -> FLOPs of the published arithmetic; 0 where there is no product.
        executed: (config, batch, path) -> the same of an implementation, path being a back end,
            "reference" or "compile"; None where all do what is published.
    """

    name: str
    make: Callable[[FARConfig, int, torch.dtype], Arguments]
    flops: Callable[[FARConfig, int], int]
    executed: Callable[[FARConfig, int, str], int] | None = None

    @property
    def op(self) -> ops.Op[..., Tensor]:
        """The production op."""
        operation: ops.Op[..., Tensor] = getattr(ops, self.name)
        return operation

    @property
    def reference(self) -> Callable[..., Tensor]:
        """The truth."""
        function: Callable[..., Tensor] = getattr(reference, self.name)
        return function

    def executed_flops(self, config: FARConfig, batch: int, path: str = "torch") -> int:
        """FLOPs that an implementation executes."""
        if self.executed is None:
            return self.flops(config, batch)
        return self.executed(config, batch, path)

    def inputs(self, config: FARConfig, batch: int, dtype: torch.dtype, seed: int = 0) -> Arguments:
        """Arguments of the op for `batch` images; the same numbers for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(config, batch, dtype)

    def prepared(
        self, arguments: Arguments, backend: str, dtype: torch.dtype, device: torch.device | str
    ) -> Arguments:
        """float32 `arguments` as a model that was made ready for a back end passes them.

        "native": matrices of weights are packed in `dtype` and all else is float32; an op without
        weights gets its tensors in `dtype`. "triton": the head is folded. Elsewhere all is `dtype`.

        Raises:
            ValueError, OSError: sizes that cannot be packed, or no native library.
        """
        args, kwargs = arguments
        args = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, args)
        if self.name == "denoise_loop" and backend in ("native", "triton"):
            head, *rest = args
            ready = pack_head(head, dtype) if backend == "native" else fold_head(head, dtype)
            return (ready, *rest), kwargs
        if backend != "native":
            return tuple(as_float(x, dtype) for x in args), kwargs
        names = list(inspect.signature(self.op).parameters)[: len(args)]
        weights = {name for name, x in zip(names, args, strict=True) if name.endswith("weight")}
        matrices = any(args[names.index(name)].ndim == 2 for name in weights)

        def ready_for(name: str, x: Any) -> Any:
            if name in weights and x.ndim == 2:
                return packed(x, dtype)
            if name in weights and x.ndim == 4 and can_pack(dtype):
                pack = pack_upsample if self.name == "upsample_convolution" else pack_convolution
                return pack(x, dtype)
            return as_float(x, torch.float32 if matrices else dtype)

        return tuple(ready_for(name, x) for name, x in zip(names, args, strict=True)), kwargs

    @staticmethod
    def bytes_moved(arguments: Arguments, out: Any) -> int:
        """Bytes of all inputs and of the outputs: the least traffic with memory."""
        tensors = [x for x in tree_leaves((arguments, out)) if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in tensors)


def as_float(x: Any, dtype: torch.dtype) -> Any:
    """Tensors of real numbers, also those inside a dictionary, in `dtype`; all else as it is."""
    if isinstance(x, Mapping):
        return {key: as_float(value, dtype) for key, value in x.items()}
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def positions(config: FARConfig) -> int:
    """S: tokens and buffer positions of an image in the transformer."""
    return config.buffer_size + config.num_tokens


def matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random weights that keep the size of what they are multiplied with."""
    return (torch.randn(rows, columns) / math.sqrt(columns)).to(dtype)


def vector(size: int, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    """A random bias, or with mean 1 a gain."""
    return (mean + 0.1 * torch.randn(size)).to(dtype)
