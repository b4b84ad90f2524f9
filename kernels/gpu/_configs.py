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


_INTERPRETED_PRODUCT = _c(BM=32, BN=64, BK=64, GROUP=8)
_FLOAT32_PRODUCT = {
    0: _INTERPRETED_PRODUCT,
    80: _c(4, 2, BM=64, BN=64, BK=32, GROUP=8),
    942: _c(4, 2, BM=64, BN=64, BK=32, GROUP=8),
}

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
    # --- products: BM x BN outputs, BK of the sum at a time -----------------------------------
    # At batch 1 the modulations of the next steps run beside the chain of products of this one. So
    # a program of either kind must leave room for one of the other on a multiprocessor: "gated" or
    # "modulated" and "modulations" share 65536 registers, and 228 KB (sm_90) of shared memory.
    ("gemm_linear", 2): {
        0: _INTERPRETED_PRODUCT,
        80: _c(4, 3, BM=64, BN=128, BK=64, GROUP=8),
        90: _c(8, 4, BM=128, BN=128, BK=64, GROUP=8),
        120: _c(4, 3, BM=64, BN=128, BK=64, GROUP=8),
        942: _c(4, 2, BM=64, BN=64, BK=64, GROUP=8),
    },
    ("gemm_linear", 4): _FLOAT32_PRODUCT,
    ("gemm_narrow", 2): {
        0: _INTERPRETED_PRODUCT,
        80: _c(4, 3, BM=64, BN=128, BK=64, GROUP=8),
        90: _c(8, 4, BM=64, BN=128, BK=64, GROUP=8),
        120: _c(4, 3, BM=64, BN=128, BK=64, GROUP=8),
        942: _c(4, 2, BM=64, BN=64, BK=64, GROUP=8),
    },
    ("gemm_narrow", 4): _FLOAT32_PRODUCT,
    # From some thousand rows on, where nothing has to run beside it; without an activation or gate,
    # for which no registers are left.
    ("gemm_large", 2): {
        0: _INTERPRETED_PRODUCT,
        80: _c(8, 3, BM=128, BN=128, BK=64, GROUP=8),
        90: _c(8, 3, BM=128, BN=256, BK=64, GROUP=8),
        120: _c(8, 3, BM=128, BN=128, BK=32, GROUP=8),
        942: _c(8, 2, BM=128, BN=128, BK=64, GROUP=8),
    },
    ("gemm_large", 4): _FLOAT32_PRODUCT,
    ("gemm_modulations", 2): {
        0: _INTERPRETED_PRODUCT,
        80: _c(8, 3, BM=128, BN=128, BK=32, GROUP=8),
        90: _c(8, 4, BM=128, BN=128, BK=64, GROUP=8),
        120: _c(8, 3, BM=128, BN=128, BK=32, GROUP=8),
        942: _c(8, 2, BM=128, BN=128, BK=64, GROUP=8),
    },
    ("gemm_modulations", 4): _FLOAT32_PRODUCT,
    ("gemm_modulated", 2): {
        0: _INTERPRETED_PRODUCT,
        80: _c(4, 3, BM=64, BN=64, BK=64, GROUP=8),
        90: _c(8, 3, BM=64, BN=128, BK=64, GROUP=8),
        100: _c(4, 3, BM=64, BN=128, BK=64, GROUP=8),
        120: _c(4, 3, BM=64, BN=64, BK=64, GROUP=8),
        942: _c(4, 2, BM=64, BN=64, BK=64, GROUP=8),
    },
    ("gemm_modulated", 4): {
        **_FLOAT32_PRODUCT,
        80: _c(4, 2, BM=32, BN=64, BK=32, GROUP=8),  # twice as high it spills
        90: _FLOAT32_PRODUCT[80],
    },
    ("gemm_gated", 2): {
        0: _INTERPRETED_PRODUCT,
        80: _c(4, 3, BM=64, BN=64, BK=64, GROUP=8),
        90: _c(8, 3, BM=64, BN=128, BK=64, GROUP=8),
        100: _c(4, 3, BM=64, BN=64, BK=64, GROUP=8),  # twice as wide it spills
        120: _c(4, 3, BM=64, BN=64, BK=64, GROUP=8),
        942: _c(4, 2, BM=64, BN=64, BK=64, GROUP=8),
    },
    ("gemm_gated", 4): _FLOAT32_PRODUCT,
    # --- ends of a diffusion step: BM tokens a program, BK of the sum, BN of the next stream --
    ("activate", 2): {0: _c(BM=32, BN=64), 80: _c(4, 1, BM=4, BN=1024)},
    ("activate", 4): {0: _c(BM=32, BN=64), 80: _c(4, 1, BM=4, BN=1024)},
    ("step", 2): {0: _c(BM=16, BN=64, BK=64), 80: _c(4, 3, BM=16, BN=128, BK=128)},
    ("step", 4): {0: _c(BM=16, BN=64, BK=64), 80: _c(4, 2, BM=16, BN=64, BK=32)},
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
