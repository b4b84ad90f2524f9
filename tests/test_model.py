"""model.py and head.py: golden conditions and losses, masks, dropout, published names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Golden
from formula import fill_by_formula
from tolerances import GOLDEN, relative
from torch import Tensor, nn

import fastfar
from fastfar import FAR, FARConfig, TrainingDraws, diffusion_loss, reference
from fastfar.levels import low_pass

Read = Callable[[str], Golden]
MANIFESTS = Path(__file__).parent / "manifests"
TOTALS = {"far_base": 207.9e6, "far_large": 426.4e6, "far_huge": 811.7e6}


# --- golden files ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["far_tiny_nomask", "far_tiny_mask"])
def test_condition_of_every_outer_step(name: str, dtype: torch.dtype, golden: Read) -> None:
    """Teacher-forced: the recorded input of each step gives the recorded condition."""
    case = golden(name)
    model = fastfar.load_official(case.under("model."), num_heads=2).to(dtype)
    run = case.under("run.")
    batch = len(run["labels"])
    class_MD = torch.cat(
        [model.class_embedding(run["labels"]), model.unconditional_embedding(batch)]
    )
    assert len(run["encoder_input"]) >= 10
    with torch.inference_mode():
        for step, tokens in enumerate(run["encoder_input"].to(dtype)):
            mask = run["mask"][step].repeat(2, 1) if "mask" in run else None
            z = model(tokens.repeat(2, 1, 1), class_MD, mask)
            assert relative(z, run["condition"][step]) < GOLDEN, step


@pytest.fixture(params=["masked", "unmasked"])
def recorded_loss(request: pytest.FixtureRequest, golden: Read) -> dict[str, Tensor]:
    return golden("far_loss").under(f"{request.param}.")


def formula_model(golden: Read) -> FAR:
    """The model of far_loss: the sizes of far_tiny_nomask, weights by formula."""
    model = fastfar.load_official(golden("far_tiny_nomask").under("model."), num_heads=2)
    fill_by_formula(model)
    return model.eval()


def test_loss_and_gradients(recorded_loss: dict[str, Tensor], golden: Read) -> None:
    case, model = recorded_loss, formula_model(golden)
    draws = TrainingDraws(case["level"], case["t"], case["noise"], case.get("mask"))
    level = case["level"].expand(len(case["labels"]))
    assert relative(low_pass(case["latent"], level, num_levels=16), case["filtered"]) < GOLDEN
    loss = diffusion_loss(model, case["latent"], case["labels"], draws)
    assert relative(loss, case["loss"]) < GOLDEN
    loss.backward()
    gradients = {k.removeprefix("grad."): v for k, v in case.items() if k.startswith("grad.")}
    assert len(gradients) >= 7
    for key, expected in gradients.items():
        ours = model.get_parameter(key).grad
        assert ours is not None
        if key == "class_emb.weight":  # recorded for the rows of the labels, zero elsewhere
            assert float(ours.norm()) == pytest.approx(float(ours[case["labels"]].norm()))
            ours = ours[case["labels"]]
        assert relative(ours, expected) < GOLDEN, key


# --- names and sizes -------------------------------------------------------------------------


@pytest.mark.parametrize("preset", sorted(TOTALS))
def test_parameter_names_and_shapes_are_the_published_ones(preset: str) -> None:
    manifest = json.loads((MANIFESTS / f"{preset}.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = FAR(FARConfig.preset(preset))
    shapes = {name: list(x.shape) for name, x in model.state_dict().items()}
    assert shapes == manifest
    total = sum(math.prod(shape) for shape in manifest.values())
    assert sum(p.numel() for p in model.parameters()) == total
    assert total == pytest.approx(TOTALS[preset], abs=5e4)


def test_a_fresh_head_predicts_zero_and_a_fresh_model_is_finite(tiny_config: FARConfig) -> None:
    model = FAR(tiny_config).eval()
    tokens = torch.randn(2, tiny_config.num_tokens, tiny_config.token_dim)
    z = model(tokens, model.class_embedding(torch.tensor([0, 4])))
    assert z.isfinite().all() and z.std() > 0.1
    rows = z.flatten(0, 1)
    x = torch.randn(len(rows), tiny_config.token_dim)
    assert not model.head(x, torch.arange(len(rows)), rows, torch.ones(len(rows))).any()


# --- against the reference -------------------------------------------------------------------


def tokens_for(config: FARConfig, batch: int) -> Tensor:
    return torch.randn(batch, config.num_tokens, config.token_dim, dtype=torch.float64)


def mask_with(counts: list[int], length: int) -> Tensor:
    """(B, L) bool with `counts[b]` masked tokens in image b."""
    rank = torch.rand(len(counts), length).argsort(dim=1).argsort(dim=1)
    return rank < torch.tensor(counts)[:, None]


@pytest.mark.parametrize("masked", [None, 0, 1, 5, 8, 9])
def test_equal_masks_against_the_reference(tiny_model: FAR, masked: int | None) -> None:
    config, model = tiny_model.config, tiny_model.double()
    tokens, labels = tokens_for(config, 3), torch.tensor([0, 4, -1])
    mask = None if masked is None else mask_with([masked] * 3, config.num_tokens)
    params = model.state_dict()
    expected = reference.condition(
        params,
        tokens,
        mask,
        reference.class_embedding(params, labels),
        num_heads=config.num_heads,
    )
    class_BD = model.class_embedding(labels.clamp(min=0), labels < 0)
    assert relative(model(tokens, class_BD, mask), expected) < 1e-12
    if mask is not None and masked is not None:
        known = model(tokens, class_BD, mask.float(), num_kept=config.num_tokens - masked)
        assert relative(known, expected) < 1e-12
        poisoned = tokens.masked_fill(mask[..., None], 1e6)
        assert relative(model(poisoned, class_BD, mask), expected) < 1e-12, "masked = not seen"


def test_different_mask_counts_equal_each_image_alone(tiny_model: FAR) -> None:
    """Images with fewer visible tokens are padded; nobody may look at the padding."""
    config, model = tiny_model.config, tiny_model.double()
    tokens, mask = tokens_for(config, 5), mask_with([9, 0, 4, 8, 1], config.num_tokens)
    class_BD = model.class_embedding(torch.arange(5))
    together = model(tokens, class_BD, mask)
    for b in range(5):
        one = slice(b, b + 1)
        assert relative(together[one], model(tokens[one], class_BD[one], mask[one])) < 1e-12, b


def test_gradients_through_different_mask_counts(tiny_model: FAR) -> None:
    config, model = tiny_model.config, tiny_model.double()
    tokens, mask = tokens_for(config, 3), mask_with([7, 2, 5], config.num_tokens)
    weights = torch.randn(3, config.num_tokens, config.width, dtype=torch.float64)

    def gradients(images: list[slice]) -> list[Tensor]:
        model.zero_grad()
        for b in images:
            class_BD = model.class_embedding(torch.arange(3)[b])
            (model(tokens[b], class_BD, mask[b]) * weights[b]).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    together = gradients([slice(0, 3)])
    alone = gradients([slice(0, 1), slice(1, 2), slice(2, 3)])
    assert len(together) == len(alone) > 20
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_head_against_the_reference(tiny_model: FAR) -> None:
    config, head = tiny_model.config, tiny_model.double().head
    x = torch.randn(7, config.token_dim, dtype=torch.float64)
    z = torch.randn(7, config.width, dtype=torch.float64)
    timestep, level = torch.randint(1000, (7,)), torch.arange(7)
    expected = reference.head_forward(head.state_dict(), x, timestep, z, level)
    assert relative(head(x, timestep, z, level), expected) < 1e-12


def test_without_a_buffer(tiny_config: FARConfig) -> None:
    config = FARConfig.from_dict({**tiny_config.to_dict(), "buffer_size": 0})
    model = FAR(config).eval()
    mask = mask_with([3, 5], config.num_tokens)
    z = model(tokens_for(config, 2).float(), model.class_embedding(torch.tensor([1, 2])), mask)
    assert z.shape == (2, config.num_tokens, config.width) and z.isfinite().all()


# --- train mode ------------------------------------------------------------------------------


def test_dropout_is_active_in_train_mode_only(tiny_model: FAR) -> None:
    tokens = tokens_for(tiny_model.config, 2).float()

    def twice() -> tuple[Tensor, Tensor]:
        class_BD = tiny_model.class_embedding(torch.tensor([1, 2]))
        return tiny_model(tokens, class_BD), tiny_model(tokens, class_BD)

    assert torch.equal(*twice())
    tiny_model.train()
    first, second = twice()
    assert relative(first, second) > 1e-3
    for module in tiny_model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    assert torch.equal(*twice()), "dropout is all the randomness there is"


def test_dropped_labels_are_the_unconditional_embedding(tiny_model: FAR) -> None:
    nn.init.normal_(tiny_model.fake_latent)
    out = tiny_model.class_embedding(torch.tensor([1, 2]), torch.tensor([True, False]))
    assert torch.equal(out[0], tiny_model.fake_latent[0])
    assert torch.equal(out[1], tiny_model.class_emb.weight[2])
    assert torch.equal(tiny_model.unconditional_embedding(2), out[:1].expand(2, -1))
