"""filter_mask_patchify against its reference: both filters, all levels, patches, masks."""

from __future__ import annotations

import pytest
import torch
from tolerances import DTYPES, assert_close_to_reference, relative, with_gap
from torch import Tensor

from fastfar import reference
from fastfar.ops import filter_mask_patchify

OPS = (filter_mask_patchify, reference.filter_mask_patchify)
KINDS = ("area_bicubic", "fourier")
SIZES = [(1, 1), (5, 1), (16, 1), (6, 2), (7, 7), (12, 4)]  # H, patch size
LEVELS = 16


def mask_for(batch: int, size: int, patch: int) -> Tensor:
    return torch.rand(batch, (size // patch) ** 2) < 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size, patch", SIZES)
def test_values_and_gradients(size: int, patch: int, kind: str, dtype: torch.dtype) -> None:
    level = torch.arange(-1, LEVELS + 1)  # every image at its own level
    latent = torch.randn(len(level), 3, size, size, dtype=torch.float64)
    for mask in (None, mask_for(len(level), size, patch)):
        assert_close_to_reference(
            *OPS, latent, level, mask, dtype=dtype, patch_size=patch, num_levels=LEVELS, kind=kind
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_half_precision_and_not_contiguous(patch: int, dtype: torch.dtype) -> None:
    level = torch.tensor([0, 1, 7, 11, 16, -1])
    latent = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    assert_close_to_reference(
        *OPS, latent, level, None, dtype=dtype, layout=with_gap, patch_size=patch, num_levels=LEVELS
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fourier_in_half_precision(dtype: torch.dtype) -> None:
    """There is no FFT to compare with in these dtypes: the result is the rounded float64 one."""
    level = torch.tensor([0, 3, 8, 16])
    latent = torch.randn(4, 2, 9, 9).to(dtype)
    options = {"patch_size": 3, "num_levels": LEVELS, "kind": "fourier"}
    out = filter_mask_patchify(latent, level, **options)
    truth = reference.filter_mask_patchify(latent.double(), level, **options)
    assert out.dtype is dtype
    assert relative(out, truth) < torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
def test_special_levels_are_exact(kind: str) -> None:
    latent = torch.randn(3, 2, 6, 6)
    options = {"patch_size": 2, "num_levels": 8, "kind": kind}
    out = filter_mask_patchify(latent, torch.tensor([0, 8, -1]), **options)
    assert not out[0].any()
    assert torch.equal(out[1:], reference.patchify(latent[1:], 2))


def test_masks_of_any_type_zero_their_tokens() -> None:
    latent, level = torch.randn(2, 2, 4, 4), torch.tensor([3, 5])
    mask = mask_for(2, 4, 2)
    options = {"patch_size": 2, "num_levels": 8}
    plain = filter_mask_patchify(latent, level, **options)
    for form in (mask, mask.float(), mask.long()):
        out = filter_mask_patchify(latent, level, form, **options)
        assert not out[mask].any() and torch.equal(out[~mask], plain[~mask])


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    latent = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    level, mask = torch.tensor([2, 3]), mask_for(2, 4, 2)
    assert torch.autograd.gradcheck(
        lambda x: filter_mask_patchify(x, level, mask, patch_size=2, num_levels=4, kind=kind),
        latent,
    )


@pytest.mark.parametrize("level", [-2, 9, 100])
def test_levels_out_of_range(level: int) -> None:
    latent = torch.randn(2, 2, 4, 4)
    with pytest.raises(ValueError, match=r"0\.\.8"):
        filter_mask_patchify(latent, torch.tensor([1, level]), patch_size=1, num_levels=8)


def test_bad_arguments() -> None:
    latent, level = torch.randn(2, 2, 4, 4), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="kind"):
        filter_mask_patchify(latent, level, patch_size=1, num_levels=8, kind="gauss")
    with pytest.raises(ValueError, match="patch"):
        filter_mask_patchify(latent, level, patch_size=3, num_levels=8)
    with pytest.raises(ValueError, match="level"):
        filter_mask_patchify(latent, level[:1], patch_size=1, num_levels=8)
    with pytest.raises(TypeError, match="integer"):
        filter_mask_patchify(latent, level.float(), patch_size=1, num_levels=8)
