"""The committed recipes by name, without PyTorch: `fastfar train --help` lists them."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "training" / "recipes"


def recipe_names() -> list[str]:
    """Sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def recipe_text(name: str) -> str:
    """The JSON of one of them."""
    return (FOLDER / f"{name}.json").read_text(encoding="utf-8")
