"""`fastfar bench scaling`: how the time of an image grows with threads, batch, T or tokens.

All values of an axis are measured by `fastfar.bench.run`, taking turns; numbers of threads, which
belong to the process, one after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastfar.bench import far
from fastfar.bench.far import FARSubject
from fastfar.bench.report import over
from fastfar.bench.rows import Row
from fastfar.bench.run import Options, Outcome, run
from fastfar.bench.subjects import Choice, Recipe, Subject, far_dtype, select
from fastfar.bench.tables import Table, digits, duration, share, times
from fastfar.config import PRESETS, FARConfig
from fastfar.kl_vae import KLVAE
from fastfar.model import FAR
from fastfar.tokenizer import PixelTokenizer

AXES = ("threads", "batch", "steps", "tokens")
DEFAULTS = {"batch": (1, 2, 4, 8), "steps": (10, 25, 50, 100), "tokens": (64, 256, 576)}
HEADERS = {"threads": "threads", "batch": "images", "steps": "T", "tokens": "tokens"}


def default_values(axis: str) -> tuple[int, ...]:
    """Of an axis; threads: powers of two up to those that PyTorch uses now."""
    if axis != "threads":
        return DEFAULTS[axis]
    most = torch.get_num_threads()
    return (*(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < most), most)


def sweep(
    axis: str,
    values: Sequence[int] | None,
    selectors: Sequence[str],
    options: Options,
    device: torch.device | str,
    choice: Choice | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Outcome:
    """Measure subjects along an axis.

    Args:
        axis: "threads", "batch", "steps" (T of every outer step, FAR only) or "tokens" (of a
            latent of as many square patches, presets of FAR only).
        values: None: `default_values`.
        selectors: of subjects, MODEL[/FORM]; see `fastfar.bench.subjects`.
        options: of the run; its mode and, along "batch", its batches are set here.
        device, choice, say: see `fastfar.bench.run.run`.

    Raises:
        ValueError: an axis or value that is not known, or a subject that has no such axis.
    """
    if axis not in AXES:
        raise ValueError(f"axis {axis!r} is not known; allowed: {', '.join(AXES)}")
    values = default_values(axis) if values is None else tuple(values)
    if not values or min(values) < 1:
        raise ValueError(f"values of {axis} must be at least 1, got {list(values)}")
    options = dataclasses.replace(options, mode=f"scaling {axis}")
    choice = choice or Choice()
    if axis == "batch":
        options = dataclasses.replace(options, batches=values)
        return run(select(selectors, device, choice), options, device, say)
    if axis == "threads":
        return _threads(values, selectors, options, device, choice, say)
    make = _with_steps if axis == "steps" else _with_tokens
    recipes = [
        recipe
        for selector in selectors
        for value in values
        for recipe in make(selector, value, torch.device(device), choice)
    ]
    return run(recipes, options, device, say)


def table(axis: str, rows: Sequence[Row]) -> Table:
    """Time along an axis, beside the first value of the same subject."""
    first: dict[tuple[str, str, str], Row] = {}
    lines = []
    for row in rows:
        base = first.setdefault((row.model, row.form, row.dtype), row)
        ratio = over(row, base)  # of times; None where a gate is not green
        per_image = None if ratio is None else ratio / row.batch * base.batch
        grown = value_of(axis, row) / value_of(axis, base)
        used = None if axis != "threads" or not ratio else 1 / ratio / grown
        gate = "red: wrong result" if row.gate == "red" else row.gate
        ideal = (share(used),) if axis == "threads" else ()
        lines.append(
            (row.title, str(value_of(axis, row)), duration(row.median_s),
             digits(row.images_per_s or 0.0), times(per_image and 1 / per_image), *ideal,
             share(row.share_of_peak), gate)
        )  # fmt: skip
    header = (f"along {axis}", HEADERS[axis], "time", "images/s", "speed-up per image",
              *(("of ideal",) if axis == "threads" else ()), "of peak", "gate")  # fmt: skip
    notes = ("speed-up per image: over the first line of the same subject",) if lines else ()
    return Table(f"Scaling with {axis}", header, tuple(lines), notes)


def value_of(axis: str, row: Row) -> int:
    """Where a row stands on an axis."""
    if axis == "threads":
        return int(row.environment["threads"])
    if axis == "batch":
        return row.batch
    if axis == "steps":
        return int(max((row.plan or {})["diffusion_steps"]))
    return int(row.shape.split()[0])


# --- axes ------------------------------------------------------------------------------------


def _threads(
    values: Sequence[int],
    selectors: Sequence[str],
    options: Options,
    device: torch.device | str,
    choice: Choice,
    say: Callable[[str], object],
) -> Outcome:
    """One number after the other, as it holds for the whole process."""
    before, outcome = torch.get_num_threads(), Outcome()
    try:
        for count in values:
            torch.set_num_threads(count)
            say(f"{count} threads")
            recipes = [
                _renamed(recipe, f"{count} threads") for recipe in select(selectors, device, choice)
            ]
            part = run(recipes, options, device, say)
            outcome.rows += part.rows
            outcome.skipped |= part.skipped
            outcome.estimate = part.estimate or outcome.estimate
    finally:
        torch.set_num_threads(before)
    return outcome


def _with_steps(selector: str, steps: int, device: torch.device, choice: Choice) -> list[Recipe]:
    model, *rest = selector.split("/")
    if model not in PRESETS or len(rest) > 1:
        raise ValueError(
            f"{selector!r} along steps: give FAR as MODEL[/FORM]; models: {', '.join(PRESETS)}"
        )
    return select([selector], device, dataclasses.replace(choice, diffusion_steps=steps))


def _with_tokens(selector: str, tokens: int, device: torch.device, choice: Choice) -> list[Recipe]:
    """A preset with random weights whose square latent has so many tokens."""
    model, *rest = selector.split("/")
    if model not in PRESETS or model == "demo" or len(rest) > 1:
        allowed = ", ".join(sorted(set(PRESETS) - {"demo"}))
        raise ValueError(f"{selector!r} along tokens: give a preset as MODEL[/FORM]: {allowed}")
    config = far.sized(model, choice.head_depth)
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"{tokens} tokens are no square; give 64, 256, 576, ...")
    values = {**config.to_dict(), "latent_size": side * config.patch_size}
    config = FARConfig.from_dict(values)
    with torch.device("meta"):
        vae = KLVAE() if config.latent_channels == 16 else PixelTokenizer(0.0, 1.0)
        sketched = far.Weights(model, FAR(config), vae, random=True)
    plan = sketched.official(choice.mode).with_changes(
        diffusion_steps=choice.diffusion_steps, guidance_scale=choice.guidance_scale
    )
    family = f"{model} of {tokens} tokens"
    recipes = []
    for form in rest or far.default_forms(device.type == "cuda"):
        dtype, reason = far_dtype(form, device, choice.dtype)

        def build(shared: dict[str, Any], form: str = form, dtype: Any = dtype) -> Subject:
            if family not in shared:
                tokenizer = far.random_tokenizer(config)
                if isinstance(tokenizer, KLVAE):
                    tokenizer = tokenizer.to(device)
                network = far.random_model(config).to(device).eval().requires_grad_(False)
                shared[family] = far.Weights(model, network, tokenizer, random=True)
            return FARSubject(shared[family], form, dtype, plan)

        sketch = FARSubject(sketched, form, dtype, plan)
        recipes.append(_renamed(Recipe(sketch, build, family, reason), f"{tokens} tokens"))
    return recipes


def _renamed(recipe: Recipe, text: str) -> Recipe:
    """The recipe with a key of its own: one key is one subject of a run."""

    def build(shared: dict[str, Any]) -> Subject:
        return _named(recipe.build(shared), text)

    return dataclasses.replace(recipe, sketch=_named(recipe.sketch, text), build=build)


def _named(subject: Subject, text: str) -> Subject:
    subject.key += f"/{text}"
    return subject
