"""levels.py: the filters as matrices, patches, level checks."""

from __future__ import annotations

import pytest
import torch
from tolerances import relative

from fastfar import levels, reference
from fastfar.levels import check_levels, filter_matrices, low_pass, patchify, unpatchify

KINDS = ("area_bicubic", "fourier")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size, num_levels", [(1, 4), (5, 16), (8, 16), (16, 16), (32, 16), (7, 3)])
def test_matrices_equal_the_reference_filters(size: int, num_levels: int, kind: str) -> None:
    image_1CHH = torch.randn(1, 3, size, size, dtype=torch.float64)
    matrices = filter_matrices(size, num_levels, kind)
    assert matrices.shape == (num_levels + 1, size, size) and matrices.dtype is torch.float64
    for level, matrix_HH in enumerate(matrices):
        expected = reference.low_pass(
            image_1CHH, torch.tensor([level]), num_levels=num_levels, kind=kind
        )
        out = matrix_HH @ image_1CHH @ matrix_HH.T
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [5, 16])
def test_properties_of_the_matrices(size: int, kind: str) -> None:
    matrices = filter_matrices(size, 16, kind)
    assert not matrices[0].any()
    assert torch.equal(matrices[16], torch.eye(size, dtype=torch.float64))
    # A constant image passes every level but 0.
    torch.testing.assert_close(matrices[1:].sum(2), torch.ones(16, size, dtype=torch.float64))
    if kind == "fourier":  # orthogonal projections
        torch.testing.assert_close(matrices, matrices.mT)
        torch.testing.assert_close(matrices @ matrices, matrices)


@pytest.mark.parametrize("kind", KINDS)
def test_low_pass_takes_a_level_per_image(kind: str) -> None:
    latent = torch.randn(5, 2, 8, 8)
    level = torch.tensor([0, 4, 11, 16, -1])
    out = low_pass(latent, level, num_levels=16, kind=kind)
    expected = reference.low_pass(latent, level, num_levels=16, kind=kind)
    assert out.dtype is torch.float32 and relative(out, expected) < 1e-6
    assert torch.equal(out[3:], latent[3:])


@pytest.mark.parametrize("size, patch", [(4, 1), (6, 2), (8, 4), (9, 3), (5, 5)])
def test_patchify_and_back(size: int, patch: int) -> None:
    latent = torch.randn(2, 3, size, size)
    tokens = patchify(latent, patch)
    assert torch.equal(tokens, reference.patchify(latent, patch))
    assert torch.equal(unpatchify(tokens, patch), latent)


def test_errors() -> None:
    with pytest.raises(ValueError, match="area_bicubic"):
        filter_matrices(8, 16, "gauss")
    with pytest.raises(ValueError, match="positive"):
        filter_matrices(0, 16)
    with pytest.raises(ValueError, match="positive"):
        filter_matrices(8, 0)
    check_levels(torch.tensor([-1, 0, 16]), 16)
    with pytest.raises(ValueError, match=r"0\.\.16.*17"):
        check_levels(torch.tensor([3, 17]), 16)
    with pytest.raises(TypeError, match="float32"):
        check_levels(torch.tensor([3.0]), 16)
    with pytest.raises(ValueError, match="patches of 3"):
        patchify(torch.zeros(1, 1, 4, 4), 3)


def test_a_table_made_while_sampling_serves_training() -> None:
    """Tables outlive inference mode, whose tensors autograd refuses."""
    levels.filter_matrices.cache_clear()
    levels.filter_table.cache_clear()
    latent, level_B = torch.randn(2, 1, 4, 4), torch.tensor([3, -1])
    with torch.inference_mode():
        expected = low_pass(latent, level_B, num_levels=8)
    ours = low_pass(latent.requires_grad_(), level_B, num_levels=8)
    (grad,) = torch.autograd.grad(ours.square().sum(), [latent])
    assert torch.equal(ours, expected) and torch.equal(grad[1], 2 * latent[1])
    assert levels.filter_table.cache_info().misses == 1
