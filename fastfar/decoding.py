"""From latents to images, on a back end and in its dtype."""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor, nn

from fastfar import backend as backends
from fastfar import graphs
from fastfar._tables import fingerprint
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
    copy of its decoder (channels-last, on the native back end packed), which is kept. So does the
    first one on Triton for a KL-VAE whose weights are not channels-last.

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
        if name == "triton" and isinstance(tokenizer, KLVAE) and _in_graph(latents_BCHW):
            return _graph_of(tokenizer, latents_BCHW)(latents_BCHW)
        return tokenizer.to_images(latents_BCHW)


# --- CUDA graphs -----------------------------------------------------------------------------

MAX_GRAPH_BATCH = 8  # images; more keep a GPU busy without a graph, and its memory would be held


def _in_graph(latents_BCHW: Tensor) -> bool:
    """Whether decoding is one graph: the host takes longer for its 150 launches than the GPU."""
    device = latents_BCHW.device
    if not graphs.wanted(device) or not 0 < len(latents_BCHW) <= MAX_GRAPH_BATCH:
        return False
    return not torch.cuda.is_current_stream_capturing()


# The last graph of each VAE, and what it is for; made by one thread at a time.
_graphs: weakref.WeakKeyDictionary[KLVAE, tuple[tuple[object, ...], graphs.Graphed]] = (
    weakref.WeakKeyDictionary()
)
_capturing = threading.Lock()


def _graph_of(vae: KLVAE, latents_BCHW: Tensor) -> graphs.Graphed:
    """The graph that decodes latents of this shape; captured where there is none, or an old one."""
    key = (
        latents_BCHW.shape,
        latents_BCHW.dtype,
        latents_BCHW.device,
        fingerprint(vae.parameters()),
    )
    with _capturing:
        kept = _graphs.get(vae)
        if kept is not None and kept[0] == key:
            return kept[1]
        _graphs.pop(vae, None)  # free the old one's memory first
        graph = graphs.Graphed(vae.to_images, (latents_BCHW,))
        _graphs[vae] = key, graph
        return graph


# --- copies ----------------------------------------------------------------------------------


# vae -> (native or not, dtype, fingerprint of its weights, copy made for them); one is kept.
_copies: weakref.WeakKeyDictionary[KLVAE, tuple[bool, torch.dtype, tuple[int, ...], KLVAE]] = (
    weakref.WeakKeyDictionary()
)
_copying = threading.Lock()


def _prepared(vae: KLVAE, backend: str, dtype: torch.dtype) -> KLVAE:
    """The VAE as `backend` decodes with it in `dtype`: itself if that is what it is, or a copy."""
    native = backend == "native" and can_pack(dtype)
    weights = {key: p for key, p in vae.named_parameters() if key.startswith(_DECODER)}
    fit = all(p.dtype is dtype for p in weights.values())
    if backend == "triton":  # else cuDNN would turn the weights around in every call
        fit = fit and all(map(_is_channels_last, weights.values()))
    if fit and not native:
        return vae
    held = fingerprint(weights.values())
    with _copying:
        kept = _copies.get(vae)
        if kept is not None and kept[:3] == (native, dtype, held):
            return kept[3]
        _copies.pop(vae, None)  # free the old copy before the new one is made
        copied = _decoder_only(vae, weights, dtype, native)
        _copies[vae] = (native, dtype, held, copied)
        return copied


def _is_channels_last(weight: Tensor) -> bool:
    return weight.ndim != 4 or weight.is_contiguous(memory_format=torch.channels_last)


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
