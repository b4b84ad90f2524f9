"""VAR: published keys, parity with a recorded run, one function in two forms, the sampling rule."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import Watch, fake_cuda
from formula import formula_tensor
from tolerances import GOLDEN, relative
from torch import Tensor

from fastfar._weights import skeleton
from fastfar.baselines import FORMS, create, var
from fastfar.baselines._baseline import Settings
from fastfar.baselines.var import VAR, guided, sample_published, sample_well_run
from fastfar.baselines.var_transformer import (
    ENDS,
    LENGTHS,
    TOTAL,
    Transformer,
    WellRun,
    training_buffers,
)
from fastfar.baselines.var_vae import IGNORED, SIDES, VOCABULARY, VQVAE

MANIFESTS = Path(__file__).parents[1] / "manifests"
BF16 = torch.bfloat16
LABELS = torch.tensor([7, 990])


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    values = json.loads((MANIFESTS / f"{name}.json").read_text())
    return {key: tuple(shape) for key, shape in values.items()}


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def formula_state(module: torch.nn.Module, prefix: str = "") -> dict[str, Tensor]:
    keys = [(prefix + key, value) for key, value in module.named_parameters()]
    return {key: formula_tensor(key, tuple(value.shape)) for key, value in keys}


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, Tensor]]:
    """VAR of depth 4 and the VQ-VAE by formula, in the published layout less the encoder."""
    with skeleton():
        model, vae = Transformer(4), VQVAE()
    zeros = {f"blocks.{i}.attn.zero_k_bias": torch.zeros(256) for i in range(4)}
    return {
        "model": {**formula_state(model), **training_buffers(), **zeros},
        "tokenizer": formula_state(vae),
    }


@pytest.fixture(scope="module")
def forms(weights: dict[str, dict[str, Tensor]]) -> dict[str, VAR]:
    """Both forms of it in float32."""
    settings = {form: Settings(form, dtype=torch.float32, weights=weights) for form in FORMS}
    return {form: VAR("var_d4", settings[form]) for form in FORMS}


@functools.cache
def small(form: str, dtype: torch.dtype = BF16) -> VAR:
    """Two narrow blocks with open gates; the decoder is there, but holds zeros."""
    with skeleton():
        model, vae = Transformer(2), VQVAE()
    zeros = {key: torch.zeros(()).expand(shape) for key, shape in shapes(vae).items()}
    weights = {
        "model": {**formula_state(model), **training_buffers()},
        "tokenizer": {**zeros, **formula_state(vae.quantize, "quantize.")},
    }
    for i in range(2):
        weights["model"][f"blocks.{i}.attn.zero_k_bias"] = torch.zeros(128)
    weights["model"]["class_emb.weight"] *= 10
    return VAR("var_d2", Settings(form, dtype=dtype, weights=weights))


@pytest.fixture
def six_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images end at 6x6 tokens: an eighth of the work."""
    monkeypatch.setattr(var, "SIDES", SIDES[:6])


# --- weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [16, 20, 24, 30])
def test_keys_and_shapes_of_the_published_transformers(depth: int) -> None:
    with skeleton():
        model = Transformer(depth)
    assert shapes(model) == manifest(f"var_d{depth}")


def test_keys_and_shapes_of_the_published_decoder() -> None:
    with skeleton():
        vae = VQVAE()
    published = manifest("vq_f16")
    used = {key: shape for key, shape in published.items() if not key.startswith(IGNORED)}
    assert shapes(vae) == used
    assert len(used) < len(published)


def test_whole_published_files_load(tmp_path: Path) -> None:
    """Encoder and training's counts are passed over; the mask of training is not read."""
    for name, part in (("vq_f16", "tokenizer"), ("var_d16", "model")):
        # One number in the file for each tensor, so that it is small.
        numbers = enumerate(manifest(name).items())
        state = {key: torch.tensor(i / 256).expand(shape) for i, (key, shape) in numbers}
        if part == "model":
            kept = [key for key in state if "blocks" not in key or key.startswith("blocks.0.")]
            state = {key: state[key] for key in kept}
            state["lvl_1L"] = training_buffers()["lvl_1L"]
        torch.save(state, tmp_path / f"{part}.pth")
    sources = {part: tmp_path / f"{part}.pth" for part in ("model", "tokenizer")}
    settings = Settings(dtype=torch.float32, weights=sources)
    loaded = VAR("var_d16", settings, depth=1, width=1024)
    assert not loaded.random_weights
    order = list(manifest("vq_f16"))
    for key, value in loaded.vae.state_dict().items():
        assert (value == order.index(key) / 256).all(), key
    assert loaded.model.get_buffer("lvl_1L").dtype == torch.int64
    assert loaded.model.get_buffer("attn_bias_for_masking").min() == -math.inf
    assert (loaded.model.head.bias == list(manifest("var_d16")).index("head.bias") / 256).all()


def test_weights_of_another_depth_are_refused(weights: dict[str, dict[str, Tensor]]) -> None:
    with pytest.raises(ValueError, match=r"missing .*blocks.4.attn"):
        VAR("var_d5", Settings(weights=weights), width=256)


def test_random_weights(six_scales: None) -> None:
    """Finite, as large as a trained model's, gates open."""
    baseline = VAR("var_d2", Settings(dtype=torch.float32))
    assert baseline.random_weights
    f_hat = baseline.tokens(LABELS, greedy=True)
    assert f_hat.isfinite().all() and 0.1 < f_hat.std() < 10
    gate1, gate2, *_ = baseline.model.blocks[0].modulations(baseline.model.conditions(LABELS))
    assert min(gate1.abs().mean(), gate2.abs().mean()) > 0.1


def test_packed_weights_take_the_place_of_the_parameters() -> None:
    """The well run form holds its blocks once."""
    baseline = small("well_run", BF16)
    keys = {key.split(".", 2)[2] for key in baseline.model.state_dict() if "blocks" in key}
    assert keys == {"ada_lin.1.weight", "ada_lin.1.bias"}


# --- parity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_recorded_run(
    form: str,
    forms: dict[str, VAR],
    golden: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits of both halves, and the feature map of greedy codes: the same codes everywhere."""
    recorded = golden("var_d4")
    seen: dict[int, Tensor] = {}

    def spy(logits_MLV: Tensor, guidance_scale: float, scale: int) -> Tensor:
        assert guidance_scale == 4.0
        seen[scale] = logits_MLV
        return guided(logits_MLV, guidance_scale, scale)

    monkeypatch.setattr(var, "guided", spy)
    f_hat = forms[form].tokens(recorded.tensors["labels"], greedy=True)
    assert relative(seen[0], recorded.tensors["logits_scale0"]) < GOLDEN
    assert relative(seen[3], recorded.tensors["logits_scale3"]) < GOLDEN
    assert relative(f_hat, recorded.tensors["f_hat"]) < GOLDEN


def test_recorded_image(forms: dict[str, VAR], golden: Callable[[str], Any]) -> None:
    """The image was recorded in half precision."""
    recorded = golden("var_d4").tensors
    image = forms["published"].decode(recorded["f_hat"])
    assert image.dtype == torch.float32 and image.shape == (1, 3, 256, 256)
    assert relative(image, recorded["image"].float()) < 1e-3


# --- two forms of one function ---------------------------------------------------------------


def test_forms_agree_on_given_draws(six_scales: None) -> None:
    noise = torch.empty(2, TOTAL, VOCABULARY)
    noise[:, : ENDS[5]].exponential_()
    run = {form: small(form, torch.float32) for form in FORMS}
    f_hat = {form: run[form].tokens(LABELS, noise=noise) for form in FORMS}
    assert relative(f_hat["well_run"], f_hat["published"]) < GOLDEN
    greedy = run["published"].tokens(LABELS, greedy=True)
    assert relative(f_hat["published"], greedy) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_decoders_agree(forms: dict[str, VAR], dtype: torch.dtype) -> None:
    """On a small map, in images of either form."""
    f_hat = torch.randn(1, 32, 2, 2)
    truth = forms["published"].decode(f_hat)
    assert truth.min() >= 0 and truth.max() <= 1
    if dtype == torch.float32:
        assert relative(forms["well_run"].decode(f_hat), truth) < GOLDEN
        return
    with torch.autocast("cpu", dtype):
        allowed = relative(forms["published"].decode(f_hat), truth)
    with torch.inference_mode():
        out = copy.deepcopy(forms["well_run"].vae).to(dtype)(f_hat.to(dtype)).float()
    assert allowed / 2 <= relative(out, truth) <= 2 * allowed


def logits_of_given_maps(baseline: VAR, scales: int = 5) -> Tensor:
    """Logits of the first scales, the feature map before each given."""
    generator, found = torch.Generator().manual_seed(1), []
    autocast = baseline.autocast() if baseline.form == "published" else nullcontext()
    with torch.inference_mode(), autocast:
        x_MLD = baseline.runner.start(LABELS)
        for scale in range(scales):
            if scale:
                tokens = torch.randn(2, LENGTHS[scale], 32, generator=generator)
                x_MLD = baseline.runner.embed(tokens, scale)
            found.append(baseline.runner.logits(baseline.runner.blocks(x_MLD, scale)))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "as on a GPU"])
def test_rounding_errors_of_the_forms_are_alike(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 against each form's own float32: within a factor of 2 of one another."""
    if not packed:
        monkeypatch.setattr("fastfar.baselines._linear.can_pack", lambda weight: False)
    errors = {}
    for form in FORMS:
        exact, half = (logits_of_given_maps(small(form, d)) for d in (torch.float32, BF16))
        errors[form] = relative(half, exact)
    assert 1e-3 < errors["published"] < 0.05
    assert 0.5 < errors["well_run"] / errors["published"] < 2


def test_images_of_a_batch_are_those_of_single_ones(six_scales: None) -> None:
    """Also that buffers of another batch size are of no consequence."""
    for form in FORMS:
        both = small(form, torch.float32).tokens(LABELS, greedy=True)
        one = small(form, torch.float32).tokens(LABELS[1:], greedy=True)
        assert relative(one, both[1:]) < GOLDEN


def test_dtypes_of_the_forms() -> None:
    settings = Settings("published"), Settings("well_run")
    assert [each.compute_dtype(torch.float16) for each in settings] == [BF16, BF16]
    published, well_run = small("published", BF16), small("well_run", BF16)
    assert published.model.head.weight.dtype == torch.float32
    assert well_run.model.head.weight.dtype == BF16
    assert well_run.vae.decoder.conv_out.weight.dtype == BF16
    assert "autocast" in published.ways and "autocast" not in well_run.ways


# --- the sampling rule -----------------------------------------------------------------------


def kept(logits: list[float], top_k: int, top_p: float) -> set[int]:
    """Codes that may be drawn, by the words of `sample_published`."""
    codes = sorted(range(len(logits)), key=lambda code: logits[code])[-top_k:]
    p = torch.tensor([logits[code] for code in codes], dtype=torch.float64).softmax(0)
    sums = p.cumsum(0)
    return {c for c, s in zip(codes, sums, strict=True) if s > 1 - top_p} | {codes[-1]}


@pytest.mark.parametrize("sample", ["published", "by code", "by rank"])
@pytest.mark.parametrize("top_k, top_p", [(1, 0.95), (5, 0.95), (12, 0.6), (40, 0.95), (40, 0.01)])
def test_top_k_and_top_p(sample: str, top_k: int, top_p: float) -> None:
    """A code that races with a draw of next to nothing wins if, and only if, it was kept."""
    logits_V = torch.randn(40) * 2
    expected = kept(logits_V.tolist(), top_k, top_p)
    count = top_k if sample == "by rank" else 40
    race_1NV = torch.ones(1, count, count)
    race_1NV[0].fill_diagonal_(1e-9)
    logits_1NV = logits_V.repeat(1, count, 1)
    if sample == "published":
        codes_1N = sample_published(logits_1NV, top_k, top_p, None, race_1NV)
    else:
        codes_1N = sample_well_run(logits_1NV, top_k, top_p, race_1NV)
    assert set(codes_1N[0].tolist()) == expected
    assert len(expected) < 40


def test_the_published_draws_are_a_race() -> None:
    """Codes of a generator are those of the exponential draws that it gives."""
    logits_BLV = torch.randn(2, 5, 64)
    race_BLV = torch.empty(10, 64).exponential_(generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    drawn = sample_published(logits_BLV.clone(), 30, 0.95, generator, None)
    assert torch.equal(drawn, sample_published(logits_BLV, 30, 0.95, None, race_BLV.view(2, 5, 64)))


@pytest.mark.parametrize("form", FORMS)
def test_frequencies(form: str) -> None:
    """Shares of 20,000 draws are the probabilities of the codes kept."""
    logits_V, draws = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0]), 20_000
    logits_1NV = logits_V.repeat(1, draws, 1)
    if form == "published":
        codes_1N = sample_published(logits_1NV, 5, 0.97, torch.Generator().manual_seed(0), None)
    else:
        codes_1N = sample_well_run(logits_1NV, 5, 0.97, torch.empty(1, draws, 5).exponential_())
    left = sorted(kept(logits_V.tolist(), 5, 0.97))
    expected = torch.zeros(6)
    expected[left] = logits_V[left].softmax(0)
    shares = torch.bincount(codes_1N[0], minlength=6) / draws
    assert (shares - expected).abs().max() < 5 * (0.25 / draws) ** 0.5
    assert 0 < (expected == 0).sum() < 5


@pytest.mark.parametrize("scale", [0, 3, 9])
def test_guidance_of_a_scale(scale: int) -> None:
    """It grows with the scale, from none at the first; the conditional half comes first."""
    logits_MLV = torch.randn(4, 2, 8)
    t = 1.5 * scale / 9
    expected = (1 + t) * logits_MLV[:2] - t * logits_MLV[2:]
    assert torch.allclose(guided(logits_MLV, 1.5, scale), expected)
    if scale == 0:
        assert torch.equal(guided(logits_MLV, 1.5, scale), logits_MLV[:2])


def test_defaults_are_the_published_script() -> None:
    assert (var.GUIDANCE_SCALE, var.TOP_K, var.TOP_P) == (4.0, 900, 0.95)
    baseline = small("published", BF16)
    assert (baseline.steps, baseline.guidance_scale, baseline.title) == (10, 4.0, "VAR-d2")


@pytest.mark.parametrize("form", FORMS)
def test_generators_decide(form: str, six_scales: None) -> None:
    baseline = small(form, BF16)
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    first, same, other = (baseline.tokens(LABELS[:1], generator=each) for each in seeds)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_noise_of_a_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"noise must have shape \(2, 680, 4096\)"):
        small("published", BF16).tokens(LABELS, noise=torch.ones(2, 680, 900))
    with pytest.raises(TypeError, match="noise must be a tensor"):
        small("published", BF16).tokens(LABELS, noise=3)


# --- devices without a machine ---------------------------------------------------------------


def onto_fake_cuda(module: torch.nn.Module) -> None:
    """New tensors without numbers; call it inside `fake_cuda`."""
    for part in module.modules():
        for key, value in part.named_parameters(recurse=False):
            empty = torch.empty(value.shape, dtype=value.dtype, device="cuda")
            setattr(part, key, torch.nn.Parameter(empty, requires_grad=False))
        for key, value in part.named_buffers(recurse=False):
            setattr(part, key, torch.empty(value.shape, dtype=value.dtype, device="cuda"))


def test_the_well_run_image_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake CUDA tensors: no wait for the device, no copy from the host, from labels to f_hat.

    Without bicubic enlarging: what PyTorch makes of it for fake tensors wants a CUDA build.
    """
    monkeypatch.setattr(var, "SIDES", SIDES[:3])
    baseline = VAR("var_d1", Settings("well_run", torch.device("meta")))
    with skeleton():
        model = Transformer(1).to(BF16)
    with fake_cuda():
        for part in (model, baseline.vae):
            onto_fake_cuda(part)
        baseline.runner = WellRun(model, compile=False)
        quantize = baseline.vae.quantize
        monkeypatch.setattr(
            quantize, "add", lambda f, codes, _: f + quantize.embedding(codes).sum()
        )
        labels_B = torch.empty(2, dtype=torch.int64, device="cuda")
        noise = torch.empty(2, TOTAL, var.TOP_K, device="cuda")
        with torch.inference_mode(), Watch() as watch:
            f_hat = baseline._image(labels_B, noise, 4.0, False, None)
        assert f_hat.device.type == "cuda" and watch.launches


def test_create_builds_var() -> None:
    baseline = create("var_d24", "well_run", device="meta")
    assert isinstance(baseline, VAR) and baseline.title == "VAR-d24"
    assert f"{baseline.num_parameters / 1e6:.0f}" == "1033"


def test_phi_of_a_scale() -> None:
    """Which of the four phis works at which scale."""
    quantize = copy.deepcopy(small("published").vae.quantize)
    seen: list[int] = []
    for i, phi in enumerate(quantize.quant_resi.qresi_ls):
        phi.register_forward_hook(lambda *_, i=i: seen.append(i))
    for scale, length in enumerate(LENGTHS):
        quantize.add(torch.zeros(1, 32, 16, 16), torch.arange(length)[None], scale)
    assert seen == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
