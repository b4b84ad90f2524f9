"""Reading weights: files and dictionaries in, parameters out, safely and in little memory.

Shared by `checkpoint.load_official`, `KLVAE.load_official` and the package's own format. Nothing
here runs code from a file: `.pth` files go through `torch.load(weights_only=True)` only.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

Source = str | os.PathLike[str] | Mapping[str, Any]
M = TypeVar("M", bound=nn.Module)

_TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
_PARTS = 8  # weights are copied in this many parts, so that a mapped file adds 1/8 at the peak
_FINE_PARTS = 32  # for weights that are packed: beside the bound on those, 1/8 would be much
_SHOWN = 5  # keys of a kind that an error message spells out


@dataclass(frozen=True)
class Weights:
    """Named tensors that can be read some at a time.

    Attributes:
        name: what error messages call it: the path, or "the given state dict".
        shapes: key -> shape, of every tensor.
        dtypes: key -> dtype.
        read: keys -> tensors; they may be views of a mapped file, so copy them and let them go.
        ema: True if they are the moving average of a training checkpoint.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    read: Callable[[Sequence[str]], dict[str, torch.Tensor]]
    ema: bool = False

    def without(self, prefix: str) -> Weights:
        """The same weights less the keys that start with `prefix`."""
        kept = [key for key in self.shapes if not key.startswith(prefix)]
        return Weights(
            self.name,
            {key: self.shapes[key] for key in kept},
            {key: self.dtypes[key] for key in kept},
            self.read,
            self.ema,
        )


def open_weights(source: Source, use_ema: bool = True) -> Weights:
    """Open a `.safetensors` or `.pth` file, or wrap a state dict; no tensor is copied yet.

    A dictionary (in a `.pth` file or given) is a state dict, {"state_dict": ...}, or a training
    checkpoint {"model": ..., "model_ema": ..., "optimizer": ..., "args": ..., "epoch": ...}: then
    `use_ema` picks "model_ema" where the file has one, else "model". Prefixes "module." that
    DistributedDataParallel leaves are stripped.

    Raises:
        FileNotFoundError: no such file.
        TypeError: `source` is neither a path nor a mapping.
        ValueError: an unknown suffix, a truncated or foreign file, a pickle that holds more than
            weights, or no state dict inside.
    """
    if isinstance(source, Mapping):
        return _from_mapping("the given state dict", source, use_ema)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source must be a path or a state dict, got {type(source).__name__}")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no file {path}: check the path, or download the checkpoint first")
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; name the checkpoint file in it ({', '.join(_TORCH_SUFFIXES)} or "
            ".safetensors). A folder written by fastfar is read by FAR.from_pretrained"
        )
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    if path.suffix in _TORCH_SUFFIXES:
        return _from_torch_file(path, use_ema)
    raise ValueError(
        f"cannot tell the format of {path} from its suffix {path.suffix!r}; known are "
        f"{', '.join(_TORCH_SUFFIXES)} and .safetensors: rename the file"
    )


def check_fit(module: nn.Module, weights: Weights, what: str, hint: str = "") -> None:
    """Compare keys, shapes and kinds of number with what `module` has; ValueError lists all."""
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    given = weights.shapes
    wrong = [
        f"{key} is {given[key]} and should be {shape}"
        for key, shape in expected.items()
        if key in given and given[key] != shape
    ]
    quantised = [
        f"{key} ({dtype})" for key, dtype in weights.dtypes.items() if not dtype.is_floating_point
    ]
    problems = [
        _listing("missing", [key for key in expected if key not in given]),
        _listing("unexpected", [key for key in given if key not in expected]),
        _listing("of wrong shape", wrong),
        _listing("not floating point", quantised),
    ]
    if any(problems):
        found = "; ".join(problem for problem in problems if problem)
        raise ValueError(f"{weights.name} does not fit {what}. Keys {found}.{hint}")


def fill(module: M, weights: Weights, dtype: torch.dtype | None) -> M:
    """Give `module`, built on the meta device, a copy of `weights` in `dtype` (None: as stored).

    At the peak the process holds the module plus 1/8 of the source: a file is mapped, not read,
    and mapped anew for each eighth, so that its pages do not pile up beside the copies.
    """
    copies: dict[str, torch.Tensor] = {}

    def take(key: str, value: torch.Tensor) -> None:
        copies[key] = value.to(
            device="cpu", dtype=dtype, copy=True, memory_format=torch.contiguous_format
        )

    keys = [key for key in module.state_dict() if key in weights.shapes]
    visit(weights, keys, take, _PARTS)
    module.load_state_dict(copies, strict=False, assign=True)
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_meta:
            raise RuntimeError(f"{name} of {type(module).__name__} was given no value")
    return module


def visit(
    weights: Weights,
    keys: Sequence[str],
    take: Callable[[str, torch.Tensor], None],
    parts: int = _FINE_PARTS,
) -> None:
    """take(key, tensor) for every key, in about `parts` parts that are mapped one after the other.

    `take` must copy what it needs: the tensor may be a view of a mapped file.
    """
    for part in _in_parts(keys, weights, parts):
        # Moving the views out of the dictionary frees each as soon as it has been taken.
        views = weights.read(part)
        for key in part:
            take(key, views.pop(key))


@contextlib.contextmanager
def skeleton() -> Iterator[None]:
    """Modules built inside are on the meta device: shapes and dtypes without memory."""
    with torch.device("meta"), _SkipDraws():
        yield


class _SkipDraws(TorchFunctionMode):
    """Passes over torch.nn.init. On "meta", normal_ would import sympy first, which takes 2 s."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def weights_digest(weights: Weights) -> str:
    """First 12 hexadecimal digits of a SHA-256 over names, shapes and values, as float32.

    So a model keeps it when it is loaded in a wider dtype than it is stored in.
    """
    digest = hashlib.sha256()

    def take(key: str, value: torch.Tensor) -> None:
        digest.update(f"{key} {tuple(value.shape)}".encode())
        exact = value.detach().to("cpu", torch.float32).contiguous()
        digest.update(exact.flatten().view(torch.uint8).numpy().tobytes())

    visit(weights, sorted(weights.shapes), take)
    return digest.hexdigest()[:12]


def indices(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> set[int]:
    """The numbers i for which a key "{prefix}.i.(...)" exists."""
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in shapes)
    return {int(match[1]) for match in found if match}


def _listing(kind: str, keys: Sequence[str]) -> str:
    if not keys:
        return ""
    more = f", and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{kind} ({len(keys)}): {', '.join(keys[:_SHOWN])}{more}"


def _in_parts(keys: Sequence[str], weights: Weights, parts: int) -> Iterator[list[str]]:
    """Consecutive keys, each part about 1 / parts of all the numbers."""
    sizes = [torch.Size(weights.shapes[key]).numel() for key in keys]
    limit = sum(sizes) / parts
    part: list[str] = []
    filled = 0
    for key, size in zip(keys, sizes, strict=True):
        if part and filled + size > limit:
            yield part
            part, filled = [], 0
        part.append(key)
        filled += size
    if part:
        yield part


def _from_mapping(
    name: str,
    loaded: object,
    use_ema: bool,
    reopen: Callable[[], object] | None = None,
) -> Weights:
    """Weights of a loaded object; `reopen` loads it afresh (a mapped file), None keeps it."""
    state, ema = _state_dict_of(name, loaded, use_ema)
    original = {key.removeprefix("module."): key for key in state}

    def read(keys: Sequence[str]) -> dict[str, torch.Tensor]:
        tensors = state if reopen is None else _state_dict_of(name, reopen(), use_ema)[0]
        return {key: tensors[original[key]] for key in keys}

    shapes = {key: tuple(state[old].shape) for key, old in original.items()}
    dtypes = {key: state[old].dtype for key, old in original.items()}
    if reopen is not None:
        state = {}  # let the first mapping go
    return Weights(name, shapes, dtypes, read, ema)


def _state_dict_of(
    name: str, loaded: object, use_ema: bool
) -> tuple[Mapping[str, torch.Tensor], bool]:
    """(state dict, is it the moving average?) inside a loaded object."""
    if not isinstance(loaded, Mapping):
        raise ValueError(
            f"{name} holds a {type(loaded).__name__}; a state dict or a training checkpoint "
            "(a dictionary with 'model' and 'model_ema') is needed"
        )
    ema = use_ema and loaded.get("model_ema") is not None
    wanted = "model_ema" if ema else "model"
    if wanted not in loaded and "model_ema" in loaded:
        raise ValueError(f"{name} has 'model_ema' but no 'model': load it with use_ema=True")
    entry = next((key for key in (wanted, "state_dict") if key in loaded), None)
    state = loaded if entry is None else loaded[entry]
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{name}: the entry {entry!r} is not a state dict or is empty")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{name} is not a state dict: its entry {key!r} is a {type(value).__name__}, not "
                "a tensor. Known layouts: a flat state dict, {'state_dict': ...}, "
                "{'model': ..., 'model_ema': ...}"
            )
    return state, ema


def _from_safetensors(path: Path) -> Weights:
    def read(keys: Sequence[str]) -> dict[str, torch.Tensor]:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(original[key]) for key in keys}

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys()
            original = {name.removeprefix("module."): name for name in names}
            tensors = {key: file.get_tensor(name) for key, name in original.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); it may be truncated: copy or "
            "download it again"
        ) from error
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
    return Weights(str(path), shapes, dtypes, read)


def _from_torch_file(path: Path, use_ema: bool) -> Weights:
    with path.open("rb") as file:
        starts_as_zip = file.read(4) == b"PK\x03\x04"
    mapped = zipfile.is_zipfile(path)
    if starts_as_zip and not mapped:
        raise ValueError(f"{path} is truncated: copy or download it again")

    def load() -> object:
        return _torch_load(path, mapped)

    # Files of PyTorch before 1.6 are no zip archives and cannot be mapped: read them once.
    return _from_mapping(str(path), load(), use_ema, reopen=load if mapped else None)


def _torch_load(path: Path, mapped: bool) -> object:
    """torch.load for weights only; argparse.Namespace ("args") is the one class let in."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        # PyTorch's own text advises weights_only=False, which would run code from the file.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the Python object {refused[1]}" if refused else "something else than tensors"
        raise ValueError(
            f"{path} is damaged or is not a weights-only file: it holds {what}. fastfar never "
            "runs code from a checkpoint. Save the bare state dict with torch.save or safetensors "
            "where you trust the file, then load that"
        ) from None
    except Exception as error:  # a damaged file can fail anywhere in the parser
        raise ValueError(
            f"{path} is not a readable PyTorch checkpoint "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); it may "
            "be truncated: copy or download it again"
        ) from error
