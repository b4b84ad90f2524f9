"""Checkpoints: published FAR files in, and the package's own format both ways.

The own format is a folder: config.json (format, version, sizes of the model, tokenizer, sampling
plan, class names) and model.safetensors (the published key layout, every tensor in its own dtype),
plus tokenizer.safetensors where the tokenizer has weights, and moments.safetensors where the model
has a moment head. Plain data throughout: no pickle.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from fastfar import backend as backends
from fastfar._files import atomic_writes
from fastfar._weights import (
    Source,
    Weights,
    check_fit,
    fill,
    indices,
    open_weights,
    skeleton,
    visit,
    weights_digest,
)
from fastfar.config import FARConfig
from fastfar.model import FAR
from fastfar.moments import FILE as MOMENTS_FILE
from fastfar.moments import MomentHead
from fastfar.plan import SamplingPlan
from fastfar.prepared import native_reason, prepare
from fastfar.tokenizer import KLVAE, PixelTokenizer, tokenizer_from_dict

FORMAT = "fastfar"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.safetensors"

_ASSETS = Path(__file__).parent / "assets"
_EMBEDDED = ("demo",)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HEADS = {768: 12, 1024: 16, 1280: 16}  # the published models; shapes do not tell


@dataclass(frozen=True)
class Pretrained:
    """What a folder of the own format holds; parts that were not saved are None."""

    model: FAR
    tokenizer: PixelTokenizer | KLVAE | None = None
    plan: SamplingPlan | None = None
    class_names: tuple[str, ...] | None = None
    moments: MomentHead | None = None


def load_official(
    source: Source,
    num_heads: int | None = None,
    *,
    use_ema: bool = True,
    patch_size: int = 1,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> FAR:
    """A FAR model from weights in the published key layout; in eval mode, on the CPU.

    Every size is read from the shapes, except three that leave no trace in them: `num_heads`,
    `patch_size`, and the number of frequency levels (16).

    Args:
        source: a `.pth` or `.safetensors` path, or a state dict. A `.pth` file holds a state dict,
            {"state_dict": ...}, or a training checkpoint {"model", "model_ema", "optimizer",
            "args", "epoch"}. It is read with weights_only=True: no code in it is ever run.
        num_heads: attention heads; None takes the published number for widths 768, 1024 and 1280
            (12, 16, 16) and width // 64 for others.
        use_ema: of a training checkpoint take "model_ema" where there is one, else "model". The
            moving average has to be whole: a key that it lacks is an error and is not filled in
            from "model", which would mix two models.
        patch_size: p; the latent has token_dim / p**2 channels and grid * p pixels a side.
        dtype: of the parameters; None is float32, or for the native back end what it is fastest
            in (float32 or bfloat16).
        backend: None gives a model for every back end and for training. "native" packs the weights
            in `dtype` as they are read: a model to sample from and for nothing else, without an
            unpacked copy at any time. "auto" does so where sampling would choose that back end.

    Memory: the peak is the model in `dtype` plus 1/8 of the stored weights (1/32 where packed).

    Raises:
        FileNotFoundError: no such file.
        TypeError: `source` is neither a path nor a mapping.
        ValueError: not a FAR checkpoint, a truncated file, a pickle with more than weights in it,
            sizes that do not fit each other, or keys that are missing, unexpected or of wrong
            shape: one error lists them all. A back end that is off or does not take the model.
    """
    weights = open_weights(source, use_ema)
    config = infer_config(weights, num_heads, patch_size)
    return build_model(weights, config, dtype, backend, default=torch.float32)


def infer_config(weights: Weights, num_heads: int | None = None, patch_size: int = 1) -> FARConfig:
    """The sizes that the shapes of a published FAR model imply (`load_official` says which)."""
    shapes = weights.shapes
    _refuse_other_models(weights)

    def size(what: str, *places: tuple[str, int]) -> int:
        """The length that most of these axes have: one damaged tensor does not decide."""
        found = [shapes[key][axis] for key, axis in places if len(shapes.get(key, ())) > axis]
        if not found:
            keys = ", ".join(key for key, _ in places)
            raise ValueError(f"{weights.name} is not a FAR model: no {what}; missing keys: {keys}")
        return statistics.mode(found)

    width = size(
        "width",
        ("encoder_norm.weight", 0),
        ("decoder_norm.weight", 0),
        ("z_proj.weight", 0),
        ("class_emb.weight", 1),
    )
    token_dim = size("token width", ("z_proj.weight", 1), ("diffloss.net.input_proj.weight", 1))
    tokens = size("position embedding of the head", ("diffusion_pos_embed_learned", 1))
    positions = size(
        "position embedding", ("encoder_pos_embed_learned", 1), ("decoder_pos_embed_learned", 1)
    )
    hidden = size("transformer MLP", ("encoder_blocks.0.mlp.fc1.weight", 0))
    grid = round(tokens**0.5)
    if grid * grid != tokens:
        raise ValueError(f"{weights.name} has {tokens} tokens, which is not a square grid")
    if patch_size < 1 or token_dim % patch_size**2:
        raise ValueError(
            f"patch_size {patch_size} does not fit tokens of {token_dim} numbers: "
            "patch_size**2 must divide them"
        )
    return FARConfig(
        width=width,
        encoder_depth=len(indices(shapes, "encoder_blocks")),
        decoder_depth=len(indices(shapes, "decoder_blocks")),
        num_heads=_HEADS.get(width, max(1, width // 64)) if num_heads is None else num_heads,
        head_depth=len(indices(shapes, "diffloss.net.res_blocks")),
        head_width=size(
            "head",
            ("diffloss.net.input_proj.weight", 0),
            ("diffloss.net.cond_embed.weight", 0),
            ("diffloss.net.time_embed.mlp.2.weight", 0),
        ),
        latent_channels=token_dim // patch_size**2,
        latent_size=grid * patch_size,
        patch_size=patch_size,
        buffer_size=positions - tokens,
        num_classes=size("class table", ("class_emb.weight", 0)),
        mlp_ratio=max(1, round(hidden / width)),
    )


def build_model(
    weights: Weights,
    config: FARConfig,
    dtype: torch.dtype | None,
    backend: str | None = None,
    default: torch.dtype | None = None,
) -> FAR:
    """FAR(config) holding a copy of `weights`, in eval mode; `load_official` explains `backend`.

    dtype None is the best one of the native back end, otherwise `default` (None: as stored).
    """
    native = False
    if backend is not None:
        native = backends.resolve(backend, "cpu", dtype, native_reason(config)) == "native"
    with skeleton():
        model = FAR(config)
    check_fit(
        model,
        weights,
        f"FAR of width {config.width}, {config.encoder_depth}+{config.decoder_depth} blocks and "
        f"a head of {config.head_depth} x {config.head_width}",
        " If another part of the training checkpoint was wanted, see use_ema"
        if weights.ema
        else "",
    )
    if native:
        keys = list(model.state_dict())
        dtype = dtype or backends.best_dtype("native", "cpu")
        return prepare(config, dtype, lambda take: visit(weights, keys, take))
    return fill(model, weights, dtype or default).eval()


def save_pretrained(
    folder: str | os.PathLike[str],
    model: FAR,
    tokenizer: PixelTokenizer | KLVAE | None = None,
    plan: SamplingPlan | None = None,
    class_names: Sequence[str] | None = None,
    moments: MomentHead | None = None,
) -> None:
    """Write the own format into `folder`; tensors are stored bit for bit in their own dtypes.

    All files are written whole under temporary names before the first one takes its place, so an
    interrupted or failed save leaves what was there before.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old files are intact.
        TypeError: `model` is not a FAR.
        ValueError: more class names than classes, or an entry that is no string; a moment head of
            another model.
    """
    if not isinstance(model, FAR):
        raise TypeError(f"model must be a fastfar.FAR, got {type(model).__name__}")
    if class_names is not None and (
        isinstance(class_names, str)
        or len(class_names) > model.config.num_classes
        or not all(isinstance(name, str) for name in class_names)
    ):
        raise ValueError(
            f"class_names must be at most {model.config.num_classes} strings, got {class_names!r}"
        )
    values = {
        "model": model.config.to_dict(),
        "tokenizer": None if tokenizer is None else tokenizer.to_dict(),
        "plan": None if plan is None else plan.to_dict(),
        "class_names": None if class_names is None else list(class_names),
    }
    modules: dict[str, nn.Module] = {MODEL_FILE: model}
    if isinstance(tokenizer, KLVAE):
        modules[TOKENIZER_FILE] = tokenizer
    if moments is not None:
        moments.check_teacher(weights_digest(open_weights(model.state_dict())))
    _write(Path(folder), values, modules)
    if moments is not None:
        moments.save(Path(folder) / MOMENTS_FILE)


def save_tokenizer(folder: str | os.PathLike[str], vae: KLVAE) -> None:
    """Add `vae` to a folder of the own format, in place of the tokenizer that it had.

    Raises:
        FileNotFoundError, ValueError: `folder` holds no model in the own format.
        OSError: as `save_pretrained`.
    """
    values = _read_config(Path(folder))
    _write(Path(folder), {**values, "tokenizer": vae.to_dict()}, {TOKENIZER_FILE: vae})


def load_pretrained(
    folder_or_name: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Pretrained:
    """Read the own format: model (eval mode, CPU), tokenizer, plan, class names and moment head.

    Args:
        folder_or_name: "demo" is the embedded model ("./demo" a folder of that name); else an
            existing folder; else, if it looks like "user/name", a repository of the Hugging Face
            hub, fetched with huggingface_hub where that is installed.
        dtype: of the model's parameters; None keeps them as stored. The tokenizer's stay.
        backend: None, or "native" or "auto" to pack the model as it is read, for sampling only:
            see `load_official`; then dtype None is the best one of the native back end.

    Raises:
        FileNotFoundError: no such folder or repository, or a file of the format is not in it.
        ImportError: a hub name, and huggingface_hub is not installed.
        ValueError: config.json or the weights are not of this format, damaged, or do not fit; the
            moment head was trained for another model.
    """
    folder = _resolve(folder_or_name)
    values = _read_config(folder)
    tokenizer = None
    with _naming(folder / CONFIG_FILE):
        config = FARConfig.from_dict(values["model"])
        plan = None if values.get("plan") is None else SamplingPlan.from_dict(values["plan"])
        names = values.get("class_names")
        class_names = None if names is None else tuple(map(str, names))
        if values.get("tokenizer") is not None:
            file = folder / TOKENIZER_FILE
            decoder = open_weights(file) if file.exists() else None
            tokenizer = tokenizer_from_dict(values["tokenizer"], decoder)
    weights = open_weights(_existing(folder / MODEL_FILE))
    moments = None
    if (moments_file := folder / MOMENTS_FILE).exists():
        moments = MomentHead.load(moments_file, weights_digest(weights))
    model = build_model(weights, config, dtype, backend)
    return Pretrained(model, tokenizer, plan, class_names, moments)


def save_model(folder: str | os.PathLike[str], model: FAR) -> None:
    """`save_pretrained` of the model alone; what `FAR.save_pretrained` calls."""
    save_pretrained(folder, model)


def load_model(
    folder_or_name: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> FAR:
    """The model of `load_pretrained` alone; what `FAR.from_pretrained` calls."""
    folder = _resolve(folder_or_name)
    values = _read_config(folder)
    with _naming(folder / CONFIG_FILE):
        config = FARConfig.from_dict(values["model"])
    return build_model(open_weights(_existing(folder / MODEL_FILE)), config, dtype, backend)


def _refuse_other_models(weights: Weights) -> None:
    """A clear word where the file is a model that is known but is not class-conditional FAR."""
    known = {
        "context_embed.weight": "FAR-T2I (text to image), which this version does not read",
        "post_quant_conv.weight": "a KL autoencoder: use fastfar.KLVAE.load_official",
    }
    for key, what in known.items():
        if key in weights.shapes and "class_emb.weight" not in weights.shapes:
            raise ValueError(f"{weights.name} is {what}")


def _write(folder: Path, values: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
    """config.json of `values`, and one file of weights per entry of `modules`."""
    values = {"format": FORMAT, "format_version": FORMAT_VERSION, **values}
    text = json.dumps(values, indent=2) + "\n"
    paths = [folder / name for name in (*modules, CONFIG_FILE)]
    with atomic_writes(*paths) as (*weight_files, config_file):
        for file, module in zip(weight_files, modules.values(), strict=True):
            _save_weights(module, file)
        config_file.write_text(text, encoding="utf-8")


def _save_weights(module: nn.Module, path: Path) -> None:
    tensors = {
        key: tensor.detach().to("cpu", memory_format=torch.contiguous_format)
        for key, tensor in module.state_dict().items()
    }
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # Its text carries the system's number: "I/O error: No space left on device (os error 28)".
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _resolve(folder_or_name: str | os.PathLike[str]) -> Path:
    """The folder that a path or a name stands for."""
    if not isinstance(folder_or_name, str | os.PathLike):
        raise TypeError(f"a folder or a name is needed, got {type(folder_or_name).__name__}")
    name = os.fspath(folder_or_name)
    if name in _EMBEDDED and isinstance(folder_or_name, str):
        return _ASSETS / name
    folder = Path(folder_or_name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(
            f"{folder} is a file, not a folder with {CONFIG_FILE}; published checkpoints are read "
            "by fastfar.load_official, or turned into such a folder by `fastfar convert`"
        )
    if isinstance(folder_or_name, str) and _HUB_NAME.fullmatch(name):
        return _from_hub(name)
    raise FileNotFoundError(
        f"no folder {name!r}. Give an existing folder, 'user/name' on the Hugging Face hub, or one "
        f"of the embedded models: {', '.join(_EMBEDDED)}"
    )


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"there is no folder {name!r}, and to fetch it from the Hugging Face hub the package "
            "huggingface_hub is needed: pip install 'fastfar[hub]'"
        ) from error
    files = [CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE, MOMENTS_FILE]
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError) as error:  # what its many errors derive from
        raise FileNotFoundError(
            f"there is no folder {name!r}, and the Hugging Face hub did not give a repository of "
            f"that name ({type(error).__name__}: {error})"
        ) from error


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: the folder is not one written by fastfar, or is incomplete"
        )
    return path


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = _existing(folder / CONFIG_FILE)
    with _naming(path):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f'it has no "format": "{FORMAT}", so fastfar did not write it')
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"its format_version is {version!r}; this fastfar reads {FORMAT_VERSION}: "
                "update fastfar, or save the model again"
            )
        if not isinstance(values.get("model"), dict):
            raise ValueError('it has no "model" entry with the sizes')
    return values


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file a ValueError (or a wrong kind of entry, TypeError) comes from."""
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from error
