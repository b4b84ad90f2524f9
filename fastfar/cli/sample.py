"""`fastfar sample`: class labels in, a grid of pictures out."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastfar.cli._plans import HELP, PLANS, plan_named

# PyTorch and the model are imported in `run`: --help and a wrong argument need not wait for them.
if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from fastfar.pipeline import FARPipeline
    from fastfar.plan import SamplingPlan

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_ALSO = ("images", "levels", "animation", "trace")
_TOKENS_PER_BATCH = 4096
_MANY_CLASSES = 20

_DESCRIPTION = """\
Sample images and write them as one PNG grid, one row per class. Image i of a run depends on the
seed and on i alone, so --batch-size changes the speed and not the images."""

_EPILOG = """examples:
  fastfar sample                                  # one image of each class of the embedded demo
  fastfar sample --classes "trouser,ankle boot" --per-class 8 --seed 1 --scale 4
  fastfar sample --classes 0,1,2 --levels --output outputs/levels.png
  fastfar sample far_huge --vae kl16.ckpt --classes 207 --per-class 1 --guidance-scale 3

in Python: fastfar.FARPipeline.from_pretrained("demo")(class_labels=[0, 1, 2], generator=0).images
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `fastfar`."""
    parser = subparsers.add_parser(
        "sample",
        help="sample images from a checkpoint",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="?",
        default="demo",
        help="folder, hub name, or the embedded %(default)s (default)",
    )
    add(
        "--classes",
        metavar="LIST",
        help="numbers or names with commas between them (default: all classes; ten of them where "
        f"the model has more than {_MANY_CLASSES})",
    )
    add("--per-class", metavar="N", type=int, default=1, help="images per class (%(default)s)")
    add("--seed", metavar="N", type=int, default=0, help="(%(default)s)")
    add("--plan", choices=PLANS, help=HELP)
    add("--guidance-scale", metavar="S", type=float, help="1 is none (default: the checkpoint's)")
    add("--diffusion-steps", metavar="T", type=int, help="per level (default: the checkpoint's)")
    add("--backend", metavar="NAME", default="auto", help="auto, reference, torch, native, triton")
    add("--device", metavar="NAME", default="cpu", help="cpu, cuda, cuda:1 (%(default)s)")
    add("--dtype", choices=_DTYPES, default="auto", help="to compute in (the back end's best)")
    add("--batch-size", metavar="N", type=int, help="default: 4096 tokens' worth")
    add("--output", metavar="FILE", type=Path, default=Path("outputs/sample.png"), help="the grid")
    add("--images", metavar="DIR", type=Path, help="also DIR/CLASS/NUMBER.png for every image")
    add(
        "--levels",
        action="store_true",
        help="also OUTPUT-levels.png, the first image of each class after every outer step, and "
        "OUTPUT-levels.gif, the grid growing sharp",
    )
    add("--scale", metavar="K", type=int, default=1, help="enlarge the grid K times (%(default)s)")
    add("--labels", action="store_true", help="write the classes beside the rows")
    add("--vae", metavar="FILE", type=Path, help="published KL-16, for a checkpoint without it")
    add("--trace", metavar="FILE", type=Path, help="also a Chrome trace of the sampling (.json)")
    add("--quiet", action="store_true", help="no progress bar")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Sample, write the files, say where they are and how fast it was; 0, or 130 after Ctrl-C."""
    start = time.perf_counter()
    for name in ("per_class", "batch_size", "scale"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.output.suffix.lower() != ".png":
        raise ValueError(f"--output must end in .png, got {args.output}")
    if args.output.is_dir():
        raise ValueError(f"--output {args.output} is a folder; give the name of a file")
    _check_writable(args.output.parent)
    if args.images is not None:
        _check_writable(args.images)
    if args.trace is not None:
        if args.trace.is_dir():
            raise ValueError(f"--trace {args.trace} is a folder; give the name of a file")
        _check_writable(args.trace.parent)

    job = _Job(args, _load(args))
    loaded = time.perf_counter()
    interrupted = job.sample()
    seconds = time.perf_counter() - loaded
    if not job.images:
        print("fastfar sample: interrupted before the first image was finished", file=sys.stderr)
        return 130
    written = job.write()
    count = len(job.images)
    found: dict[str, Any] = {
        "checkpoint": args.checkpoint,
        **written,
        "count": count,
        "interrupted": interrupted,
        "classes": job.classes,
        "per_class": args.per_class,
        "seed": args.seed,
        "guidance_scale": job.plan.guidance_scale,
        "diffusion_steps": list(job.plan.diffusion_steps),
        "head_calls": job.plan.head_calls,
        "backend": job.backend,
        "device": args.device,
        "dtype": job.dtype_name,
        "threads": job.threads,
        "batch_size": job.batch_size,
        "seconds": round(seconds, 4),
        "seconds_per_image": round(seconds / count, 5),
        "images_per_second": round(count / seconds, 3),
        "seconds_total": round(time.perf_counter() - start, 4),
    }
    if interrupted:
        print(
            f"fastfar sample: interrupted; {count} of {len(job.labels)} images were finished and "
            "are saved",
            file=sys.stderr,
        )
    print(json.dumps(found) if args.json else _report(found))
    return 130 if interrupted else 0


def _check_writable(folder: Path) -> None:
    """OSError before anything is sampled, if files cannot be made in `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write into {folder}: {error.strerror or error}; choose another place",
        ) from error


def _load(args: argparse.Namespace) -> FARPipeline:
    """The pipeline, able to make images; ValueError says what is missing."""
    from fastfar.pipeline import FARPipeline
    from fastfar.tokenizer import KLVAE

    # For the native back end the weights are packed as they are read, without a copy beside them.
    backend = args.backend if _device(args.device).type == "cpu" else None
    pipe = FARPipeline.from_pretrained(args.checkpoint, _dtype(args.dtype), backend)
    if args.vae is not None:
        pipe.tokenizer = KLVAE.load_official(args.vae)
    if pipe.tokenizer is None:
        raise ValueError(
            f"{args.checkpoint} has no tokenizer to turn latents into images; give the published "
            "KL-16 file with --vae FILE, or add it once with `fastfar convert FILE "
            f"{args.checkpoint}`"
        )
    channels = pipe.model.config.latent_channels
    if isinstance(pipe.tokenizer, KLVAE) and pipe.tokenizer.config.latent_channels != channels:
        raise ValueError(
            f"the tokenizer has {pipe.tokenizer.config.latent_channels} latent channels, the "
            f"model {channels}: they do not belong together"
        )
    return pipe


def parse_classes(text: str | None, num_classes: int, names: Sequence[str] | None) -> list[int]:
    """Labels that --classes means.

    Args:
        text: numbers or names, separated by commas; None is all classes, or ten evenly spread
            over them where there are more than 20.
        num_classes: of the model.
        names: of the classes, if the checkpoint carries them.

    Raises:
        ValueError: an empty list, a number out of range, an unknown name.
    """
    if text is None:
        if num_classes <= _MANY_CLASSES:
            return list(range(num_classes))
        return [i * num_classes // 10 for i in range(10)]
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ValueError("--classes is empty; give numbers or names, such as --classes 0,1,2")
    numbers = {name.lower(): label for label, name in enumerate(names or ())}
    known = ", ".join(names) if names else "no names in this checkpoint"
    labels = []
    for word in words:
        label = numbers.get(word.lower(), int(word) if word.isascii() and word.isdigit() else -1)
        if not 0 <= label < num_classes:
            raise ValueError(
                f"--classes: {word!r} is not a class of this model; there are the numbers "
                f"0..{num_classes - 1} and the names: {known}"
            )
        labels.append(label)
    return labels


class _Job:
    """One run: what is sampled, and the images that are finished."""

    def __init__(self, args: argparse.Namespace, pipe: FARPipeline) -> None:
        import torch

        from fastfar import backend
        from fastfar.prepared import native_reason

        self.args, self.pipe = args, pipe
        config = pipe.model.config
        self.plan: SamplingPlan = plan_named(args.plan, pipe.plan).with_changes(
            guidance_scale=args.guidance_scale, diffusion_steps=args.diffusion_steps
        )
        self.classes = parse_classes(args.classes, config.num_classes, pipe.class_names)
        self.labels = [label for label in self.classes for _ in range(args.per_class)]
        device = _device(args.device)
        dtype = _dtype(args.dtype)
        self.backend = backend.resolve(args.backend, device, dtype, native_reason(config))
        self.dtype = dtype or backend.best_dtype(self.backend, device)
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        self.batch_size = min(
            args.batch_size or max(1, _TOKENS_PER_BATCH // config.num_tokens), len(self.labels)
        )
        pipe.to(device)
        self.threads = torch.get_num_threads()
        self.images: list[Image.Image] = []
        self.levels: list[list[Image.Image]] = [[] for _ in self.plan.levels]

    def sample(self) -> bool:
        """Fill `images` (and `levels`) batch by batch; True if Ctrl-C ended it."""
        from tqdm import tqdm

        from fastfar.profiling import trace

        batches = -(-len(self.labels) // self.batch_size)
        bar_options = {"desc": f"{len(self.labels)} images", "disable": self.args.quiet}
        total = batches * self.plan.head_calls
        with trace(self.args.trace), tqdm(total=total, unit="step", **bar_options) as bar:
            try:
                for first in range(0, len(self.labels), self.batch_size):
                    self._batch(first, bar)
            except KeyboardInterrupt:
                return True
        return False

    def _batch(self, first: int, bar: Any) -> None:
        from fastfar.noise import SeededNoise
        from fastfar.pictures import decode_levels

        config = self.pipe.model.config
        labels = self.labels[first : first + self.batch_size]
        keys = [(self.args.seed, first + row) for row in range(len(labels))]
        kept: list[Tensor] = []

        def on_level(pipe: FARPipeline, step: int, latents: Tensor) -> None:
            bar.update(self.plan.diffusion_steps[step])
            if not bool(latents.isfinite().all()):
                raise ValueError(
                    f"the latents hold NaN or infinity after outer step {step + 1} of "
                    f"{len(self.plan)}; try --dtype float32. If that does not help, the model is "
                    "undertrained and needs a plan with x0_range"
                )
            if self.args.levels:
                kept.append(latents)

        output = self.pipe(
            labels,
            plan=self.plan,
            noise=SeededNoise(keys, config.num_tokens, config.token_dim),
            backend=self.args.backend,
            dtype=self.dtype,
            callback_on_level_end=on_level,
            whole_levels=self.args.levels,
            return_dict=False,
        )
        assert isinstance(output, tuple)
        levels = decode_levels(self.pipe, kept)
        for step, images in enumerate(levels):
            self.levels[step].extend(images)
        self.images.extend(cast("list[Image.Image]", output[0]))

    def write(self) -> dict[str, Any]:
        """Write the grid and what else was asked for; the paths, for the report."""
        from fastfar.pictures import level_strip, make_grid, save_animation, save_png

        args = self.args
        rows = self._rows(self.images)
        options: dict[str, Any] = {"scale": args.scale}
        if args.labels:
            names = self.pipe.class_names or tuple(map(str, range(max(self.classes) + 1)))
            options["labels"] = [names[label] for label in self.classes[: len(rows)]]
        save_png(args.output, make_grid(rows, **options))
        written: dict[str, Any] = {"output": str(args.output)}
        if args.images is not None:
            for index, image in enumerate(self.images):
                save_png(args.images / str(self.labels[index]) / f"{index:06d}.png", image)
            written["images"] = str(args.images)
        if args.trace is not None:
            written["trace"] = str(args.trace)
        if args.levels:
            strip, animation = (
                args.output.with_name(f"{args.output.stem}-levels{suffix}")
                for suffix in (".png", ".gif")
            )
            grids = [self._rows(images) for images in self.levels]
            firsts = [[row[0] for row in grid] for grid in grids]
            save_png(strip, level_strip(firsts, **options))
            save_animation(animation, [make_grid(grid, **options) for grid in grids])
            written |= {"levels": str(strip), "animation": str(animation)}
        return written

    def _rows(self, images: list[Image.Image]) -> list[list[Image.Image]]:
        """One row per class; the last one may be short."""
        count = self.args.per_class
        return [images[start : start + count] for start in range(0, len(images), count)]


def _device(name: str) -> Any:
    import torch

    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is not a device; give cpu, cuda or cuda:1") from error


def _dtype(name: str) -> torch.dtype | None:
    import torch

    return None if name == "auto" else cast(torch.dtype, getattr(torch, name))


def _report(found: dict[str, Any]) -> str:
    count, each = found["count"], found["seconds_per_image"]
    also = [str(found[name]) for name in _ALSO if name in found]
    return "\n".join(
        [
            f"{found['output']}: {count} image{'s' if count > 1 else ''}, "
            f"{len(found['classes'])} classes x {found['per_class']}, seed {found['seed']}",
            *([f"also written: {', '.join(also)}"] if also else []),
            f"{found['seconds_total']:.2f} s in all, of which sampling {found['seconds']:.2f} s: "
            f"{1000 * each:.1f} ms per image, {found['images_per_second']:.2f} images/s",
            f"back end {found['backend']} on {found['device']} in {found['dtype']}, "
            f"{found['threads']} threads, batches of {found['batch_size']}, "
            f"{found['head_calls']} head calls per token",
        ]
    )
