"""What the tests of `fastfar`'s commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastfar import cli

Captured = pytest.CaptureFixture[str]


def picture(path: Path | str) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image)


def fails(capsys: Captured, *arguments: str) -> str:
    """The message of a command that ends with 2: one line on standard error, nothing else."""
    assert cli.main(arguments) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1
    assert errors.startswith(f"fastfar {arguments[0]}: error: ")
    return errors
