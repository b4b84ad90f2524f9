"""FAR with its weights packed for the native back end: to sample from, and for nothing else.

Made of a model by `prepare_native`, or straight from a mapped checkpoint by
`load_official(..., backend="native")`, which never holds an unpacked copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastfar._weights import skeleton
from fastfar.config import FARConfig
from fastfar.head import SimpleMLPAdaLN
from fastfar.model import FAR
from fastfar.ops import use_backend
from fastfar.ops._head import pack_head
from fastfar.packing import packed

Visit = Callable[[Callable[[str, Tensor], None]], None]

COMPUTE_DTYPES = (torch.float32, torch.bfloat16)
_NAMES = "float32 or bfloat16"

_HEAD = "diffloss.net."
# Matrices that native ops read, by the last two parts of their layers' names.
_PACKED = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "decoder_embed")


def native_reason(config: FARConfig) -> str | None:
    """None where the native kernels take a model of these sizes, else why not."""
    if config.head_width % 16:
        return f"it needs a head whose width is a multiple of 16, this one has {config.head_width}"
    return None


class PreparedFAR(FAR):
    """FAR whose large matrices are `PackedWeight`s and whose head is packed; the rest is float32.

    In eval mode, without gradients, on the CPU. Refuses what needs the original weights
    (ValueError): training, state_dict, saving, another dtype or device, other back ends.

    Attributes:
        compute_dtype: float32 or bfloat16, of the packed weights and of all products.
    """

    def __init__(self, config: FARConfig, compute_dtype: torch.dtype) -> None:
        super().__init__(config)
        self.compute_dtype = compute_dtype
        self._head_weights: Mapping[str, Tensor] = {}

    @property
    def head(self) -> SimpleMLPAdaLN:
        """Not there: only its packed weights are."""
        self._refuse("its denoising MLP runs inside sampling only")

    @property
    def head_weights(self) -> Mapping[str, Tensor]:
        """The head as the native `denoise_loop` takes it."""
        return self._head_weights

    def forward(
        self,
        tokens_BLP: Tensor,
        class_BD: Tensor,
        mask_BL: Tensor | None = None,
        num_kept: int | None = None,
    ) -> Tensor:
        """See `FAR.forward`; float32 (B, L, D)."""
        with torch.no_grad(), use_backend("native"):
            return super().forward(tokens_BLP, class_BD, mask_BL, num_kept)

    def train(self, mode: bool = True) -> PreparedFAR:
        if mode:
            self._refuse("it cannot be trained")
        super().train(False)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> PreparedFAR:
        if requires_grad:
            self._refuse("it has no gradients")
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("its weights cannot be read back or saved")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("it takes no other weights")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PreparedFAR:
        """What `to`, `half`, `cuda` ... come down to: only what changes nothing is allowed."""
        before = self.fake_latent.data
        after = fn(before)
        if after.dtype is not before.dtype or after.device != before.device:
            self._refuse("it cannot be moved to another dtype or device")
        return self

    def _refuse(self, what: str) -> NoReturn:
        dtype = str(self.compute_dtype).removeprefix("torch.")
        raise ValueError(
            f"this model was packed for sampling on the native back end in {dtype}: {what}. Load "
            "the checkpoint again, without backend='native', for anything else"
        )


def prepare(config: FARConfig, dtype: torch.dtype, visit: Visit) -> PreparedFAR:
    """A packed model of the weights that `visit(take)` hands over: take(key, tensor), each once.

    Keys are the published ones; the tensors may be views of a mapped file: they are copied.

    Raises:
        ValueError: dtype is not float32 or bfloat16, or the kernels do not take these sizes.
        OSError: there is no native library.
    """
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"the native back end computes in {_NAMES}, not in {dtype}")
    if (reason := native_reason(config)) is not None:
        raise ValueError(f"the native back end does not take this model: {reason}")
    with skeleton():
        model = PreparedFAR(config, dtype)
    head: dict[str, Tensor] = {}

    def take(key: str, value: Tensor) -> None:
        if key.startswith(_HEAD):
            head[key.removeprefix(_HEAD)] = _copy(value, value.dtype)
            return
        path, _, leaf = key.rpartition(".")
        layer = model.get_submodule(path)
        if leaf == "weight" and ".".join(path.split(".")[-2:]) in _PACKED:
            delattr(layer, leaf)  # a parameter; what takes its place is a plain attribute
            setattr(layer, leaf, packed(_packable(value), dtype))
        else:
            setattr(layer, leaf, nn.Parameter(_copy(value, torch.float32), requires_grad=False))

    visit(take)
    del model.diffloss
    model._head_weights = pack_head(head, dtype)
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise RuntimeError(f"{missing} were given no value")
    return model.eval()


def prepare_native(model: FAR, dtype: torch.dtype) -> PreparedFAR:
    """A packed copy of `model` with compute dtype `dtype`; the model stays as it is.

    Raises: as `prepare`; ValueError for a model that is packed already.
    """
    state = model.state_dict()

    def visit(take: Callable[[str, Tensor], None]) -> None:
        for key, value in state.items():
            take(key, value)

    prepared = prepare(model.config, dtype, visit)
    prepared.set_attention_backend(model.attention_backend)
    return prepared


def _packable(value: Tensor) -> Tensor:
    return value.cpu() if value.dtype in COMPUTE_DTYPES else value.to("cpu", torch.float32)


def _copy(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
