"""filter_mask_patchify against its reference: both filters, all levels, patches, masks."""

from __future__ import annotations

import itertools

import interpreter
import pytest
import torch
from guarded import guarded, outputs
from native_training import opcheck_of
from tolerances import DTYPES, assert_close_to_reference, relative, with_gap
from torch import Tensor

from fastfar import reference
from fastfar._native import NativeLibrary
from fastfar.levels import filter_matrices
from fastfar.ops import filter_mask_patchify, use_backend
from fastfar.ops.filter_mask_patchify import _backward, _forward

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


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
@pytest.mark.parametrize("patch, count", [(1, 1), (2, 5), (3, 4)])
def test_kept_tokens(patch: int, count: int, backend: str, request: pytest.FixtureRequest) -> None:
    """Some tokens in any order, one of them twice, masked ones among them; values and gradients."""
    if backend == "native":
        request.getfixturevalue("library")
    if backend == "triton":
        interpreter.need()
    level = torch.tensor([0, 3, 8, -1, 5])
    latent = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    length = (6 // patch) ** 2
    kept = torch.stack([torch.randperm(length) for _ in range(5)])[:, :count]
    kept[1, -1] = kept[1, 0]
    options = {"patch_size": patch, "num_levels": 8}
    with use_backend(backend):
        for mask in (None, mask_for(5, 6, patch)):
            args = (latent, level, mask, kept)
            assert_close_to_reference(*OPS, *args, dtype=torch.float32, **options)
    whole = reference.filter_mask_patchify(latent, level, mask, **options)
    tokens = reference.filter_mask_patchify(latent, level, mask, kept, **options)
    for b, j in itertools.product(range(5), range(count)):
        assert torch.equal(tokens[b, j], whole[b, kept[b, j]])
    with use_backend(backend), pytest.raises(ValueError, match=r"kept_BK must have shape \(5, K"):
        filter_mask_patchify(latent.float(), level, None, kept[:4], **options)


# --- native ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size, patch", SIZES)
def test_native_values_and_gradients(isa: str, size: int, patch: int, kind: str) -> None:
    level = torch.arange(-1, LEVELS + 1)
    latent = torch.randn(len(level), 3, size, size, dtype=torch.float64)
    options = {"patch_size": patch, "num_levels": LEVELS, "kind": kind}
    with use_backend("native"):
        for mask in (None, mask_for(len(level), size, patch)):
            for layout in (Tensor.contiguous, with_gap):
                assert_close_to_reference(
                    *OPS, latent, level, mask, dtype=torch.float32, layout=layout, **options
                )


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_native_bfloat16(isa: str, patch: int) -> None:
    level = torch.tensor([0, 1, 7, 11, 16, -1])
    latent = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    args = (latent, level, mask_for(6, 8, patch))
    with use_backend("native"):
        assert_close_to_reference(
            *OPS, *args, dtype=torch.bfloat16, patch_size=patch, num_levels=LEVELS
        )


def test_native_special_levels_are_exact(library: NativeLibrary) -> None:
    latent = torch.randn(3, 2, 6, 6)
    latent[0, 0, 0, 0] = float("nan")  # of no account at level 0
    with use_backend("native"):
        out = filter_mask_patchify(latent, torch.tensor([0, 8, -1]), patch_size=2, num_levels=8)
    assert not out[0].any()
    assert torch.equal(out[1:], reference.patchify(latent[1:], 2))


def test_native_is_the_same_for_any_number_of_threads_and_form_of_input(
    library: NativeLibrary,
) -> None:
    latent, level, mask = torch.randn(5, 20, 16, 16), torch.arange(2, 7), mask_for(5, 16, 1)
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 1, 2, 3, 4):
            torch.set_num_threads(threads)
            for levels, masks in ((level, mask), (level.int(), mask.float())):
                with use_backend("native"):
                    outs.append(
                        filter_mask_patchify(latent, levels, masks, patch_size=1, num_levels=16)
                    )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_native_follows_pytorch_s_rules_for_custom_ops(library: NativeLibrary) -> None:
    level, mask = torch.tensor([2, 3]), mask_for(2, 6, 2)
    latent, tokens = torch.randn(2, 3, 6, 6), torch.randn(2, 9, 12)
    for operation, x in ((_forward, latent), (_backward, tokens)):
        for each in (mask, None):
            x = x.detach().requires_grad_()
            torch.library.opcheck(operation, (x, level, each, 2, 8, "area_bicubic"))


def test_native_adjoint_is_its_own_gradient_s_gradient(library: NativeLibrary) -> None:
    """<forward(x), g> = <x, backward(g)>, and the gradient of the gradient is the operation."""
    latent = torch.randn(2, 3, 6, 6, requires_grad=True)
    weights = torch.randn(2, 9, 12, requires_grad=True)
    level, mask = torch.tensor([2, 3]), mask_for(2, 6, 2)
    options = {"patch_size": 2, "num_levels": 8}
    with use_backend("native"):
        tokens = filter_mask_patchify(latent, level, mask, **options)
        (grad,) = torch.autograd.grad(tokens, latent, weights, create_graph=True)
        direction = torch.randn_like(latent)
        (again,) = torch.autograd.grad(grad, weights, direction)
        expected = filter_mask_patchify(direction, level, mask, **options)
    torch.testing.assert_close((tokens * weights).sum(), (latent * grad).sum())
    assert torch.equal(again, expected)


def test_native_compiles_in_one_graph(library: NativeLibrary) -> None:
    level, mask = torch.tensor([2, 3]), mask_for(2, 6, 2)
    native = filter_mask_patchify.implementations["native"]

    def loss(latent: Tensor) -> Tensor:
        tokens: Tensor = native(latent, level, mask, patch_size=2, num_levels=8)
        return tokens.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    latent = torch.randn(2, 3, 6, 6, requires_grad=True)
    ours, plain = compiled(latent), loss(latent)
    torch.testing.assert_close(ours, plain)
    (a,), (b,) = torch.autograd.grad(ours, latent), torch.autograd.grad(plain, latent)
    torch.testing.assert_close(a, b)


def test_native_bad_arguments(library: NativeLibrary) -> None:
    latent, level = torch.randn(2, 2, 4, 4), torch.tensor([1, 2])
    options = {"patch_size": 1, "num_levels": 8}
    with use_backend("native"):
        with pytest.raises(TypeError, match=r"float32 or bfloat16, got torch\.float64"):
            filter_mask_patchify(latent.double(), level, **options)
        with pytest.raises(ValueError, match="on the CPU"):
            filter_mask_patchify(latent.to("meta"), level, **options)
        with pytest.raises(ValueError, match="kind"):
            filter_mask_patchify(latent, level, **options, kind="gauss")
        with pytest.raises(ValueError, match="patches of 3"):
            filter_mask_patchify(latent, level, patch_size=3, num_levels=8)
        with pytest.raises(ValueError, match="level"):
            filter_mask_patchify(latent, level[:1], **options)
        with pytest.raises(ValueError, match=r"0\.\.8"):
            filter_mask_patchify(latent, level + 7, **options)
        with pytest.raises(TypeError, match="integer"):
            filter_mask_patchify(latent, level.float(), **options)
        with pytest.raises(ValueError, match="mask_BL"):
            filter_mask_patchify(latent, level, torch.zeros(2, 4), **options)


# --- triton ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size, patch", SIZES)
def test_triton_values_and_gradients(size: int, patch: int, kind: str) -> None:
    interpreter.need()
    level = torch.tensor([-1, 0, 1, 11])
    latent = torch.randn(4, 3, size, size, dtype=torch.float64)
    options = {"patch_size": patch, "num_levels": LEVELS, "kind": kind}
    with use_backend("triton"):
        mask = None if kind == "fourier" else mask_for(4, size, patch)
        assert_close_to_reference(*OPS, latent, level, mask, dtype=torch.float32, **options)


@pytest.mark.parametrize("size, channels, patch", [(16, 17, 1), (20, 1, 4), (18, 3, 2)])
def test_triton_in_half_precision_and_of_any_layout(size: int, channels: int, patch: int) -> None:
    interpreter.need()
    level = torch.tensor([11])
    latent = torch.randn(1, channels, size, size, dtype=torch.float64)
    args = (latent, level, mask_for(1, size, patch))
    with use_backend("triton"):
        for layout in (with_gap, lambda x: x.to(memory_format=torch.channels_last)):
            assert_close_to_reference(
                *OPS, *args, dtype=torch.float16, layout=layout, patch_size=patch, num_levels=16
            )


@pytest.mark.parametrize("kept, arch", [(None, 0), (7, 80)])  # tiles of the interpreter, of a GPU
@pytest.mark.parametrize("channels, patch", [(1, 1), (5, 2), (9, 4)])
def test_triton_stays_inside_its_tensors(
    channels: int, patch: int, kept: int | None, arch: int
) -> None:
    interpreter.need()
    from fastfar.kernels.gpu import filter_mask_patchify as kernels

    size, length = 20, (20 // patch) ** 2
    level, mask = guarded(torch.tensor([4, 0, 9])), guarded(mask_for(3, size, patch))
    chosen = None if kept is None else guarded(torch.randint(length, (3, kept)))
    matrices = guarded(filter_matrices(size, 16).float())
    latent = torch.randn(3, channels, size, size)
    shape = (3, kept or length, channels * patch**2)
    tokens, gradient = outputs(shape, torch.float32), outputs(latent.shape, torch.float32)
    options = {"patch_size": patch, "arch": arch}
    shared = (level, mask, chosen, matrices)
    kernels.filter_mask_patchify(guarded(latent), *shared, tokens.tensor, **options)
    tokens.intact()
    cotangent = guarded(torch.randn(shape))
    kernels.filter_mask_patchify_backward(cotangent, *shared, gradient.tensor, **options)
    gradient.intact()
    truth = reference.filter_mask_patchify(
        latent.double(), level, mask, chosen, patch_size=patch, num_levels=16
    )
    assert relative(tokens.tensor, truth) < 1e-6
    # The transpose: <forward(x), g> = <x, backward(g)>.
    inner = (truth * cotangent.double()).sum()
    ours = (latent.double() * gradient.tensor.double()).sum()
    torch.testing.assert_close(ours, inner, rtol=1e-5, atol=1e-5)


def test_triton_special_levels_are_exact_and_strange_ones_are_safe() -> None:
    interpreter.need()
    from fastfar.kernels.gpu import filter_mask_patchify as kernels

    latent = torch.randn(5, 2, 6, 6)
    latent[0, 0, 0, 0] = float("nan")  # of no account at level 0
    tokens = outputs((5, 9, 8), torch.float32)
    level = torch.tensor([0, 8, -1, 2**40, -7])  # on a GPU nobody looks whether they are in range
    matrices = filter_matrices(6, 8).float()
    kernels.filter_mask_patchify(
        guarded(latent), level, None, None, matrices, tokens.tensor, patch_size=2, arch=0
    )
    tokens.intact()
    assert not tokens.tensor[0].any()
    assert torch.equal(tokens.tensor[1:], reference.patchify(latent[1:], 2))
    kept = torch.tensor([[9, -1, 3, 2**40]]).expand(5, -1)
    tokens = outputs((5, 4, 8), torch.float32)
    kernels.filter_mask_patchify(
        guarded(latent), level, None, kept, matrices, tokens.tensor, patch_size=2, arch=0
    )
    assert not tokens.tensor[:, [0, 1, 3]].any()
    assert torch.equal(tokens.tensor[1:, 2], reference.patchify(latent[1:], 2)[:, 3])


def test_triton_reads_inputs_of_any_strides() -> None:
    """A level for all images, a slice of an order, a latent that is a view of tokens."""
    interpreter.need()
    level = torch.tensor([3]).expand(4)
    kept = torch.stack([torch.randperm(36) for _ in range(4)])[:, 30:]
    latent = torch.randn(4, 36, 5).transpose(1, 2).unflatten(2, (6, 6))
    options = {"patch_size": 1, "num_levels": 8}
    with use_backend("triton"):
        out = filter_mask_patchify(latent, level, None, kept, **options)
        plain = filter_mask_patchify(latent.contiguous(), level.clone(), None, kept, **options)
    assert torch.equal(out, plain)
    truth = reference.filter_mask_patchify(latent.double(), level, None, kept, **options)
    assert relative(out, truth) < 1e-6


def test_triton_follows_pytorch_s_rules_for_custom_ops() -> None:
    interpreter.need()
    level, mask, kept = torch.tensor([2, 3]), mask_for(2, 6, 2), torch.tensor([[1, 7], [0, 0]])
    options = (2, 8, "area_bicubic")
    name = "filter_mask_patchify_triton"
    latent = torch.randn(2, 3, 6, 6, requires_grad=True)
    opcheck_of(name, latent, level, None, kept, *options)
    tokens = torch.randn(2, 9, 12, requires_grad=True)
    opcheck_of(f"{name}_backward", tokens, level, mask, None, *options, 6)


def test_triton_leaves_double_precision_to_pytorch_and_checks_what_it_can_see() -> None:
    interpreter.need()
    latent, level = torch.randn(2, 2, 4, 4), torch.tensor([1, 2])
    options = {"patch_size": 1, "num_levels": 8}
    with use_backend("triton"):
        assert filter_mask_patchify(latent.double(), level, **options).dtype is torch.float64
        with pytest.raises(ValueError, match="kind"):
            filter_mask_patchify(latent, level, **options, kind="gauss")
        with pytest.raises(ValueError, match="patches of 3"):
            filter_mask_patchify(latent, level, patch_size=3, num_levels=8)
        with pytest.raises(ValueError, match=r"0\.\.8"):
            filter_mask_patchify(latent, level + 7, **options)
        with pytest.raises(TypeError, match="integer"):
            filter_mask_patchify(latent, level.float(), **options)
        with pytest.raises(ValueError, match="mask_BL"):
            filter_mask_patchify(latent, level, torch.zeros(2, 4), **options)
