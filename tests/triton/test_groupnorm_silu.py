"""groupnorm_silu and the convolutions by Triton's kernels, in the interpreter."""

from __future__ import annotations

from typing import Any

import interpreter
import pytest
import torch
from guarded import Output, guarded, outputs
from tolerances import assert_close_to_reference, relative, with_gap
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastfar import reference
from fastfar.decoding import _prepared, decode_latents
from fastfar.kernels.gpu._launch import recording
from fastfar.kl_vae import KLVAE, KLVAEConfig
from fastfar.ops import convolution_residual, groupnorm_silu, upsample_convolution, use_backend

interpreter.need()
DTYPES = [torch.float32, torch.float16]


def run(*args: Any, **kwargs: Any) -> Tensor:
    out: Tensor = groupnorm_silu.implementations["triton"](*args, **kwargs)
    return out


OPS = (run, reference.groupnorm_silu)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = torch.randn(2, shape[1], dtype=torch.float64)
    x = 3 * torch.randn(*shape, dtype=torch.float64) + 1
    return x.to(dtype), (1 + 0.3 * weight).to(dtype), (0.3 * bias).to(dtype)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


# --- GroupNorm and SiLU ----------------------------------------------------------------------


# B, C, H, W, groups: three channels a group; several parts, the last one short
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 1, 3, 2), (1, 12, 9, 11, 3)], ids=str)
def test_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *sizes, groups = shape
    layout = channels_last if dtype is torch.float32 else with_gap
    assert_close_to_reference(
        *OPS, *inputs(*sizes), dtype=dtype, gradients=False, layout=layout, groups=groups,
        silu=dtype is torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_launchers_write_their_outputs_and_nothing_else(dtype: torch.dtype) -> None:
    """In the parts and blocks of a GPU: two of groups, of which the second is not full, and two of
    positions; statistics and values."""
    from fastfar.kernels.gpu import groupnorm_silu as kernels

    batch, positions, channels, groups = 1, 19, 66, 22
    x, weight, bias = inputs(batch, channels, 1, positions, dtype=dtype)
    x_BSC = guarded(x[:, :, 0].transpose(1, 2))
    shape = kernels.statistics_shape(x_BSC, groups, 90)
    assert shape == (2, batch, groups, 2)
    assert kernels.cut(positions, channels, groups, 90).blocks == 2
    statistics, y = outputs(shape, torch.float32), outputs(tuple(x_BSC.shape), dtype)
    kernels.groupnorm_silu(
        x_BSC, guarded(weight), guarded(bias), statistics.tensor, y.tensor,
        eps=0.1, silu=True, arch=90,
    )  # fmt: skip
    statistics.intact()
    y.intact()
    parts = x_BSC.double().reshape(positions, groups, 3).transpose(0, 1).split(16, dim=1)
    means = [part.mean(dim=(1, 2)) for part in parts]
    squares = [part.var(dim=(1, 2), correction=0) * part[0].numel() for part in parts]
    expected = torch.stack([torch.stack(means, dim=1), torch.stack(squares, dim=1)])
    assert relative(statistics.tensor[:, 0], expected) < 1e-6
    truth = reference.groupnorm_silu(
        x.double(), weight.double(), bias.double(), groups=groups, eps=0.1
    )
    # The interpreter cuts numbers off to bfloat16, where a GPU rounds them.
    limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert relative(y.tensor, truth[:, :, 0].transpose(1, 2)) < limit


def test_an_offset_costs_no_digits() -> None:
    """Numbers around 1000 with a spread of 0.01, in several parts: as the CPU's kernel."""
    x = (1000 + 0.01 * torch.randn(1, 8, 9, 9, dtype=torch.float64)).float()
    one, zero = torch.ones(8), torch.zeros(8)
    out = run(x, one, zero, groups=2, silu=False)
    truth = reference.groupnorm_silu(x.double(), one, zero, groups=2, silu=False)
    assert (out - truth).abs().max() < 0.02


@pytest.mark.parametrize("arch", [80, 90, 100, 942])
def test_how_images_are_cut(arch: int) -> None:
    """KL-16's: enough programs for a large GPU, few statistics to be merged, none left over."""
    from fastfar.kernels.gpu.groupnorm_silu import cut

    for size, channels in ((16, 512), (32, 512), (64, 256), (128, 256), (256, 128), (1024, 128)):
        positions = size * size
        image = cut(positions, channels, 32, arch)
        assert image.parts * image.blocks >= 128 and image.parts <= 128
        assert image.parts * image.part >= positions > (image.parts - 1) * image.part
        tile = image.tile
        assert image.part % tile["ROWS"] == 0
        assert tile["ROWS"] * tile["GROUPS"] * tile["WIDTH"] <= 32 * 32 * tile["num_warps"]
    with pytest.raises(ValueError, match="groups of 16384 channels; at most 8192"):
        cut(16, 16384, 1, arch)


def test_what_pytorch_computes_and_what_is_refused() -> None:
    x, weight, bias = inputs(1, 6, 2, 2)
    assert_close_to_reference(*OPS, x, weight, bias, dtype=torch.float64, groups=3)
    x, weight, bias = inputs(1, 6, 2, 2, dtype=torch.float32)
    with recording() as launches:
        run(x, weight.requires_grad_(), bias, groups=3)
        assert run(x[:0], weight.detach(), bias, groups=3).shape == (0, 6, 2, 2)
    assert not launches
    weight = weight.detach()
    with pytest.raises(ValueError, match="6 channels cannot be split into 4"):
        run(x, weight, bias, groups=4)
    with pytest.raises(ValueError, match=r"bias is \(5,\), expected \(6,\)"):
        run(x, weight, bias[:5], groups=3)
    with pytest.raises(TypeError, match=r"weight is torch\.float64"):
        run(x, weight.double(), bias, groups=3)


# --- convolutions ----------------------------------------------------------------------------


def convolve(*args: Any) -> Tensor:
    out: Tensor = convolution_residual.implementations["triton"](*args)
    return out


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_convolutions(dtype: torch.dtype) -> None:
    """Rows of channels that fill no tile; float64 is PyTorch's."""
    x, bias = image(2, 5, 3, 4), image(7)
    options: dict[str, Any] = {"dtype": dtype, "gradients": dtype is torch.float64}
    for kernel, residual in ((3, image(2, 7, 3, 4)), (1, None)):
        weight = image(7, 5, kernel, kernel) / 5
        assert_close_to_reference(
            convolve, reference.convolution_residual, x, weight, bias, residual, layout=with_gap,
            **options,
        )  # fmt: skip
    assert_close_to_reference(
        upsample_convolution.implementations["triton"], reference.upsample_convolution,
        x, image(7, 5, 3, 3) / 7, bias, **options,
    )  # fmt: skip


@pytest.mark.parametrize("channels", [3, 130])
def test_bias_and_residual_are_added_in_place(channels: int) -> None:
    from fastfar.kernels.gpu import convolution_residual as kernels

    y: Output = outputs((17, channels), torch.float16)
    before, residual = torch.randn(2, 17, channels).half()
    bias = torch.randn(channels)
    y.tensor.copy_(before)
    kernels.convolution_residual(y.tensor, guarded(bias), guarded(residual), arch=90)
    y.intact()
    exact = before.double() + bias.double() + residual.double()
    assert relative(y.tensor, exact) <= 1.01 * relative(exact.half(), exact), "rounded once"


def test_what_convolutions_refuse() -> None:
    x, weight, bias = torch.randn(1, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.randn(4)
    with pytest.raises(ValueError, match=r"residual is \(1, 4, 1, 3\), expected \(1, 4, 3, 3\)"):
        convolve(x, weight, bias, torch.randn(1, 4, 1, 3))
    with pytest.raises(ValueError, match=r"bias is \(1,\)"):
        convolve(x, weight, bias[:1])
    with recording() as launches:
        convolve(x, weight.requires_grad_(), bias)
        convolve(x.double(), weight.detach().double(), bias.double())
    assert not launches


# --- the decoder -----------------------------------------------------------------------------


def small_vae(*mults: int) -> KLVAE:
    torch.manual_seed(0)
    config = KLVAEConfig(
        channels=32, channel_mults=mults, blocks=1, z_channels=2, latent_channels=2,
        encoder_attention=(), decoder_attention=(),
    )  # fmt: skip
    return KLVAE(config).eval().requires_grad_(False)


class Copies(TorchDispatchMode):
    """Shapes of the images, of more than 2 channels, that are copied."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copies = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
        if func in copies and args[0].shape[1] > 2:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_no_image_changes_its_layout_in_the_decoder() -> None:
    """Every norm and convolution is a kernel's."""
    vae = small_vae(1, 2)
    copied = _prepared(vae, "triton", torch.float32)
    assert copied is _prepared(vae, "triton", torch.float32) is not vae
    assert copied is _prepared(copied, "triton", torch.float32), "it is channels-last already"
    with (
        recording() as launches, use_backend("triton"), torch.inference_mode(), Copies() as copies
    ):  # fmt: skip
        copied.to_images(torch.randn(1, 2, 3, 3))
    names = [launch.name for launch in launches]
    for kind, name in (
        (torch.nn.GroupNorm, "groupnorm_silu_kernel"),
        (torch.nn.Conv2d, "convolution_residual_kernel"),
    ):
        assert names.count(name) == sum(isinstance(m, kind) for m in copied.modules())
    assert not copies.shapes


def test_decoding() -> None:
    vae, latents = small_vae(1), 0.2 * torch.randn(1, 2, 2, 2)
    ours = decode_latents(vae, latents, "triton", torch.float32)
    assert relative(ours, vae.to_images(latents)) < 1e-5
