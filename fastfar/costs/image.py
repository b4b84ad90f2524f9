"""What an image costs on a GPU, stage by stage, by the model of `kernels.py`.

The outer steps of the real sampling code are traced (`trace.py`), each with few blocks and few
diffusion steps, and continued: all blocks of a transformer cost the same, and so do all chunks of
diffusion steps of the published solver once L2 holds what it keeps. Of other solvers, which take
few, all steps are traced. Memory: weights of the transformer come from there at
every step; what L2 holds in the head follows from its size.

Kernels run one after the other. A chunk of diffusion steps is three of them, the modulations of all
its steps and the beginning of the first one; each step is 4 d + 1 more at depth d, the chain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastfar.config import FARConfig
from fastfar.costs import counts
from fastfar.costs.gpus import GPU
from fastfar.costs.kernels import Cost, Work, price_all
from fastfar.costs.trace import Event, Tracer, tracing
from fastfar.kl_vae import KLVAE
from fastfar.model import FAR
from fastfar.ops import use_backend
from fastfar.ops._folded_head import FoldedHead, fold_head
from fastfar.outer_step import Inputs, OuterStep
from fastfar.plan import SamplingPlan
from fastfar.rows import mean_rows
from fastfar.solver import PUBLISHED, schedule

STAGES = ("filter, embed", "encoder", "decoder", "head modulations", "head chain", "decode")
# Kernels that belong to the modulations: SiLU of the conditions and the product after it.
_ACTIVATE = "denoise_activate", "activate"
_BLOCKS = 2  # of each half of the transformer that are traced
_CHUNKS = 3  # of diffusion steps that are traced


@dataclass
class Total:
    """Sums over kernels.

    Attributes:
        launches: kernels.
        flops: executed by products, padding included.
        moved: bytes that L2 sends and receives.
        memory: bytes between memory and L2.
        seconds: one kernel after the other.
        bounds: seconds of the kernels that each bound holds.
    """

    launches: float = 0.0
    flops: float = 0.0
    moved: float = 0.0
    memory: float = 0.0
    seconds: float = 0.0
    bounds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, costs: Sequence[Cost]) -> Total:
        """The sums."""
        total = cls()
        for cost in costs:
            total += cls(
                1.0,
                cost.work.flops,
                cost.work.moved - cost.work.multicast,
                cost.memory_bytes,
                cost.seconds,
                {cost.bound: cost.seconds},
            )
        return total

    def __add__(self, other: Total) -> Total:
        return self._combined(other, 1.0)

    def __sub__(self, other: Total) -> Total:
        return self._combined(other, -1.0)

    def __mul__(self, factor: float) -> Total:
        return Total()._combined(self, factor)

    def _combined(self, other: Total, factor: float) -> Total:
        every = {**self.bounds, **other.bounds}
        bounds = {n: self.bounds.get(n, 0.0) + factor * other.bounds.get(n, 0.0) for n in every}
        names = [f.name for f in dataclasses.fields(self)[:-1]]
        numbers = {n: getattr(self, n) + factor * getattr(other, n) for n in names}
        return Total(**numbers, bounds=bounds)

    @property
    def bound(self) -> str:
        """What holds most of the time."""
        return max(self.bounds, key=lambda name: self.bounds[name]) if self.bounds else "-"


@dataclass(frozen=True)
class HeadCost:
    """The denoising loop of one outer step.

    Attributes:
        begin: before the first chunk.
        modulations, chain: of all chunks.
        chunk: diffusion steps of a chunk.
        steps: T.
    """

    begin: Total
    modulations: Total
    chain: Total
    chunk: int
    steps: int

    @property
    def seconds(self) -> float:
        """All of it."""
        return (self.begin + self.modulations + self.chain).seconds


@dataclass(frozen=True)
class Prediction:
    """An image, or a batch of them.

    Attributes:
        gpu, batch: of what.
        stages: name -> sums over the whole image.
        heads: the denoising loop of each outer step.
        reference_flops: published arithmetic, see `counts`.
        head_reference_flops: of the head alone.
    """

    gpu: GPU
    batch: int
    stages: dict[str, Total]
    heads: tuple[HeadCost, ...]
    reference_flops: float
    head_reference_flops: float

    @property
    def total(self) -> Total:
        """All stages."""
        return sum(self.stages.values(), Total())

    @property
    def head(self) -> float:
        """Seconds of the head."""
        return sum(head.seconds for head in self.heads)

    @property
    def seconds(self) -> float:
        """The whole batch."""
        return self.total.seconds

    @property
    def launches_per_step(self) -> float:
        """Kernels of one diffusion step, its share of the modulations included."""
        steps = sum(h.steps for h in self.heads)
        return sum((h.modulations + h.chain).launches for h in self.heads) / steps

    @property
    def head_roofline(self) -> float:
        """Published FLOPs of the head at the peak, over its predicted time."""
        return self.head_reference_flops / self.gpu.half / self.head


def predict(
    config: FARConfig,
    plan: SamplingPlan,
    gpu: GPU,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    vae: KLVAE | None = None,
) -> Prediction:
    """Time of `batch` images of different classes on the Triton back end, captured as a graph.

    vae: its decoder is a stage; None leaves that stage out.

    Raises:
        ValueError: the plan asks for a moment head, which is not priced.
    """
    if any(solver.needs_moments for solver in plan.solvers):
        raise ValueError("a moment head is not priced: predict a plan without moments")
    with tracing(gpu) as tracer:
        runner = _Runner(tracer, config, plan, batch, dtype)
        runner.trace(min(1, len(plan) - 1), 1, 1)  # tables are made at first use
        stages = {name: Total() for name in STAGES}
        heads: list[HeadCost] = []
        known: dict[tuple[object, ...], tuple[dict[str, Total], HeadCost]] = {}
        for k in range(len(plan)):
            key = _key(config, plan, k)
            if key not in known:
                more, less = runner.trace(k, _BLOCKS), runner.trace(k, 1, 1)
                known[key] = _outer_step(config, plan, k, gpu, runner.chunk(k), more, less)
            parts, head = known[key]
            for name, total in parts.items():
                stages[name] = stages[name] + total
            heads.append(head)
        if vae is not None:
            stages["decode"] = _decode(tracer, vae, config, batch, dtype)
    head_flops = sum(
        counts.Head.of(config, batch * config.num_tokens, 2, steps).reference_flops()
        for steps in plan.diffusion_steps
    )
    return Prediction(
        gpu,
        batch,
        stages,
        tuple(heads),
        float(batch * counts.reference_image_flops(config, plan, vae)),
        float(head_flops),
    )


def _key(config: FARConfig, plan: SamplingPlan, k: int) -> tuple[object, ...]:
    """Outer steps with the same key launch the same kernels on the same shapes."""
    guided = plan.guidance_scales[k] != 1.0
    masked, tokens = plan.num_masked(k, config.num_tokens), _head_tokens(config, plan, k)
    return k == 0, guided, masked, tokens, plan.diffusion_steps[k], plan.solvers[k]


def _head_tokens(config: FARConfig, plan: SamplingPlan, k: int) -> int:
    """Tokens of an image that the head computes at an outer step that is captured."""
    return round(mean_rows(plan, k, config, "fixed"))


class _Runner:
    """Traces outer steps of a model of fake weights."""

    def __init__(
        self,
        tracer: Tracer,
        config: FARConfig,
        plan: SamplingPlan,
        batch: int,
        dtype: torch.dtype,
    ) -> None:
        self.tracer, self.config, self.plan, self.batch = tracer, config, plan, batch
        few = dataclasses.replace(
            config,
            encoder_depth=min(_BLOCKS, config.encoder_depth),
            decoder_depth=min(_BLOCKS, config.decoder_depth),
        )
        model = fake_module(FAR, few, dtype)
        self.blocks = model.encoder_blocks, model.decoder_blocks
        tracer.know(list(model.parameters()))
        head = fold_head(model.head_weights, dtype)
        tracer.know(dict(head))
        self.step = OuterStep(model, head, plan, dtype)
        self.inputs = Inputs(
            torch.empty(batch, dtype=torch.int64, device="cuda:0"),
            torch.empty(batch, dtype=torch.int64, device="cuda:0"),
            None
            if plan.mask_ratios is None
            else torch.empty(batch, config.num_tokens, dtype=torch.int64, device="cuda:0"),
        )
        self.latent = torch.empty(self.step.latent_shape(batch), device="cuda:0")
        tracer.know([vars(self.inputs), self.latent])

    def chunk(self, k: int) -> int:
        """Diffusion steps whose modulations are computed at once, where they are guided."""
        from fastfar.ops._denoise_triton import steps_ahead

        tokens = self.batch * _head_tokens(self.config, self.plan, k)
        rows = tokens * counts.halves_of(self.plan, k)
        return steps_ahead(rows, self.plan.diffusion_steps[k])

    def trace(self, k: int, blocks: int, steps: int | None = None) -> list[Event]:
        """Kernels of outer step k with so many blocks; steps: of the published solver.

        None: the first chunks of the published solver, or all steps of another one.
        """
        model = self.step.model
        model.encoder_blocks, model.decoder_blocks = (part[:blocks] for part in self.blocks)
        step = self.step
        if steps is None:
            steps = traced_steps(self.plan, k, self.chunk(k))
        else:
            step = dataclasses.replace(step, plan=self.plan.with_changes(solvers=PUBLISHED))
        if isinstance(step.head, FoldedHead):
            solver = step.plan.solvers[k]
            step.head.time_embedding(schedule(solver, steps, self.config.num_timesteps).timesteps)
        _, rows, channels = self.step.noise_shape(k, self.batch)
        initial = torch.empty(rows, channels, device="cuda:0")
        noise = torch.empty(steps, rows, channels, device="cuda:0")
        self.tracer.know([initial, noise])
        self.tracer.drain()
        start = len(self.tracer.events)
        with use_backend("triton"):
            step(k, self.inputs, self.latent, initial, noise)
        self.tracer.drain()
        return self.tracer.events[start:]


def traced_steps(plan: SamplingPlan, k: int, chunk: int) -> int:
    """Diffusion steps of outer step k that stand for all of them."""
    steps = plan.diffusion_steps[k]
    return min(steps, _CHUNKS * chunk) if plan.solvers[k] == PUBLISHED else steps


Made = TypeVar("Made", FAR, KLVAE)


def fake_module(module: Callable[[Any], Made], config: Any, dtype: torch.dtype) -> Made:
    """A module whose parameters are fake tensors on the GPU."""
    with torch.device("meta"):
        made = module(config).eval()
    for part in made.modules():
        for name, value in list(part._parameters.items()):
            if value is not None:
                fake = torch.empty(value.shape, dtype=dtype, device="cuda:0")
                if value.ndim == 4:
                    fake = torch.empty_like(fake, memory_format=torch.channels_last)
                part._parameters[name] = nn.Parameter(fake, requires_grad=False)
    return made


def _outer_step(
    config: FARConfig,
    plan: SamplingPlan,
    k: int,
    gpu: GPU,
    chunk: int,
    more: list[Event],
    less: list[Event],
) -> tuple[dict[str, Total], HeadCost]:
    """Stages and head of one outer step from traces with `_BLOCKS` blocks and with one."""
    stages = {}
    two, one = _by_stage(more, gpu), _by_stage(less, gpu)
    for name, depth in (("encoder", config.encoder_depth), ("decoder", config.decoder_depth)):
        blocks = min(_BLOCKS, depth) - 1
        each = (two[name] - one[name]) * (1.0 / blocks) if blocks else Total()
        stages[name] = one[name] + each * (depth - 1)
    stages["filter, embed"] = one["filter, embed"]
    works = [e.work for e in more if e.stage == "head"]
    head = head_cost(works, gpu, plan.diffusion_steps[k], chunk, traced_steps(plan, k, chunk))
    stages["head modulations"] = head.modulations
    stages["head chain"] = head.begin + head.chain
    return stages, head


def _by_stage(events: list[Event], gpu: GPU) -> dict[str, Total]:
    """Totals of the transformer's stages; L2 starts without their weights."""
    costs = price_all([event.work for event in events], gpu)
    found: dict[str, list[Cost]] = {}
    for event, cost in zip(events, costs, strict=True):
        stage = event.stage if event.stage in ("encoder", "decoder", "head") else "filter, embed"
        found.setdefault(stage, []).append(cost)
    names = ("filter, embed", "encoder", "decoder")
    return {name: Total.of(found.get(name, ())) for name in names}


def head_cost(
    works: Sequence[Work], gpu: GPU, steps: int, chunk: int, traced: int
) -> HeadCost:
    """The denoising loop of `steps` steps from the kernels of the first `traced` of them.

    The second chunk stands for all that are not traced: L2 then holds what it keeps.
    """
    starts = [i for i, work in enumerate(works) if work.name in _ACTIVATE]
    if not starts:
        raise ValueError("no modulations among the kernels of the head: was it traced on Triton?")
    costs = price_all(works, gpu)
    ends = [*starts[1:], len(costs)]
    chunks = [costs[start:end] for start, end in zip(starts, ends, strict=True)]
    left = (steps - traced) / chunk  # chunks that are not traced
    steady = chunks[min(1, len(chunks) - 1)]
    modulations = [Total.of(part[:2]) for part in chunks]
    modulations.append(Total.of(steady[:2]) * left)
    chain = Total.of([cost for part in chunks for cost in part[2:]])
    chain = chain + Total.of(steady[2:]) * left
    return HeadCost(
        begin=Total.of(costs[: starts[0]]),
        modulations=sum(modulations, Total()),
        chain=chain,
        chunk=chunk,
        steps=steps,
    )


def _decode(
    tracer: Tracer, vae: KLVAE, config: FARConfig, batch: int, dtype: torch.dtype
) -> Total:
    """The KL-VAE's decoder on PyTorch's convolutions, channels last."""
    twin = fake_module(KLVAE, vae.config, dtype)
    tracer.know(list(twin.parameters()))
    shape = (batch, vae.config.latent_channels, config.latent_size, config.latent_size)
    latent: Tensor = torch.empty(shape, dtype=dtype, device="cuda:0")
    tracer.know(latent)
    tracer.drain()
    start = len(tracer.events)
    with use_backend("triton"):
        twin.decode(latent)
    tracer.drain()
    return Total.of(price_all([e.work for e in tracer.events[start:]], tracer.gpu))
