"""The command `fastfar`: help, sample, convert and doctor on tiny models."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Captured, fails, picture
from PIL import Image
from tiny_far import tiny_state
from tiny_run import tiny_pipeline

from fastfar import _files, backend, cli
from fastfar.backend import BACKENDS
from fastfar.cli import sample as sample_command
from fastfar.kl_vae import KLVAE, KLVAEConfig
from fastfar.pipeline import FARPipeline

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """Four classes, 8 x 8 pixels, three levels."""
    tiny_pipeline().save_pretrained(tmp_path / "far")
    return str(tmp_path / "far")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=120
    )


# --- all commands -----------------------------------------------------------------------------


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_shows_an_example(command: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "example" in text and f"  fastfar {command}" in text


def test_sample_names_the_back_ends(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sample", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ", ".join(("auto", *BACKENDS)) in text


def test_help_lists_all_commands(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "example: fastfar sample" in text
    assert all(f"    {name} " in text for name in cli.COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["paint"], ["sample", "--dtype", "int7"]])
def test_wrong_command_lines(arguments: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2 and "usage: fastfar" in capsys.readouterr().err


def test_help_does_not_wait_for_pytorch() -> None:
    script = (
        "import sys\nfrom fastfar.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'numpy', 'PIL') if name in sys.modules])"
    )
    for arguments in (["--help"], ["sample", "--help"], ["train", "--help"], ["--version"]):
        found = python("-c", script, *arguments)
        assert found.stdout.splitlines()[-1] == "[]", (arguments, found.stderr)


def test_names_of_the_package_are_lazy_and_all_there() -> None:
    script = """
import sys, fastfar
assert "torch" not in sys.modules
assert set(fastfar.__all__) <= set(dir(fastfar))
from fastfar import FAR, FARConfig
assert FAR is sys.modules["fastfar.model"].FAR
assert "fastfar.training" not in sys.modules and "fastfar.pipeline" not in sys.modules
assert all(getattr(fastfar, name) is not None for name in fastfar.__all__)
assert fastfar.training.Trainer and fastfar.levels
for name in ("nothing", "_nothing"):
    try:
        getattr(fastfar, name)
    except AttributeError as error:
        assert repr(name) in str(error)
    else:
        raise AssertionError(name)
"""
    found = python("-c", script)
    assert found.returncode == 0, found.stderr


# --- sample -----------------------------------------------------------------------------------


def test_sample_writes_a_grid(checkpoint: str, tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "new" / "grid.png"
    arguments = ["--per-class", "3", "--scale", "2", "--output", str(path), "--seed", "5"]
    assert cli.main(["sample", checkpoint, *arguments]) == 0
    grid = picture(path)
    assert grid.shape == (4 * 16 + 3 * 2, 3 * 16 + 2 * 2)
    output, errors = capsys.readouterr()
    assert output.startswith(f"{path}: 12 images, 4 classes x 3, seed 5\n")
    assert "s in all" in output and "ms per image" in output and "images/s" in output
    used = backend.resolve("auto")  # the model is one that the native kernels take
    assert f"back end {used} on cpu in" in output and "6 head calls per token" in output
    assert "12 images" in errors and "6/6" in errors  # the progress bar
    pipe = FARPipeline.from_pretrained(checkpoint)
    images = pipe([label for label in range(4) for _ in range(3)], generator=5).images
    assert (np.asarray(images[4]) == grid[18:34:2, 18:34:2]).all()  # row 1, column 1


def test_sample_says_it_in_json(checkpoint: str, tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "grid.png"
    arguments = ["--classes", "left side, 1", "--per-class", "2", "--diffusion-steps", "3"]
    arguments += ["--guidance-scale", "1.5", "--dtype", "float32", "--backend", "reference"]
    assert cli.main(["sample", checkpoint, *arguments, "--output", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = {
        "checkpoint": checkpoint,
        "output": str(path),
        "count": 4,
        "interrupted": False,
        "classes": [3, 1],
        "per_class": 2,
        "seed": 0,
        "guidance_scale": 1.5,
        "diffusion_steps": [3, 3, 3],
        "head_calls": 9,
        "backend": "reference",
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "batch_size": 4,
    }
    assert expected.items() <= found.items()
    assert found["seconds_per_image"] == pytest.approx(found["seconds"] / 4, rel=0.01, abs=1e-4)
    assert found["seconds_total"] > found["seconds"] > 0 and found["images_per_second"] > 0


def test_the_batch_size_changes_no_image(checkpoint: str, tmp_path: Path) -> None:
    shown = []
    for size in ("1", "3", "8"):
        folder = tmp_path / size
        options = ["--batch-size", size, "--per-class", "2", "--images", str(folder), "--quiet"]
        options += ["--dtype", "float32", "--output", str(folder / "grid.png")]
        assert cli.main(["sample", checkpoint, *options]) == 0
        files = sorted(folder.glob("*/*.png"))
        assert [str(file.relative_to(folder)) for file in files] == [
            f"{index // 2}/{index:06d}.png" for index in range(8)
        ]
        shown.append(np.stack([picture(file) for file in files]).astype(int))
    assert np.abs(shown[0] - shown[1]).max() <= 1 and np.abs(shown[0] - shown[2]).max() <= 1
    assert np.abs(shown[0][0] - shown[0][1]).max() > 5  # not all alike


def test_sample_by_a_published_plan(checkpoint: str, tmp_path: Path, capsys: Captured) -> None:
    size = ["--diffusion-steps", "2", "--classes", "1", "--per-class", "1"]
    where = ["--output", str(tmp_path / "grid.png"), "--quiet", "--json"]
    assert cli.main(["sample", checkpoint, "--plan", "official-mask", *size, *where]) == 0
    assert json.loads(capsys.readouterr().out)["diffusion_steps"] == [2] * 11


def test_sample_shows_the_levels(checkpoint: str, tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "out.png"
    options = ["--classes", "0,2", "--per-class", "3", "--batch-size", "4", "--levels"]
    assert cli.main(["sample", checkpoint, *options, "--output", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["levels"] == str(tmp_path / "out-levels.png")
    assert found["animation"] == str(tmp_path / "out-levels.gif")
    grid, strip = picture(path), picture(found["levels"])
    assert strip.shape == (2 * 8 + 2, 3 * 8 + 2 * 2)
    assert (strip[:8, 20:] == grid[:8, :8]).all()  # the last level is the picture
    assert (strip[10:, 20:] == grid[10:, :8]).all()
    assert (strip[:8, :8] != strip[:8, 20:]).any()
    with Image.open(found["animation"]) as animation:
        assert animation.n_frames == 3 and animation.size == grid.shape[::-1]
        animation.seek(2)
        last = np.asarray(animation.convert("L")).astype(int)
    assert np.abs(last - grid).max() <= 1


def test_labels_are_written_beside_the_rows(checkpoint: str, tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    options = ["--quiet", "--labels", "--per-class", "6", "--output", str(path)]
    assert cli.main(["sample", checkpoint, *options]) == 0
    grid = picture(path)
    assert grid.shape[0] == 4 * 8 + 3 * 2 and grid.shape[1] > 6 * 8 + 5 * 2 + 20


def test_quiet_is_quiet(checkpoint: str, tmp_path: Path, capsys: Captured) -> None:
    options = ["--quiet", "--json", "--per-class", "1", "--output", str(tmp_path / "a.png")]
    assert cli.main(["sample", checkpoint, *options]) == 0
    assert capsys.readouterr().err == ""


def test_sample_with_a_published_autoencoder(tmp_path: Path, capsys: Captured) -> None:
    pipe = tiny_pipeline()
    FARPipeline(pipe.model, None, pipe.plan).save_pretrained(tmp_path / "far")
    files = {}
    for channels in (1, 3):
        config = KLVAEConfig(
            channels=32, channel_mults=(1, 2), blocks=1, latent_channels=channels
        )
        files[channels] = tmp_path / f"kl-{channels}.pth"
        torch.save({"model": KLVAE(config).state_dict()}, files[channels])
    output = tmp_path / "out.png"
    command = ["sample", str(tmp_path / "far"), "--per-class", "1", "--output", str(output)]
    assert "--vae FILE" in fails(capsys, *command)
    assert "3 latent channels" in fails(capsys, *command, "--vae", str(files[3]))
    assert not output.exists()
    assert cli.main([*command, "--vae", str(files[1])]) == 0
    assert picture(output).shape == (4 * 16 + 3 * 2, 16, 3)


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_ctrl_c_keeps_what_is_finished(
    checkpoint: str,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    finished: int,
) -> None:
    """Batches of three images, of which `finished` are whole when Ctrl-C comes."""
    plain, calls = FARPipeline.__call__, []

    def interrupted(self: FARPipeline, *arguments: Any, **options: Any) -> Any:
        calls.append(len(calls))
        inner = options.pop("callback_on_level_end")

        def callback(pipe: FARPipeline, step: int, latents: torch.Tensor) -> None:
            if len(calls) > finished and step == 1:
                raise KeyboardInterrupt
            inner(pipe, step, latents)

        return plain(self, *arguments, callback_on_level_end=callback, **options)

    monkeypatch.setattr(FARPipeline, "__call__", interrupted)
    output = tmp_path / "out.png"
    options = ["--per-class", "2", "--batch-size", "3", "--levels", "--json"]
    assert cli.main(["sample", checkpoint, *options, "--output", str(output)]) == 130
    text, errors = capsys.readouterr()
    assert "interrupted" in errors
    if finished == 0:
        assert text == "" and not output.exists()
        return
    found = json.loads(text)
    assert found["interrupted"] is True and found["count"] == 3 * finished
    assert f"{3 * finished} of 8 images were finished" in errors
    rows = -(-3 * finished // 2)
    assert picture(output).shape == (rows * 10 - 2, 18)
    assert picture(found["levels"]).shape == (rows * 10 - 2, 28)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "0,9"], "'9' is not a class of this model"),
        (["--classes", "top,hat"], "'hat' is not a class.*bottom, top, right, left side"),
        (["--classes", "-1"], "'-1' is not a class"),
        (["--classes", " , "], "--classes is empty"),
        (["--per-class", "0"], "--per-class must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--scale", "-2"], "--scale must be at least 1"),
        (["--output", "picture.jpg"], r"must end in \.png"),
        (["--backend", "abacus"], "abacus.*allowed: auto, reference"),
        (["--device", "abacus"], "'abacus' is not a device"),
        (["--guidance-scale", "-1"], "guidance_scale"),
        (["--guidance-scale", "nan"], "guidance_scale"),
        (["--diffusion-steps", "0"], "diffusion_steps"),
        (["--vae", "nothing.pth"], r"nothing\.pth"),
    ],
)
def test_wrong_arguments_of_sample(
    checkpoint: str, tmp_path: Path, capsys: Captured, options: list[str], message: str
) -> None:
    arguments = ["sample", checkpoint, "--output", str(tmp_path / "out.png"), *options]
    errors = fails(capsys, *arguments)


    assert re.search(message, errors), errors
    assert not (tmp_path / "out.png").exists()


def test_places_that_cannot_be_written(
    checkpoint: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    output = str(tmp_path / "file" / "out.png")
    assert "cannot write into" in fails(capsys, "sample", checkpoint, "--output", output)
    (tmp_path / "folder.png").mkdir()
    output = str(tmp_path / "folder.png")
    assert "is a folder" in fails(capsys, "sample", checkpoint, "--quiet", "--output", output)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_files, "_flush", full)
    output = str(tmp_path / "out.png")
    errors = fails(capsys, "sample", checkpoint, "--quiet", "--output", output)
    assert "No space left on device" in errors and "free space" in errors
    assert not Path(output).exists()


def test_no_such_checkpoint(tmp_path: Path, capsys: Captured) -> None:
    errors = fails(
        capsys, "sample", str(tmp_path / "none"), "--output", str(tmp_path / "out.png")
    )
    assert "no folder" in errors and "demo" in errors


def test_a_model_that_diverges_says_so(
    checkpoint: str, tmp_path: Path, capsys: Captured
) -> None:
    pipe = FARPipeline.from_pretrained(checkpoint)
    with torch.no_grad():
        pipe.model.head.final_layer.linear.bias.fill_(float("nan"))
    pipe.save_pretrained(checkpoint)
    output = str(tmp_path / "out.png")
    errors = fails(capsys, "sample", checkpoint, "--quiet", "--output", output)
    assert "NaN or infinity after outer step 1 of 3" in errors and "float32" in errors


def test_classes_by_default() -> None:
    parse = sample_command.parse_classes
    assert parse(None, 10, None) == list(range(10))
    assert parse(None, 1000, None) == [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]
    assert parse("7, 0,7", 10, None) == [7, 0, 7]
    assert parse("Ankle Boot,1", 10, ["t-shirt/top", "ankle boot"]) == [1, 1]
    assert parse("1", 2, ["1", "0"]) == [0]  # a name is a name, whatever it looks like
    with pytest.raises(ValueError, match="no names in this checkpoint"):
        parse("boot", 10, None)


def test_sampling_imports_nothing_heavy(checkpoint: str, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom fastfar.cli import main\nassert main(sys.argv[1:]) == 0\n"
        "heavy = ('torch._dynamo', 'torch._inductor', 'numpy.testing', 'huggingface_hub', 'sympy',"
        " 'rich', 'matplotlib', 'fastfar.training', 'fastfar.data', 'fastfar.evaluation')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    output = str(tmp_path / "out.png")
    found = python("-c", script, "sample", checkpoint, "--quiet", "--output", output)
    assert found.stdout.splitlines()[-1] == "[]", found.stdout + found.stderr


# --- convert and doctor -----------------------------------------------------------------------


def test_convert(tmp_path: Path, capsys: Captured) -> None:
    torch.save(tiny_state(), tmp_path / "far.pth")
    arguments = ["--num-heads", "2", "--json"]
    command = ["convert", str(tmp_path / "far.pth"), str(tmp_path / "far"), *arguments]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "far" and found["sizes"]["width"] == 32
    assert (tmp_path / "far" / "model.safetensors").is_file()
    assert "no.pth" in fails(capsys, "convert", str(tmp_path / "no.pth"), str(tmp_path / "b"))


def test_doctor(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backends"]["torch"] is None and found["torch"] == torch.__version__
    assert cli.main(["doctor"]) == 0
    assert "Back ends" in capsys.readouterr().out
    monkeypatch.setenv("FASTFAR_BACKEND", "abacus")
    assert cli.main(["doctor", "--json"]) == 1
