"""Models packed for the native back end: made, loaded, refused, and how much memory that takes."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_far import TINY, State, tiny_model, tiny_state, training_checkpoint
from tiny_run import tiny_pipeline
from torch import Tensor

import fastfar
from fastfar import FAR, FARConfig, FARPipeline, SamplingPlan, checkpoint, cli, sampling
from fastfar._weights import skeleton
from fastfar.packing import PackedWeight, pack, packed
from fastfar.prepared import PreparedFAR, prepare_native

HERE = Path(__file__).parent
PLAN = SamplingPlan.official("mask", diffusion_steps=2).with_changes(x0_range=(-2.0, 2.0))
DTYPES = (torch.float32, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("library")


def sample(model: FAR, **options: Any) -> Tensor:
    return fastfar.sample_latents(model, [3, 7], PLAN, generator=0, **options)


@pytest.fixture
def prepared() -> PreparedFAR:
    return prepare_native(tiny_model(), torch.bfloat16)


# --- packed weights ---------------------------------------------------------------------------


def test_a_packed_weight_knows_what_it_is() -> None:
    weight_NK = torch.randn(40, 24)
    result = pack(weight_NK, torch.bfloat16)
    assert isinstance(result, PackedWeight) and "40 x 24" in repr(result)
    assert (result.out_features, result.in_features) == (40, 24)
    assert result.compute_dtype is torch.bfloat16 and result.numel() == 2 * 64 * 32
    assert packed(result) is result and copy.deepcopy([result])[0] is result
    assert packed(weight_NK.requires_grad_()).compute_dtype is torch.float32
    with pytest.raises(ValueError, match="cannot be saved"):
        pickle.dumps(result)


def test_what_cannot_be_packed() -> None:
    with pytest.raises(TypeError, match=r"float64 as .*use float32 or bfloat16"):
        pack(torch.zeros(4, 4, dtype=torch.float64), torch.float32)
    with pytest.raises(TypeError, match=r"as torch.float16; use float32 or bfloat16"):
        pack(torch.zeros(4, 4), torch.float16)
    with pytest.raises(ValueError, match=r"2 dimensions, got \(4,\)"):
        pack(torch.zeros(4), torch.float32)
    with pytest.raises(ValueError, match="on the CPU"):
        pack(torch.zeros(4, 4, device="meta"), torch.float32)


# --- what a prepared model is -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_matrices_are_packed_and_the_rest_is_float32(dtype: torch.dtype) -> None:
    model = prepare_native(tiny_model().double(), dtype)
    assert isinstance(model, FAR) and not model.training and model.compute_dtype is dtype
    parameters = dict(model.named_parameters())
    assert all(p.dtype is torch.float32 and not p.requires_grad for p in parameters.values())
    names = {name for name in tiny_state() if not name.startswith("diffloss.")}
    layers = {name.removesuffix(".weight") for name in names - set(parameters)}
    assert len(layers) == 1 + 4 * 3 and "decoder_embed" in layers  # three blocks
    for name in layers:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, PackedWeight) and weight.compute_dtype is dtype, name


def test_the_model_that_it_is_made_of_stays_as_it_is() -> None:
    model, state = tiny_model(), tiny_state()
    prepared = prepare_native(model, torch.float32)
    with torch.no_grad():
        prepared.fake_latent.add_(1.0)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())


def test_it_gives_z_outside_sampling_too(prepared: PreparedFAR) -> None:
    model = tiny_model()
    tokens_BLP, labels_B = torch.randn(2, 16, 6), torch.tensor([1, 7])
    with torch.no_grad():
        z_BLD = model(tokens_BLP, model.class_embedding(labels_B))
    ours_BLD = prepared(tokens_BLP, prepared.class_embedding(labels_B))
    assert ours_BLD.dtype is torch.float32
    assert 0 < (ours_BLD - z_BLD).norm() / z_BLD.norm() < 2e-2


# --- what it refuses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "what"),
    [
        (lambda model: model.train(), "cannot be trained"),
        (lambda model: model.requires_grad_(), "no gradients"),
        (lambda model: model.state_dict(), "cannot be read back or saved"),
        (lambda model: model.load_state_dict({}), "takes no other weights"),
        (lambda model: model.head, "inside sampling only"),
        (lambda model: model.half(), "another dtype or device"),
        (lambda model: model.to(torch.bfloat16), "another dtype or device"),
        (lambda model: model.to("meta"), "another dtype or device"),
        (lambda model: prepare_native(model, torch.float32), "cannot be read back or saved"),
        (
            lambda model: fastfar.diffusion_loss(
                model, torch.zeros(1, 6, 4, 4), torch.zeros(1, dtype=torch.int64)
            ),
            "inside sampling only",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_needs_the_original_weights_is_refused(
    prepared: PreparedFAR, action: Callable[[FAR], object], what: str
) -> None:
    with pytest.raises(ValueError, match=rf"in bfloat16: .*{what}\. Load the checkpoint again"):
        action(prepared)


def test_it_cannot_be_saved(prepared: PreparedFAR, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read back or saved"):
        prepared.save_pretrained(tmp_path / "far")
    assert not any(tmp_path.rglob("*.safetensors"))
    with pytest.raises(ValueError, match="cannot be saved"):
        torch.save(prepared, io.BytesIO())


def test_what_changes_nothing_is_allowed(prepared: PreparedFAR) -> None:
    expected = sample(prepared)
    same = prepared.to("cpu").float().eval().train(False).requires_grad_(False)
    assert same is prepared
    assert torch.equal(sample(copy.deepcopy(prepared)), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "torch"}, "back end 'torch' in torch.bfloat16"),
        ({"backend": "reference"}, "back end 'reference' in torch.bfloat16"),
        ({"dtype": torch.float32}, "back end 'native' in torch.float32"),
        ({"dtype": torch.float64}, "back end 'torch' in torch.float64"),
    ],
    ids=str,
)
def test_it_is_sampled_on_its_own_back_end_and_dtype_only(
    prepared: PreparedFAR, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"packed for the native back end.*{message}"):
        sample(prepared, **options)
    expected = sample(prepared)
    assert torch.equal(sample(prepared, dtype=torch.bfloat16, backend="native"), expected)


def test_sizes_and_dtypes_that_the_kernels_do_not_take(tiny_model: FAR) -> None:
    message = "head whose width is a multiple of 16, this one has 20"
    with pytest.raises(ValueError, match=message):
        prepare_native(tiny_model, torch.float32)
    with pytest.raises(ValueError, match=message):
        fastfar.sample_latents(tiny_model, [0], PLAN, backend="native")
    assert fastfar.sample_latents(tiny_model, [0], PLAN).isfinite().all()  # auto: torch
    state = tiny_state()
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(ValueError, match="float32 or bfloat16"):
            fastfar.load_official(state, num_heads=2, backend="native", dtype=dtype)


# --- loading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loading_packs_what_preparing_packs(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    state = {key: value.to(stored) for key, value in tiny_state().items()}
    plain = fastfar.load_official(state, num_heads=2)
    expected = sample(plain, backend="native", dtype=dtype)
    save_file(state, tmp_path / "far.safetensors")
    torch.save(training_checkpoint(state), tmp_path / "far.pth")
    sources = (state, tmp_path / "far.safetensors", tmp_path / "far.pth")
    for source in sources:
        options: dict[str, Any] = {"use_ema": False, "dtype": dtype, "backend": "native"}
        model = fastfar.load_official(source, num_heads=2, **options)
        assert isinstance(model, PreparedFAR) and model.compute_dtype is dtype
        assert torch.equal(sample(model), expected)


def test_the_model_does_not_depend_on_its_file(tmp_path: Path) -> None:
    path = tmp_path / "far.safetensors"
    save_file(tiny_state(), path)
    model = fastfar.load_official(path, num_heads=2, backend="native")
    expected = sample(model)
    with path.open("r+b") as file:  # in place: the very pages that were mapped
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(sample(model), expected)


def test_back_end_and_dtype_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(**options: Any) -> FAR:
        return fastfar.load_official(tiny_state(), num_heads=2, **options)

    for backend in (None, "torch", "reference"):
        model = load(backend=backend)
        assert type(model) is FAR and model.fake_latent.dtype is torch.float32
    best = fastfar.backend.best_dtype("native", "cpu")
    for backend in ("native", "auto"):
        model = load(backend=backend)
        assert isinstance(model, PreparedFAR) and model.compute_dtype is best
    assert type(load(backend="auto", dtype=torch.float64)) is FAR
    with pytest.raises(ValueError, match="allowed: auto, reference"):
        load(backend="abacus")
    monkeypatch.setenv("FASTFAR_BACKEND", "torch")
    assert type(load(backend="auto")) is FAR


def test_errors_of_a_checkpoint_are_those_of_any_loading() -> None:
    state = tiny_state()
    del state["mask_token"]
    with pytest.raises(ValueError, match=r"missing \(1\): mask_token"):
        fastfar.load_official(state, num_heads=2, backend="native")


def test_the_own_format(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    call: dict[str, Any] = {"generator": 0, "output_type": "latent"}
    expected = pipe([0, 3], backend="native", **call).images
    loaded = FARPipeline.from_pretrained(tmp_path, backend="native")
    assert isinstance(loaded.model, PreparedFAR)
    assert torch.equal(loaded([0, 3], **call).images, expected)
    assert torch.equal(loaded.to("cpu")([0, 3], **call).images, expected)
    with pytest.raises(ValueError, match="cannot be read back or saved"):
        loaded.save_pretrained(tmp_path)
    assert torch.equal(FARPipeline.from_pretrained(tmp_path)([0, 3], **call).images, expected)
    model = FAR.from_pretrained(tmp_path, torch.float32, backend="native")
    assert isinstance(model, PreparedFAR) and model.compute_dtype is torch.float32


@pytest.mark.parametrize(
    ("options", "packs"),
    [
        ([], True),
        (["--backend", "native", "--dtype", "float32"], True),
        (["--dtype", "float64"], False),
        (["--backend", "torch"], False),
    ],
    ids=str,
)
def test_the_command_packs_as_it_reads(
    options: list[str], packs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "far")
    made: list[FAR] = []
    prepare = checkpoint.prepare

    def recorded(*arguments: Any) -> PreparedFAR:
        made.append(prepare(*arguments))
        return made[-1]  # type: ignore[return-value]

    def refused(*arguments: Any) -> None:
        raise AssertionError("packed again, from a model that was loaded whole")

    monkeypatch.setattr(checkpoint, "prepare", recorded)
    monkeypatch.setattr(sampling, "prepare_native", refused)
    arguments = ["--quiet", "--output", str(tmp_path / "a.png"), *options]
    assert cli.main(["sample", str(tmp_path / "far"), *arguments]) == 0
    assert len(made) == packs


# --- memory -----------------------------------------------------------------------------------

_MEASURE = """
import sys, torch, fastfar
torch.set_num_threads(1)
plan = fastfar.SamplingPlan.official("nomask", diffusion_steps=2)

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

def run(path):
    model = fastfar.load_official(path, num_heads=8, dtype=torch.bfloat16, backend="native")
    fastfar.sample_latents(model, [1], plan, generator=0)
    return model

run(sys.argv[2])  # imports, and buffers of the libraries
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # start the high-water mark afresh
model = run(sys.argv[1])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_peak_memory_of_loading_and_sampling(tmp_path: Path, stored: torch.dtype) -> None:
    """At most 1.3 times the bfloat16 weights and 60 MB, with mapped pages, scratch and all.

    An unpacked copy would add 1.0 or 2.0 times the weights. (The bound for FAR-H, with 15 times as
    many weights, is 1.3 times them and 300 MB.)
    """
    config = FARConfig(width=512, encoder_depth=8, decoder_depth=8, num_heads=8, head_width=512)
    sizes: dict[str, int] = {}
    for name, settings in (("big", config), ("tiny", TINY)):
        with skeleton():
            shapes = {key: value.shape for key, value in FAR(settings).state_dict().items()}
        state: State = {key: torch.full(shape, 0.01, dtype=stored) for key, shape in shapes.items()}
        save_file(state, tmp_path / f"{name}.safetensors")
        sizes[name] = 2 * sum(value.numel() for value in state.values())
        del state
    paths = [str(tmp_path / f"{name}.safetensors") for name in sizes]
    out = subprocess.run(
        [sys.executable, "-c", _MEASURE, *paths],
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    peak, weights = int(out.stdout), sizes["big"]
    assert weights > 110e6
    assert 0.9 * weights < peak < 1.3 * weights + 60e6, f"{peak / 1e6:.0f} MB"
