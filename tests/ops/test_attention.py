"""attention against its reference, on PyTorch and on every native instruction set."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dirty_scratch import assert_same_on_any_number_of_threads
from tolerances import DTYPES, assert_close_to_reference, relative, with_gap
from torch import Tensor

from fastfar import reference
from fastfar._native import NativeLibrary
from fastfar.ops import attention, use_backend

SHAPES = [(1, 1, 1, 4), (2, 7, 3, 5), (3, 13, 2, 16), (1, 67, 2, 8)]  # B, S, heads, E


def inputs(shape: tuple[int, int, int, int]) -> Tensor:
    batch, length, heads, width = shape
    return torch.randn(batch, length, 3, heads, width, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_close_to_reference(attention, reference.attention, inputs(shape), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_contiguous(dtype: torch.dtype) -> None:
    qkv = inputs((2, 7, 3, 5))
    assert_close_to_reference(
        attention, reference.attention, qkv, dtype=dtype, layout=with_gap
    )
    other_order = qkv.transpose(1, 3).contiguous().transpose(1, 3)
    torch.testing.assert_close(attention(other_order), reference.attention(qkv))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_key_mask(dtype: torch.dtype) -> None:
    mask = torch.rand(3, 13) < 0.5
    mask[:, 0], mask[1] = True, torch.arange(13) == 0  # one image with a single key
    qkv = inputs((3, 13, 2, 16))
    assert_close_to_reference(attention, reference.attention, qkv, mask, dtype=dtype)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_key_mask_equals_dropping_the_keys(needs_gradient: bool) -> None:
    qkv = inputs((2, 11, 3, 5)).requires_grad_(needs_gradient)
    mask = torch.rand(2, 11) < 0.6
    mask[:, 0] = True
    out = attention(qkv, mask)
    for image, kept in enumerate(mask):
        alone = reference.attention(qkv[image : image + 1, kept])[0]
        assert relative(out[image, kept], alone) < 1e-12
    if needs_gradient:
        out[mask].sum().backward()
        assert qkv.grad is not None and not qkv.grad[~mask].any()


def test_gradcheck() -> None:
    qkv = inputs((2, 3, 2, 2)).requires_grad_()
    mask = torch.tensor([[True, False, True], [True, True, True]])
    assert torch.autograd.gradcheck(lambda x: attention(x, mask), qkv)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_dropout_keeps_the_mean(needs_gradient: bool) -> None:
    qkv = inputs((1, 5, 2, 4)).requires_grad_(needs_gradient)
    draws = torch.stack([attention(qkv, dropout=0.3).detach() for _ in range(2000)])
    assert draws.std(0).min() > 0.01
    assert relative(draws.mean(0), attention(qkv)) < 0.05


# --- back ends by name -------------------------------------------------------------------------

ON_THE_CPU = ("sdpa", "sdpa_flash", "sdpa_math")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ON_THE_CPU)
def test_by_name(name: str, dtype: torch.dtype) -> None:
    by_name = partial(attention, implementation=name)
    mask = torch.rand(2, 7) < 0.6
    mask[:, 0] = True
    for given in ((inputs((2, 7, 3, 5)),), (inputs((2, 7, 3, 5)), mask)):
        assert_close_to_reference(by_name, reference.attention, *given, dtype=dtype)


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_by_name_an_image_without_keys_gives_zeros(name: str) -> None:
    mask = torch.tensor([[True, True, False], [False, False, False]])
    with torch.no_grad():
        out = attention(inputs((2, 3, 2, 4)), mask, implementation=name)
    assert out[0].all() and not out[1].any()


@pytest.mark.parametrize("name", ["auto", "sdpa_flash", "sdpa_math"])
def test_compiled(name: str) -> None:
    """In one graph, with values and gradients as without; once more where lengths are symbols."""

    def loss(qkv_BS3HE: Tensor, mask_BS: Tensor) -> Tensor:
        return attention(qkv_BS3HE, mask_BS, implementation=name).square().sum()

    torch.compiler.reset()
    traced = "aot_eager" if name == "sdpa_flash" else "eager"  # which also traces the backward
    compiled = torch.compile(loss, fullgraph=True, backend=traced)
    for length in (7, 9):
        qkv, mask = inputs((2, length, 2, 4)).float(), torch.rand(2, length) < 0.7
        mask[:, 0] = True
        results = []
        for function in (loss, compiled):
            leaf = qkv.clone().requires_grad_()
            value = function(leaf, mask)
            value.backward()
            results.append((value.detach(), leaf.grad))
        torch.testing.assert_close(results[1], results[0])
    torch.compiler.reset()


def test_compiling_what_cannot_be_served_shows_the_reason() -> None:
    @partial(torch.compile, fullgraph=True, backend="eager")
    def compiled(qkv_BS3HE: Tensor) -> Tensor:
        return attention(qkv_BS3HE, implementation="sdpa_cudnn")

    with pytest.raises(Exception, match="'sdpa_cudnn' cannot be used: it runs on NVIDIA GPUs"):
        compiled(inputs((1, 3, 2, 4)))


# --- native ----------------------------------------------------------------------------------

NATIVE_DTYPES = (torch.float32, torch.bfloat16)
# one query block and several; odd and padded head widths; more groups of queries than one
NATIVE_SHAPES = [*SHAPES, (2, 33, 2, 80), (1, 3, 5, 33), (1, 200, 1, 64), (1, 32, 2, 32)]


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", NATIVE_SHAPES, ids=str)
def test_native(isa: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    ops = (attention, reference.attention)
    mask = torch.rand(shape[:2]) < 0.6
    mask[:, -1] = True
    with use_backend("native"):
        for layout in (torch.Tensor.contiguous, with_gap):
            assert_close_to_reference(
                *ops, inputs(shape), dtype=dtype, gradients=False, layout=layout
            )
        assert_close_to_reference(*ops, inputs(shape), mask, dtype=dtype, gradients=False)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_native_masked_keys_weigh_nothing(isa: str, dtype: torch.dtype) -> None:
    """And an image without any key gives what PyTorch gives: zeros."""
    qkv = inputs((3, 45, 2, 16)).to(dtype)
    mask = torch.rand(3, 45) < 0.5
    mask[0], mask[1, 7] = False, True
    with use_backend("native"):
        out = attention(qkv, mask)
        qkv[:, :, 1:][~mask] = 1000.0  # keys and values, not queries
        assert torch.equal(attention(qkv, mask), out)
    torch.testing.assert_close(out[0], torch.zeros_like(out[0]), rtol=0, atol=0)
    torch.testing.assert_close(out[0], attention(qkv, mask)[0], rtol=0, atol=0)
    only_key = attention(qkv[1:2, 7:8])  # of queries that see one key
    mask[1] = torch.arange(45) == 7
    with use_backend("native"):
        torch.testing.assert_close(attention(qkv, mask)[1], only_key[0].expand(45, -1))


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_native_large_scores_do_not_overflow(isa: str, dtype: torch.dtype) -> None:
    with use_backend("native"):
        qkv = 30 * inputs((1, 40, 2, 32))
        assert_close_to_reference(
            attention, reference.attention, qkv, dtype=dtype, gradients=False
        )


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_native_is_the_same_everywhere(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv, mask = inputs((1, 300, 1, 24)).to(dtype), torch.rand(1, 300) < 0.7
    with use_backend("native"):
        assert_same_on_any_number_of_threads(monkeypatch, lambda: attention(qkv, mask))


def test_native_leaves_training_to_pytorch(library: NativeLibrary) -> None:
    qkv = inputs((1, 5, 2, 4)).float().requires_grad_()
    with use_backend("native"):
        out = attention(qkv)
        assert out.requires_grad
        torch.testing.assert_close(out, attention(qkv.detach()))
        dropped = attention(qkv.detach(), dropout=0.9)
    assert not torch.equal(dropped, out)


def test_native_refuses_what_it_cannot_do(library: NativeLibrary) -> None:
    qkv = inputs((2, 5, 2, 4))
    with use_backend("native"):
        with pytest.raises(TypeError, match=r"qkv_BS3HE is torch\.float64; give float32 or bf"):
            attention(qkv)
        with pytest.raises(ValueError, match="meta; give it on the CPU"):
            attention(qkv.float().to("meta"))
        with pytest.raises(ValueError, match=r"\(B, S, 3, heads, E\), got \(2, 5, 2, 2, 4\)"):
            attention(qkv.float()[:, :, :2])
        with pytest.raises(TypeError, match="give bool"):
            attention(qkv.float(), torch.ones(2, 5))
        with pytest.raises(ValueError, match=r"expected \(2, 5\)"):
            attention(qkv.float(), torch.ones(2, 4, dtype=torch.bool))
        assert attention(qkv.float()[:0]).shape == (0, 5, 8)
