"""KL-16 against the published code's outputs, and what both tokenizers promise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from formula import formula_tensor
from safetensors.torch import load_file, save_file

from fastfar._weights import skeleton
from fastfar.diagonal_gaussian import DiagonalGaussian
from fastfar.kl_vae import KLVAE, KLVAEConfig
from fastfar.tokenizer import PixelTokenizer, Tokenizer, tokenizer_from_dict

HERE = Path(__file__).parent
SMALL = KLVAEConfig(
    channels=32,
    channel_mults=(1, 2, 3),
    blocks=1,
    z_channels=4,
    latent_channels=6,
    encoder_attention=(1, 2),
    decoder_attention=(0,),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The convolutions here are tiny: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out - ref).norm() / ref.norm())


@pytest.fixture(scope="module")
def kl16_state() -> dict[str, torch.Tensor]:
    manifest = json.loads((HERE / "manifests" / "kl16.json").read_text())
    return {key: formula_tensor(key, tuple(shape)) for key, shape in manifest.items()}


@pytest.fixture(scope="module")
def kl16(kl16_state: dict[str, torch.Tensor]) -> KLVAE:
    return KLVAE.load_official(kl16_state)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(HERE / "golden" / "kl16_64px.safetensors")


@pytest.fixture
def small() -> KLVAE:
    torch.manual_seed(0)
    return KLVAE(SMALL).eval().requires_grad_(False)


def images(size: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, size, size, generator=generator) * 2 - 1


# --- KL-16 against the published code ---------------------------------------------------------


@torch.no_grad()
def test_encode_golden(kl16: KLVAE, golden: dict[str, torch.Tensor]) -> None:
    posterior = kl16.encode(golden["image"])
    assert relative_error(posterior.mean, golden["posterior_mean"]) < 1e-4
    assert relative_error(posterior.std, golden["posterior_std"]) < 1e-4


@torch.no_grad()
def test_decode_golden(kl16: KLVAE, golden: dict[str, torch.Tensor]) -> None:
    assert relative_error(kl16.decode(golden["latent"]), golden["decoded"]) < 1e-4


@torch.no_grad()
def test_scaled_latents(kl16: KLVAE, golden: dict[str, torch.Tensor]) -> None:
    """to_latents and to_images differ from encode and decode by 0.2325 and the clamp only."""
    generator = torch.Generator().manual_seed(1)
    latents = kl16.to_latents(golden["image"], generator)
    draw = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    expected = 0.2325 * (golden["posterior_mean"] + golden["posterior_std"] * draw)
    assert relative_error(latents, expected) < 1e-4
    decoded = kl16.to_images(golden["latent"] * 0.2325)
    assert relative_error(decoded, golden["decoded"].clamp(-1, 1)) < 1e-4
    assert golden["decoded"].abs().max() > 1  # else the clamp was not tested
    assert decoded.abs().max() <= 1


def test_layout_is_the_published_one(kl16: KLVAE) -> None:
    manifest = json.loads((HERE / "manifests" / "kl16.json").read_text())
    with skeleton():
        shapes = {key: list(tensor.shape) for key, tensor in KLVAE().state_dict().items()}
    assert shapes == manifest
    assert kl16.config == KLVAEConfig()
    assert kl16.config.downsampling == 16
    assert not kl16.training and not any(p.requires_grad for p in kl16.parameters())


# --- sizes, files and errors ------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["flat", "model", "state_dict", "loss", "module"])
def test_load_official_reads_sizes(small: KLVAE, tmp_path: Path, layout: str) -> None:
    state = dict(small.state_dict())
    if layout == "loss":
        state["loss.discriminator.main.0.weight"] = torch.zeros(4, 3, 4, 4)
    if layout == "module":
        state = {f"module.{key}": value for key, value in state.items()}
    path = tmp_path / "kl.pth"
    torch.save({layout: state} if layout in ("model", "state_dict") else state, path)
    loaded = KLVAE.load_official(path)
    assert loaded.config == SMALL
    for key, value in small.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert torch.equal(loaded.encode(images()).mean, small.encode(images()).mean)


def test_load_official_safetensors_and_dtype(small: KLVAE, tmp_path: Path) -> None:
    path = tmp_path / "kl.safetensors"
    save_file(small.state_dict(), path)
    loaded = KLVAE.load_official(path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    # Computes in the dtype of its weights, whatever comes in, and stays close.
    decoded = loaded.decode(torch.ones(1, 6, 2, 2))
    assert decoded.dtype == torch.bfloat16 and decoded.shape == (1, 3, 8, 8)
    assert relative_error(decoded.float(), small.decode(torch.ones(1, 6, 2, 2))) < 0.05


def test_load_official_lists_what_does_not_fit(small: KLVAE) -> None:
    state = dict(small.state_dict())
    del state["decoder.mid.attn_1.q.bias"]
    state["extra.weight"] = torch.zeros(1)
    state["encoder.norm_out.weight"] = torch.zeros(7)
    with pytest.raises(ValueError) as error:
        KLVAE.load_official(state)
    text = str(error.value)
    assert "missing (1): decoder.mid.attn_1.q.bias" in text
    assert "unexpected (1): extra.weight" in text
    assert "encoder.norm_out.weight is (7,) and should be (96,)" in text


def test_load_official_of_something_else() -> None:
    with pytest.raises(ValueError, match=r"fastfar\.load_official"):
        KLVAE.load_official({"z_proj.weight": torch.zeros(8, 16)})
    with pytest.raises(ValueError, match="not a KL autoencoder"):
        KLVAE.load_official({"a.weight": torch.zeros(8, 16)})


def test_encode_and_decode_errors(small: KLVAE) -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(2, 1, 16, 16\)"):
        small.encode(torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match="multiples of 4, got 16 x 18"):
        small.encode(torch.zeros(1, 3, 16, 18))
    with pytest.raises(ValueError, match="got 0 x 16"):
        small.encode(torch.zeros(1, 3, 0, 16))
    with pytest.raises(ValueError, match=r"got \(3, 16, 16\)"):
        small.encode(torch.zeros(3, 16, 16))
    with pytest.raises(TypeError, match=r"127\.5"):
        small.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(B, 6, H, W\), got \(1, 16, 4, 4\)"):
        small.decode(torch.zeros(1, 16, 4, 4))


def test_config_errors() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        KLVAEConfig(channels=48)
    with pytest.raises(ValueError, match="positive"):
        KLVAEConfig(blocks=0)
    with pytest.raises(ValueError, match="scale"):
        KLVAEConfig(scale=0.0)


# --- the posterior ----------------------------------------------------------------------------


def test_posterior_sample_and_mode() -> None:
    mean = torch.full((1, 4, 100, 100), 2.0)
    posterior = DiagonalGaussian(mean, torch.full_like(mean, -2.0))
    draw = posterior.sample(torch.Generator().manual_seed(3))
    again = posterior.sample(torch.Generator().manual_seed(3))
    other = posterior.sample(torch.Generator().manual_seed(4))
    assert torch.equal(draw, again) and not torch.equal(draw, other)
    assert abs(draw.mean() - 2.0) < 0.01
    assert abs(draw.std() - torch.tensor(-1.0).exp()) < 0.01
    assert torch.equal(posterior.mode(), mean)


def test_logvar_is_clamped(small: KLVAE) -> None:
    with torch.no_grad():
        small.quant_conv.weight.zero_()
        small.quant_conv.bias.fill_(-100.0)
        assert torch.equal(small.encode(images()).logvar, torch.full((2, 6, 4, 4), -30.0))
        small.quant_conv.bias.fill_(100.0)
        assert torch.equal(small.encode(images()).logvar, torch.full((2, 6, 4, 4), 20.0))


def test_images_do_not_influence_each_other(small: KLVAE) -> None:
    batch = images()
    alone = small.encode(batch[1:]).mean
    torch.testing.assert_close(small.encode(batch).mean[1:], alone, rtol=1e-4, atol=1e-5)


# --- PixelTokenizer and the dictionaries ------------------------------------------------------


def test_pixel_tokenizer() -> None:
    tokenizer = PixelTokenizer(mean=-0.5, std=0.25)
    x = images()
    latents = tokenizer.to_latents(x)
    torch.testing.assert_close(latents, (x + 0.5) / 0.25)
    torch.testing.assert_close(tokenizer.to_images(latents), x)
    assert tokenizer.x0_range == (-2.0, 6.0)
    assert tokenizer.to_images(torch.tensor([-50.0, 50.0])).tolist() == [-1.0, 1.0]
    low, high = tokenizer.x0_range
    assert tokenizer.to_images(torch.tensor([low, high])).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("mean, std", [(0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), (0.0, 1e999)])
def test_pixel_tokenizer_errors(mean: float, std: float) -> None:
    with pytest.raises(ValueError, match="std positive"):
        PixelTokenizer(mean, std)


def test_pixel_tokenizer_wants_floats() -> None:
    with pytest.raises(TypeError, match=r"127\.5"):
        PixelTokenizer(0.0, 1.0).to_latents(torch.zeros(1, 1, 4, 4, dtype=torch.uint8))


def test_dictionaries(small: KLVAE) -> None:
    pixel = PixelTokenizer(mean=-0.43, std=0.7)
    assert tokenizer_from_dict(json.loads(json.dumps(pixel.to_dict()))) == pixel
    values = json.loads(json.dumps(small.to_dict()))
    assert values.pop("type") == "kl_vae"
    assert KLVAEConfig(**values) == SMALL
    assert isinstance(pixel, Tokenizer) and isinstance(small, Tokenizer)


@pytest.mark.parametrize(
    "values, text",
    [
        ({"type": "vq"}, "unknown tokenizer type 'vq'"),
        ({}, "unknown tokenizer type None"),
        ({"type": "pixel", "mean": 0.0}, "std"),
        ({"type": "pixel", "mean": 0.0, "std": 1.0, "gamma": 1}, "gamma"),
        ({"type": "kl_vae"}, "needs its weights"),
    ],
)
def test_dictionary_errors(values: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        tokenizer_from_dict(values)
