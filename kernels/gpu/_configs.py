"""Fixed configurations of the kernels, per architecture. Nothing is tuned while running.

A captured graph must not time anything, and a served image must not wait for a search: so tiles
and warps are data. They were chosen by the compiler's resource report (no spills) and by the cost
model; `make test-gpu` and `fastfar bench --device cuda` measure them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

INTERPRETER = 0  # architecture of CPU tensors under Triton's interpreter


@dataclass(frozen=True)
class Config:
    """Tiles (constants of the kernel by name) and how a program is run."""

    num_warps: int = 4
    num_stages: int = 1
    tiles: dict[str, int] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of a launch."""
        return {**self.tiles, "num_warps": self.num_warps, "num_stages": self.num_stages}


def _c(num_warps: int = 4, num_stages: int = 1, **tiles: int) -> Config:
    return Config(num_warps, num_stages, tiles)


# (kernel, bytes of an operand) -> architecture -> configuration. An architecture that is not
# listed takes the next lower one of the same vendor, or the lowest. The interpreter (0) has small
# tiles, since tests have small sizes.
_TABLE: dict[tuple[str, int], dict[int, Config]] = {
    # --- filter: BM positions or rows, BK of the sum, BF = channels x columns of the latent ---
    ("filter_mask_patchify", 4): {
        INTERPRETER: _c(4, 1, BM=128, BK=16, BF=256),
        70: _c(4, 2, BM=32, BK=16, BF=128),
    },
    ("filter_mask_patchify_backward", 4): {
        INTERPRETER: _c(4, 1, BM=16, BK=128, BF=256),
        70: _c(4, 1, BM=16, BK=32, BF=128),
    },
    # --- row by row: TILE numbers, see `row_tile` ---------------------------------------------
    ("hybrid_loss", 4): {80: _c(4, 1, TILE=1024)},
    ("add_noise", 4): {80: _c(4, 1, TILE=1024)},
    ("convolution_residual", 4): {80: _c(4, 1, TILE=2048)},
    # --- images: TILE numbers of which CHANNELS side by side, at least ROWS positions a part; an
    # image makes PROGRAMS programs, in which every one reads the statistics of up to PARTS parts --
    ("groupnorm_silu", 4): {
        INTERPRETER: _c(TILE=16384, CHANNELS=512, ROWS=4, PROGRAMS=2, PARTS=2),
        80: _c(TILE=8192, CHANNELS=64, ROWS=16, PROGRAMS=256, PARTS=128),
    },
    # --- ends of a diffusion step: BM tokens a program, BK of the sum, BN of the next stream --
    ("activate", 2): {0: _c(BM=32, BN=64), 80: _c(4, 1, BM=4, BN=1024)},
    ("activate", 4): {0: _c(BM=32, BN=64), 80: _c(4, 1, BM=4, BN=1024)},
    ("step", 2): {0: _c(BM=16, BN=64, BK=64), 80: _c(4, 3, BM=16, BN=128, BK=128)},
    ("step", 4): {0: _c(BM=16, BN=64, BK=64), 80: _c(4, 2, BM=16, BN=64, BK=16)},
}


def config(kernel: str, arch: int, element_size: int) -> Config:
    """The configuration of a kernel.

    Args:
        kernel: its name in the table.
        arch: 80, 90, 100, 120 (NVIDIA: 10 major + minor), 942 (AMD), 0 (interpreter).
        element_size: bytes of an operand: 2 or 4.

    Raises:
        KeyError: the kernel is not in the table.
    """
    table = _TABLE[kernel, element_size]
    vendor = {known: each for known, each in table.items() if (known > 900) == (arch > 900)}
    vendor = vendor or table
    lower = [known for known in vendor if known <= arch]
    return vendor[max(lower) if lower else min(vendor)]


def row_tile(chosen: Config, numbers: int) -> dict[str, int]:
    """BN rows and BP of the `numbers` of each, BN * BP = TILE, for a kernel that runs over rows."""
    width = min(1 << (numbers - 1).bit_length(), 128)
    return {"BN": chosen.tiles["TILE"] // width, "BP": width}


def precision(arch: int) -> str:
    """How float32 operands are multiplied: three TF32 products, or plainly where there is none.

    "tf32x3" splits each operand in two TF32 numbers and drops the product of the small parts:
    about 21 bits, close to float32, on tensor cores.
    """
    return "ieee" if arch == INTERPRETER or arch > 900 else "tf32x3"
