"""What `fastfar eval` judges: samples, drawn or found in files."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastfar import backend
from fastfar._version import __version__
from fastfar.cli._plans import plan_named
from fastfar.data import balanced_labels
from fastfar.evaluation.runs import run_pipelines
from fastfar.evaluation.samples import SampleStore, digest, fill, weights_fingerprint
from fastfar.pipeline import FARPipeline
from fastfar.plan import SamplingPlan
from fastfar.tokenizer import KLVAE
from fastfar.training.state import has_run


@dataclass(frozen=True)
class Drawn:
    """A set of samples: its name, what it is, its labels, and its images in batches (uint8)."""

    name: str
    about: dict[str, Any]
    labels: Tensor | None
    batches: Callable[[], Iterator[Tensor]]


def pipelines_of(args: argparse.Namespace) -> dict[str, FARPipeline]:
    """What is judged, by name: a checkpoint, or raw and averaged weights of a training run.

    Raises ValueError where --weights is asked of something that has one set of weights.
    """
    folder = Path(args.checkpoint)
    vae = None if args.vae is None else KLVAE.load_official(args.vae)
    if has_run(folder):
        found = run_pipelines(folder, args.weights or "ema", vae)
        found = {f"{folder.name} {name}": pipeline for name, pipeline in found.items()}
    elif args.weights is not None:
        raise ValueError(
            f"--weights {args.weights}: {args.checkpoint} is no folder of a training run, and a "
            "checkpoint holds one set of weights; leave --weights out"
        )
    else:
        found = {folder.name: FARPipeline.from_pretrained(args.checkpoint)}
        if vae is not None:
            found[folder.name].tokenizer = vae
    device = own_device(args.device)
    return {name: pipe.to(device) if device.type != "cpu" else pipe for name, pipe in found.items()}


def image_shape(pipeline: FARPipeline) -> tuple[int, int, int]:
    """(C, H, W) of the images that a pipeline makes; ValueError where it makes none."""
    config, tokenizer = pipeline.model.config, pipeline.tokenizer
    if tokenizer is None:
        raise ValueError(
            "this checkpoint has no tokenizer, so it makes no images to judge: name the published "
            "KL-16 file with --vae FILE"
        )
    if isinstance(tokenizer, KLVAE):
        side = config.latent_size * tokenizer.config.downsampling
        return tokenizer.config.image_channels, side, side
    return config.latent_channels, config.latent_size, config.latent_size


def draw(args: argparse.Namespace, name: str, pipeline: FARPipeline) -> Drawn | None:
    """This process's share of the samples, and of those that nobody else draws; None after Ctrl-C.

    When it returns, all samples are there.
    """
    changes = {"guidance_scale": args.guidance_scale, "diffusion_steps": args.diffusion_steps}
    plan = plan_named(args.plan, pipeline.plan).with_changes(**changes)
    identity = _identity(args, pipeline, plan)
    folder = args.work or Path.home() / ".cache" / "fastfar" / "eval" / digest(identity)
    if args.work is not None and args.weights == "both":
        folder = args.work / name.split()[-1]
    store = SampleStore(folder, identity)
    rank, processes, *_ = backend.launched()
    config = pipeline.model.config
    if rank == 0:
        print(f"samples are kept in {folder}", file=sys.stderr)
    start = time.perf_counter()
    with tqdm(total=args.samples, desc="sampling", unit="image", disable=rank != 0) as bar:
        done = 0

        def progress(now: int, total: int) -> None:
            nonlocal done
            bar.update(now - done)
            done = now

        try:
            new = fill(
                pipeline,
                args.samples,
                store,
                batch_size=args.batch_size,
                seed=args.seed,
                num_classes=config.num_classes,
                share=(rank, processes),
                progress=progress,
                backend=args.backend,
                plan=plan,
            )
        except KeyboardInterrupt:
            bar.close()
            print(
                f"stopped with {done} of {args.samples} samples finished; they are kept in "
                f"{folder}, and the same command goes on from there",
                file=sys.stderr,
            )
            return None
    seconds = time.perf_counter() - start
    about = {"checkpoint": str(args.checkpoint), **identity, "batch_size": args.batch_size}
    about |= {
        "processes": processes,
        "new_samples": new,  # of this process
        "seconds_per_new_sample": round(seconds / new, 5) if new else None,
    }
    labels_B = balanced_labels(args.samples, config.num_classes)
    return Drawn(name, about, labels_B, lambda: store.batches(args.samples, size=500))


def _identity(
    args: argparse.Namespace, pipeline: FARPipeline, plan: SamplingPlan
) -> dict[str, Any]:
    """What decides the samples."""
    device = own_device(args.device)
    identity = {
        "weights": weights_fingerprint(pipeline.model),
        "plan": plan.to_dict(),
        "seed": args.seed,
        "backend": backend.resolve(args.backend, device),
        "device": device.type,
        "fastfar": __version__,
    }
    if isinstance(pipeline.tokenizer, KLVAE):
        identity["tokenizer"] = weights_fingerprint(pipeline.tokenizer)
    if any(solver.needs_moments for solver in plan.solvers) and pipeline.moments is not None:
        identity["moments"] = weights_fingerprint(pipeline.moments)
    return identity


def own_device(name: str) -> torch.device:
    """Of --device; "cuda" is this process's own GPU."""
    device = torch.device(f"cuda:{backend.launched().local_rank}" if name == "cuda" else name)
    backend.resolve("torch", device)  # ValueError, with the reason, where there is none
    return device
