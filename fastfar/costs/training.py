"""What a training run needs: memory of each GPU, time of a step. Nothing is measured.

Memory is a sum of components, each with its formula; time is that of the kernels in
`training_step.py` by the model of `kernels.py`, of the optimizer's passes over memory, and of the
communication that the backward does not hide. `LETTERS` are those of the formulas here.

The wrapping is that of `fastfar.training.distributed`: DDP whose gradients lie in its buckets and
are summed once a step; FSDP2 over blocks, head and the rest, with bfloat16 weights gathered for
every forward and backward, and gradients summed in float32 after each. Gradients, activations and
workspace are counted as if all were there at once, and every residual stream as float32, so that
memory is an upper estimate.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from fastfar._weights import skeleton
from fastfar.config import FARConfig
from fastfar.costs import kernels, training_step
from fastfar.costs.gpus import EAGER_CALL, GPU
from fastfar.costs.kernels import Work, price
from fastfar.costs.training_machines import HOST_COPY, HOST_MEMORY, Machine
from fastfar.costs.training_step import Part, Product, kept_bytes, parts, sizes_of, value
from fastfar.model import FAR

LETTERS = {
    "p": "parameters",
    "q": "those of the weights of linear layers whose input wants a gradient",
    "u": "those of the largest unit: a block of the transformer, or the head",
    "o": "those outside of units",
    "s": "share that a GPU keeps: 1, or 1 / GPUs where sharded",
}

PARALLEL = ("ddp", "fsdp")
EMA = ("same", "cpu")

CONTEXT = 1.5 * 2**30  # bytes of CUDA's context, libraries' workspaces, NCCL's buffers [assumed]
FRAGMENTS = 0.05  # of what comes and goes within a step: lost between blocks [assumed]
HIDDEN = 0.9  # share of the backward behind which communication may hide [assumed]
ROOM = 0.95  # of the memory, which an estimate should not exceed to be relied on [assumed]
WORTH = 0.05  # differences below it are less than the model can tell
BACKWARD_CALL = EAGER_CALL / 2  # host time of a kernel of the backward, without Python [assumed]


@dataclass(frozen=True)
class Run:
    """A training run to be planned.

    Attributes:
        config: the model's sizes.
        machine: where.
        batch: images of an optimizer step, on all GPUs together.
        multiplier: head rows of a token.
        accumulate: micro-batches that a step is cut into, one after the other on every GPU.
        parallel: "ddp", or "fsdp": weights, gradients and optimizer state sharded.
        grad_checkpointing: blocks are computed again in the backward.
        ema: averaged weights on the "same" GPU, or on the host ("cpu").

    Raises:
        ValueError: an unknown option, or the batch cannot be cut into equal micro-batches.
    """

    config: FARConfig
    machine: Machine
    batch: int
    multiplier: int = 4
    accumulate: int = 1
    parallel: str = "ddp"
    grad_checkpointing: bool = False
    ema: str = "same"

    def __post_init__(self) -> None:
        for name, allowed in (("parallel", PARALLEL), ("ema", EMA)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("batch", "multiplier", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch % (parts_of := self.machine.count * self.accumulate):
            raise ValueError(
                f"a batch of {self.batch} cannot be cut into {self.accumulate} equal micro-batches "
                f"on each of {self.machine.count} GPUs; give a multiple of {parts_of}"
            )

    @property
    def images(self) -> int:
        """Of a micro-batch on one GPU."""
        return self.batch // (self.machine.count * self.accumulate)

    @property
    def sharded(self) -> bool:
        """Whether weights are: with one GPU there is nothing to share."""
        return self.parallel == "fsdp" and self.machine.count > 1

    @property
    def sizes(self) -> dict[str, float]:
        """The letters of all formulas."""
        share = 1.0 / self.machine.count if self.sharded else 1.0
        sizes = sizes_of(self.config, self.images, self.multiplier)
        return {**sizes, **parameters(self.config), "s": share}


@functools.cache
def parameters(config: FARConfig) -> dict[str, int]:
    """The numbers p, q, u and o."""
    with skeleton():
        model = FAR(config)
    units = [*model.encoder_blocks, *model.decoder_blocks, model.head]
    every, *each = (sum(x.numel() for x in m.parameters()) for m in (model, *units))
    sizes = sizes_of(config, 1, 1)
    linear = sum(
        part.count * round(value(layer.outputs, sizes) * value(layer.inputs, sizes))
        for part in parts(config)
        for layer in part.linears.values()
        if layer.trained_input
    )
    return {"p": every, "q": linear, "u": max(each), "o": every - sum(each)}


# --- memory ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Component:
    """Bytes on one GPU, and how they come about."""

    name: str
    bytes: float
    formula: str


def memory(run: Run) -> list[Component]:
    """Components of one GPU's memory at the peak of a step."""
    sizes, again = run.sizes, run.grad_checkpointing
    formulas = {"weights, float32": "4 p s", "gradients": "4 p s", "AdamW's moments": "8 p s"}
    if run.ema == "same":
        formulas["averaged weights (EMA)"] = "4 p s"
    if run.sharded:
        formulas["weights gathered: two units, and what is outside"] = "4 u + 2 o"
        formulas["gradients of these to be shared out"] = "12 u + 6 o"
    else:
        formulas["bfloat16 copies of the weights"] = "2 q"
    lasting = [Component(name, value(text, sizes), text) for name, text in formulas.items()]
    passing, steps = [], parts(run.config)
    for title, ours in (
        ("activations of the transformer", [x for x in steps if not _is_head(x)]),
        ("activations of the head's rows", [x for x in steps if _is_head(x)]),
    ):
        kept = sum(kept_bytes(part, sizes, again) for part in ours)
        passing.append(Component(title, kept, "what each module keeps for the backward"))
    if again:
        whole = [replace(part, count=1) for part in steps if part.input is not None and part.count]
        block = max(whole, key=lambda part: kept_bytes(part, sizes))
        text = f"what one of the {block.name} keeps"
        passing.append(Component("a block computed again", kept_bytes(block, sizes), text))
    largest = max(steps, key=lambda part: value(part.workspace, sizes))
    text = f"{largest.workspace}: gradients within {largest.name}"
    passing.append(Component("workspace", value(largest.workspace, sizes), text))
    lost = FRAGMENTS * sum(each.bytes for each in passing)
    text = f"{FRAGMENTS:.0%} of activations and workspace [assumed]"
    return [
        *lasting,
        *passing,
        Component("lost between blocks", lost, text),
        Component("CUDA, cuBLAS, NCCL", CONTEXT, "[assumed]"),
    ]


def _is_head(part: Part) -> bool:
    return part.name.startswith("head")


# --- time ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A part of a step on one GPU.

    Attributes:
        name: of it.
        seconds: that it takes.
        flops: of its products, without padding.
        bytes: that it moves through memory, or over links.
    """

    name: str
    seconds: float
    flops: float = 0.0
    bytes: float = 0.0


def stages(run: Run) -> list[Stage]:
    """The parts of one optimizer step, in their order; they add up to it."""
    sizes, gpu, times = run.sizes, run.machine.gpu, run.accumulate
    forward, backward, again, host = Stage("forward", 0), Stage("backward", 0), Stage("", 0), 0.0
    for part in parts(run.config):
        ahead, calls_ahead = _pass(run, part, sizes, ahead=True)
        back, calls_back = _pass(run, part, sizes, ahead=False)
        forward, backward = _sum(forward, ahead), _sum(backward, back)
        host += calls_ahead * EAGER_CALL + calls_back * BACKWARD_CALL
        if run.grad_checkpointing and part.input is not None:
            again = _sum(again, ahead)
            host += calls_ahead * EAGER_CALL
    found = [_times(forward, times, "forward"), _times(backward, times, "backward")]
    if run.grad_checkpointing:
        found.append(_times(again, times, "forward of blocks again"))
    # Weights to bfloat16 and gradients back, every micro-batch; later ones are added to the first.
    moved = value("6 q + 6 q", sizes) * times + value("12 p s", sizes) * (times - 1)
    found.append(Stage("casts of weights and gradients", _stream(gpu, moved), bytes=moved))
    busy = sum(each.seconds for each in found)
    found.append(Stage("waiting for the host", max(0.0, host * times - busy)))
    found.append(_communication(run, sizes, backward.seconds, forward.seconds))
    clip_and_step = value("4 p s + 8 p s + 28 p s", sizes)
    found.append(Stage("optimizer", _stream(gpu, clip_and_step), bytes=clip_and_step))
    if run.ema == "cpu":
        copied, moved = value("4 p s", sizes), value("12 p s", sizes)
        taken = copied / HOST_COPY + moved / HOST_MEMORY
        found.append(Stage("EMA on the host", taken, bytes=copied + moved))
    else:
        moved = value("12 p s", sizes)
        found.append(Stage("EMA", _stream(gpu, moved), bytes=moved))
    return found


def _communication(
    run: Run, sizes: Mapping[str, float], backward: float, forward: float
) -> Stage:
    """What no computation hides.

    DDP sums 4 p bytes behind the backward of the last micro-batch; FSDP gathers 2 p for each
    forward and backward and shares out 4 p of gradients, all behind the computing of the same.
    """
    machine, p = run.machine, sizes["p"]
    if run.sharded:
        taken = run.accumulate * (2 * machine.gather(2 * p) + machine.gather(4 * p))
        behind, moved = run.accumulate * (forward + backward), run.accumulate * 8 * p
    else:
        taken, behind, moved = machine.all_reduce(4 * p), backward, 8 * p
    if machine.count == 1:
        moved = 0.0
    return Stage("communication not hidden", max(0.0, taken - HIDDEN * behind), bytes=moved)


def _pass(
    run: Run, part: Part, sizes: Mapping[str, float], ahead: bool
) -> tuple[Stage, int]:
    """Forward or backward of all modules of a part in one micro-batch; kernels that it starts."""
    gpu, which = run.machine.gpu, 0 if ahead else 1
    products = [each for x in part.linears.values() for each in x.products(sizes)[which]]
    streams = [value(text, sizes) for text in (part.forward if ahead else part.backward).values()]
    streams = [nbytes for nbytes in streams if nbytes]
    seconds = sum(_product(gpu, each) for each in products)
    seconds += sum(_stream(gpu, nbytes) for nbytes in streams)
    flops = training_step.linear_flops(part, sizes)[which]
    # Weight and bias are cast, too; their gradients are cast back and added up.
    calls = len(products) + len(streams) + len(part.linears) * (2 if ahead else 4)
    if part.attention:
        flops += training_step.attention_flops(sizes)[which]
        config = run.config
        one = _attention(gpu, run.images * config.num_heads, round(sizes["S"]),
                         config.width // config.num_heads)  # fmt: skip
        seconds += one if ahead else 2.5 * one
        calls += 1 if ahead else 3
    moved = sum(streams) + sum(2.0 * (m * k + n * k + m * n) for m, n, k in products)
    stage = Stage(part.name, seconds, flops, moved)
    return _times(stage, part.count, part.name), part.count * calls


@functools.cache
def _product(gpu: GPU, shape: Product) -> float:
    m, n, k = shape
    nbytes = 2.0 * (m * k + n * k + m * n)
    return price(kernels.library_product(gpu, "mm", m, n, k, 2), gpu, nbytes).seconds


def _stream(gpu: GPU, nbytes: float) -> float:
    programs = max(1, round(nbytes / (4 * kernels.STREAM_NUMBERS)))
    return price(Work("stream", programs, moved=nbytes), gpu, nbytes).seconds


@functools.cache
def _attention(gpu: GPU, batch_heads: int, length: int, width: int) -> float:
    work = kernels.attention("attention", batch_heads, length, length, width, 2)
    return price(work, gpu, 8.0 * batch_heads * length * width).seconds


def _sum(a: Stage, b: Stage) -> Stage:
    return Stage(a.name, a.seconds + b.seconds, a.flops + b.flops, a.bytes + b.bytes)


def _times(stage: Stage, count: int, name: str) -> Stage:
    return Stage(name, count * stage.seconds, count * stage.flops, count * stage.bytes)


# --- both ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What is expected of a run."""

    run: Run
    memory: list[Component]
    stages: list[Stage]

    @property
    def bytes(self) -> float:
        """Of one GPU's memory."""
        return sum(each.bytes for each in self.memory)

    @property
    def fits(self) -> bool:
        """Whether the GPU has as much."""
        return self.bytes <= self.run.machine.memory

    @property
    def tight(self) -> bool:
        """Whether it fits with so little to spare that the estimate cannot be relied on."""
        return self.fits and self.bytes > ROOM * self.run.machine.memory

    @property
    def seconds(self) -> float:
        """Of an optimizer step."""
        return sum(each.seconds for each in self.stages)

    @property
    def flops(self) -> float:
        """Of the whole batch: products of forward and backward, none of them twice."""
        per_pass = training_step.flops(self.run.config, self.run.images, self.run.multiplier)
        return sum(per_pass) * self.run.accumulate * self.run.machine.count

    @property
    def utilisation(self) -> float:
        """Share of the GPUs' bfloat16 peak that these are (MFU)."""
        peak = self.run.machine.gpu.half * self.run.machine.count
        return self.flops / self.seconds / peak

    @property
    def host_bytes(self) -> float:
        """Of the host's memory, for a process: averaged weights that are there."""
        return value("4 p s", self.run.sizes) if self.run.ema == "cpu" else 0.0


def estimate(run: Run) -> Estimate:
    """Memory and time of a run."""
    return Estimate(run, memory(run), stages(run))


def changes(run: Run) -> Iterator[dict[str, object]]:
    """Options that take less memory than those of a run, the fewest changes first."""
    accumulate = [
        a
        for a in (run.accumulate * 2**i for i in range(20))
        if run.batch % (run.machine.count * a) == 0
    ]
    options: dict[str, list[object]] = {
        "accumulate": [*accumulate],
        "grad_checkpointing": [*{run.grad_checkpointing, True}],
        "ema": [*dict.fromkeys((run.ema, "cpu"))],
        "parallel": [*dict.fromkeys((run.parallel, *("fsdp",) * (run.machine.count > 1)))],
    }
    found = []
    for values in itertools.product(*options.values()):
        entry = dict(zip(options, values, strict=True))
        found.append({k: v for k, v in entry.items() if v != getattr(run, k)})
    yield from sorted(filter(None, found), key=len)


def remedies(run: Run, most: int = 3) -> list[tuple[dict[str, object], Estimate]]:
    """Changes by which a run fits with room to spare: for every number of changes the fastest.

    More changes are worth naming only if they make a step `WORTH` faster than fewer do.
    """
    best: dict[int, tuple[dict[str, object], Estimate]] = {}
    for change in changes(run):
        made = estimate(replace(run, **change))  # type: ignore[arg-type]
        known = best.get(len(change))
        better = known is None or made.seconds < known[1].seconds
        if made.fits and not made.tight and better:
            best[len(change)] = (change, made)
    found: list[tuple[dict[str, object], Estimate]] = []
    for _, entry in sorted(best.items()):
        if not found or entry[1].seconds < (1 - WORTH) * found[-1][1].seconds:
            found.append(entry)
    return found[:most]
