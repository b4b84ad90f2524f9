"""LlamaGen: published keys, recorded codes and image, both forms alike, the rule of sampling."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Golden
from formula import formula_tensor
from tolerances import FACTOR, FLOOR, GOLDEN, relative
from torch import Tensor, nn

from fastfar import profiling
from fastfar._weights import skeleton
from fastfar.baselines import create, llamagen
from fastfar.baselines._baseline import Settings
from fastfar.baselines.llamagen import CONFIGS, LlamaGen, Optimised, Published, SamplingRule
from fastfar.baselines.llamagen_transformer import LlamaGenConfig, Transformer, rotary_table
from fastfar.baselines.llamagen_vq import UNUSED, VQDecoder

MANIFESTS = Path(__file__).parents[1] / "manifests"
RECORDED = LlamaGenConfig(depth=2, width=128, heads=2)
SMALL = LlamaGenConfig(depth=2, width=24, heads=2, grid=3, vocabulary=50)
FORMS: dict[str, type[Published] | type[Optimised]] = {
    "published": Published,
    "well_run": Optimised,
}
LABELS = torch.tensor([3, 999])


def shapes(construct: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    with skeleton():
        return {key: tuple(value.shape) for key, value in construct().state_dict().items()}


def by_formula(construct: Callable[[], nn.Module]) -> dict[str, Tensor]:
    return {key: formula_tensor(key, shape) for key, shape in shapes(construct).items()}


@pytest.fixture(scope="module")
def vq_weights() -> dict[str, Tensor]:
    return by_formula(lambda: VQDecoder(well_run=False))


def decoder(well_run: bool, weights: dict[str, Tensor]) -> VQDecoder:
    with skeleton():
        made = VQDecoder(well_run)
    made.load_state_dict(weights, assign=True)
    return made


@functools.cache
def empty_vq_weights() -> dict[str, Tensor]:
    """For tests that make no image."""
    vq = shapes(lambda: VQDecoder(well_run=False))
    return {key: torch.zeros(1).expand(shape) for key, shape in vq.items()}


def small(
    form: str, dtype: torch.dtype = torch.float32, *, compile: bool | None = None, **changes: Any
) -> LlamaGen:
    config = LlamaGenConfig(**{**vars(SMALL), **changes})
    weights = {"model": by_formula(lambda: Transformer(config)), "tokenizer": empty_vq_weights()}
    settings = Settings(form, dtype=dtype, weights=weights, compile=compile)
    return FORMS[form]("llamagen_b", settings, config)


# --- keys and the recorded case --------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_are_the_published_ones(name: str) -> None:
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text())
    found = shapes(lambda: Transformer(CONFIGS[name]))
    assert found == {key: tuple(shape) for key, shape in manifest.items()}


def test_tokenizer_keys_are_the_published_ones() -> None:
    manifest = json.loads((MANIFESTS / "vq_16.json").read_text())
    used = {key: tuple(shape) for key, shape in manifest.items() if not key.startswith(UNUSED)}
    assert shapes(lambda: VQDecoder(well_run=True)) == used
    assert any(key.startswith("encoder.") for key in manifest)


@pytest.mark.parametrize("form", FORMS)
def test_recorded_codes(form: str, golden: Callable[[str], Golden]) -> None:
    recorded = golden("llamagen_2x128")
    weights = {"model": by_formula(lambda: Transformer(RECORDED)), "tokenizer": empty_vq_weights()}
    settings = Settings(form, dtype=torch.float32, weights=weights)
    baseline = FORMS[form]("llamagen_b", settings, RECORDED)
    assert baseline.guidance_scale == float(recorded.meta["cfg"])
    codes = baseline.tokens(recorded.tensors["labels"], greedy=True)
    assert torch.equal(codes, recorded.tensors["indices"])


def test_recorded_image(
    vq_weights: dict[str, Tensor], golden: Callable[[str], Golden]
) -> None:
    recorded = golden("llamagen_2x128")
    with torch.inference_mode():
        image = decoder(False, vq_weights)(recorded.tensors["indices"])
    assert relative(image, recorded.tensors["image"]) < 1e-3  # recorded in half precision


def test_both_decoders_agree(vq_weights: dict[str, Tensor]) -> None:
    """Fully convolutional but for attention, so 1x3 tokens show it as well as 16x16."""
    codes = torch.randint(16384, (2, 3))
    published, well_run = decoder(False, vq_weights), decoder(True, vq_weights)
    well_run.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        truth = published(codes, (1, 3))
        assert truth.shape == (2, 3, 16, 48)
        assert relative(well_run(codes, (1, 3)), truth) < 1e-5
        allowed = relative(published.bfloat16()(codes, (1, 3)), truth)
        error = relative(well_run.bfloat16()(codes, (1, 3)), truth)
    assert error <= FACTOR * allowed + FLOOR[torch.bfloat16]


# --- the transformer -------------------------------------------------------------------------


def direct_rotation(x_PHE: Tensor, grid: int) -> Tensor:
    """Neighbouring channels as complex numbers times exp(i place frequency); 0 at the class."""
    width = x_PHE.shape[-1]
    turned = torch.zeros_like(x_PHE)
    for position in range(1, len(x_PHE)):
        row, column = divmod(position - 1, grid)
        for pair in range(width // 2):
            half = pair % (width // 4)
            place = row if pair < width // 4 else column
            angle = torch.tensor(place * 10000.0 ** (-4 * half / width), dtype=torch.float64)
            a, b = x_PHE[position, :, 2 * pair], x_PHE[position, :, 2 * pair + 1]
            z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
            turned[position, :, 2 * pair], turned[position, :, 2 * pair + 1] = z.real, z.imag
    return turned


def direct_logits(
    weights: dict[str, Tensor], config: LlamaGenConfig, label: int, codes_S: Tensor
) -> Tensor:
    """(S + 1, V) in float64, all positions at once under a causal mask: no cache."""
    w = {key: value.double() for key, value in weights.items()}

    def norm(x: Tensor, key: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{key}.weight"]

    class_1D = w["cls_embedding.embedding_table.weight"][label][None]
    x_PD = torch.cat((class_1D, w["tok_embeddings.weight"][codes_S]))
    for i in range(config.depth):
        layer = f"layers.{i}"
        qkv = norm(x_PD, f"{layer}.attention_norm") @ w[f"{layer}.attention.wqkv.weight"].T
        q, k, v = qkv.view(len(x_PD), 3, config.heads, -1).unbind(1)
        q, k = direct_rotation(q, config.grid), direct_rotation(k, config.grid)
        scores_HPP = torch.einsum("phe,qhe->hpq", q, k) / config.head_width**0.5
        hidden = torch.ones(len(x_PD), len(x_PD)).triu(1).bool()
        p_HPP = scores_HPP.masked_fill(hidden, -torch.inf).softmax(-1)
        mixed = torch.einsum("hpq,qhe->phe", p_HPP, v).flatten(1)
        x_PD = x_PD + mixed @ w[f"{layer}.attention.wo.weight"].T
        h_PD, mlp = norm(x_PD, f"{layer}.ffn_norm"), f"{layer}.feed_forward"
        gate = nn.functional.silu(h_PD @ w[f"{mlp}.w1.weight"].T)
        x_PD = x_PD + (gate * (h_PD @ w[f"{mlp}.w3.weight"].T)) @ w[f"{mlp}.w2.weight"].T
    return norm(x_PD, "norm") @ w["output.weight"].T


def test_rotary_table_is_a_complex_rotation() -> None:
    x_PHE = torch.randn(17, 1, 8, dtype=torch.float64)
    table = rotary_table(4, 8)
    assert not table[0].any()  # the class: no rotation by 0 but a table of zeros
    z = torch.view_as_complex(x_PHE.unflatten(-1, (-1, 2)))
    factor = torch.view_as_complex(table.double())[:, None]
    assert relative(torch.view_as_real(z * factor).flatten(-2), direct_rotation(x_PHE, 4)) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_cached_steps_equal_the_whole_sequence(form: str) -> None:
    baseline = small(form)
    weights, scale = by_formula(lambda: Transformer(SMALL)), 2.5
    codes = torch.randint(SMALL.vocabulary, (2, 8))
    for _ in range(2):  # caches that hold another run's numbers change nothing
        found = baseline.logits(LABELS, codes, scale)
    for row, label in enumerate(LABELS.tolist()):
        c = direct_logits(weights, SMALL, label, codes[row])
        u = direct_logits(weights, SMALL, SMALL.num_classes, codes[row])
        assert relative(found[row], u + scale * (c - u)) < GOLDEN
        assert relative(baseline.logits(LABELS, codes, 1.0)[row], c) < GOLDEN


def test_both_forms_agree_in_bfloat16() -> None:
    codes = torch.randint(SMALL.vocabulary, (2, 8))
    errors = {}
    for form in FORMS:
        exact = small(form, width=64).logits(LABELS, codes)
        errors[form] = relative(small(form, torch.bfloat16, width=64).logits(LABELS, codes), exact)
    assert errors["well_run"] <= FACTOR * errors["published"], errors
    assert errors["published"] < 0.1


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_same_draws_give_the_same_codes(guidance_scale: float) -> None:
    draws = torch.Generator().manual_seed(5)
    noise = torch.stack([torch.empty(2, 50).exponential_(generator=draws) for _ in range(9)])
    found = []
    for form in FORMS:
        baseline = small(form)
        baseline.sampling = SamplingRule(top_k=20, top_p=0.9, temperature=1.2)
        same = torch.Generator().manual_seed(5)
        options = {"guidance_scale": guidance_scale}
        found.append(baseline.tokens(LABELS, noise=noise, **options))
        found.append(baseline.tokens(LABELS, generator=same, **options))
        baseline.sampling = SamplingRule(top_k=1)
        likeliest = baseline.tokens(LABELS, greedy=True, **options)
        assert torch.equal(baseline.tokens(LABELS, noise=noise, **options), likeliest)
        assert not torch.equal(likeliest, found[0])
    assert all(torch.equal(codes, found[0]) for codes in found)
    assert found[0].shape == (2, 9) and found[0].dtype == torch.int64


def test_a_whole_step_compiles_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo alone, as Inductor takes minutes: one graph for all steps, under a profiler too."""
    traced = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=keep))
    torch._dynamo.reset()
    compiled, eager = small("well_run", compile=True, depth=1), small("well_run", depth=1)
    assert "torch.compile" in compiled.ways and eager.ways.endswith("eager")
    seeded = torch.Generator().manual_seed
    with profiling.ranges():
        codes = compiled.tokens(LABELS, generator=seeded(1))
    assert torch.equal(codes, eager.tokens(LABELS, generator=seeded(1)))
    given = codes[:, :4]
    assert relative(compiled.logits(LABELS, given), eager.logits(LABELS, given)) < GOLDEN
    assert len(traced) == 1
    torch._dynamo.reset()


# --- the rule of sampling --------------------------------------------------------------------


def kept(rule: SamplingRule, logits: list[float]) -> list[int]:
    return rule.probabilities(torch.tensor([logits]))[0].nonzero()[:, 0].tolist()


def test_top_k_keeps_ties_and_top_p_the_code_that_reaches_it() -> None:
    logits = torch.tensor([0.4, 0.1, 0.3, 0.1, 0.1]).log().tolist()
    assert kept(SamplingRule(top_k=0), logits) == [0, 1, 2, 3, 4]
    assert kept(SamplingRule(top_k=2), logits) == [0, 2]
    assert kept(SamplingRule(top_k=3), logits) == [0, 1, 2, 3, 4]
    assert kept(SamplingRule(top_k=9, top_p=0.5), logits) == [0, 2]
    assert kept(SamplingRule(top_k=0, top_p=0.3), logits) == [0]
    assert kept(SamplingRule(top_k=0, top_p=0), logits) == [0]
    # Among the two of top_k the first has 4/7 > 0.5.
    assert kept(SamplingRule(top_k=2, top_p=0.5), logits) == [0]
    assert kept(SamplingRule(temperature=0), logits) == [0]
    p = SamplingRule(top_k=2, temperature=0.5).probabilities(torch.tensor([logits]))
    assert torch.allclose(p[0, [0, 2]], torch.tensor([16 / 25, 9 / 25]))


def test_logits_are_left_alone_and_rows_are_apart() -> None:
    logits = torch.randn(3, 40)
    before, rule = logits.clone(), SamplingRule(top_k=10, top_p=0.7)
    p = rule.probabilities(logits)
    assert torch.equal(logits, before)
    assert all(torch.equal(p[i], rule.probabilities(logits[i : i + 1])[0]) for i in range(3))
    assert torch.allclose(p.sum(-1), torch.ones(3))


# --- create, random weights, errors ----------------------------------------------------------


def test_create_says_what_it_made() -> None:
    for form in FORMS:
        xl = create("llamagen_xl", form, device="meta")
        assert xl.title == "LlamaGen-XL" and xl.steps == 256 and xl.random_weights
        assert xl.num_parameters == 774_699_520 and xl.dtype == torch.bfloat16
        assert xl.ways.startswith("bfloat16 weights") and not xl.extrapolates
        assert xl.decode(torch.zeros(2, 256, dtype=torch.int64, device="meta")).shape == (
            (2, 3, 256, 256)
        )
    assert "float32 tokenizer" in create("llamagen_l", device="meta").ways


def test_random_weights_are_drawn_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaGenConfig(depth=1, width=64, heads=2, grid=2, vocabulary=300)
    monkeypatch.setattr(llamagen, "VQDecoder", lambda well_run: nn.Conv2d(1, 1, 1))
    codes, logits = torch.tensor([[5, 6], [7, 8]]), {}
    for form in FORMS:
        baseline = FORMS[form]("llamagen_b", Settings(form, dtype=torch.float32, seed=7), config)
        logits[form] = baseline.logits(LABELS, codes)
        other = FORMS[form]("llamagen_b", Settings(form, dtype=torch.float32, seed=8), config)
        assert relative(other.logits(LABELS, codes), logits[form]) > 0.5
    assert relative(logits["well_run"], logits["published"]) < GOLDEN
    assert 0.5 < float(logits["published"].std()) < 20  # neither closed nor exploding


def test_published_files_load_whole(tmp_path: Path) -> None:
    """As the training script saves them; the tokenizer with its encoder."""
    whole = json.loads((MANIFESTS / "vq_16.json").read_text())
    files = {
        "model": {"model": by_formula(lambda: Transformer(SMALL)), "optimizer": {}, "steps": 1},
        "tokenizer": {"model": {k: torch.zeros(1).expand(shape) for k, shape in whole.items()}},
    }
    for part, content in files.items():
        torch.save({**content, "args": argparse.Namespace(lr=1e-4)}, tmp_path / f"{part}.pt")
    weights = {part: tmp_path / f"{part}.pt" for part in files}
    loaded = Published("llamagen_b", Settings(dtype=torch.float32, weights=weights), SMALL)
    assert not loaded.random_weights
    codes = torch.tensor([[1, 2], [3, 4]])
    assert torch.equal(loaded.logits(LABELS, codes), small("published").logits(LABELS, codes))


@pytest.mark.parametrize(
    "rule", [{"top_k": -1}, {"top_p": 1.5}, {"temperature": -1.0}, {"temperature": torch.inf}]
)
def test_impossible_sampling_rules(rule: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="top_k >= 0"):
        SamplingRule(**rule)


@pytest.mark.parametrize("form", FORMS)
def test_errors_say_what_is_allowed(form: str) -> None:
    baseline = small(form)
    with pytest.raises(ValueError, match=r"noise must have shape \(9, 2, 50\)"):
        baseline.tokens(LABELS, noise=torch.ones(9, 1, 50))
    with pytest.raises(TypeError, match="noise must be a tensor"):
        baseline.tokens(LABELS, noise=[1.0])
    with pytest.raises(ValueError, match="leave timed_steps out"):
        baseline.tokens(LABELS, timed_steps=[0])
    with pytest.raises(ValueError, match=r"0\.\.999"):
        baseline.tokens(torch.tensor([1000]))
    with pytest.raises(ValueError, match=r"\(B, 9\)"):
        baseline.decode(torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="whole numbers"):
        baseline.decode(torch.zeros(1, 9))
    with pytest.raises(ValueError, match="missing"):
        FORMS[form](
            "llamagen_b",
            Settings(form, weights={"model": {"norm.weight": torch.ones(24)}, "tokenizer": {}}),
            SMALL,
        )
