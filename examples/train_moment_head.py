"""Train a moment head for a checkpoint on its own sampling runs.

    python examples/train_moment_head.py demo runs/moments --images 1200 --steps 8000

Writes FOLDER/moments.safetensors: give it to `fastfar experiment fewstep E4 --moments FILE`, or put
it beside the model's weights. Stopped, it goes on where it was. About an hour on two cores with AMX
for the demo: most of it are the runs at T = 100.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import fastfar
from fastfar.data import balanced_labels
from fastfar.evaluation.samples import image_generator
from fastfar.training.moment_rows import MomentRows, sampled_runs
from fastfar.training.moments import MomentRecipe, train_moments

BATCH = 100


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder, hub name or demo")
    parser.add_argument("folder", type=Path, help="where the rows and the head are written")
    parser.add_argument("--images", type=int, default=1200, help="runs (%(default)s)")
    parser.add_argument("--steps", type=int, default=8000, help="of the training (%(default)s)")
    parser.add_argument("--teacher-steps", type=int, default=100, help="T (%(default)s)")
    args = parser.parse_args()

    pipe = fastfar.FARPipeline.from_pretrained(args.checkpoint)
    config = pipe.model.config
    plan = pipe.plan.with_changes(diffusion_steps=args.teacher_steps)
    labels_B = balanced_labels(args.images, config.num_classes)
    parts = []
    for start in range(0, args.images, BATCH):
        part_B = labels_B[start : start + BATCH]
        path = args.folder / "rows" / f"{start:06d}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            generators = [image_generator(0, start + i) for i in range(len(part_B))]
            runs = sampled_runs(pipe.model, plan, part_B, generators)
            MomentRows.write(pipe.model, plan, runs, path)
            print(f"{start + len(part_B)} of {args.images} runs", flush=True)
        parts.append(MomentRows(path, config.token_dim))
    recipe = MomentRecipe(steps=args.steps, mean_steps=args.steps // 8)
    head = train_moments(pipe.model, plan, parts, args.folder, recipe, on_log=print)
    head.save(args.folder / "moments.safetensors")


if __name__ == "__main__":
    main()
