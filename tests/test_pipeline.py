"""`FARPipeline`: what comes out, what repeats, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import tiny_pipeline

import fastfar
from fastfar.kl_vae import KLVAE, KLVAEConfig
from fastfar.noise import SeededNoise
from fastfar.pipeline import FARPipeline, ImagePipelineOutput, to_pil
from fastfar.plan import SamplingPlan


@pytest.fixture(scope="module")
def pipe() -> FARPipeline:
    return tiny_pipeline()


def call(pipe: FARPipeline, labels: Any = (0, 3), **options: Any) -> Any:
    """Latents, with seed 0, unless told otherwise."""
    options = {"generator": 0, "output_type": "latent", "dtype": torch.float32, **options}
    return pipe(labels, **options)


# --- what comes out ---------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_output_types_hold_the_same_images(channels: int) -> None:
    pipe = tiny_pipeline(channels)
    latent, tensor, array, pictures = (
        call(pipe, output_type=name).images for name in ("latent", "pt", "np", "pil")
    )
    assert latent.shape == (2, channels, 8, 8) and latent.dtype == torch.float32
    assert tensor.shape == (2, channels, 8, 8) and tensor.dtype == torch.float32
    assert array.shape == (2, 8, 8, channels) and array.dtype == np.float32
    assert 0.0 <= array.min() < array.max() <= 1.0
    assert torch.equal(tensor, torch.from_numpy(array).permute(0, 3, 1, 2))
    decoded = (latent * 0.5 - 0.25).clamp(-1, 1) / 2 + 0.5  # PixelTokenizer(-0.25, 0.5)
    assert torch.allclose(tensor, decoded, atol=1e-6)
    assert [picture.mode for picture in pictures] == ["L" if channels == 1 else "RGB"] * 2
    bytes_BHWC = np.stack([np.asarray(picture).reshape(8, 8, channels) for picture in pictures])
    assert (bytes_BHWC == np.round(array * 255)).all()


def test_return_dict(pipe: FARPipeline) -> None:
    output = call(pipe)
    assert isinstance(output, ImagePipelineOutput)
    plain = call(pipe, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == 1
    assert torch.equal(plain[0], output.images)


def test_labels_in_any_form(pipe: FARPipeline) -> None:
    one = call(pipe, 2).images
    assert one.shape[0] == 1
    for labels in ([2], (2,), torch.tensor([2]), torch.tensor(2), np.array([2])):
        assert torch.equal(call(pipe, labels).images, one)
    assert not torch.allclose(call(pipe, 1).images, one)


def test_8_bit_images_round() -> None:
    values = np.array([0.0, 0.49 / 255, 0.51 / 255, 1.0], dtype=np.float32).reshape(1, 2, 2, 1)
    assert np.asarray(to_pil(values)[0]).ravel().tolist() == [0, 0, 1, 255]


# --- what repeats -----------------------------------------------------------------------------


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_with_a_generator_per_image_an_image_stands_alone(pipe: FARPipeline) -> None:
    both = call(pipe, [1, 2], generator=seeded(5, 6)).images
    assert torch.allclose(call(pipe, [1], generator=seeded(5)).images[0], both[0], atol=1e-4)
    swapped = call(pipe, [2, 1], generator=seeded(6, 5)).images
    assert torch.allclose(swapped.flip(0), both, atol=1e-4)
    assert not torch.allclose(call(pipe, [1], generator=seeded(6)).images[0], both[0], atol=1e-2)


def test_one_generator_moves_on(pipe: FARPipeline) -> None:
    generator = torch.Generator().manual_seed(5)
    first, second = (call(pipe, [1], generator=generator).images for _ in range(2))
    assert not torch.allclose(first, second, atol=1e-2)
    again = call(pipe, [1], generator=torch.Generator().manual_seed(5)).images
    assert torch.equal(first, again)


def test_without_a_generator_pytorch_seeds_it(pipe: FARPipeline) -> None:
    images = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        images.append(call(pipe, generator=None).images)
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_a_seed_is_a_noise_source(pipe: FARPipeline) -> None:
    config = pipe.model.config
    noise = SeededNoise([(7, 0), (7, 1)], config.num_tokens, config.token_dim)
    given = call(pipe, noise=noise, generator=None).images
    assert torch.equal(given, call(pipe, generator=7).images)


def test_the_plan_of_a_call(pipe: FARPipeline) -> None:
    plain = call(pipe).images
    stronger = call(pipe, guidance_scale=6.0).images
    assert not torch.allclose(plain, stronger, atol=1e-2)
    other = pipe.plan.with_changes(guidance_scale=6.0)
    assert torch.equal(call(pipe, plan=other).images, stronger)
    assert torch.equal(call(pipe, guidance_scale=2.0).images, plain)  # the pipeline's own
    assert not torch.allclose(call(pipe, diffusion_steps=3).images, plain, atol=1e-2)
    assert pipe.plan.guidance_scale == 2.0 and pipe.plan.diffusion_steps == (2, 2, 2)


# --- while it runs ----------------------------------------------------------------------------


def test_callback_after_each_level(pipe: FARPipeline) -> None:
    seen: list[tuple[int, torch.Tensor]] = []

    def callback(given: FARPipeline, step: int, latents: torch.Tensor) -> None:
        assert given is pipe
        seen.append((step, latents.clone()))

    result = call(pipe, callback_on_level_end=callback).images
    assert [step for step, _ in seen] == [0, 1, 2]
    assert all(latents.shape == result.shape for _, latents in seen)
    assert torch.equal(seen[-1][1], result) and not torch.equal(seen[0][1], result)


def test_progress_bar_is_off_until_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    pipe = tiny_pipeline()
    call(pipe)
    assert capfd.readouterr() == ("", "")
    pipe.set_progress_bar_config(desc="drawing")
    call(pipe)
    output, errors = capfd.readouterr()
    assert output == "" and "drawing" in errors and "6/6" in errors
    pipe.set_progress_bar_config(disable=True)
    call(pipe)
    assert capfd.readouterr() == ("", "")


def test_names_of_classes(pipe: FARPipeline) -> None:
    assert pipe.get_label_ids("top") == [1]
    assert pipe.get_label_ids(["left side", "bottom"]) == [3, 0]
    with pytest.raises(ValueError, match=r"\['middle'\].*left side"):
        pipe.get_label_ids(["top", "middle"])
    with pytest.raises(ValueError, match="no class names"):
        FARPipeline(pipe.model, None).get_label_ids("top")


# --- files ------------------------------------------------------------------------------------


def test_round_trip(pipe: FARPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = fastfar.FARPipeline.from_pretrained(tmp_path)
    assert loaded.plan == pipe.plan and loaded.plan != SamplingPlan.official()
    assert loaded.tokenizer == pipe.tokenizer and loaded.class_names == pipe.class_names
    assert loaded.model.config == pipe.model.config
    assert torch.equal(call(loaded).images, call(pipe).images)
    half = FARPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}


def test_round_trip_with_an_autoencoder(tmp_path: Path) -> None:
    vae = KLVAE(KLVAEConfig(channels=32, channel_mults=(1, 2), blocks=1, latent_channels=1))
    before = FARPipeline(tiny_pipeline().model, vae.eval(), tiny_pipeline().plan)
    before.save_pretrained(tmp_path)
    pipe = FARPipeline.from_pretrained(tmp_path)
    images = call(pipe, output_type="pil").images
    assert images[0].size == (16, 16) and images[0].mode == "RGB"
    expected = call(before, output_type="pil").images
    assert (np.asarray(images[1]) == np.asarray(expected[1])).all()


def test_to_moves_everything(pipe: FARPipeline) -> None:
    assert pipe.to("cpu") is pipe
    assert {p.device.type for p in pipe.model.parameters()} == {"cpu"}


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        ([4], {}, ValueError, r"0\.\.3"),
        ([-1], {}, ValueError, r"0\.\.3"),
        ([], {}, ValueError, "empty"),
        ([1.5], {}, TypeError, "whole numbers"),
        ([[1, 2]], {}, ValueError, "one-dimensional"),
        ([1], {"output_type": "jpg"}, ValueError, "output_type"),
        ([1], {"backend": "abacus"}, ValueError, "abacus"),
        ([1], {"dtype": torch.int8}, ValueError, "dtype"),
        ([1], {"generator": seeded(1, 2)}, ValueError, "2 generators for 1 images"),
        ([1], {"guidance_scale": -1.0}, ValueError, "guidance_scale"),
        ([1], {"diffusion_steps": 0}, ValueError, "diffusion_steps"),
        ([1], {"diffusion_steps": 1001}, ValueError, "diffusion_steps"),
    ],
)
def test_wrong_arguments(
    pipe: FARPipeline, labels: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(pipe, labels, **options)


def test_without_a_tokenizer_there_are_latents_only(pipe: FARPipeline) -> None:
    bare = FARPipeline(pipe.model, None, pipe.plan)
    assert torch.equal(call(bare).images, call(pipe).images)
    with pytest.raises(ValueError, match="no tokenizer"):
        call(bare, output_type="pil")
    with pytest.raises(ValueError, match="no tokenizer"):
        bare.decode(torch.zeros(1, 1, 8, 8))


def test_pictures_are_pil_images(pipe: FARPipeline) -> None:
    output = pipe(class_labels=[3], generator=torch.Generator().manual_seed(0))
    assert isinstance(output, ImagePipelineOutput)
    assert isinstance(output.images[0], Image.Image) and output.images[0].size == (8, 8)


def test_images_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        to_pil(np.full((1, 4, 4, 1), np.nan, dtype=np.float32))
