"""KL-16's decoder on a GPU: the recorded image, and errors like PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Golden
from formula import formula_tensor
from tolerances import FACTOR, FLOOR, GOLDEN, relative

from fastfar import graphs
from fastfar._weights import skeleton
from fastfar.decoding import decode_latents
from fastfar.kl_vae import KLVAE

pytestmark = pytest.mark.gpu


def test_golden(golden: Callable[[str], Golden]) -> None:
    """float32 is parity: no TF32 in the convolutions. Half precision is as close as PyTorch's."""
    with skeleton():
        shapes = {key: tuple(x.shape) for key, x in KLVAE().state_dict().items()}
    vae = KLVAE.load_official({key: formula_tensor(key, shape) for key, shape in shapes.items()})
    vae = vae.to("cuda")
    recorded = golden("kl16_64px").tensors
    latents = (recorded["latent"] * 0.2325).to("cuda")
    truth = recorded["decoded"].clamp(-1, 1)
    assert relative(decode_latents(vae, latents, "triton", torch.float32).cpu(), truth) < GOLDEN
    for dtype in (torch.bfloat16, torch.float16):
        ours, plain = (
            decode_latents(vae, latents, backend, dtype).cpu() for backend in ("triton", "torch")
        )
        assert relative(ours, truth) <= FACTOR * relative(plain, truth) + FLOOR[dtype]


def test_a_graph_is_what_its_launches_are() -> None:
    """Bit by bit, for new latents and after the weights have changed."""
    vae = KLVAE().to("cuda").requires_grad_(False)
    for seed in (0, 1, 2):
        if seed == 2:
            vae.decoder.conv_out.weight.mul_(0.5)
        latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
        latents = latents.to("cuda")
        ours = decode_latents(vae, latents, "triton")
        with graphs.disabled():
            assert torch.equal(decode_latents(vae, latents, "triton"), ours)
