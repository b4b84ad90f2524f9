"""E0 and its kin: figures of the model and of R that are no candidate's.

Legend: B image, L token, P number of a token, N = B L, D width of z, G guidance half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastfar.data import ImageDataset, load_fashion_mnist
from fastfar.diffusion import cosine_alpha_bar
from fastfar.evaluation.tokens import token_report
from fastfar.evaluation.variance import forced_inputs, fraction
from fastfar.experiments.base import Row, Setting
from fastfar.experiments.teacher import Teacher, draw_tokens
from fastfar.levels import filter_matrices, low_pass, patchify, unpatchify
from fastfar.sampling import outer_steps

TIMESTEPS = (5, 15, 30, 60, 100, 200, 300, 400, 500, 600, 700, 800, 900, 950, 980)
_HELD_OUT_SEED = 5


def held_out(setting: Setting, count: int) -> tuple[Tensor, Tensor]:
    """Latents (count, C, H, H) and labels of class-balanced images of the test split."""
    test: ImageDataset = load_fashion_mnist("test", setting.data)
    images_BCHW, labels_B = test.take(test.balanced_rows(count, _HELD_OUT_SEED))
    tokenizer = setting.pipeline.tokenizer
    if tokenizer is None:
        raise ValueError("this pipeline has no tokenizer: it cannot encode real images")
    return tokenizer.to_latents(images_BCHW), labels_B


def loss_by_time(setting: Setting) -> Row:
    """rho = V / s_t^2 of the conditional half on held-out data: mean, least, most of the numbers.

    {outer step: {timestep: [mean, min, max over numbers, rmse of eps]}}.
    """
    latents_BCHH, labels_B = held_out(setting, setting.conditions)
    config, plan = setting.pipeline.model.config, setting.teacher_plan
    alpha_bar = cosine_alpha_bar(config.num_timesteps)
    x0_NP = patchify(latents_BCHH, config.patch_size).flatten(0, 1)
    outcome: Row = {}
    plain = plan.with_changes(guidance_scale=1.0)
    with outer_steps(setting.pipeline.model, plain, setting.backend) as step:
        inputs = forced_inputs(step, labels_B, 0)
        for k in range(len(plan)):
            z_ND = step.condition(k, inputs, latents_BCHH).flatten(0, 1)
            of_step = outcome[str(k)] = {}
            for t in TIMESTEPS:
                values = fraction(step, k, z_ND, x0_NP, t, 0)
                mean = sum(values) / len(values)
                rmse = (mean * float(alpha_bar[t])) ** 0.5
                numbers = (mean, min(values), max(values), rmse)
                of_step[str(t)] = [round(value, 5) for value in numbers]
    return outcome


def learned_fraction(setting: Setting) -> Row:
    """Rank correlation by token of f = (v + 1) / 2 with the squared error that it should follow.

    {timestep: {"r": mean over outer steps, "learned": mean f, "measured": mean rho}}; both are
    averaged over the numbers of a token and over 4 draws of noise.
    """
    noises, steps = 4, (1, 3, 5, 7, 9)
    model = setting.pipeline.model
    config, plan = model.config, setting.teacher_plan.with_changes(guidance_scale=1.0)
    latents_BCHH, labels_B = held_out(setting, max(10, setting.conditions // 4))
    alpha_bar = cosine_alpha_bar(config.num_timesteps)
    x0_NP = patchify(latents_BCHH, config.patch_size).flatten(0, 1)
    found: dict[int, list[tuple[float, float, float]]] = {t: [] for t in TIMESTEPS}
    with outer_steps(model, plan, "torch", torch.float32) as step:
        head, inputs = step.model.head, forced_inputs(step, labels_B, 0)
        for k in (k for k in steps if k < len(plan)):
            z_ND = step.condition(k, inputs, latents_BCHH).flatten(0, 1)
            level_N = torch.full((len(x0_NP),), float(plan.levels[k]))
            for t in TIMESTEPS:
                signal, sigma = float(alpha_bar[t]) ** 0.5, float(1.0 - alpha_bar[t]) ** 0.5
                learned_N, error_N = torch.zeros(len(x0_NP)), torch.zeros(len(x0_NP))
                for seed in range(noises):
                    generator = torch.Generator().manual_seed(1000 * seed + t)
                    noise_NP = torch.randn(x0_NP.shape, generator=generator)
                    timestep_N = torch.full((len(x0_NP),), t)
                    x_NP = signal * x0_NP + sigma * noise_NP
                    eps_NP, v_NP = head(x_NP, timestep_N, z_ND, level_N).chunk(2, dim=1)
                    learned_N += ((v_NP + 1.0) / 2.0).mean(dim=1) / noises
                    error_N += ((eps_NP - noise_NP) / signal).square().mean(dim=1) / noises
                means = float(learned_N.mean()), float(error_N.mean())
                found[t].append((_rank_correlation(learned_N, error_N), *means))
    names = ("r", "learned", "measured")
    return {
        str(t): {
            name: round(sum(row[i] for row in values) / len(values), 4)
            for i, name in enumerate(names)
        }
        for t, values in found.items()
    }


def token_variance(setting: Setting) -> Row:
    """C(z) by outer step: variance of a number given z, mean and quantiles over conditions."""
    teacher, outcome = Teacher(setting), {}
    for k in range(len(teacher.plan)):
        variance_Z = teacher.draws(k).var(dim=1).mean(dim=1)
        quantiles = torch.quantile(variance_Z, torch.tensor([0.1, 0.5, 0.9])).tolist()
        outcome[str(k)] = [round(x, 5) for x in (float(variance_Z.mean()), *quantiles)]
    return outcome


def survival(setting: Setting) -> Row:
    """Share of the head's noise that passes the low pass of the next input, by outer step.

    "white": if all pixels were independent, (tr(A A^T) / H)^2; "between": if tokens were
    independent but the pixels of one token equal; "measured": of two draws for the same conditions.
    """
    teacher, outcome = Teacher(setting), {}
    config, plan = setting.pipeline.model.config, teacher.plan
    matrices = filter_matrices(config.latent_size, config.num_levels, config.filter)
    with outer_steps(setting.pipeline.model, plan, setting.backend) as step:
        for k in range(len(plan) - 1):
            level = plan.input_levels[k + 1]
            if level is None:
                continue
            few = min(32, teacher.count)
            z_GND = teacher.whole_conditions(step, k)[:, :few].flatten(1, 2)
            generator = torch.Generator().manual_seed(k)
            first, second = (draw_tokens(step, k, z_GND, None, generator) for _ in range(2))
            tokens_BLP = (first - second).view(few, config.num_tokens, config.token_dim)
            noise_BCHH = unpatchify(tokens_BLP, config.patch_size).float()
            kept = _kept(noise_BCHH, level, config.num_levels, config.filter)
            generator = torch.Generator().manual_seed(0)
            flat_BLP = torch.randn(64, config.num_tokens, 1, generator=generator)
            flat_BLP = flat_BLP.expand(-1, -1, config.token_dim)
            between = _kept(
                unpatchify(flat_BLP, config.patch_size), level, config.num_levels, config.filter
            )
            white = float(matrices[level].square().sum() / config.latent_size) ** 2
            figures = {"white": white, "between": between, "measured": kept}
            outcome[str(k)] = {name: round(value, 4) for name, value in figures.items()}
    return outcome


def _kept(noise_BCHH: Tensor, level: int, num_levels: int, kind: str) -> float:
    level_B = torch.full((len(noise_BCHH),), level)
    passed_BCHH = low_pass(noise_BCHH, level_B, num_levels=num_levels, kind=kind)
    return float(passed_BCHH.square().sum() / noise_BCHH.square().sum())


def class_variance(setting: Setting) -> Row:
    """E9: per-class variance of low-passed latents, real over R's, by outer step."""
    teacher, outcome = Teacher(setting), {}
    config, plan = setting.pipeline.model.config, teacher.plan
    latents_BCHH, labels_B = held_out(setting, teacher.count)
    for k in range(len(plan) - 1):
        level = plan.input_levels[k + 1]
        level_B = torch.full((teacher.count,), -1 if level is None else level)
        real, ours = (
            _within_class(
                low_pass(x, level_B, num_levels=config.num_levels, kind=config.filter), labels
            )
            for x, labels in (
                (latents_BCHH, labels_B),
                (teacher.latents_SBCHH[k], teacher.labels_B),
            )
        )
        outcome[str(k)] = round(real / ours, 3)
    return outcome


def _within_class(latents_BCHH: Tensor, labels_B: Tensor) -> float:
    classes = torch.unique(labels_B)
    squares = 0.0
    for label in classes:
        of_class_BCHH = latents_BCHH[labels_B == label]
        squares += float((of_class_BCHH - of_class_BCHH.mean(dim=0)).square().sum())
    return squares / (len(latents_BCHH) - len(classes)) / latents_BCHH[0].numel()


def predicted_condition(setting: Setting) -> Row:
    """E6: R^2 of z_u from (z_c, class) by ridge regression, as the head sees it, by outer step."""
    teacher, outcome = Teacher(setting), {}
    head = setting.pipeline.model.head_weights
    weight_WD = head["cond_embed.weight"].float()
    with outer_steps(setting.pipeline.model, teacher.plan, setting.backend) as step:
        for k in range(len(teacher.plan)):
            z_GBLD = teacher.whole_conditions(step, k).float()
            if len(z_GBLD) == 1:
                continue
            one_hot_BC = torch.nn.functional.one_hot(teacher.labels_B).float()
            one_hot_BLC = one_hot_BC[:, None].expand(-1, z_GBLD.shape[2], -1)
            inputs_BLX = torch.cat([z_GBLD[0], one_hot_BLC], dim=-1)
            targets_BLW = z_GBLD[1] @ weight_WD.mT
            outcome[str(k)] = round(_ridge_r2(inputs_BLX, targets_BLW), 4)
    return outcome


def _ridge_r2(inputs_BLX: Tensor, targets_BLW: Tensor, penalty: float = 1e-3) -> float:
    """Fitted on the first four fifths of the images, judged on the others."""
    split = max(1, len(inputs_BLX) * 4 // 5)
    x, y = inputs_BLX.double(), targets_BLW.double()
    train_x, test_x = x[:split].flatten(0, 1), x[split:].flatten(0, 1)
    train_y, test_y = y[:split].flatten(0, 1), y[split:].flatten(0, 1)
    mean_x, mean_y = train_x.mean(dim=0), train_y.mean(dim=0)
    centred = train_x - mean_x
    gram = centred.mT @ centred
    gram.diagonal().add_(penalty * float(gram.diagonal().mean()))
    map_XW = torch.linalg.solve(gram, centred.mT @ (train_y - mean_y))
    error = test_y - mean_y - (test_x - mean_x) @ map_XW
    return 1.0 - float(error.square().sum() / (test_y - mean_y).square().sum())


def mixed_condition(setting: Setting) -> Row:
    """E6: tokens of z = z_u + s (z_c - z_u) in one half, guidance in condition space, untrained."""
    teacher, outcome = Teacher(setting), {}
    plan = teacher.plan
    plain = plan.with_changes(guidance_scale=1.0)
    for k in (k for k in (3, 6, 9) if k < len(plan)):
        z_GZD, scale = teacher.conditions(k), plan.guidance_scales[k]
        if len(z_GZD) == 1:
            continue
        z_1ZD = z_GZD[1:] + scale * (z_GZD[:1] - z_GZD[1:])
        drawn_ZMP = teacher.sample(plain, k, setting.draws // 2, z_GZD=z_1ZD)
        report = token_report(teacher.draws(k), drawn_ZMP)
        outcome[str(k)] = {subset: metrics.to_dict() for subset, metrics in report.items()}
    return outcome


def _rank_correlation(a_N: Tensor, b_N: Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a_N, b_N)])
    return float(torch.corrcoef(ranks)[0, 1])
