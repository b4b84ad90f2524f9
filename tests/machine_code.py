"""What a binary says of itself: cubins through cuobjdump and nvdisasm, AMD's by their assembly."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

# Tensor-core instructions as nvdisasm prints them: mma on sm_80, wgmma on sm_90, tcgen05 on sm_100.
_PRODUCT = re.compile(r"\b(HMMA|HGMMA|UTC[A-Z]*MMA)\b")
_LOCAL = re.compile(r"\b(LDL|STL)\b")


def inspect(compiled: Any, folder: Path) -> dict[str, int]:
    """Registers, spilled bytes, accesses to local memory, tensor-core instructions.

    Instructions are looked at where there can be some of these: in kernels with a product, or with
    a stack. (nvdisasm takes as long as the compiler.)

    Args:
        compiled: what triton.compile returned.
        folder: for a file of the binary.
    """
    return _amd(compiled) if "amdgcn" in compiled.asm else _nvidia(compiled, folder)


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _nvidia(compiled: Any, folder: Path) -> dict[str, int]:
    binary = folder / f"{compiled.hash}.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    usage = _tool("cuobjdump", "-res-usage", str(binary))
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    spills = numbers["STACK"] + numbers["LOCAL"]
    code = ""
    if spills or "tt.dot" in compiled.asm["ttir"]:
        code = _tool("nvdisasm", "-ndf", "-c", str(binary))
        if "EXIT" not in code:
            raise RuntimeError(f"nvdisasm shows no code of {compiled.name}")
    return {
        "registers": numbers["REG"],
        "spills": spills,
        "local": len(_LOCAL.findall(code)),
        "products": len(_PRODUCT.findall(code)),
    }


def _amd(compiled: Any) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]

    return {
        "registers": number("vgpr_count"),
        "spills": 4 * (number("vgpr_spill_count") + number("sgpr_spill_count")),
        "local": 0,
        "products": len(re.findall(r"\bv_s?mfma", text)),
    }
