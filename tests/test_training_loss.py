"""training/loss.py: draws, mask rules, level weights, and the loss against the reference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from tiny_run import tiny_data, tiny_recipe
from tolerances import relative
from torch import Tensor

from fastfar import FAR, FARConfig, TrainingDraws, diffusion_loss, reference
from fastfar._native import NativeLibrary
from fastfar.levels import low_pass
from fastfar.ops import use_backend
from fastfar.training.loss import level_weights, loss_per_image, mask_ratio, sample_draws

BATCH = 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_for(config: FARConfig, **options: object) -> tuple[Tensor, Tensor, TrainingDraws]:
    latents = torch.randn(
        BATCH,
        config.latent_channels,
        config.latent_size,
        config.latent_size,
        dtype=torch.float64,
    )
    draws = sample_draws(config, BATCH, generator=generator(), **options)  # type: ignore[arg-type]
    return latents, torch.tensor([0, 4, 2]), draws


def reference_loss(
    model: FAR, latents: Tensor, labels: Tensor, draws: TrainingDraws, weight: str | None
) -> tuple[Tensor, dict[str, Tensor]]:
    config = model.config
    params = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    dropped = torch.zeros_like(labels, dtype=torch.bool) if draws.dropped is None else draws.dropped
    loss = reference.training_loss(
        params,
        latents,
        labels.masked_fill(dropped, -1),
        draws.level.expand(len(labels)),
        draws.timestep,
        draws.noise.to(latents.dtype),
        draws.mask,
        num_heads=config.num_heads,
        patch_size=config.patch_size,
        num_levels=config.num_levels,
        kind=config.filter,
        level_weight=weight,
        num_timesteps=config.num_timesteps,
    )
    loss.backward()
    return loss, {k: v.grad for k, v in params.items() if v.grad is not None}


# --- the loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, "sine"])
@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_all_gradients(
    tiny_model: FAR, masked: bool, multiplier: int, weight: str | None
) -> None:
    model = tiny_model.double()
    latents, labels, draws = batch_for(
        model.config, mask_rule=None, batch_multiplier=multiplier, label_dropout=0.5
    )
    assert draws.dropped is not None and len(draws.level.unique()) > 1
    if masked:  # the reference wants the same number in every image
        rank = torch.rand(BATCH, model.config.num_tokens).argsort(dim=1).argsort(dim=1)
        draws = dataclasses.replace(draws, mask=rank < 4)
    expected, gradients = reference_loss(model, latents, labels, draws, weight)
    loss = diffusion_loss(model, latents, labels, draws, weight)
    assert loss.ndim == 0 and loss.dtype is torch.float64
    assert relative(loss, expected) < 1e-12
    loss.backward()
    for name, parameter in model.named_parameters():
        ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        wanted = gradients.get(name, torch.zeros_like(parameter))
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-11, msg=name)


def test_different_mask_counts_equal_each_image_alone(tiny_model: FAR) -> None:
    model = tiny_model.double()
    length = model.config.num_tokens
    latents, labels, draws = batch_for(model.config, batch_multiplier=2)
    assert draws.mask is not None and len(draws.mask.sum(1).unique()) > 1
    together = loss_per_image(model, latents, labels, draws)
    timestep = draws.timestep.view(2, BATCH, length)
    noise = draws.noise.view(2, BATCH, length, -1)
    for b in range(BATCH):
        one = TrainingDraws(
            draws.level[b : b + 1],
            timestep[:, b].flatten(),
            noise[:, b].flatten(0, 1),
            draws.mask[b : b + 1],
        )
        alone, _ = reference_loss(model, latents[b : b + 1], labels[b : b + 1], one, None)
        assert relative(together[b], alone) < 1e-12, b


def test_level_weight_scales_loss_and_gradient_of_an_image(tiny_model: FAR) -> None:
    model = tiny_model.double()
    latents, labels, draws = batch_for(model.config, mask_rule=None)
    draws = dataclasses.replace(draws, level=torch.tensor([5]))  # one level for the whole batch

    def run(weight: str | None) -> tuple[Tensor, Tensor]:
        loss = diffusion_loss(model, latents, labels, draws, weight)
        (gradient,) = torch.autograd.grad(loss, model.z_proj.weight)
        return loss, gradient

    factor = 1 + math.sin(math.pi / 2 * 5 / 16)
    for plain, weighted in zip(run(None), run("sine"), strict=True):
        torch.testing.assert_close(weighted, factor * plain)


def test_level_weights() -> None:
    weights = level_weights(torch.tensor([0, 8, 16]), 16)
    torch.testing.assert_close(weights, torch.tensor([1.0, 1 + math.sqrt(0.5), 2.0]))


def test_batch_multiplier_is_outermost(tiny_model: FAR) -> None:
    """Twice the same draws, one after the other, is the same loss as once."""
    model = tiny_model.double()
    latents, labels, once = batch_for(model.config, batch_multiplier=1)
    twice = dataclasses.replace(
        once, timestep=once.timestep.repeat(2), noise=once.noise.repeat(2, 1)
    )
    a, b = (diffusion_loss(model, latents, labels, draws) for draws in (once, twice))
    torch.testing.assert_close(a, b)
    wrong = dataclasses.replace(
        once,
        timestep=once.timestep.repeat_interleave(2),
        noise=once.noise.repeat_interleave(2, dim=0),
    )
    assert relative(diffusion_loss(model, latents, labels, wrong), a) > 1e-3


def test_dropped_labels_train_the_unconditional_embedding(tiny_model: FAR) -> None:
    latents, labels, draws = batch_for(tiny_model.config)
    model = tiny_model.double()
    draws = dataclasses.replace(draws, dropped=torch.tensor([True, False, True]))
    diffusion_loss(model, latents, labels, draws).backward()
    assert model.fake_latent.grad is not None and model.fake_latent.grad.any()
    gradient = model.class_emb.weight.grad
    assert gradient is not None
    assert gradient.any(dim=1).tolist() == [False, False, False, False, True]


def test_no_draws_are_reproducible_under_a_seed(tiny_model: FAR) -> None:
    latents, labels, _ = batch_for(tiny_model.config)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return diffusion_loss(tiny_model, latents.float(), labels).item()

    assert loss(1) == loss(1) != loss(2)
    tiny_model.train()  # dropout and dropped labels as well
    assert loss(1) == loss(1) != loss(2)


def test_train_mode_drops_a_tenth_of_the_labels(
    tiny_model: FAR, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    module = diffusion_loss.__globals__
    original = module["sample_draws"]

    def spy(*args: object, label_dropout: float) -> TrainingDraws:
        seen.append(label_dropout)
        draws: TrainingDraws = original(*args, label_dropout=label_dropout)
        return draws

    monkeypatch.setitem(module, "sample_draws", spy)
    latents, labels, _ = batch_for(tiny_model.config)
    for mode in (True, False):
        diffusion_loss(tiny_model.train(mode), latents.float(), labels)
    assert seen == [0.1, 0.0]


# --- the draws -------------------------------------------------------------------------------


def test_paper_rule_masks_low_levels_more() -> None:
    """Uniform in [r_i, 1] with r_i from 0.7 at level 0 down to 0 at level 15."""
    for level, lowest in [(0, 0.7), (5, 0.7 * 10 / 15), (15, 0.0)]:
        uniform = torch.rand(4000, generator=generator(level))
        ratio = mask_ratio(torch.full((4000,), level), 16, "paper", uniform)
        assert lowest <= ratio.min() < lowest + 0.01 and 0.99 < ratio.max() <= 1.0
        uniform = stats.uniform(lowest, 1 - lowest)
        assert stats.kstest(ratio.numpy(), uniform.cdf).pvalue > 1e-3, level


def test_official_rule_is_a_truncated_normal_that_rises() -> None:
    """Normal(1, 0.25) truncated to [0.7 i / 16, 1]."""
    means = []
    for level in (0, 8, 15):
        uniform = torch.rand(4000, generator=generator(level))
        ratio = mask_ratio(torch.full((4000,), level), 16, "official", uniform)
        low = 0.7 * level / 16
        assert low <= ratio.min() and ratio.max() <= 1.0
        truncated = stats.truncnorm((low - 1) / 0.25, 0.0, loc=1.0, scale=0.25)
        assert stats.kstest(ratio.numpy(), truncated.cdf).pvalue > 1e-3, level
        means.append(float(ratio.mean()))
    assert means == sorted(means)


@pytest.mark.parametrize("rule", ["paper", "official"])
def test_masks_are_random_and_of_the_drawn_size(rule: str) -> None:
    config = FARConfig.preset("demo")
    draws = sample_draws(config, 600, mask_rule=rule, batch_multiplier=1, generator=generator())
    assert draws.mask is not None
    share = draws.mask.float().mean(1)
    ratio_low = 0.7 * (1 - draws.level / 15) if rule == "paper" else 0.7 * draws.level / 16
    assert (share >= ratio_low - 1e-6).all() and len(share.unique()) > 20
    position = draws.mask.float().mean(0)  # no token is masked more often than another
    assert position.std() < 0.05
    assert (position - share.mean()).abs().max() < 0.1


def test_levels_timesteps_noise_and_dropped_labels() -> None:
    config = FARConfig.preset("demo")
    draws = sample_draws(config, 400, batch_multiplier=2, label_dropout=0.25, generator=generator())
    assert draws.level.shape == (400,) and set(draws.level.tolist()) == set(range(16))
    assert draws.timestep.shape == (2 * 400 * 64,)
    assert (int(draws.timestep.min()), int(draws.timestep.max())) == (0, 999)
    assert draws.noise.shape == (2 * 400 * 64, 16)
    assert abs(float(draws.noise.mean())) < 0.01 and abs(float(draws.noise.std()) - 1) < 0.01
    assert draws.dropped is not None and 0.18 < float(draws.dropped.float().mean()) < 0.32
    one_level = sample_draws(config, 9, level_per_image=False, mask_rule=None)
    assert one_level.level.shape == (9,) and len(one_level.level.unique()) == 1
    assert one_level.mask is None and one_level.dropped is None
    assert len(one_level.timestep) == 4 * 9 * 64, "the batch multiplier is 4 unless told otherwise"


def test_levels_of_a_plan_and_the_next_of_them_as_target() -> None:
    config, levels = FARConfig.preset("demo"), (0, 3, 4, 15)
    draws = sample_draws(
        config, 400, batch_multiplier=1, levels=levels, target="next_level", generator=generator()
    )
    assert draws.target_level is not None
    pairs = set(zip(draws.level.tolist(), draws.target_level.tolist(), strict=True))
    assert pairs == {(0, 3), (3, 4), (4, 15), (15, 16)}
    clean = sample_draws(config, 400, batch_multiplier=1, levels=levels, generator=generator())
    assert clean.target_level is None and torch.equal(clean.level, draws.level)


def test_a_target_that_is_low_passed(tiny_model: FAR) -> None:
    """At level 0 nothing of the latent is seen, so only the target can make the difference."""
    config = tiny_model.config
    latents, labels, draws = batch_for(config, batch_multiplier=2)
    model, draws = tiny_model.double(), dataclasses.replace(draws, level=torch.zeros(1).long())
    target_level = torch.tensor([5, 9, config.num_levels])
    wanted = diffusion_loss(
        model, low_pass(latents, target_level, num_levels=config.num_levels), labels, draws
    )
    given = dataclasses.replace(draws, target_level=target_level)
    torch.testing.assert_close(diffusion_loss(model, latents, labels, given), wanted)
    assert abs(diffusion_loss(model, latents, labels, draws) - wanted) > 1e-4


# --- errors ----------------------------------------------------------------------------------


def test_errors(tiny_model: FAR) -> None:
    latents, labels, draws = batch_for(tiny_model.config, batch_multiplier=1)
    latents = latents.float()

    def expect(message: str, **changes: Tensor) -> None:
        with pytest.raises(ValueError, match=message):
            diffusion_loss(tiny_model, latents, labels, dataclasses.replace(draws, **changes))

    rows = BATCH * tiny_model.config.num_tokens
    expect(rf"{rows - 1} rows.*B \* L = {rows}", timestep=draws.timestep[1:])
    expect("0 rows", timestep=draws.timestep[:0])
    expect(rf"noise must be \({rows}, 8\)", noise=draws.noise[:, :7])
    expect(r"mask must be \(3, 9\)", mask=torch.zeros(3, 8))
    expect("1 or 3 levels, got 2", level=torch.tensor([1, 2]))
    expect(r"0\.\.16", level=torch.tensor([1, 2, 17]))
    expect("target_level must hold 1 or 3 levels, got 2", target_level=torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="integer"):
        diffusion_loss(
            tiny_model, latents, labels, dataclasses.replace(draws, level=torch.rand(3))
        )
    with pytest.raises(ValueError, match=r"latents must be \(B, 2, 6, 6\)"):
        diffusion_loss(tiny_model, latents[..., :4], labels, draws)
    with pytest.raises(ValueError, match=r"latents must be"):
        diffusion_loss(tiny_model, latents[0], labels, draws)
    with pytest.raises(ValueError, match=r"class_labels must be \(3,\)"):
        diffusion_loss(tiny_model, latents, labels[:2], draws)
    with pytest.raises(ValueError, match="level_weight"):
        diffusion_loss(tiny_model, latents, labels, draws, "cosine")
    with pytest.raises(ValueError, match="mask rule"):
        sample_draws(tiny_model.config, 2, mask_rule="random")
    with pytest.raises(ValueError, match="target must be one of"):
        sample_draws(tiny_model.config, 2, target="previous")
    for levels in ((), (3, 2), (2, 2), (0, 16)):
        with pytest.raises(ValueError, match=r"ascending whole numbers in 0\.\.15"):
            sample_draws(tiny_model.config, 2, levels=levels)


# --- native ----------------------------------------------------------------------------------


def gradients(
    backend: str, function: Callable[..., Tensor], dtype: torch.dtype, dropout: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Loss of a tiny model, and all its gradients as one vector."""
    recipe, data = tiny_recipe(), tiny_data()
    torch.manual_seed(0)
    model = FAR(dataclasses.replace(recipe.config, dropout=dropout)).train()
    with torch.no_grad():
        for parameter in model.parameters():  # zero gates would hide most of the head
            parameter.add_(0.05 * torch.randn(parameter.shape))
    images, labels = data.take(torch.arange(8))
    draws = sample_draws(recipe.config, 8, batch_multiplier=2, generator=generator())
    with use_backend(backend), torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        loss = function(model, images, labels, draws, None)
    loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return loss.detach(), torch.cat([x.flatten() for x in found])


def test_native_training_step(isa: str) -> None:
    exact = gradients("torch", diffusion_loss, torch.float32)
    half = gradients("torch", diffusion_loss, torch.bfloat16)
    for dtype, limits in (
        (torch.float32, (1e-5, 1e-4)),
        (torch.bfloat16, [2 * relative(a, b) + 2e-3 for a, b in zip(half, exact, strict=True)]),
    ):
        ours = gradients("native", diffusion_loss, dtype)
        for one, other, limit in zip(ours, exact, limits, strict=True):
            assert relative(one, other) < limit, (isa, dtype)


def test_native_training_step_compiled(library: NativeLibrary) -> None:
    """Traced with fake tensors and differentiated by the compiler's own graph.

    Without dropout: compiled code keeps masked positions in the encoder, so it draws more of it.
    """
    torch.compiler.reset()
    compiled = torch.compile(diffusion_loss, backend="aot_eager")
    expected = gradients("native", diffusion_loss, torch.float32, dropout=0.0)
    ours = gradients("native", compiled, torch.float32, dropout=0.0)
    for one, other in zip(ours, expected, strict=True):
        assert relative(one, other) < 1e-5
