"""From latents to images, on a back end and in its dtype."""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor, nn

from fastfar import backend as backends
from fastfar._weights import skeleton
from fastfar.ops import use_backend
from fastfar.ops._convolution import can_pack, pack_convolution
from fastfar.ops.upsample_convolution import pack_upsample
from fastfar.profiling import annotate
from fastfar.tokenizer import KLVAE, PixelTokenizer

_DECODER = ("decoder.", "post_quant_conv.")


@torch.inference_mode()
def decode_latents(
    tokenizer: PixelTokenizer | KLVAE,
    latents_BCHW: Tensor,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Images in [-1, 1] of FAR's latents: `tokenizer.to_images` on a back end.

    The first call for a KL-VAE in another dtype than its own, or on the native back end, makes a
    copy of its decoder (channels-last, on the native back end packed), which is kept.

    Args:
        tokenizer: of the model that made the latents.
        latents_BCHW: (B, C, h, w) floating.
        backend: "auto", "reference", "torch", "native" or "triton".
        dtype: compute dtype of a KL-VAE; None is the back end's best.

    Returns:
        (B, channels, H, W), in the compute dtype (PixelTokenizer: dtype of the latents).

    Raises:
        ValueError: a back end that is not available, latents of the wrong shape.
        TypeError: latents that are not floating-point numbers.
    """
    name = backends.resolve(backend, latents_BCHW.device, dtype)
    if dtype is None:
        dtype = backends.best_dtype(name, latents_BCHW.device)
    if isinstance(tokenizer, KLVAE):
        tokenizer = _prepared(tokenizer, name, dtype)
    with use_backend(name), annotate("decode"):
        return tokenizer.to_images(latents_BCHW)


# vae -> (native or not, dtype, fingerprint of its weights, copy made for them); one is kept.
_copies: weakref.WeakKeyDictionary[KLVAE, tuple[bool, torch.dtype, tuple[int, ...], KLVAE]] = (
    weakref.WeakKeyDictionary()
)
_copying = threading.Lock()


def _prepared(vae: KLVAE, backend: str, dtype: torch.dtype) -> KLVAE:
    """The VAE as `backend` decodes with it in `dtype`: itself if that is what it is, or a copy."""
    native = backend == "native" and can_pack(dtype)
    weights = {key: p for key, p in vae.named_parameters() if key.startswith(_DECODER)}
    if not native and all(p.dtype is dtype for p in weights.values()):
        return vae
    # Tensors made in inference mode count no versions.
    fingerprint = tuple(
        p.data_ptr() + (0 if p.is_inference() else p._version) for p in weights.values()
    )
    with _copying:
        kept = _copies.get(vae)
        if kept is not None and kept[:3] == (native, dtype, fingerprint):
            return kept[3]
        _copies.pop(vae, None)  # free the old copy before the new one is made
        copied = _decoder_only(vae, weights, dtype, native)
        _copies[vae] = (native, dtype, fingerprint, copied)
        return copied


def _decoder_only(
    vae: KLVAE, weights: dict[str, nn.Parameter], dtype: torch.dtype, native: bool
) -> KLVAE:
    """A VAE that can decode and nothing else, with weights in `dtype`, packed where native."""
    with skeleton():
        copied = KLVAE(vae.config).eval()
    del copied.encoder, copied.quant_conv
    for key, parameter in weights.items():
        path, _, leaf = key.rpartition(".")
        layer, value = copied.get_submodule(path), parameter.detach()
        if value.ndim == 4 and native:
            delattr(layer, leaf)  # a parameter; what takes its place is a plain attribute
            upsampled = path.endswith("upsample.conv")
            pack = pack_upsample if upsampled else pack_convolution
            setattr(layer, leaf, pack(value, dtype))
        elif value.ndim == 4:
            value = value.to(dtype, copy=True, memory_format=torch.channels_last)
            setattr(layer, leaf, nn.Parameter(value, requires_grad=False))
        else:
            exact = native and isinstance(layer, nn.GroupNorm)  # its kernel takes float32
            value = value.to(torch.float32 if exact else dtype, copy=True)
            setattr(layer, leaf, nn.Parameter(value, requires_grad=False))
    return copied
