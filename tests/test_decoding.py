"""Decoding on every back end: the same images, in the dtype that was asked for."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from conftest import Golden
from formula import formula_tensor
from recorder import RecordingCapturer
from tolerances import FACTOR, FLOOR, relative
from torch import Tensor

from fastfar import decoding, graphs
from fastfar._native import NativeLibrary
from fastfar._weights import skeleton
from fastfar.decoding import decode_latents
from fastfar.kl_vae import KLVAE, KLVAEConfig
from fastfar.ops import use_backend
from fastfar.tokenizer import PixelTokenizer

SMALL = KLVAEConfig(
    channels=32,
    channel_mults=(1, 2, 3),
    blocks=1,
    z_channels=4,
    latent_channels=6,
    decoder_attention=(0,),
)
LAYERS = 40  # convolutions and norms in series
BACKENDS = ("reference", "torch", "native")


@pytest.fixture
def vae() -> KLVAE:
    torch.manual_seed(0)
    return KLVAE(SMALL).eval().requires_grad_(False)


def latents() -> Tensor:
    return 0.2325 * torch.randn(2, 6, 5, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_that_of_pytorch(
    library: NativeLibrary, vae: KLVAE, backend: str, dtype: torch.dtype
) -> None:
    x = latents()
    out = decode_latents(vae, x, backend, dtype)
    assert out.dtype is dtype and out.shape == (2, 3, 20, 20)
    truth = copy.deepcopy(vae).double().to_images(x.double())
    plain = copy.deepcopy(vae).to(dtype).to_images(x)
    limit = FACTOR * relative(plain, truth) + LAYERS * FLOOR[torch.float32]
    assert relative(out, truth) <= limit


def test_golden_on_the_native_back_end(
    library: NativeLibrary, golden: Callable[[str], Golden]
) -> None:
    """KL-16 in parity mode, its weights packed and its upsampling in four small convolutions."""
    with skeleton():
        shapes = {key: tuple(x.shape) for key, x in KLVAE().state_dict().items()}
    vae = KLVAE.load_official({key: formula_tensor(key, shape) for key, shape in shapes.items()})
    recorded = golden("kl16_64px").tensors
    out = decode_latents(vae, recorded["latent"] * 0.2325, "native", torch.float32)
    assert relative(out, recorded["decoded"].clamp(-1, 1)) < 1e-4
    half = decode_latents(vae, recorded["latent"] * 0.2325, "native", torch.bfloat16)
    plain = decode_latents(vae, recorded["latent"] * 0.2325, "torch", torch.bfloat16)
    truth = recorded["decoded"].clamp(-1, 1)
    assert 1e-4 < relative(half, truth) <= FACTOR * relative(plain, truth)


def test_plain_weights_on_the_native_back_end(library: NativeLibrary, vae: KLVAE) -> None:
    """What `use_backend` does to a VAE that nobody prepared: encoding and decoding."""
    x = latents()
    images = vae.to_images(x)
    with use_backend("native"):
        assert relative(vae.to_images(x), images) < 1e-5
        assert relative(vae.encode(images).mean, vae.encode(images).mean) < 1e-5


def test_best_dtype_is_the_default(vae: KLVAE) -> None:
    assert decode_latents(vae, latents(), "reference").dtype is torch.float32
    assert decode_latents(vae, latents(), "torch", torch.float64).dtype is torch.float64


def test_the_vae_itself_where_nothing_is_to_be_changed(vae: KLVAE) -> None:
    assert decoding._prepared(vae, "torch", torch.float32) is vae
    assert decoding._prepared(vae, "torch", torch.bfloat16) is not vae


def test_a_copy_is_kept_until_the_weights_change(library: NativeLibrary, vae: KLVAE) -> None:
    first = decoding._prepared(vae, "native", torch.float32)
    assert decoding._prepared(vae, "native", torch.float32) is first
    assert not any(name.startswith(("encoder", "quant")) for name, _ in first.named_modules())
    before = decode_latents(vae, latents(), "native", torch.float32)
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(1.0)
    assert decoding._prepared(vae, "native", torch.float32) is not first
    torch.manual_seed(0)
    assert not torch.equal(decode_latents(vae, latents(), "native", torch.float32), before)


def test_copies_go_with_their_vae(vae: KLVAE) -> None:
    count = len(decoding._copies)
    other = copy.deepcopy(vae)
    decode_latents(other, latents(), "torch", torch.bfloat16)
    assert len(decoding._copies) == count + 1
    del other
    gc.collect()
    assert len(decoding._copies) == count


def test_pixels_need_no_copy() -> None:
    tokenizer = PixelTokenizer(0.1, 0.5)
    x = latents()
    for dtype in (None, torch.bfloat16):
        assert torch.equal(decode_latents(tokenizer, x, "torch", dtype), tokenizer.to_images(x))


def test_errors(vae: KLVAE) -> None:
    with pytest.raises(ValueError, match="nothing"):
        decode_latents(vae, latents(), "nothing")
    with pytest.raises(ValueError, match=r"\(B, 6, H, W\)"):
        decode_latents(vae, torch.zeros(1, 3, 4, 4), "torch")


def test_a_graph_decodes_what_lies_in_its_buffer(
    vae: KLVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a recorder in CUDA's place: own results, one capture a shape, a new one for weights."""
    made: list[RecordingCapturer] = []

    def capturer(device: torch.device) -> RecordingCapturer:
        made.append(RecordingCapturer(device))
        return made[-1]

    monkeypatch.setattr(graphs, "CudaCapturer", capturer)
    monkeypatch.setattr(graphs, "wanted", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    first, second = latents(), latents()
    with torch.inference_mode():
        expected = [vae.to_images(x) for x in (first, second)]
        ours = [decoding._graph_of(vae, x)(x) for x in (first, second)]
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other)
        assert len(made) == 1
        vae.decoder.conv_out.weight.mul_(0.5)
        torch.testing.assert_close(decoding._graph_of(vae, first)(first), vae.to_images(first))
        decoding._graph_of(vae, first[:1])
    assert len(made) == 3
    assert decoding._in_graph(first)
    assert not decoding._in_graph(first.repeat(decoding.MAX_GRAPH_BATCH, 1, 1, 1))
