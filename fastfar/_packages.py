"""Which optional packages import here, and why the others do not. Part of `backend.py`."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util

import torch

# name -> (module, how to get it)
_PACKAGES = {
    "flash_attn": ("flash_attn", "pip install 'fastfar[flash]' (CUDA only)"),
    "flash_attn_3": ("flash_attn_interface", "build flash-attention's folder hopper (Hopper only)"),
    "flash_attn_4": ("flash_attn.cute", "pip install 'fastfar[flash4]' (CUDA only)"),
    "xformers": ("xformers.ops", "pip install 'fastfar[xformers]' (CUDA only)"),
    "triton": ("triton", "pip install 'fastfar[triton]'"),
    "apex": ("apex", "build NVIDIA apex from source; PyPI's apex is another project"),
    "huggingface_hub": ("huggingface_hub", "pip install 'fastfar[hub]'"),
    "tensorboard": ("tensorboard", "pip install 'fastfar[train]'"),
    "torch_fidelity": ("torch_fidelity", "pip install 'fastfar[eval]'"),
    "matplotlib": ("matplotlib", "pip install 'fastfar[bench]'"),
    "nvtx": ("nvtx", "pip install nvtx"),
}
_NEEDS_CUDA = ("flash_attn", "flash_attn_3", "flash_attn_4", "xformers", "apex")
# what of a package is called, where another one can be found under its name
_ATTRIBUTES = {
    "flash_attn": "flash_attn_func",
    "flash_attn_3": "flash_attn_func",
    "flash_attn_4": "flash_attn_func",
    "xformers": "memory_efficient_attention",
}


def cuda_reason() -> str | None:
    """Why there is no CUDA device; None if there is one."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "no CUDA device (this PyTorch is a CPU build)"
    return "no CUDA device"


def optional_packages() -> dict[str, str | None]:
    """Optional packages: None = imports and can work here, else the reason it cannot."""
    return {name: package_reason(name) for name in _PACKAGES}


@functools.cache
def package_reason(name: str) -> str | None:
    """Why an optional package cannot be used here; None if it can."""
    module, remedy = _PACKAGES[name]
    if not _installed(name, module):
        return f"not installed; {remedy}"
    if name in _NEEDS_CUDA and (no_cuda := cuda_reason()) is not None:
        return no_cuda
    try:
        imported = importlib.import_module(module)
        if not hasattr(imported, _ATTRIBUTES.get(name, "__name__")):
            return f"installed, but has no {_ATTRIBUTES[name]}; {remedy}"
        if name == "apex":
            if importlib.util.find_spec("apex.multi_tensor_apply") is None:
                return f"installed, but not NVIDIA's apex; {remedy}"
            importlib.import_module("apex.optimizers")
            importlib.import_module("amp_C")  # its CUDA extension, without which FusedAdam raises
    except Exception as error:  # a broken binary package raises errors of any type
        problem = f"installed, but does not import: {type(error).__name__}: {error}"
        if name == "xformers" and "flash_attn" in str(error):
            problem += "; it takes the folder of flash-attn 4 for flash-attn 2: install that too"
        return problem
    return None


def _installed(name: str, module: str) -> bool:
    if name == "flash_attn_4":  # in the folder of flash-attn 2, which may carry an old copy of it
        try:
            importlib.metadata.version("flash-attn-4")
        except importlib.metadata.PackageNotFoundError:
            return False
        return True
    spec = importlib.util.find_spec(module.split(".")[0])
    # Without an origin it is a bare folder: flash_attn where only flash-attn 4 is installed.
    return spec is not None and spec.origin is not None
