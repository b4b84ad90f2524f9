"""The Inception network of the FID, through torch-fidelity, with the user's own weights file.

Only the network and its resizing are torch-fidelity's.  The figures are computed by
`fastfar.evaluation.metrics`: torch-fidelity takes no published statistics, its precision and recall
use another network unless told otherwise, and before 0.4 it had the two the wrong way round.

Legend: B image, C channel, H height, W width, F feature (2048), K class (1008).
"""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfar.backend import package_reason

WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
_PUBLISHED = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # its SHA-256
_WHERE = (
    f"get {WEIGHTS_FILE} from release v0.2.0 of github.com/toshas/torch-fidelity and name it with "
    "--inception; fastfar downloads nothing"
)


class Inception:
    """An `Extractor`: the pooled features (2048) and the logits without bias, as FID and inception
    score use them (Heusel et al. 2017, Salimans et al. 2016).

    Images of any size are resized to 299x299 as TensorFlow 1 did; grey ones get three equal
    channels.  Arithmetic is float32, on a GPU too.  `metric` is "FID" with the published weights
    (by their SHA-256) and "FD-inception" with any others.

    Args:
        weights: file of torch-fidelity's state dict. Only the published one may hold anything but
            tensors: no code in a file is ever run.
        device: where to compute.

    Raises:
        FileNotFoundError: there is no such file; the message says where to get it.
        ValueError: torch-fidelity cannot be used, or the file holds no such weights.
    """

    def __init__(self, weights: str | os.PathLike[str], device: torch.device | str = "cpu") -> None:
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(f"no Inception weights: {path} is missing; {_WHERE}")
        if (reason := package_reason("torch_fidelity")) is not None:
            raise ValueError(f"FID needs torch-fidelity, which cannot be used: {reason}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.device = torch.device(device)
        try:
            if digest != _PUBLISHED:
                # torch-fidelity reads the file with pickle: prove first that it is tensors alone.
                torch.load(path, map_location="cpu", weights_only=True)
            self._network = _network(str(path)).to(self.device)
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{path} holds no weights of torch-fidelity's Inception ({first_line}); {_WHERE}"
            ) from error
        self.metric = "FID" if digest == _PUBLISHED else "FD-inception"
        self.fingerprint = f"inception {digest[:12]}"

    @torch.inference_mode()
    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, H, W) or (B, 3, H, W) -> float32 features (B, F) and logits (B, K)."""
        images_BCHW = images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images
        if images_BCHW.dtype != torch.uint8 or images_BCHW.shape[1:2] != (3,):
            raise ValueError(
                "Inception takes uint8 images of shape (B, H, W) or (B, 3, H, W), got "
                f"{images.dtype} {tuple(images.shape)}"
            )
        # TF32 convolutions, PyTorch's default on newer GPUs, move the FID.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features_BF, logits_BK = self._network(images_BCHW.contiguous().to(self.device))
        return features_BF.float(), logits_BK.float()


def _network(path: str) -> Any:
    from torch_fidelity import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=path
    )
