"""Training as the cost model sees it, beside what PyTorch counts, keeps and allocates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

from fastfar import backend
from fastfar.config import FARConfig
from fastfar.costs import training, training_machines, training_step
from fastfar.costs.gpus import GPUS
from fastfar.costs.image import fake_module
from fastfar.costs.trace import tracing
from fastfar.costs.training import Run, estimate
from fastfar.costs.training_step import parts, sizes_of, value
from fastfar.kernels.gpu import _launch
from fastfar.model import FAR
from fastfar.ops import _attention, use_backend
from fastfar.training import EMA, Recipe, diffusion_loss, sample_draws
from fastfar.training.optimizer import make_optimizer

SMALL = FARConfig(
    width=64,
    encoder_depth=2,
    decoder_depth=1,
    num_heads=4,
    head_depth=2,
    head_width=48,
    latent_channels=4,
    latent_size=8,
    patch_size=2,
    buffer_size=3,
    num_classes=10,
    dropout=0.1,
)
OTHER = dataclasses.replace(
    SMALL, width=96, encoder_depth=3, head_depth=3, head_width=64, patch_size=1, dropout=0.0
)
IMAGES, MULTIPLIER = 5, 3
HUGE = FARConfig.preset("far_huge")
EIGHT = training_machines.find("8xH100")


def step(model: FAR, mask_rule: str | None = None, images: int = IMAGES) -> Tensor:
    config = model.config
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    draws = sample_draws(
        config, images, mask_rule=mask_rule, batch_multiplier=MULTIPLIER, label_dropout=0.1
    )
    labels = torch.zeros(images, dtype=torch.int64)
    return diffusion_loss(model, torch.randn(images, *shape), labels, draws)


# --- formulas --------------------------------------------------------------------------------


def test_a_formula_is_what_it_says() -> None:
    assert value("2 a N D + 8 N", {"a": 2.0, "N": 10.0, "D": 7.0}) == 2 * 2 * 10 * 7 + 8 * 10
    assert value("0", {}) == 0
    with pytest.raises(KeyError):
        value("2 x", {"y": 1.0})


def test_every_letter_is_explained() -> None:
    letters = {**training_step.LETTERS, **training.LETTERS}
    assert set(Run(SMALL, EIGHT, 64).sizes) == set(letters)


# --- what autograd keeps ---------------------------------------------------------------------


def _fused_attention(
    qkv_BS3HE: Tensor, key_mask_BS: Tensor | None, dropout: float, deterministic: bool
) -> Tensor:
    """PyTorch's flash attention, which the CPU has too, but not for dropout."""
    q, k, v = qkv_BS3HE.permute(2, 0, 3, 1, 4).unbind(0)
    mask = None if key_mask_BS is None else key_mask_BS[:, None, None, :]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out_BHSE = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out_BHSE.transpose(1, 2).flatten(2)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """As on a GPU, with a mask of bytes."""
    return torch.native_dropout(x, p, True)[0] if p > 0 else x


def _all_positions(self: FAR, mask_BL: Tensor, num_kept: int | None) -> Any:
    """As on a GPU."""
    buffer_BS = mask_BL.new_ones(len(mask_BL), self.config.buffer_size)
    return None, torch.cat([buffer_BS, ~mask_BL], dim=1)


@contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The Triton back end's graph on CPU tensors: kernels are noted, the rest is computed."""
    plain = dataclasses.replace(_attention.REGISTRY["sdpa"], run=_fused_attention)
    monkeypatch.setitem(_attention.REGISTRY, "sdpa", plain)
    monkeypatch.setattr(F, "dropout", _dropout)
    monkeypatch.setattr(FAR, "_visible", _all_positions)
    monkeypatch.setattr(_launch, "Launch", lambda *args: None)  # which would hold the tensors
    _attention._chosen.cache_clear()
    with ExitStack() as stack:
        stack.enter_context(backend.described_gpu(90))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        stack.enter_context(_launch.recording())
        stack.enter_context(use_backend("triton"))
        yield
    _attention._chosen.cache_clear()


def kept(model: FAR, mask_rule: str | None) -> tuple[int, int]:
    """Bytes of the storages that autograd keeps, and of those that are weights in bfloat16."""
    own = {x.untyped_storage()._cdata for x in model.parameters()}
    shapes = {tuple(x.shape) for x in model.parameters() if x.ndim == 2}
    shapes |= {shape[::-1] for shape in shapes}
    found: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in own:
            found.setdefault(x.untyped_storage()._cdata, x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = step(model, mask_rule)
    assert loss.requires_grad
    weights = rest = 0
    for x in found.values():
        nbytes = x.untyped_storage().nbytes()
        if x.dtype is torch.bfloat16 and tuple(x.shape) in shapes:
            weights += nbytes
        else:
            rest += nbytes
    return rest, weights


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("mask_rule", [None, "paper"])
@pytest.mark.parametrize("config", [SMALL, OTHER], ids=["small", "other"])
def test_activations(
    config: FARConfig, mask_rule: str | None, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a thousandth: labels, masks and the biases of attention are not in the formulas."""
    pytest.importorskip("triton", minversion="3.2")
    model = FAR(config).train()
    model.set_grad_checkpointing(again)
    with as_on_a_gpu(monkeypatch):
        activations, weights = kept(model, mask_rule)
    expected = training_step.activation_bytes(config, IMAGES, MULTIPLIER, again)
    assert activations == pytest.approx(expected, rel=1e-3)
    if not again:
        assert weights == 2 * training.parameters(config)["q"]


def test_a_peak_is_below_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a forward and backward allocates, by PyTorch's own profile of memory."""
    pytest.importorskip("triton", minversion="3.2")
    images = 16
    model = FAR(OTHER).train()
    with as_on_a_gpu(monkeypatch):
        step(model, images=images).backward()  # tables, and gradients that stay
        with torch.profiler.profile(profile_memory=True) as profile:
            step(model, images=images).backward()
    events = [x for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda x: x.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    run = Run(OTHER, training_machines.find("h100"), images, MULTIPLIER)
    components = {each.name: each.bytes for each in training.memory(run)}
    # What was there before is not in the profile, nor what the allocator of a GPU loses.
    before = ("weights, float32", "gradients", "AdamW's moments", "averaged weights (EMA)")
    others = (*before, "lost between blocks", "CUDA, cuBLAS, NCCL")
    expected = sum(nbytes for name, nbytes in components.items() if name not in others)
    assert 0.8 * expected < peak < expected


# --- FLOPs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, OTHER], ids=["small", "other"])
def test_flops(config: FARConfig) -> None:
    """As PyTorch counts them without masks; its CPU's attention spells the formula out."""
    model = FAR(config).train()
    with FlopCounterMode(display=False) as counter:
        loss = step(model)
        forward = counter.get_total_flops()
        loss.backward()
    backward = counter.get_total_flops() - forward
    latent = config.latent_size
    low_pass = 2 * 2 * IMAGES * config.latent_channels * latent**3  # A x A^T
    expected = training_step.flops(config, IMAGES, MULTIPLIER)
    assert forward == expected[0] + low_pass
    sizes = sizes_of(config, IMAGES, MULTIPLIER)
    blocks = config.encoder_depth + config.decoder_depth
    assert backward == expected[1] - blocks * value("2 N S D", sizes)  # no scores again


def test_flops_of_fused_attention() -> None:
    sizes = sizes_of(SMALL, IMAGES, MULTIPLIER)
    positions, heads = SMALL.buffer_size + SMALL.num_tokens, SMALL.num_heads
    shape = (IMAGES, heads, positions, SMALL.width // heads)
    counted = sdpa_backward_flop_count(shape, shape, shape, shape)
    assert training_step.attention_flops(sizes)[1] == counted


# --- bytes that are moved --------------------------------------------------------------------


def moved_by(module: str) -> tuple[float, float]:
    """Bytes that the forward's kernels without products move by a trace, and by the formulas."""
    config = dataclasses.replace(HUGE, dropout=0.0)  # fused attention drops nothing here
    sizes = sizes_of(config, 4, 4)
    part = next(x for x in parts(config) if x.name == module)
    with tracing(GPUS["h100"], torch.bfloat16) as tracer:
        model = fake_module(FAR, dataclasses.replace(config, encoder_depth=1), torch.float32)
        tracer.know(list(model.parameters()), parameters=True)

        def empty(*shape: str, dtype: torch.dtype = torch.float32) -> Tensor:
            numbers = [round(value(each, sizes)) for each in shape]
            return torch.empty(numbers, dtype=dtype, device="cuda:0")

        if module == "transformer blocks":
            run, inputs = model.encoder_blocks[0], (empty("B", "S", "D"),)
        else:
            half = torch.bfloat16
            run = model.head.res_blocks[0]
            inputs = (empty("R", "W"), empty("R", "W", dtype=half), True)
        tracer.know(inputs)
        with use_backend("triton"):
            run(*inputs)  # casts of the weights, which stay
            tracer.drain()
            before = len(tracer.events)
            run(*inputs)
            tracer.drain()
    works = [event.work for event in tracer.events[before:]]
    streams = [work for work in works if not work.flops and work.name != "linear"]
    # Casts of biases are in no formula.
    moved = sum(work.moved for work in streams if work.moved > 1e6)
    return moved, sum(value(text, sizes) for text in part.forward.values())


@pytest.mark.parametrize("module", ["transformer blocks", "head: other blocks"])
def test_bytes_of_the_forward(module: str) -> None:
    pytest.importorskip("triton", minversion="3.2")
    traced, expected = moved_by(module)
    assert traced == pytest.approx(expected, rel=0.01)


# --- memory ----------------------------------------------------------------------------------


def test_what_stays_between_steps() -> None:
    """Weights, gradients, moments and averages beside those of a real step."""
    model = FAR(SMALL).train()
    optimizer = make_optimizer(model, Recipe(model=SMALL.to_dict()))
    average = EMA(model, 0.9)
    step(model).backward()
    optimizer.step()
    found = {
        "weights, float32": list(model.parameters()),
        "gradients": [x.grad for x in model.parameters()],
        "AdamW's moments": [
            x for state in optimizer.state.values() for x in state.values() if x.ndim
        ],
        "averaged weights (EMA)": list(average.average.values()),
    }
    run = Run(SMALL, training_machines.find("h100"), IMAGES, MULTIPLIER)
    expected = {each.name: each.bytes for each in training.memory(run)}
    for name, tensors in found.items():
        nbytes = sum(x.numel() * x.element_size() for x in tensors if x is not None)
        assert nbytes == pytest.approx(expected[name], rel=0.01), name


def bytes_of(run: Run) -> dict[str, float]:
    return {each.name: each.bytes for each in training.memory(run)}


def test_options_take_what_they_promise() -> None:
    run = Run(HUGE, EIGHT, 1024)
    plain = bytes_of(run)
    names = ("activations of the transformer", "activations of the head's rows", "workspace")
    half = bytes_of(dataclasses.replace(run, accumulate=2))
    assert all(half[name] == pytest.approx(plain[name] / 2) for name in names)
    sharded = bytes_of(dataclasses.replace(run, parallel="fsdp"))
    for name in ("weights, float32", "gradients", "AdamW's moments", "averaged weights (EMA)"):
        assert sharded[name] == pytest.approx(plain[name] / 8), name
    assert "bfloat16 copies of the weights" not in sharded
    again = bytes_of(dataclasses.replace(run, grad_checkpointing=True))
    assert again[names[0]] < plain[names[0]] / 8 and again[names[1]] < plain[names[1]]
    assert "averaged weights (EMA)" not in bytes_of(dataclasses.replace(run, ema="cpu"))
    alone = dataclasses.replace(run, machine=training_machines.find("h100"), parallel="fsdp")
    assert bytes_of(alone)["gradients"] == plain["gradients"]  # nobody to share with


# --- time ------------------------------------------------------------------------------------


def seconds(**changes: Any) -> float:
    gpus = changes.pop("gpus", "8xH100")
    run = Run(HUGE, training_machines.find(gpus), 1024)
    return estimate(dataclasses.replace(run, **changes)).seconds


def test_what_makes_a_step_slower() -> None:
    plain = seconds()
    assert seconds(gpus="16xH100") < plain < seconds(gpus="4xH100") < seconds(gpus="h100")
    assert seconds(gpus="8xA100") > plain > seconds(gpus="8xB200")
    assert plain < seconds(accumulate=8) < 1.3 * plain
    assert 1.2 * plain < seconds(grad_checkpointing=True) < 1.5 * plain
    assert seconds(ema="cpu") > plain
    assert seconds(accumulate=128) > seconds(accumulate=64)  # one image: the host is behind


def test_communication_by_hand() -> None:
    eight, many = EIGHT, training_machines.find("64xA100")
    assert eight.rate == pytest.approx(0.82 * 450e9)
    assert many.rate == pytest.approx(0.82 * 8 * 25e9)  # cards of a node side by side
    assert eight.gather(1e9) == pytest.approx(30e-6 + 7 / 8 * 1e9 / eight.rate)
    assert eight.all_reduce(1e9) == pytest.approx(2 * eight.gather(1e9))
    assert training_machines.find("h100").all_reduce(1e9) == 0
    # Four cards on PCIe cannot hide what eight on NVLink can.
    slow = estimate(Run(HUGE, training_machines.find("4xrtx4090"), 16)).stages
    fast = estimate(Run(HUGE, EIGHT, 1024)).stages
    hidden = [next(x for x in s if "communication" in x.name).seconds for s in (slow, fast)]
    assert hidden[0] > 0.05 and hidden[1] == 0


def test_flops_of_a_step_are_those_of_its_images() -> None:
    whole = estimate(Run(HUGE, EIGHT, 1024))
    forward, backward = training_step.flops(HUGE, 1, 4)
    assert whole.flops == pytest.approx(1024 * (forward + backward))
    cut = estimate(Run(HUGE, EIGHT, 1024, accumulate=4, grad_checkpointing=True))
    assert cut.flops == pytest.approx(whole.flops)  # none of them twice
    assert 0.2 < whole.utilisation < GPUS["h100"].library_share
    executed = [sum(stage.flops for stage in each.stages) for each in (whole, cut)]
    assert executed[0] == pytest.approx(whole.flops / 8) and executed[1] > 1.2 * executed[0]


# --- machines and runs -----------------------------------------------------------------------


def test_machines() -> None:
    machine = training_machines.find("8xA100:40")
    assert (machine.gpu.name, machine.count, machine.memory) == ("a100", 8, 40 * 2**30)
    assert training_machines.find("RTX4090").count == 1
    assert "in 8 nodes" in training_machines.find("64xh200").title
    assert set(training_machines._MACHINES) == set(GPUS)
    with pytest.raises(ValueError, match="'v100'; there are h100"):
        training_machines.find("8xv100")
    for text in ("", "8x", "0xh100", "8 h100", "h100:", "h100:0"):
        with pytest.raises(ValueError, match="such as 8xH100"):
            training_machines.find(text)


def test_runs_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="give a multiple of 24"):
        Run(HUGE, EIGHT, 1024, accumulate=3)
    with pytest.raises(ValueError, match="parallel must be one of"):
        Run(HUGE, EIGHT, 1024, parallel="tensor")
    with pytest.raises(ValueError, match="multiplier must be at least 1"):
        Run(HUGE, EIGHT, 1024, multiplier=0)


# --- remedies --------------------------------------------------------------------------------


def test_remedies_fit() -> None:
    run = Run(HUGE, EIGHT, 1024)
    assert not estimate(run).fits
    found = training.remedies(run)
    assert found and len(found[0][0]) == 1
    for change, other in found:
        assert other.fits and not other.tight
        again = estimate(dataclasses.replace(run, **change))  # type: ignore[arg-type]
        assert again.bytes == other.bytes
    assert not training.remedies(dataclasses.replace(run, machine=training_machines.find("h100:2")))


# One H100, 64 images at once: seconds of a step and bytes that PyTorch's allocator reserved, by
# benchmarks/bench_training_run.py (benchmarks/LOG.md, the first training on a GPU).
MEASURED = {"far_base": (0.162, 26.9), "far_large": (0.214, 39.4), "far_huge": (0.351, 61.5)}


@pytest.mark.parametrize("preset", MEASURED)
def test_the_estimate_is_near_what_was_measured(preset: str) -> None:
    """The smallest model waits most for the host, which the estimate has too fast."""
    run = Run(FARConfig.preset(preset), training_machines.find("1xH100"), batch=64)
    found, (seconds, gib) = estimate(run), MEASURED[preset]
    assert 0.8 * seconds < found.seconds < seconds
    assert gib < found.bytes / 2**30 < 1.15 * gib, "never told to fit what does not"
