"""Extraction: right numbers, one content one store, resumed bit for bit, nothing half-written."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image
from torch import nn

from brainalign.data.schema import validate
from brainalign.data.stimuli import write_stimuli
from brainalign.errors import (
    BrainalignError,
    ConfigError,
    DiskSpaceError,
    SchemaError,
    UnknownNameError,
)
from brainalign.features import extract, extraction, load_model
from brainalign_kernels.adapters import swap_attention

N = 30


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Images:
    """A set of stimuli in memory, which notes what is opened and can fail."""

    def __init__(self, n: int = N, side: int = 16, fail_at: int | None = None, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.pixels = rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
        self.ids = [f"s{i:03d}" for i in range(n)]
        self.fail_at = fail_at
        self.opened: list[int] = []

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.pixels.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.pixels)

    def open(self, i: int) -> Image.Image:
        self.opened.append(i)
        if i == self.fail_at:
            raise KeyboardInterrupt
        return Image.fromarray(self.pixels[i])


def convolutional(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(5, 6, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(6 * 25, 7),
    )


def small(seed: int = 0, std: float = 0.5):
    def transform(image: Image.Image) -> torch.Tensor:
        pixels = np.asarray(image.resize((16, 16)), np.float32) / 255
        return torch.from_numpy((pixels - 0.5) / std).movedim(-1, 0)

    return load_model(
        convolutional(seed), transform=transform, mean=[0.5] * 3, std=[std] * 3, device="cpu"
    )


@pytest.fixture(scope="module")
def vit():
    return load_model(
        "random:timm:vit_tiny_patch16_224",
        options={"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
        image_size=32,
        device="cpu",
    )


@pytest.fixture
def short_blocks(monkeypatch):
    monkeypatch.setattr(extraction, "BLOCK", 8)


def visible(folder: Path) -> list[str]:
    """Return the stores under a folder that a reader would find."""
    return sorted(p.name for p in folder.glob("*/[!.]*.zarr"))


def everything(ds: xr.Dataset) -> bytes:
    return ds["features"].values.tobytes()


# --- numbers -----------------------------------------------------------------------------------


def test_layers_hold_what_the_modules_compute():
    model, images = small(), Images()
    found = extract(model, images, pooling="flatten", batch_size=7)
    assert list(found) == ["0", "1", "2", "3", "4", "5"]
    x = torch.stack([model.transform(images.open(i)) for i in range(N)])
    with torch.no_grad():
        for i in range(6):
            # The module's in-place ReLUs must not have reached what was hooked before them.
            expected = model.module[: i + 1](x)
            if i in (0, 2):
                expected = model.module[i](x if i == 0 else model.module[:2](x))
            np.testing.assert_allclose(
                found[str(i)]["features"], expected.flatten(1), atol=1e-5, rtol=1e-4
            )
    assert (found["0"]["features"].values < 0).any()
    maps = extract(model, images, ["2", "output"])
    assert maps["2"]["features"].shape == (N, 6)
    np.testing.assert_allclose(
        maps["2"]["features"],
        found["2"]["features"].values.reshape(N, 6, 25).mean(2),
        atol=1e-6,
    )
    np.testing.assert_allclose(maps["output"]["features"], found["5"]["features"], atol=1e-6)


def test_token_pooling(vit):
    images = Images(5)
    tokens = extract(vit, images, "blocks.*", pooling="none")
    assert list(tokens) == ["blocks.0", "blocks.1"]
    one = tokens["blocks.1"]
    validate(one, "token_features")
    assert one["features"].shape == (5, 17, 24)
    x = torch.stack([vit.transform(images.open(i)) for i in range(5)])
    with torch.no_grad():
        hidden = vit.module.patch_embed(x)
        hidden = vit.module.blocks(vit.module.norm_pre(vit.module._pos_embed(hidden)))
    np.testing.assert_allclose(one["features"], hidden, atol=1e-5)
    mean = extract(vit, images, "blocks.1")["blocks.1"]["features"]
    np.testing.assert_allclose(mean, hidden[:, 1:].mean(1), atol=1e-5)
    cls = extract(vit, images, "blocks.1", pooling="class")["blocks.1"]["features"]
    np.testing.assert_allclose(cls, hidden[:, 0], atol=1e-5)
    with pytest.raises(ConfigError, match=r"'patch_embed' has no class token"):
        extract(vit, images, "patch_embed", pooling="class")


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_changes_neither_numbers_nor_key(vit, batch_size, tmp_path, short_blocks):
    images = Images()
    reference = extract(vit, images, batch_size=16, store=tmp_path)
    found = extract(vit, images, batch_size=batch_size, workers=3)
    for name, ds in reference.items():
        np.testing.assert_allclose(found[name]["features"], ds["features"], atol=1e-5)
    images.opened.clear()
    again = extract(vit, images, batch_size=batch_size, store=tmp_path)
    assert images.opened == []
    assert [d.encoding["source"] for d in again.values()] == [
        d.encoding["source"] for d in reference.values()
    ]


def test_autocast_computes_in_less_and_stores_float32(vit):
    images = Images(4)
    full = extract(vit, images, "blocks.1")["blocks.1"]
    half = extract(vit, images, "blocks.1", autocast="bf16")["blocks.1"]
    assert half["features"].dtype == np.float32
    assert half.attrs["autocast"] == "bf16"
    difference = np.abs(half["features"].values - full["features"].values).max()
    assert 0 < difference < 0.05
    with pytest.raises(ConfigError, match="bf16"):
        extract(vit, images, autocast="bf15")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_cpu():
    images = Images()
    cpu = extract(small(), images)
    cuda = extract(small(), images, device="cuda")
    for name in cpu:
        np.testing.assert_allclose(cuda[name]["features"], cpu[name]["features"], atol=1e-5)


# --- the store ---------------------------------------------------------------------------------


def test_store_equals_memory_and_opens_without_us(tmp_path, short_blocks, monkeypatch):
    monkeypatch.setattr(extraction, "FEATURES_PER_CHUNK", 64)
    model, images = small(), Images()
    held = extract(model, images, pooling="flatten")
    kept = extract(model, images, pooling="flatten", store=tmp_path)
    assert kept["0"]["features"].shape == (N, 245)
    for name, ds in kept.items():
        path = Path(ds.encoding["source"])
        assert path.parent.parent == tmp_path
        plain = xr.open_zarr(path, consolidated=False, chunks=None)
        assert plain["features"].values.tobytes() == everything(held[name])
        assert plain["stimulus_id"].values.tolist() == images.ids
        assert plain["layer"].item() == name
        assert plain.attrs["weights_sha256"] == model.weights_sha256
        assert json.loads(plain.attrs["preprocessing"])["mean"] == [0.5] * 3
    assert [p.name for p in tmp_path.rglob(".*partial*")] == []
    assert isinstance(kept["0"]["features"].variable._data, np.ndarray) is False


def test_key_follows_content(tmp_path):
    images = Images(6)
    base = extract(small(), images, "5", store=tmp_path)
    variants = [
        extract(small(seed=1), images, "5", store=tmp_path),
        extract(small(std=0.4), images, "5", store=tmp_path),
        extract(small(), Images(6, seed=1), "5", store=tmp_path),
        extract(small(), images, "5", store=tmp_path, pooling="flatten"),
        extract(small(), images, "5", store=tmp_path, autocast="bf16"),
        extract(small(), images, "4", store=tmp_path),
    ]
    paths = {next(iter(f.values())).encoding["source"] for f in [base, *variants]}
    assert len(paths) == 7
    assert extract(small(), images, "5", store=tmp_path)["5"].encoding["source"] in paths
    assert len(visible(tmp_path)) == 7


@pytest.mark.parametrize("fail_at", [3, 19, 29])
def test_resumed_equals_unbroken_bit_for_bit(tmp_path, short_blocks, fail_at):
    model = small()
    unbroken = extract(model, Images(), store=tmp_path / "a", batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        extract(model, Images(fail_at=fail_at), store=tmp_path / "b", batch_size=3)
    assert visible(tmp_path / "b") == []
    images = Images()
    resumed = extract(model, images, store=tmp_path / "b", batch_size=3)
    assert min(images.opened) == fail_at // 8 * 8
    for name, ds in unbroken.items():
        assert everything(resumed[name]) == everything(ds)
        assert Path(resumed[name].encoding["source"]).name == Path(ds.encoding["source"]).name
    assert list(tmp_path.rglob(".*partial*")) == []


def test_damaged_and_missing_blocks_are_made_again(tmp_path, short_blocks):
    model = small()
    unbroken = extract(model, Images(), "0", store=tmp_path / "a", pooling="flatten")
    with pytest.raises(KeyboardInterrupt):
        extract(model, Images(fail_at=27), "0", store=tmp_path / "b", pooling="flatten")
    shards = sorted((tmp_path / "b").rglob("features/c/*/0"))
    assert len(shards) == 3
    damaged = bytearray(shards[1].read_bytes())
    damaged[100] ^= 1
    shards[1].write_bytes(damaged)
    shards[2].write_bytes(shards[2].read_bytes()[:50])
    images = Images()
    resumed = extract(model, images, "0", store=tmp_path / "b", pooling="flatten")
    assert sorted(images.opened) == list(range(8, 30))
    assert everything(resumed["0"]) == everything(unbroken["0"])


def test_more_layers_than_before_join_a_broken_run(tmp_path, short_blocks):
    model = small()
    with pytest.raises(KeyboardInterrupt):
        extract(model, Images(fail_at=20), "0", store=tmp_path)
    both = extract(model, Images(), ["0", "5"], store=tmp_path)
    for name, ds in extract(model, Images(), ["0", "5"]).items():
        np.testing.assert_allclose(both[name]["features"], ds["features"], atol=1e-6)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
from test_features_extraction import Images, extraction, small
class Killer(Images):
    def open(self, i):
        if i == 19:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open(i)
extraction.BLOCK = 8
extraction.extract(small(), Killer(), store={store!r}, batch_size=4, workers=1)
"""


def test_killed_process_leaves_nothing_final_and_resumes(tmp_path, short_blocks):
    code = KILLED.format(tests=str(Path(__file__).parent), store=str(tmp_path / "b"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert visible(tmp_path / "b") == []
    images = Images()
    resumed = extract(small(), images, store=tmp_path / "b", batch_size=4)
    assert 0 < min(images.opened) <= 16
    for name, ds in extract(small(), Images(), store=tmp_path / "a", batch_size=4).items():
        assert everything(resumed[name]) == everything(ds)


def test_two_runs_into_one_store_leave_no_hole(tmp_path, short_blocks):
    model, images, other = small(), Images(), Images()
    _ = model.traced
    opened = images.open

    def open_and_let_another_run_finish(i):
        if i == 20:
            extract(small(), other, "5", store=tmp_path)
        return opened(i)

    images.open = open_and_let_another_run_finish
    found = extract(model, images, "5", store=tmp_path, batch_size=4, workers=1)["5"]
    assert np.isfinite(found["features"].values).all()
    assert len(visible(tmp_path)) == 1
    assert list(tmp_path.rglob(".*partial*")) == []

    def open_and_lose_a_block(i):
        if i == 28:
            shutil.rmtree(next(second.rglob("features/c/0")))
        return opened(i)

    second = tmp_path / "second"
    images.open = open_and_lose_a_block
    with pytest.raises(BrainalignError, match="another run"):
        extract(model, images, "5", store=second, batch_size=4, workers=1)
    assert visible(second) == []


# --- what is refused ---------------------------------------------------------------------------


def test_unknown_layer_is_said_before_an_image_is_opened(vit, tmp_path):
    images = Images()
    with pytest.raises(UnknownNameError, match=r"Did you mean 'blocks\.[01]'"):
        extract(vit, images, ["blocks.0", "blocks.12"], store=tmp_path)
    assert images.opened == []
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_said_before_an_image_is_opened(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    images = Images()
    with pytest.raises(DiskSpaceError, match="GiB"):
        extract(small(), images, store=tmp_path)
    assert images.opened == []
    assert list(tmp_path.iterdir()) == []


def test_not_finite_names_layer_and_stimulus(tmp_path):
    class Log(nn.Module):
        def forward(self, x):
            return torch.log(x)

    module = nn.Sequential(Log(), nn.Flatten())
    model = load_model(module, image_size=16, mean=[0.0] * 3, std=[1.0] * 3, device="cpu")
    images = Images(10)
    images.pixels = images.pixels.clip(1)
    images.pixels[6, 3, 3] = 0
    with pytest.raises(BrainalignError, match=r"Layer '0' .*'s006' \(number 6\)"):
        extract(model, images, store=tmp_path, batch_size=4)
    assert visible(tmp_path) == []


def test_unreadable_image_is_named(tmp_path):
    images = write_stimuli(tmp_path / "s", list(Images(4).pixels), list("abcd"))
    images.paths[2].write_bytes(b"no image")
    with pytest.raises(SchemaError, match=r"'c' .*cannot be read as an image"):
        extract(small(), images)
    images.paths[2].unlink()
    with pytest.raises(SchemaError, match="'c'"):
        extract(small(), images)


def test_arguments_out_of_range():
    with pytest.raises(ConfigError, match="batch_size"):
        extract(small(), Images(), batch_size=0)
    with pytest.raises(SchemaError, match="no stimuli"):
        extract(small(), Images(0))
    with pytest.raises(ConfigError, match="pooling"):
        extract(small(), Images(), pooling="max")


def test_stimulus_set_from_disk(tmp_path):
    pixels = Images(4).pixels
    stimuli = write_stimuli(tmp_path / "s", list(pixels), list("abcd"))
    found = extract("pixels", stimuli, "rgb", store=tmp_path / "f")["rgb"]
    assert found["stimulus_id"].values.tolist() == list("abcd")
    assert found.attrs["stimuli_sha256"] == stimuli.hash
    assert found["features"].shape == (4, 3072)


# --- overlap -----------------------------------------------------------------------------------


def test_images_are_decoded_while_the_model_runs():
    model, images = small(), Images(12)
    _ = model.traced
    ahead = threading.Event()
    opened = images.open

    def open_and_tell(i):
        if i >= 4:
            ahead.set()
        return opened(i)

    images.open = open_and_tell
    inner, seen = model.forward, []

    def forward(x):
        seen.append(ahead.wait(timeout=10))
        return inner(x)

    model.forward = forward
    extract(model, images, "5", batch_size=4)
    assert seen == [True] * 3


def test_attention_is_swapped_and_put_back(vit):
    stimuli = Images(3)
    layers = ["blocks.0", "blocks.1"]
    own = extract(vit, stimuli, layers, device="cpu")
    same = extract(vit, stimuli, layers, device="cpu", attention="softmax")
    local = extract(vit, stimuli, layers, device="cpu", attention="neighborhood:k=2")
    again = extract(vit, stimuli, layers, device="cpu")
    for layer in layers:
        np.testing.assert_allclose(same[layer]["features"], own[layer]["features"], atol=1e-4)
        assert float(abs(local[layer]["features"] - own[layer]["features"]).max()) > 1e-4
        xr.testing.assert_equal(again[layer], own[layer])
    assert "attention" not in own["blocks.0"].attrs
    assert local["blocks.0"].attrs["attention"] == "neighborhood:d=1,k=2,stride=1"
    block = vit.module.blocks[0]
    with swap_attention(vit.module, "neighborhood:k=2"), torch.no_grad():
        images = torch.stack([vit.transform(stimuli.open(i)) for i in range(3)])
        x = vit.module.norm_pre(vit.module._pos_embed(vit.module.patch_embed(images)))
        expected = block(x)[:, 1:].mean(1).numpy()
    np.testing.assert_allclose(local["blocks.0"]["features"], expected, rtol=1e-4, atol=1e-5)


def test_attention_is_part_of_the_key(vit, tmp_path):
    stimuli = Images(3)

    def stores(attention):
        extract(vit, stimuli, "blocks.0", store=tmp_path, device="cpu", attention=attention)
        return set(visible(tmp_path))

    own = stores(None)
    local = stores("neighborhood:k=2")
    assert own < local
    assert stores("neighborhood:stride=1,k=2") == local
    assert stores("neighborhood:k=3") > local


def test_attention_that_cannot_be_swapped_is_said_before_an_image_is_opened(vit, tmp_path):
    stimuli = Images(3)
    for model, attention, message in [
        (vit, "neighbourhood", "no attention 'neighbourhood'. Known: .*neighborhood:k=7"),
        (vit, "neighborhood:k=50", "must not exceed the axis"),
        (small(), "softmax", "no attention layer that can be swapped"),
        (load_model("small-clip", device="cpu"), "flow", "image tower has no attention layer"),
    ]:
        with pytest.raises(ConfigError, match=message):
            extract(model, stimuli, store=tmp_path, device="cpu", attention=attention)
    assert not stimuli.opened and not visible(tmp_path)
