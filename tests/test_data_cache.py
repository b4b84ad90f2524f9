"""The latent cache: what is read is what the tokenizer gives, and damage is found."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import write_class_folders
from safetensors.torch import load_file, save_file
from tiny_run import tiny_data
from torch import Tensor

from fastfar.cli import main
from fastfar.data import (
    Batches,
    Examples,
    ImageDataset,
    LatentCache,
    build_cache,
    latents,
    measure_statistics,
    open_data,
)
from fastfar.kl_vae import KLVAE, KLVAEConfig
from fastfar.tokenizer import PixelTokenizer

SIZES = KLVAEConfig(
    channels=32,
    channel_mults=(1, 1),
    blocks=1,
    z_channels=4,
    latent_channels=4,
    encoder_attention=(),
    scale=0.5,
)
ROWS = torch.arange(9)
FLIP = ROWS % 2 == 0


def tiny_vae(seed: int = 0) -> KLVAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KLVAE(SIZES).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae() -> KLVAE:
    return tiny_vae()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    folder = tmp_path_factory.mktemp("pictures")
    write_class_folders(folder)
    return open_data(folder, size=8)


@pytest.fixture
def cache(source: Examples, vae: KLVAE, tmp_path: Path) -> LatentCache:
    """Nine pictures in shards of four, four and one."""
    assert build_cache(source, vae, tmp_path, shard_size=4, batch_size=3, dtype="float32") == 0
    return LatentCache(tmp_path)


def flip_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


# --- what is read ----------------------------------------------------------------------------


def test_latents_are_those_of_the_tokenizer(
    cache: LatentCache, source: Examples, vae: KLVAE
) -> None:
    assert cache.image_shape == (4, 4, 4) and cache.class_names == source.class_names
    assert torch.equal(cache.labels, source.labels) and len(cache) == 9
    order = torch.tensor([8, 0, 3, 4, 7])
    images, labels = source.take(order, FLIP[order])
    found, its_labels = cache.take(order, FLIP[order])
    torch.testing.assert_close(found, vae.encode(images).mean * 0.5, rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, its_labels) and found.dtype == torch.float32
    assert not torch.allclose(found, cache.take(order)[0]), "the mirrored ones are not used"


def test_draws_are_of_the_posterior_and_of_their_seed_alone(
    cache: LatentCache, source: Examples, vae: KLVAE
) -> None:
    seeds = torch.arange(100, 109)
    drawn, _ = cache.take(ROWS, FLIP, seeds)
    posterior = vae.encode(source.take(ROWS, FLIP)[0])
    noise = (drawn / 0.5 - posterior.mean) / posterior.std
    expected = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(103))
    torch.testing.assert_close(noise[3], expected, rtol=1e-3, atol=1e-3)
    alone, _ = cache.take(ROWS[3:4], FLIP[3:4], seeds[3:4])
    assert torch.equal(alone[0], drawn[3])
    assert not torch.equal(cache.take(ROWS, FLIP, seeds + 1)[0], drawn)


def test_half_precision_is_close(source: Examples, vae: KLVAE, tmp_path: Path) -> None:
    build_cache(source, vae, tmp_path)
    found = LatentCache(tmp_path).take(ROWS)[0]
    expected = vae.encode(source.take(ROWS)[0]).mean * 0.5
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.equal(found, expected), "stored in more than half precision"


def test_the_tokenizer_comes_back(cache: LatentCache, vae: KLVAE) -> None:
    assert isinstance(cache.tokenizer, KLVAE) and cache.tokenizer.config == SIZES
    for name, tensor in vae.state_dict().items():
        assert torch.equal(cache.tokenizer.state_dict()[name], tensor), name
    with pytest.raises(ValueError, match="holds latents"):
        cache.pixel_statistics()


def test_standardised_pixels(tmp_path: Path) -> None:
    data, tokenizer = tiny_data(), PixelTokenizer(-0.25, 0.5)
    build_cache(data, tokenizer, tmp_path, dtype="float32")
    cache = open_data(tmp_path)
    assert isinstance(cache, LatentCache) and cache.tokenizer == tokenizer
    found, _ = cache.take(ROWS, FLIP, ROWS)
    assert torch.equal(found, tokenizer.to_latents(data.take(ROWS, FLIP)[0]))


def test_worker_processes_read_the_same(cache: LatentCache) -> None:
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.take(ROWS, FLIP, ROWS)[0], cache.take(ROWS, FLIP, ROWS)[0])
    assert len(pickle.dumps(cache)) < 1000, "latents were sent, not the folder's name"
    rows = [ROWS[:4], ROWS[2:7], ROWS]
    with Batches(cache, lambda step: (rows[step % 3], None, rows[step % 3]), workers=1) as batches:
        for its_rows in rows:
            assert torch.equal(next(batches)[0], cache.take(its_rows, None, its_rows)[0])


# --- how it is made --------------------------------------------------------------------------


class Stops(ImageDataset):
    """Remembers what was read, and fails at one row."""

    stop = -1
    read: list[int]

    def take(
        self, rows_B: Tensor, flip_B: Tensor | None = None, seed_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self.read.extend(rows_B.tolist())
        if self.stop in rows_B:
            raise KeyboardInterrupt
        return super().take(rows_B, flip_B, seed_B)


def stops(stop: int) -> Stops:
    data = tiny_data(10)
    source = Stops(data.images, data.labels, data.class_names)
    object.__setattr__(source, "stop", stop)
    object.__setattr__(source, "read", [])
    return source


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    tokenizer, whole, parts = PixelTokenizer(0.0, 1.0), tmp_path / "whole", tmp_path / "parts"
    assert build_cache(stops(-1), tokenizer, whole, shard_size=3) == 0
    with pytest.raises(KeyboardInterrupt):
        build_cache(stops(7), tokenizer, parts, shard_size=3, batch_size=2)
    with pytest.raises(FileNotFoundError, match=r"latents-000002.* is missing.*again as before"):
        LatentCache(parts)
    assert not list(parts.glob(".*")), "half a file was left"
    source = stops(-1)
    told: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        told.append((done, total))

    options: Any = {"shard_size": 3, "batch_size": 5, "progress": progress}
    assert build_cache(source, tokenizer, parts, **options) == 0
    assert source.read == [6, 7, 8, 9] and told == [(3, 4), (4, 4)]
    for path in sorted(whole.glob("latents-*")):
        found, expected = load_file(parts / path.name), load_file(path)
        assert found.keys() == expected.keys() == {"mean", "labels"}
        assert all(torch.equal(found[name], expected[name]) for name in found)
    source = stops(-1)
    assert build_cache(source, tokenizer, parts, shard_size=3) == 0 and not source.read


def test_processes_share_the_work(tmp_path: Path) -> None:
    tokenizer, source = PixelTokenizer(0.0, 1.0), stops(-1)
    assert build_cache(source, tokenizer, tmp_path, shard_size=3, part=(1, 2)) == 2
    assert source.read == [3, 4, 5, 9]
    assert build_cache(source, tokenizer, tmp_path, shard_size=3, part=(0, 2)) == 0
    assert torch.equal(LatentCache(tmp_path).take(ROWS)[1], source.labels[:9])


def test_another_cache_is_not_mixed_in(source: Examples, vae: KLVAE, cache: LatentCache) -> None:
    with pytest.raises(ValueError, match=r"another cache \(different: .*tokenizer_weights\)"):
        build_cache(source, tiny_vae(1), cache.folder, shard_size=4, dtype="float32")
    with pytest.raises(ValueError, match=r"different: digest, dtype\)"):
        build_cache(source, vae, cache.folder, shard_size=4)
    other = ImageDataset(torch.zeros(9, 3, 8, 8, dtype=torch.uint8), ROWS % 3, ("a", "b", "c"))
    with pytest.raises(ValueError, match="class_names, digest, source"):
        build_cache(other, vae, cache.folder, shard_size=4, dtype="float32")


def test_wrong_arguments_are_refused(source: Examples, vae: KLVAE, cache: LatentCache) -> None:
    folder = cache.folder / "new"
    for changes, message in (
        ({"shard_size": 0}, "shard_size must be positive"),
        ({"dtype": "int8"}, "'float16', 'float32'"),
        ({"part": (2, 2)}, "got 2 of 2"),
        ({"batch_size": 0}, "batch size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            build_cache(source, vae, folder, **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds latents already"):
        build_cache(cache, vae, folder)


def test_latents_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mean of a latent in shard 0 is not finite in float16"):
        build_cache(tiny_data(), PixelTokenizer(0.0, 1e-6), tmp_path)


# --- damage ----------------------------------------------------------------------------------


def test_every_copy_is_verified_once(cache: LatentCache, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    checksum = latents.checksum

    def counted(tensors: dict[str, Tensor]) -> str:
        calls.append(1)
        return checksum(tensors)

    monkeypatch.setattr(latents, "checksum", counted)
    LatentCache(cache.folder)
    assert not calls, "verified again though nothing changed"
    path = cache.folder / "latents-000001.safetensors"
    flip_byte(path, -100)
    with pytest.raises(ValueError, match=r"latents-000001.*its checksum is wrong.*delete it"):
        LatentCache(cache.folder)
    assert len(calls) == 1, "only the changed shard needs a look"
    flip_byte(path, -100)
    LatentCache(cache.folder)
    assert len(calls) == 2


def test_damaged_shards_are_refused(cache: LatentCache, vae: KLVAE, source: Examples) -> None:
    folder = cache.folder
    paths = sorted(folder.glob("latents-*"))
    contents = [path.read_bytes() for path in paths]
    paths[0].write_bytes(contents[0][:-50])
    with pytest.raises(ValueError, match=r"latents-000000.* is damaged"):
        LatentCache(folder)
    paths[0].write_bytes(contents[2])
    with pytest.raises(ValueError, match="are not of shape"):
        LatentCache(folder)
    paths[0].write_bytes(contents[0])
    build_cache(source, vae, folder / "other", shard_size=4)
    paths[1].write_bytes((folder / "other" / paths[1].name).read_bytes())
    with pytest.raises(ValueError, match="belongs to another cache"):
        LatentCache(folder)


def test_a_changed_header_is_refused(cache: LatentCache) -> None:
    path = cache.folder / "header.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "scale": 1.0}))
    with pytest.raises(ValueError, match="changed after it was written"):
        LatentCache(cache.folder)
    path.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        LatentCache(cache.folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no header\.json"):
        LatentCache(cache.folder)


# --- statistics ------------------------------------------------------------------------------


def test_the_scale_is_one_over_the_deviation_of_draws(
    cache: LatentCache, source: Examples, vae: KLVAE
) -> None:
    found = measure_statistics(source, vae, batch_size=4)
    posterior = vae.encode(source.take(ROWS)[0])
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([posterior.sample(generator) for _ in range(400)]).double()
    assert found.images == 9 and found.std == pytest.approx(float(draws.std()), rel=0.01)
    assert float(posterior.mean.std()) < 0.9 * found.std, "the draws hardly matter here"
    assert found.scale == pytest.approx(1 / found.std)
    assert found.channel_stds == pytest.approx(draws.std((0, 2, 3)).tolist(), rel=0.02)
    assert found.channel_means == pytest.approx(draws.mean((0, 2, 3)).tolist(), abs=0.02)
    again = measure_statistics(cache)
    assert again.scale == pytest.approx(found.scale, rel=1e-4)
    with pytest.raises(ValueError, match="latents already"):
        measure_statistics(cache, vae)


def test_the_standard_error_takes_a_picture_as_one_observation() -> None:
    """Pictures of one grey each: 64 equal pixels tell no more than one."""
    generator = torch.Generator().manual_seed(0)
    greys = torch.randint(0, 256, (4000,), generator=generator)
    images = greys.to(torch.uint8)[:, None, None].expand(-1, 8, 8).contiguous()
    data = ImageDataset(images, torch.zeros(4000, dtype=torch.int64), ("grey",))
    scales = []
    for part in range(20):
        rows = slice(200 * part, 200 * part + 200)
        sample = ImageDataset(data.images[rows], data.labels[rows], ("grey",))
        scales.append(measure_statistics(sample))
    spread = float(torch.tensor([each.scale for each in scales]).std())
    assert scales[0].scale_error == pytest.approx(spread, rel=0.4)
    whole = measure_statistics(data, batch_size=500)
    assert whole.scale_error == pytest.approx(scales[0].scale_error / 20**0.5, rel=0.2)
    mean, std = data.pixel_statistics()
    assert whole.mean == pytest.approx(mean, abs=1e-6) and whole.std == pytest.approx(std, rel=1e-4)


def test_a_part_of_the_pictures(source: Examples) -> None:
    one, two = (measure_statistics(source, images=4, seed=seed) for seed in (0, 1))
    assert one.images == 4 and one.mean != two.mean
    assert one == measure_statistics(source, images=4, batch_size=1)
    with pytest.raises(ValueError, match="at least two pictures"):
        measure_statistics(source, images=1)


# --- the commands ----------------------------------------------------------------------------


def test_cache_and_stats_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], vae: KLVAE
) -> None:
    weights = tmp_path / "vae.safetensors"
    save_file(vae.state_dict(), weights)
    write_class_folders(tmp_path / "pictures")
    pictures, output = str(tmp_path / "pictures"), str(tmp_path / "latents")
    options = ["--tokenizer", str(weights), "--size", "8", "--quiet", "--json"]
    assert main(["stats", pictures, *options]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["of"] == "latents" and stats["images"] == 9
    build = ["cache", pictures, output, *options, "--scale", str(stats["scale"])]
    build += ["--shard-size", "5", "--dtype", "float32"]
    assert main([*build, "--part", "0/2"]) == 1
    assert json.loads(capsys.readouterr().out)["shards_missing"] == 1
    assert main([*build, "--workers", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 4
    cache = open_data(output)
    assert isinstance(cache.tokenizer, KLVAE)
    assert cache.tokenizer.scale == pytest.approx(stats["scale"])
    assert main(["cache", "--check", output]) == 0
    assert "9 pictures" in capsys.readouterr().out
    assert main(["stats", output, "--quiet"]) == 0
    assert f"scale = 1 / std = {stats['scale']:.4f} +- " in capsys.readouterr().out
    assert main(["stats", output, "--speed", "--steps", "2", "--batch-size", "3", "--json"]) == 0
    speed = json.loads(capsys.readouterr().out)
    assert speed["shape"] == [4, 4, 4] and speed["images_per_second"] > 0
    flip_byte(tmp_path / "latents" / "latents-000000.safetensors", -1)
    assert main(["cache", "--check", output]) == 2
    assert "latents-000000.safetensors is damaged" in capsys.readouterr().err


def test_commands_say_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_class_folders(tmp_path / "pictures", 1)
    pictures, output = str(tmp_path / "pictures"), str(tmp_path / "latents")
    cases = [
        (["cache", output], "give SOURCE and OUTPUT"),
        (["cache", str(tmp_path / "nothing"), output], "there is no"),
        (["cache", pictures, output, "--size", "8", "--scale", "2"], "give --tokenizer"),
        (["stats", pictures, "--size", "8", "--speed", "--steps", "0"], "at least 1"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not Path(output).exists()
    with pytest.raises(SystemExit):
        main(["cache", pictures, output, "--part", "half"])
    assert main(["cache", pictures, output, "--size", "8", "--quiet"]) == 0
    assert "the cache is complete" in capsys.readouterr().out
    assert main(["cache", pictures, output, "--size", "4", "--quiet"]) == 2
    assert "holds another cache" in capsys.readouterr().err
