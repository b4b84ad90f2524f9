"""A FAR model and an autoencoder small enough for tests of files, and a training checkpoint."""

from __future__ import annotations

import argparse

import torch
from formula import fill_by_formula

from fastfar.config import FARConfig
from fastfar.kl_vae import KLVAEConfig
from fastfar.model import FAR

State = dict[str, torch.Tensor]

TINY = FARConfig(
    width=32,
    encoder_depth=2,
    decoder_depth=1,
    num_heads=2,
    head_depth=3,
    head_width=48,
    latent_channels=6,
    latent_size=4,
    buffer_size=5,
    num_classes=10,
)
SMALL_VAE = KLVAEConfig(channels=32, channel_mults=(1, 2), blocks=1, latent_channels=6)


def tiny_model() -> FAR:
    """FAR of size TINY with weights by formula, in eval mode."""
    model = FAR(TINY).eval()
    fill_by_formula(model)
    return model


def tiny_state() -> State:
    """Its state dict, as plain tensors."""
    return {key: value.detach().clone() for key, value in tiny_model().state_dict().items()}


def training_checkpoint(state: State) -> dict[str, object]:
    """The published training dictionary; the moving average is 1 less than the weights."""
    return {
        "model": state,
        "model_ema": {key: value - 1 for key, value in state.items()},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}},
            "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "params": [0]}],
        },
        "args": argparse.Namespace(model="far_tiny", lr=1e-4, resume=None, diffloss_d=3),
        "epoch": 12,
    }


def assert_same(loaded: torch.nn.Module, state: State) -> None:
    """Same keys, dtypes and values."""
    found = loaded.state_dict()
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
