"""The evaluator: a small classifier of Fashion-MNIST whose penultimate layer gives the features.

Distances on its features are no ImageNet FID and compare with nothing but distances on the *same*
weights, so every figure carries ``FashionClassifier.fingerprint``.  Arithmetic is float32 whatever
the stored type, which makes the figures independent of a machine's low-precision units.

Legend: B image, C channels, H height, W width, F feature (256), K class.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from fastfar._files import atomic_write
from fastfar.data import IMAGE_SIZE, ImageDataset, to_float
from fastfar.evaluation.extractors import embed_all

METRIC = "FD-fashion"
ASSET_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "evaluator"
FORMAT, FORMAT_VERSION = "fastfar-evaluator", 1
DEFAULT_WIDTHS = (32, 64, 128, 256)
LEARNING_RATE, WEIGHT_DECAY, MAX_SHIFT = 4e-3, 0.05, 1


class FashionClassifier(nn.Module):
    """Convolutions at 16x16, 8x8 and 4x4 pixels, mean over the pixels, dropout, one linear layer.

    ``forward(images_BCHW in [-1, 1]) -> logits_BK``; ``features(images_BCHW) -> features_BF``, the
    input of the linear layer (non-negative: means of ReLUs), both float32.
    """

    fingerprint: str = "untrained"
    metric: str = METRIC

    def __init__(
        self,
        widths: tuple[int, int, int, int] = DEFAULT_WIDTHS,
        num_classes: int = 10,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if len(widths) != 4 or min(widths) < 1:
            raise ValueError(f"widths are {widths}: give four positive channel counts")
        a, b, c, d = widths
        self.widths, self.num_classes = tuple(widths), num_classes
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2),
            *_unit(4, a),
            *_unit(a, b),
            nn.MaxPool2d(2),
            *_unit(b, c),
            nn.MaxPool2d(2),
            *_unit(c, c),
            *_unit(c, d, kernel=1),
        )
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(d, num_classes)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Penultimate layer, (B, F)."""
        if images_BCHW.ndim != 4 or tuple(images_BCHW.shape[1:]) != (1, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"the evaluator takes images of shape (B, 1, {IMAGE_SIZE}, {IMAGE_SIZE}), "
                f"got {tuple(images_BCHW.shape)}"
            )
        result: Tensor = self.body(images_BCHW).mean(dim=(2, 3))
        return result

    @torch.inference_mode()
    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As an `Extractor`, in eval mode: features (B, F) and logits (B, K) of bytes."""
        was_training = self.training
        self.eval()
        features_BF = self.features(to_float(images))
        logits_BK: Tensor = self.output(features_BF)
        self.train(was_training)
        return features_BF, logits_BK

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.output(self.dropout(self.features(images_BCHW)))
        return logits


def _unit(inputs: int, outputs: int, kernel: int = 3) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU()


def train_classifier(
    train: ImageDataset,
    *,
    epochs: int = 7,
    batch_size: int = 128,
    learning_rate: float = LEARNING_RATE,
    weight_decay: float = WEIGHT_DECAY,
    max_shift: int = MAX_SHIFT,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    widths: tuple[int, int, int, int] = DEFAULT_WIDTHS,
    on_epoch: Callable[[int, float], None] | None = None,
    progress: Callable[[Iterator[Tensor], int], Iterator[Tensor]] | None = None,
) -> FashionClassifier:
    """AdamW, one-cycle learning rate, cross-entropy, images shifted by up to ``max_shift`` pixels.

    No flips: shoes face left in the data, and features blind to that would not see a model that
    turns them round.  ``dtype`` is that of autocast (float32: none).  ``on_epoch(epoch, mean
    loss)`` is called after each epoch; ``progress(batches, total)`` wraps the iteration (a progress
    bar).  Deterministic in ``seed`` on one machine.
    """
    if epochs < 1 or batch_size < 2 or len(train) < batch_size:
        raise ValueError(
            f"epochs {epochs}, batch size {batch_size} with {len(train)} images: epochs must be at "
            "least 1 and the batch size between 2 and the number of images"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FashionClassifier(widths, train.num_classes)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=learning_rate,
        )
        per_epoch = len(train) // batch_size
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=learning_rate,
            total_steps=max(epochs * per_epoch, 10),  # below, its warm-up has no step
            pct_start=0.2,
        )
        model.train()
        for epoch in range(epochs):
            order = torch.randperm(len(train), generator=generator)[: per_epoch * batch_size]
            batches = iter(torch.split(order, batch_size))
            total = 0.0
            for index in batches if progress is None else progress(batches, per_epoch):
                images_BHW = _shifted(train.images[index], max_shift, generator)
                images_BCHW = to_float(images_BHW).contiguous(memory_format=torch.channels_last)
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    logits_BK = model(images_BCHW)
                loss = nn.functional.cross_entropy(logits_BK.float(), train.labels[index])
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
                total += loss.item()
            if on_epoch is not None:
                on_epoch(epoch, total / per_epoch)
    return model.eval()


def _shifted(images_BHW: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Each image moved by its own whole pixels in [-max_shift, max_shift]^2; black flows in."""
    if max_shift == 0:
        return images_BHW
    count, height, width = images_BHW.shape
    padded = nn.functional.pad(images_BHW, (max_shift,) * 4)
    offset_2B = torch.randint(2 * max_shift + 1, (2, count), generator=generator)
    rows_BH = offset_2B[0, :, None] + torch.arange(height)
    columns_BW = offset_2B[1, :, None] + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]


@torch.inference_mode()
def extract(
    model: FashionClassifier, images_BHW: Tensor, batch_size: int = 500
) -> tuple[Tensor, Tensor]:
    """uint8 (B, H, W) -> features float32 (B, F) and the predicted class int64 (B,)."""
    found = embed_all(model, [images_BHW], batch_size)
    return torch.from_numpy(found.features), torch.from_numpy(found.logits).argmax(dim=1)


def accuracy(model: FashionClassifier, data: ImageDataset) -> float:
    """Share of ``data`` that the model puts into its class."""
    return float((extract(model, data.images)[1] == data.labels).double().mean())


def save_classifier(
    model: FashionClassifier,
    folder: str | os.PathLike[str],
    training: dict[str, Any],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write config.json and model.safetensors (weights as ``dtype``), each replaced atomically."""
    target = Path(folder)
    tensors = {
        name: (value.to(dtype) if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "widths": list(model.widths),
        "num_classes": model.num_classes,
        "training": training,
    }
    with atomic_write(target / "model.safetensors") as temporary:
        temporary.write_bytes(save(tensors))
    with atomic_write(target / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


def load_classifier(folder: str | os.PathLike[str] | None = None) -> FashionClassifier:
    """The evaluator of ``folder`` (None: the embedded one) in float32 and eval mode.

    Its fingerprint is the first 12 hexadecimal digits of the SHA-256 of model.safetensors.
    Raises FileNotFoundError where there is none, ValueError where the files are damaged or foreign.
    """
    source = ASSET_FOLDER if folder is None else Path(folder)
    config_file, weight_file = source / "config.json", source / "model.safetensors"
    for file in (config_file, weight_file):
        if not file.is_file():
            raise FileNotFoundError(
                f"no evaluator: {file} is missing; make one with "
                f"`fastfar eval train-classifier --to {source}`"
            )
    try:
        config = json.loads(config_file.read_text())
        raw = weight_file.read_bytes()
        if config["format"] != FORMAT or config["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {config['format']!r} version {config['format_version']!r}")
        model = FashionClassifier(tuple(config["widths"]), config["num_classes"])
        tensors = {name: value.float() for name, value in load(raw).items()}
        expected = {n for n in model.state_dict() if not n.endswith("num_batches_tracked")}
        if set(tensors) != expected:
            raise ValueError(f"keys differ: {sorted(set(tensors) ^ expected)}")
        model.load_state_dict(tensors, strict=False)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{source}: not a fastfar evaluator of version {FORMAT_VERSION}, or damaged ({error})"
        ) from error
    model.fingerprint = hashlib.sha256(raw).hexdigest()[:12]
    return model.eval()
