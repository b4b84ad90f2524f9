"""MAR in both forms: golden tensors, its schedule, extrapolation, published files, errors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from formula import formula_tensor
from tiny_far import training_checkpoint
from tolerances import GOLDEN, relative
from torch import Tensor

from fastfar import graphs
from fastfar._weights import skeleton
from fastfar.baselines import FORMS, create
from fastfar.baselines import _mar_well_run as well_run
from fastfar.baselines._baseline import Settings
from fastfar.baselines.mar import CONFIGS, MAR, MARNetwork, MARNoise, masked_counts
from fastfar.config import FARConfig
from fastfar.kl_vae import KLVAE, KLVAEConfig
from fastfar.ops import use_backend
from fastfar.ops._registry import active_backend

MANIFESTS = Path(__file__).parents[1] / "manifests"
RECORDED = FARConfig(  # the model of the golden file
    width=64, encoder_depth=2, decoder_depth=2, num_heads=2, head_depth=2, head_width=64
)
SMALL = FARConfig(
    width=32,
    encoder_depth=1,
    decoder_depth=2,
    num_heads=2,
    head_depth=2,
    head_width=48,
    latent_size=4,
    buffer_size=3,
)
VAE = KLVAEConfig(channels=32, channel_mults=(1, 2), blocks=1)
LABELS = torch.tensor([3, 7])


@cache
def state_of(kind: Callable[[Any], torch.nn.Module], config: Any) -> dict[str, Tensor]:
    with skeleton():
        module = kind(config)
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    return {key: formula_tensor(key, shape) for key, shape in shapes.items()}


def made(
    form: str,
    config: FARConfig = SMALL,
    dtype: torch.dtype | None = torch.float32,
    random: bool = False,
    steps: int = 6,
    diffusion_steps: int = 3,
    **settings: Any,
) -> MAR:
    weights = {"model": state_of(MARNetwork, config), "tokenizer": state_of(KLVAE, VAE)}
    return MAR(
        "mar_small",
        Settings(form, dtype=dtype, weights=None if random else weights, **settings),
        config,
        title="MAR-S",
        guidance_scale=3.0,
        steps=steps,
        diffusion_steps=diffusion_steps,
        tokenizer=VAE,
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- what it computes ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(golden: Callable[[str], Any]) -> tuple[Tensor, MARNoise, Tensor]:
    """Labels, draws in the order drawn, latents."""
    tensors = golden("mar_tiny").tensors
    drawn = [tensors[key] for key in sorted(tensors) if key.startswith("noise.")]
    return tensors["labels"], MARNoise(tensors["order"], drawn), tensors["latent"]


@pytest.mark.parametrize("form", FORMS)
def test_golden(form: str, recorded: tuple[Tensor, MARNoise, Tensor]) -> None:
    labels_B, noise, latent = recorded
    out = made(form, RECORDED, steps=8, diffusion_steps=6).tokens(labels_B, noise=noise)
    assert out.dtype == torch.float32 and relative(out, latent) <= GOLDEN


@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_both_forms_compute_the_same_image(scale: float) -> None:
    """From equal generators, too, guided and not: without guidance there is one half."""
    rows: list[int] = []

    def watch(_: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        rows.append(len(inputs[0]))

    tokens, images = [], []
    for form in FORMS:
        mar = made(form, random=True)
        mar.network.decoder_norm.register_forward_pre_hook(watch)
        tokens.append(mar.tokens(LABELS, generator=generator(), guidance_scale=scale))
        images.append(mar.decode(tokens[-1]))
    assert set(rows) == {2 if scale == 1.0 else 4}
    assert relative(tokens[1], tokens[0]) <= GOLDEN and float(tokens[0].abs().max()) <= 3.0
    assert relative(images[1], images[0]) <= GOLDEN
    assert images[0].shape == (2, 3, 8, 8) and 0 <= float(images[0].min()) < float(images[0].max())
    other = made("published", random=True).tokens(LABELS, generator=generator(1))
    assert relative(other, tokens[0]) > 0.1


def test_half_precision_is_as_good_in_both_forms() -> None:
    run = partial(made, random=True, steps=2, diffusion_steps=20)
    noise = run("published").draw_noise(2, generator())
    truth = run("published").tokens(LABELS, noise=noise)
    errors = []
    for form in FORMS:
        mar = run(form, dtype=torch.bfloat16)
        errors.append(relative(mar.tokens(LABELS, noise=noise), truth))
        assert mar.decode(truth).dtype == torch.float32
    assert GOLDEN < max(errors) <= 2 * min(errors)


def test_decoding_is_the_autoencoders() -> None:
    latent = torch.randn(2, 16, 4, 4, generator=generator())
    vae = KLVAE.load_official(state_of(KLVAE, VAE))
    expected = vae.to_images(latent) / 2 + 0.5
    for form in FORMS:
        assert relative(made(form).decode(latent), expected) <= GOLDEN


def test_torch_alone_computes() -> None:
    seen = []
    mar = made("well_run", steps=1)
    mar.vae.decoder.register_forward_pre_hook(lambda *_: seen.append(active_backend()))
    mar.network.decoder_norm.register_forward_pre_hook(lambda *_: seen.append(active_backend()))
    with use_backend("native"):
        mar.decode(mar.tokens(LABELS))
    assert seen == ["torch", "torch"]


# --- its schedule ----------------------------------------------------------------------------


def test_masked_counts(recorded: tuple[Tensor, MARNoise, Tensor]) -> None:
    assert masked_counts(256, 256) == tuple(range(256, -1, -1))  # one token per step
    noise = recorded[1]
    starts = [len(drawn) // 2 for drawn in noise.drawn[:: 1 + 6]]
    assert [a - b for a, b in pairwise(masked_counts(256, 8))] == starts
    assert masked_counts(256, 64)[:3] == (256, 255, 254) and masked_counts(5, 1) == (5, 0)
    assert masked_counts(256, 4) == (256, math.floor(256 * math.cos(math.pi / 8)), 181, 97, 0)
    for steps in (0, 257):
        with pytest.raises(ValueError, match=r"1\.\.256"):
            masked_counts(256, steps)


def lengths_and_rows(mar: MAR, **options: Any) -> list[tuple[int, int]]:
    """(positions of the encoder, rows of the head) of every outer step that runs."""
    found: list[tuple[int, int]] = []
    transformer = mar.runner.transformer

    def watched(tokens: Tensor, classes: Tensor, kept: Tensor, predicted: Tensor) -> Tensor:
        z = transformer(tokens, classes, kept, predicted)
        found.append((mar.config.buffer_size + kept.shape[1], z.shape[0] * z.shape[1]))
        return z

    mar.runner.transformer = watched  # type: ignore[method-assign]
    mar.tokens(LABELS, generator=generator(), **options)
    mar.runner.transformer = transformer  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("form", FORMS)
def test_timed_steps_are_the_real_ones(form: str) -> None:
    mar = made(form, steps=16, dtype=torch.bfloat16, random=True)
    whole = lengths_and_rows(mar)
    assert whole == [(3 + k, 4) for k in range(16)]
    timed = (2, 6, 13)
    first = [whole[2]] if form == "published" else []  # again, to know what the copies take
    assert lengths_and_rows(mar, timed_steps=timed) == first + [whole[k] for k in timed]
    assert list(mar.step_seconds) == list(timed) and min(mar.step_seconds.values()) > 0
    assert (mar.fixed_seconds > 0) and mar.extrapolated_seconds() > mar.fixed_seconds


def test_timed_steps_sample_what_a_whole_run_would() -> None:
    """Step 0 has no reached tokens, so it is the same alone; later ones see random tokens."""
    results = []
    for form in FORMS:
        mar = made(form, steps=4)
        noise = mar.draw_noise(2, generator())
        whole = mar.tokens(LABELS, noise=noise)
        alone = mar.tokens(LABELS, noise=noise, timed_steps=[0, 2])
        step_0 = noise.order_BL[:, mar.masked[1] :]
        step_2 = noise.order_BL[:, mar.masked[3] : mar.masked[2]]
        tokens, expected = (x.flatten(2).transpose(1, 2) for x in (alone, whole))
        for image in range(2):
            assert relative(tokens[image, step_0[image]], expected[image, step_0[image]]) < GOLDEN
            ran = torch.cat([step_0[image], step_2[image]])
            others = [i for i in range(16) if i not in ran.tolist()]
            assert tokens[image, ran].abs().min() > 0 and not tokens[image, others].any()
        results.append(alone)
    assert relative(results[1], results[0]) <= GOLDEN


def test_step_weights() -> None:
    mar = made("published", device=torch.device("meta"), config=RECORDED, steps=256)
    assert mar.step_weights(range(8, 256, 16)) == (16.0,) * 16
    assert mar.step_weights([0, 4, 255]) == (2.0, 128.0, 126.0)
    assert mar.step_weights([9]) == (256.0,)
    for bad in ([], [3, 3], [4, 2], [-1], [256]):
        with pytest.raises(ValueError, match="increasing"):
            mar.step_weights(bad)


def test_extrapolation_estimates_the_whole_run() -> None:
    """The cost of a subset, weighted, is that of all 256 steps, whose lengths are known."""
    mar = made("published", config=RECORDED, steps=256, device=torch.device("meta"))

    def cost(k: int) -> float:
        """Operations of MAR-H's transformer at step k, in units of D."""
        lengths = (64 + 256 - mar.masked[k], 64 + 256)
        return sum(24 * length * 1280 + 4 * length**2 for length in lengths)

    def estimate(timed: Sequence[int]) -> float:
        weights = mar.step_weights(timed)
        return sum(w * cost(k) for k, w in zip(timed, weights, strict=True))

    whole = sum(map(cost, range(256)))
    assert abs(estimate(range(256)) / whole - 1) < 1e-12
    for count in (4, 8, 16):
        assert abs(estimate(range(128 // count, 256, 256 // count)) / whole - 1) < 2e-3
    assert abs(estimate([0]) / whole - 1) > 0.1  # the steps do differ
    mar.fixed_seconds, mar.step_seconds = 5.0, {64: 2.0, 192: 3.0}
    assert mar.extrapolated_seconds() == 5.0 + 128 * 2.0 + 128 * 3.0


# --- how the forms run -----------------------------------------------------------------------


def test_autocast_copies_every_weight_once_per_run() -> None:
    """In inference mode, or of parameters that want no gradients, it would copy them always."""
    mar = made("published", dtype=None, steps=2)
    assert mar.dtype == torch.bfloat16 and "bfloat16 autocast" in mar.ways
    assert {p.dtype for p in mar.network.parameters()} == {torch.float32}
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        mar.tokens(LABELS)
    shape = list(mar.network.head.cond_embed.weight.shape)
    copies = [e for e in profile.function_events if e.name == "aten::_to_copy"]
    assert len([each for each in copies if each.input_shapes[0] == shape]) == 1


class Recorder:
    """Stands in for CUDA graphs: keeps what was captured, and runs it when it is replayed."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def capture(self, bodies: Sequence[graphs.Body]) -> list[graphs.Body]:
        self.captured += len(bodies)

        def replay() -> None:
            self.replayed += 1
            for body in bodies:
                body()

        return [replay]

    def fill(self, buffer: Tensor, value: Tensor) -> None:
        buffer.copy_(value)

    def in_turn(self) -> AbstractContextManager[None]:
        return nullcontext()


def test_cuda_graphs_replay_decoder_and_head(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = made("well_run", random=True, steps=16).tokens(LABELS, generator=generator())
    recorder = Recorder()
    captured = well_run._captured
    monkeypatch.setattr(well_run, "_captured", lambda f, _: captured(f, recorder))
    mar = made("well_run", random=True, steps=16)
    for _ in range(2):
        assert torch.equal(mar.tokens(LABELS, generator=generator()), expected)
    assert recorder.captured == 2 and recorder.replayed == 2 * 2 * 16
    with graphs.disabled():
        assert torch.equal(mar.tokens(LABELS, generator=generator()), expected)
    assert recorder.replayed == 2 * 2 * 16
    records = mar.runner._all_steps  # type: ignore[union-attr]
    for batch in range(1, 8):  # other batch sizes take the place of the oldest ones
        mar.tokens(LABELS[:1].repeat(batch), timed_steps=[3])
    assert isinstance(records, well_run.Captured) and len(records._records) == 4


def test_compiled_parts_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph of all blocks and lengths, one of all diffusion steps."""
    compiled = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return module.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    run = partial(made, "well_run", random=True, steps=16, diffusion_steps=2)
    mar, noise = run(compile=True), run().draw_noise(2, generator())
    expected = run().tokens(LABELS, noise=noise, timed_steps=[2, 9])
    assert "torch.compile" in mar.ways
    out = mar.tokens(LABELS, noise=noise, timed_steps=[2, 9])
    assert relative(out, expected) <= GOLDEN
    assert len(compiled) == 2


@pytest.mark.gpu
def test_both_forms_agree_on_a_gpu() -> None:
    """Compiled, decoder and head as CUDA graphs; one number of rows, two lengths of the encoder."""
    run = partial(made, random=True, steps=16, diffusion_steps=20, device=torch.device("cuda"))
    noise = made("published", random=True, steps=16, diffusion_steps=20).draw_noise(2, generator())
    out = {
        (form, dtype): run(form, dtype=dtype).tokens(LABELS, noise=noise).cpu()
        for form in FORMS
        for dtype in (torch.float32, torch.bfloat16)
    }
    truth = out["published", torch.float32]
    assert relative(out["well_run", torch.float32], truth) <= GOLDEN
    half = [relative(out[form, torch.bfloat16], truth) for form in FORMS]
    assert GOLDEN < max(half) <= 2 * min(half)
    assert "CUDA graphs" in run("well_run").ways
    assert run("published", dtype=None).dtype == torch.float16


def test_few_rows_are_multiplied_from_the_left() -> None:
    layer = torch.nn.Linear(64, 32).bfloat16()
    for rows in (1, 2, 16, 17):
        x = torch.randn(rows, 64, dtype=torch.bfloat16)
        out = well_run.linear(layer, x)
        assert out.is_contiguous() and relative(out, layer(x)) < 0.01


# --- weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_and_sizes_are_the_published_ones(name: str) -> None:
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text(encoding="utf-8"))
    with skeleton():
        network = MARNetwork(CONFIGS[name])
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == manifest


def test_create() -> None:
    numbers = json.loads((MANIFESTS / "mar_base.json").read_text(encoding="utf-8")).values()
    for form in FORMS:
        mar = create("mar_base", form, device="meta")
        assert (mar.title, mar.steps, mar.guidance_scale) == ("MAR-B", 256, 2.9)
        assert mar.num_parameters == sum(map(math.prod, numbers)) and mar.random_weights
        assert mar.dtype == torch.bfloat16 and "random weights" in mar.ways
        assert isinstance(mar, MAR) and mar.extrapolates and mar.diffusion_steps == 100
        held = sum(p.numel() for p in mar.network.parameters())
        assert held == mar.num_parameters, "the joined adaLN layers count, too"


def test_published_files(tmp_path: Path) -> None:
    """A training checkpoint, whose moving average is taken, and a KL-16 file with what it has."""
    state, vae = state_of(MARNetwork, SMALL), state_of(KLVAE, VAE)
    torch.save(training_checkpoint(state), tmp_path / "checkpoint-last.pth")
    torch.save({"model": {**vae, "loss.logvar": torch.zeros(())}}, tmp_path / "kl16.ckpt")
    weights = {
        "model": tmp_path / "checkpoint-last.pth",
        "tokenizer": tmp_path / "kl16.ckpt",
    }
    settings = Settings("published", dtype=torch.float32, weights=weights)
    mar = MAR("mar_small", settings, SMALL, title="", guidance_scale=3.0, steps=2, tokenizer=VAE)
    assert not mar.random_weights and "random" not in mar.ways
    found = mar.network.state_dict()
    assert all(torch.equal(found[key], state[key] - 1) for key in state)
    assert torch.equal(mar.vae.post_quant_conv.weight, vae["post_quant_conv.weight"])
    wrong = {**weights, "model": {k: v for k, v in state.items() if k != "fake_latent"}}
    with pytest.raises(ValueError, match="fake_latent"):
        MAR("", Settings(weights=wrong), SMALL, title="", guidance_scale=3.0, steps=2)


def test_random_weights_are_of_a_trained_models_kind() -> None:
    mar = made("published", random=True)
    gates = mar.network.head.res_blocks[0].adaLN_modulation[1].weight.detach()
    assert float(gates.std()) > 0.03, "closed gates"
    again = made("well_run", random=True, dtype=torch.bfloat16)
    assert torch.equal(again.network.z_proj.weight, mar.network.z_proj.weight.bfloat16())
    other = made("published", random=True, seed=1)
    assert not torch.equal(other.network.z_proj.weight, mar.network.z_proj.weight)


# --- errors ----------------------------------------------------------------------------------


def test_errors() -> None:
    mar = made("published")
    with pytest.raises(ValueError, match="continuous"):
        mar.tokens(LABELS, greedy=True)
    with pytest.raises(TypeError, match="MARNoise"):
        mar.tokens(LABELS, noise=torch.zeros(3))
    with pytest.raises(ValueError, match=r"order of shape \(1, 16\) and 24 draws"):
        mar.tokens(LABELS[:1], noise=mar.draw_noise(2))
    with pytest.raises(ValueError, match="increasing"):
        mar.tokens(LABELS, timed_steps=[6])
    with pytest.raises(ValueError, match="no steps were timed"):
        mar.extrapolated_seconds()
    with pytest.raises(ValueError, match=r"1\.\.16"):
        made("published", steps=17)
