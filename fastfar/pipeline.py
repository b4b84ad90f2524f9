"""`FARPipeline`: class labels in, images out, with diffusers' argument names."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fastfar.checkpoint import load_pretrained, save_pretrained
from fastfar.decoding import decode_latents
from fastfar.model import FAR
from fastfar.moments import MomentHead
from fastfar.noise import NoiseSource
from fastfar.plan import SamplingPlan
from fastfar.sampling import check_labels, sample_latents
from fastfar.tokenizer import KLVAE, PixelTokenizer

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Images = list[Image.Image] | npt.NDArray[np.float32] | Tensor


@dataclass(frozen=True)
class ImagePipelineOutput:
    """What a pipeline call returns.

    Attributes:
        images: list of PIL images ("pil"), (B, H, W, channels) float32 array in [0, 1] ("np"),
            (B, channels, H, W) tensor in [0, 1] ("pt") or the latents ("latent").
    """

    images: Images


class FARPipeline:
    """Class-conditional image generation with a FAR model.

    Args:
        model: the FAR model.
        tokenizer: turns latents into images; None allows output_type="latent" only.
        plan: what a call does unless told otherwise.
        class_names: names of the labels, for `get_label_ids`.
        moments: the model's moment head, for plans that ask for one.

    Example:
        >>> pipe = FARPipeline.from_pretrained("demo")
        >>> generator = torch.Generator().manual_seed(0)
        >>> image = pipe(class_labels=[7], generator=generator).images[0]
        >>> image.size
        (32, 32)
    """

    def __init__(
        self,
        model: FAR,
        tokenizer: PixelTokenizer | KLVAE | None,
        plan: SamplingPlan | None = None,
        class_names: Sequence[str] | None = None,
        moments: MomentHead | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.plan = plan if plan is not None else SamplingPlan.official()
        self.class_names = None if class_names is None else tuple(class_names)
        self.moments = moments
        self._progress: dict[str, Any] = {"disable": True}

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike[str],
        torch_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> FARPipeline:
        """Load a folder, the embedded "demo", or a hub name; see `fastfar.checkpoint`.

        backend: None gives a model for every back end. "native" packs it as it is read, in
            `torch_dtype` (None: the best one): the quickest start in the least memory, for
            sampling on that back end only. "auto" does so where sampling would choose it.
        """
        parts = load_pretrained(path_or_name, dtype=torch_dtype, backend=backend)
        return cls(parts.model, parts.tokenizer, parts.plan, parts.class_names, parts.moments)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write config.json, model.safetensors and, where there are, a KL-VAE and a moment head."""
        save_pretrained(
            path, self.model, self.tokenizer, self.plan, self.class_names, self.moments
        )

    def to(self, device: str | torch.device) -> FARPipeline:
        """Move the model (and the tokenizer's weights) to `device`; returns the pipeline."""
        self.model.to(device)
        if isinstance(self.tokenizer, KLVAE):
            self.tokenizer.to(device)
        if self.moments is not None:
            self.moments.to(device)
        return self

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options for tqdm; `disable=False` shows the bar, which is off by default."""
        self._progress = {"disable": False, **options}

    def get_label_ids(self, names: str | Sequence[str]) -> list[int]:
        """Labels of class names; ValueError lists the names that exist."""
        if self.class_names is None:
            raise ValueError("this model's file carries no class names; use label numbers")
        wanted = [names] if isinstance(names, str) else list(names)
        if unknown := [name for name in wanted if name not in self.class_names]:
            raise ValueError(f"unknown class names {unknown}; there are {list(self.class_names)}")
        return [self.class_names.index(name) for name in wanted]

    def __call__(
        self,
        class_labels: Tensor | Sequence[int] | int,
        guidance_scale: float | None = None,
        diffusion_steps: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        plan: SamplingPlan | None = None,
        noise: NoiseSource | None = None,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        callback_on_level_end: Callable[[FARPipeline, int, Tensor], object] | None = None,
        whole_levels: bool = True,
    ) -> ImagePipelineOutput | tuple[Images]:
        """Generate one image per class label.

        Args:
            class_labels: whole numbers in 0..num_classes - 1.
            guidance_scale: s of the plan's guidance ramp; 1 is no guidance; None as planned.
            diffusion_steps: T of every outer step; None as planned.
            generator: one torch.Generator, one per image, or a seed. With one per image, an image
                does not depend on the others in the batch.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns the tuple (images,).
            plan: replaces the pipeline's plan.
            noise, backend, dtype: see `fastfar.sample_latents`.
            callback_on_level_end: called as callback(pipe, step, latents) after each outer step.
            whole_levels: whether that callback needs whole latents; see `fastfar.sample_latents`.

        Raises:
            ValueError, TypeError: an argument is out of range or of the wrong type.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        if self.tokenizer is None and output_type != "latent":
            raise ValueError(
                "this pipeline has no tokenizer, so it cannot make images; ask for "
                "output_type='latent', or add one (KLVAE.load_official)"
            )
        labels = check_labels(class_labels, self.model.config.num_classes)
        plan = (plan or self.plan).with_changes(
            guidance_scale=guidance_scale, diffusion_steps=diffusion_steps
        )
        with tqdm(total=plan.head_calls, unit="step", **self._progress) as bar:

            def on_level(step: int, latent: Tensor) -> None:
                bar.update(plan.diffusion_steps[step])
                if callback_on_level_end is not None:
                    callback_on_level_end(self, step, latent)

            # Nobody to tell lets a GPU run all levels as one graph.
            told = on_level if callback_on_level_end is not None or not bar.disable else None
            latents = sample_latents(
                self.model,
                labels,
                plan,
                noise,
                generator,
                backend,
                dtype,
                told,
                whole_levels=whole_levels and callback_on_level_end is not None,
                moments=self.moments,
            )
        images: Images = latents
        if output_type != "latent":
            images = self.decode(latents, output_type, backend, dtype)
        return ImagePipelineOutput(images) if return_dict else (images,)

    @torch.inference_mode()
    def decode(
        self,
        latents: Tensor,
        output_type: str = "pil",
        backend: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> Images:
        """Images of latents (B, C, H, H), in the form that `output_type` names.

        backend, dtype: see `fastfar.decoding.decode_latents`.
        """
        if self.tokenizer is None:
            raise ValueError("this pipeline has no tokenizer, so it cannot make images")
        images = decode_latents(self.tokenizer, latents, backend, dtype)
        images = images.float().add(1.0).div(2.0).clamp(0.0, 1.0)
        if output_type == "pt":
            return images
        array: npt.NDArray[np.float32] = images.permute(0, 2, 3, 1).cpu().numpy()
        return array if output_type == "np" else to_pil(array)


def to_pil(images_BHWC: npt.NDArray[np.float32]) -> list[Image.Image]:
    """8-bit PIL images of an array in [0, 1]; one channel becomes grey.

    Raises:
        ValueError: NaN or infinity in the images.
    """
    if not np.isfinite(images_BHWC).all():
        raise ValueError("images hold NaN or infinity: the sampling run diverged")
    bytes_BHWC = (images_BHWC * 255.0).round().astype(np.uint8)
    return [
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in bytes_BHWC
    ]
