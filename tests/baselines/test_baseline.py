"""What the baselines have in common: `create`, its errors, the two stages, and `make`."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfar import baselines, profiling
from fastfar.baselines import FORMS, NAMES, Baseline, create
from fastfar.baselines import _baseline as module
from fastfar.baselines._baseline import Settings, make, num_parameters
from fastfar.baselines._linear import PreparedLinear, can_pack
from fastfar.graphs import Graphed

BF16 = torch.bfloat16


class Net(nn.Module):
    """A kernel, a norm, a bias, and a whole number that is not learned."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(400, 300)
        self.norm = nn.LayerNorm(300)
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))


CONSTANTS = {"count": torch.tensor([3, 4])}


class Toy(Baseline):
    """Its tokens are its arguments."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(
            "toy",
            settings,
            title="Toy",
            dtype=settings.compute_dtype(torch.float16),
            steps=3,
            guidance_scale=1.5,
            num_parameters=1,
            ways="none",
        )

    def _tokens(self, labels_B: Tensor, **options: Any) -> Tensor:
        assert torch.is_inference_mode_enabled()
        self.options = options
        return labels_B

    def _decode(self, tokens: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        return tokens / 999


# --- create ----------------------------------------------------------------------------------


def test_names_do_not_wait_for_pytorch() -> None:
    code = "import sys, fastfar.baselines as b; print(len(b.NAMES), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["10", "False"]


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Bseline'"):
        baselines.Bseline  # noqa: B018


@pytest.mark.parametrize("name", [name for name in NAMES if "30" not in name])
def test_every_name_has_both_forms(name: str) -> None:
    """On the meta device: sizes without memory."""
    for form in FORMS:
        baseline = create(name, form, device="meta")
        assert (baseline.name, baseline.form, baseline.device.type) == (name, form, "meta")
        assert baseline.random_weights and baseline.title and baseline.ways
        assert baseline.steps == (10 if name.startswith("var") else 256)
        assert 5e7 < baseline.num_parameters < 3e9
        assert baseline.guidance_scale > 1
        assert baseline.extrapolates == name.startswith("mar")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "var_d18"}, "unknown baseline 'var_d18'; known are var_d16, "),
        ({"form": "best"}, "unknown form 'best' of var_d16; known are published, well_run"),
        ({"dtype": torch.float64}, "dtype must be None or one of .*torch.float64"),
        ({"compile": True}, "the published form runs without torch.compile"),
        ({"weights": {"model": "x.pth"}}, "weights must be {'model': source, 'tokenizer': source}"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(**{"name": "var_d16", **arguments})


def test_weights_that_are_no_mapping() -> None:
    with pytest.raises(TypeError, match="weights must be a mapping or None, got str"):
        create("var_d16", weights="var.pth")  # type: ignore[arg-type]


def test_settings_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Settings]] = []

    class Family:
        @staticmethod
        def build(name: str, settings: Settings) -> Baseline:
            seen.append((name, settings))
            return Toy(settings)

    monkeypatch.setattr(module.importlib, "import_module", lambda name: Family)
    weights = {"model": "a.pth", "tokenizer": "b.pth"}
    create("mar_base", "well_run", dtype=BF16, weights=weights, seed=3, compile=False)
    expected = Settings("well_run", torch.device("cpu"), BF16, weights, 3, False)
    assert seen == [("mar_base", expected)]


def test_dtype_of_a_form() -> None:
    gpu = torch.device("cuda")
    half = torch.float16
    assert Settings("published", gpu).compute_dtype(half) == half
    assert Settings("well_run", gpu).compute_dtype(half) == BF16
    assert Settings("published").compute_dtype(half) == BF16
    assert Settings("published", dtype=torch.float32).compute_dtype(half) == torch.float32


# --- the two stages --------------------------------------------------------------------------


def test_stages() -> None:
    toy = Toy(Settings())
    images = toy.generate(torch.tensor([0, 999], dtype=torch.int32), greedy=True)
    assert images.tolist() == [0, 1]
    assert toy.options == {
        "generator": None,
        "noise": None,
        "guidance_scale": 1.5,
        "greedy": True,
        "timed_steps": None,
    }
    toy.tokens(torch.tensor([1]), guidance_scale=0.0)
    assert toy.options["guidance_scale"] == 0.0


@pytest.mark.parametrize(
    "labels, error, message",
    [
        (
            torch.tensor([1000]),
            ValueError,
            r"labels must be in 0..999 \(ImageNet\), got 1000..1000",
        ),
        (torch.tensor([-1, 5]), ValueError, "got -1..5"),
        (torch.tensor([[1]]), ValueError, r"shape \(B,\), B >= 1, got \(1, 1\)"),
        (torch.tensor([], dtype=torch.int64), ValueError, r"got \(0,\)"),
        (torch.tensor([1.0]), TypeError, "int64 tensor of classes, got torch.float32"),
        ([1, 2], TypeError, "got list"),
    ],
)
def test_labels_that_are_no_classes(labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Toy(Settings()).tokens(labels)


def test_steps_cannot_be_left_out_where_all_are_run() -> None:
    toy = Toy(Settings())
    with pytest.raises(ValueError, match="Toy always runs all of its 3 steps"):
        toy.tokens(torch.tensor([1]), timed_steps=[0])
    with pytest.raises(ValueError, match="none stands for others"):
        toy.step_weights([0])


def test_decoding_is_a_named_range() -> None:
    with profiling.ranges(), torch.profiler.profile() as profile:
        Toy(Settings()).decode(torch.ones(1))
    assert "decode" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_autocast(dtype: torch.dtype) -> None:
    x = torch.ones(2, 2)
    with Toy(Settings(dtype=dtype)).autocast():
        assert (x @ x).dtype == dtype
    with Toy(Settings(device=torch.device("meta"))).autocast():
        assert (x @ x).dtype == torch.float32


# --- weights ---------------------------------------------------------------------------------


def test_random_weights() -> None:
    """Scaled by fan in, from the key and the seed, in float32 and then rounded."""
    exact = make(Net, Settings(), "model", torch.float32, constants=CONSTANTS)
    half = make(Net, Settings(), "model", BF16, constants=CONSTANTS)
    other = make(Net, Settings(seed=1), "model", torch.float32, constants=CONSTANTS)
    assert abs(float(exact.linear.weight.std()) * 400**0.5 - 1) < 0.02
    assert (exact.norm.weight == 1).all() and 0 < exact.linear.bias.std() < 0.03
    for key, value in half.named_parameters():
        assert torch.equal(value, exact.get_parameter(key).to(BF16)), key
        assert not value.requires_grad
    assert not torch.equal(other.linear.weight, exact.linear.weight)
    assert exact.get_buffer("count").tolist() == [3, 4] and not exact.training
    assert num_parameters(exact) == 300 * 401 + 600


def test_a_rule_of_the_model() -> None:
    def rule(key: str, shape: tuple[int, ...]) -> tuple[float, float] | None:
        return (5.0, 0.0) if key == "linear.bias" else None

    net = make(Net, Settings(), "model", torch.float32, rule=rule, constants=CONSTANTS)
    assert (net.linear.bias == 5).all() and net.linear.weight.std() > 0


def state() -> dict[str, Tensor]:
    net = {"linear.weight": torch.randn(300, 400), "linear.bias": torch.randn(300)}
    norm = {"norm.weight": torch.randn(300), "norm.bias": torch.randn(300)}
    return {**net, **norm, "count": torch.tensor([9, 9]), "encoder.weight": torch.zeros(2)}


def settings_of(model: object) -> Settings:
    return Settings(weights={"model": model, "tokenizer": {}})  # type: ignore[dict-item]


def test_given_weights(tmp_path: Path) -> None:
    given = state()
    torch.save({"state_dict": given}, tmp_path / "net.ckpt")
    for source in (given, tmp_path / "net.ckpt"):
        for dtype in (torch.float32, BF16):
            net = make(
                Net,
                settings_of(source),
                "model",
                dtype,
                constants=CONSTANTS,
                ignored=("encoder.",),
            )
            for key, value in net.named_parameters():
                assert torch.equal(value, given[key].to(dtype)), key
            assert net.get_buffer("count").tolist() == [3, 4]


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(
        ValueError, match=r"does not fit Net. Keys unexpected \(1\): encoder.weight"
    ):
        make(Net, settings_of(state()), "model", BF16, constants=CONSTANTS)
    wrong = {**state(), "count": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"count is \(3,\) and should be \(2,\)"):
        make(Net, settings_of(wrong), "model", BF16, constants=CONSTANTS, ignored=("encoder.",))


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code from a checkpoint was run",))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(pickle.dumps({"linear.weight": _Evil()}, protocol=2))
    with pytest.raises(ValueError, match=r"never runs code|not a readable"):
        make(Net, settings_of(path), "model", BF16)


def test_on_the_meta_device_nothing_is_made() -> None:
    settings = dataclasses.replace(Settings(), device=torch.device("meta"))
    net = make(Net, settings, "model", BF16, constants=CONSTANTS)
    assert all(value.is_meta for value in net.state_dict().values())
    assert net.linear.weight.dtype == BF16


# --- parts of the well run forms -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (2, 37)])
def test_prepared_linear(dtype: torch.dtype, gelu: bool, rows: tuple[int, int]) -> None:
    weight, bias = torch.randn(48, 33, dtype=dtype), torch.randn(48, dtype=dtype)
    x = torch.randn(*rows, 33, dtype=dtype)
    for each in (bias, None):
        prepared = PreparedLinear(weight, each, gelu=gelu)
        assert prepared.packed == can_pack(weight)
        expected = x.double() @ weight.double().T + (0 if each is None else each.double())
        if gelu:
            expected = F.gelu(expected, approximate="tanh")
        out = prepared(x)
        assert out.dtype == dtype and out.shape == (*rows, 48)
        limit = 1e-6 if dtype == torch.float32 else 4e-3
        assert (out.double() - expected).norm() < limit * expected.norm()


class Replays:
    """Stands for CUDA graphs: a replay runs the body again, on the same buffers."""

    def capture(self, bodies: Sequence[Any]) -> list[Any]:
        for body in bodies:
            body()
        return list(bodies)

    def fill(self, buffer: Tensor, value: Tensor) -> None:
        buffer.copy_(value)

    def in_turn(self) -> Any:
        return torch.no_grad()


def test_a_graph_reads_its_own_buffers() -> None:
    def sums(x: Tensor, y: Tensor) -> Tensor:
        return x + 2 * y

    x, y = torch.ones(3), torch.ones(3)
    graphed = Graphed(sums, (x, y), Replays())
    x.fill_(50)  # an example is not what is read
    first = graphed(torch.zeros(3), torch.ones(3))
    second = graphed(torch.ones(3), torch.ones(3))
    assert first.tolist() == [2, 2, 2] and second.tolist() == [3, 3, 3]


def test_a_graph_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="CUDA graphs need a model on a CUDA device"):
        Graphed(torch.neg, (torch.ones(1),))
