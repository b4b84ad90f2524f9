"""The processes of a training run, and what spreads the model over them.

`fastfar train` is one process; `torchrun --nproc-per-node 4 -m fastfar train` is four of one run.
Every process draws the numbers of its own images by their number in the step (`draws.py`), so a
run is the same on any number of processes, to rounding; dropout alone is drawn per process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastfar import backend
from fastfar.model import FAR

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees it.

    Attributes:
        device: of this process.
        rank, size: number of this process, and how many there are.
        numbers: process group for a few numbers a step, on the CPU; None where there is no group.
        storage: process group of checkpoints, which are written in a thread of their own.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    numbers: Any = None
    storage: Any = None

    @classmethod
    def join(cls, device: torch.device | str = "cpu") -> World:
        """The process group that there is, or that torchrun asks for; else one process alone.

        A CUDA device without a number is the one of the process's rank on its machine. Gloo on
        CPUs, NCCL on GPUs.

        Raises:
            ValueError: the device is not known.
        """
        try:
            device = torch.device(device)
        except RuntimeError as error:
            known = "give cpu, cuda or cuda:1"
            raise ValueError(f"device {device!r} is not known; {known}") from error
        launched = backend.launched()
        if launched.size == 1 and not dist.is_initialized():
            return cls(device)
        gpu = device.type == "cuda"
        if gpu:
            if str(device) == "cuda":
                device = torch.device("cuda", launched.local_rank)
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        numbers, storage = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
        return cls(device, dist.get_rank(), dist.get_world_size(), numbers, storage)

    @staticmethod
    def leave() -> None:
        """Take the process group down, if there is one: the last thing that a command does."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def grouped(self) -> bool:
        """Whether there is a process group, be it of one process."""
        return self.numbers is not None

    @property
    def main(self) -> bool:
        """Whether this is the process that writes the log and speaks."""
        return self.rank == 0

    def mean(self, values: Sequence[float]) -> list[float]:
        """Means of numbers over the processes, each of which gives as many; in float64."""
        if not self.grouped:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total, group=self.numbers)
        means: list[float] = (total / self.size).tolist()
        return means

    def highest(self, value: int) -> int:
        """The largest of the processes' values."""
        if not self.grouped:
            return value
        highest = torch.tensor(value)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.numbers)
        return int(highest)


class Inside(nn.Module):
    """inside(function, *args) = function(model, *args), run where DDP and FSDP see it.

    They hook into the forward of the module that they wrap, and the loss uses more of the model
    than its forward: the class table, and the denoising MLP.
    """

    def __init__(self, model: FAR) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Result], *args: Any) -> Result:
        return function(self.model, *args)


def spread(
    model: FAR, world: World, parallel: str, dtype: torch.dtype, *, all_used: bool, compiled: bool
) -> nn.Module:
    """The model, wrapped for `world`: call the result as an `Inside`.

    Args:
        model: the same weights in every process; FSDP replaces its parameters by their shards.
        parallel: "ddp" (every process holds all, gradients are averaged) or "fsdp" (FSDP2's
            fully_shard of each block, of the denoising MLP and of the rest: weights, gradients,
            moments and average are split over the processes). One process without a group has
            nothing to spread.
        dtype: in which FSDP gathers the weights on GPUs; gradients are reduced in float32.
        all_used: whether every parameter takes part in every loss.
        compiled: compile FSDP's units one by one; it cannot be compiled as a whole.
    """
    inside = Inside(model)
    if not world.grouped:
        return inside
    if parallel == "ddp":
        return DistributedDataParallel(
            inside,
            gradient_as_bucket_view=True,
            find_unused_parameters=not all_used,
        )
    mesh = dist.init_device_mesh(world.device.type, (world.size,))
    # Inputs keep their dtype: levels, timesteps and noise in bfloat16 would be other draws. On a
    # CPU nothing is gained by gathering in half precision, and the native kernels want float32.
    half = dtype if world.device.type == "cuda" and dtype is not torch.float32 else None
    policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
    for unit in (*model.encoder_blocks, *model.decoder_blocks, model.head):
        if compiled:
            unit.compile()
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    # The rest is small, and gathered in float32: positions in bfloat16 would make the residual
    # stream bfloat16, which it is not in one process. Left whole after a forward without a
    # backward, as a probe's is, its parameters would be others than those the optimizer knows.
    rest = MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False)
    fully_shard(inside, mesh=mesh, mp_policy=rest, reshard_after_forward=True)
    return inside


def unreduced(inside: nn.Module) -> AbstractContextManager[None]:
    """Inside, DDP keeps gradients to itself: more of them come. FSDP adds up what is reduced."""
    if isinstance(inside, DistributedDataParallel):
        context: AbstractContextManager[None] = inside.no_sync()
        return context
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is sharded over the processes, in each of them (all must call)."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered: Tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()
    return gathered.to(tensor.device)


def own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; writing to it writes to the tensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    local: Tensor = tensor.to_local()
    return local
