"""Device code. Installed, `fastfar.kernels.gpu` is `kernels/gpu` of the repository.

In a checkout that is not installed the folder lies beside the package; it is recognised by the
header of the native library, so that somebody else's installed `kernels` is never picked up.
"""

from __future__ import annotations

from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[2] / "kernels"
if (_CHECKOUT / "cpu" / "fastfar_cpu.h").is_file():
    __path__.append(str(_CHECKOUT))
