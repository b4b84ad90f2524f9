"""One image of FAR by every form, by pytest-benchmark: `python -m pytest benchmarks -k demo`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastfar.bench.far import FORMS

# The embedded demo with its own plan; FAR-B and FAR-H with random weights and the paper's T.
MODELS = {"demo": "", "far_base": "/paper", "far_huge": "/paper"}


@pytest.mark.parametrize("form", [form for form in FORMS if form != "reference"])
@pytest.mark.parametrize("model", MODELS)
def test_image(timed_subject: Callable[[str], None], model: str, form: str) -> None:
    timed_subject(f"{model}/{form}{MODELS[model]}")
