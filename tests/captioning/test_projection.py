"""The streamed projection: against the dense one, however it is cut, and its errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

from brainalign.captioning import draw_of, embedding_weights, project
from brainalign.captioning import projection as module
from brainalign.data.store import write
from brainalign.errors import ConfigError, SchemaError, UnavailableError


def dense(weights, library, draw, k, temperature=1 / 150):
    e = np.asarray(library, dtype=np.float64)[draw == k]
    n = np.linalg.norm(e, axis=1)
    d = e / n[:, None]
    w = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    logits = w @ d.T / temperature
    s = np.exp(logits - logits.max(axis=1, keepdims=True))
    s /= s.sum(axis=1, keepdims=True)
    mean = s @ d
    return (s @ n)[:, None] * mean / np.linalg.norm(mean, axis=1, keepdims=True)


def error(got, expected):
    return (np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max()


def clustered(rng, n=30_000, d=64):
    """Embeddings in a cone, of clusters, with norms that vary."""
    centres = rng.standard_normal((12, d)) + 1.0
    e = centres[rng.integers(12, size=n)] + 0.7 * rng.standard_normal((n, d))
    return (e * rng.uniform(0.5, 2, (n, 1))).astype(np.float32)


@pytest.mark.parametrize("kind", ["random", "members", "opposite"])
def test_streamed_equals_dense(kind):
    rng = np.random.default_rng(0)
    library = clustered(rng)
    weights = {
        "random": rng.standard_normal((150, 64)),
        # Nearly one-hot: one embedding takes all of the softmax.
        "members": library[rng.integers(len(library), size=150)] * 1e-3,
        # All logits far below zero: a softmax without a reference would underflow.
        "opposite": -library[:150],
    }[kind]
    got = project(weights, library, n_draws=5, seed=3, device="cpu")
    draw = draw_of(0, len(library), 5, 3)
    assert got.shape == (5, 150, 64) and got.dtype == np.float32
    for k in range(5):
        assert error(got[k], dense(weights, library, draw, k)) < 1e-4


def test_ascending_logits_move_the_reference():
    # Each chunk's logits exceed all earlier by hundreds: a reference that stands still overflows.
    rng = np.random.default_rng(1)
    w = rng.standard_normal((40, 16))
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    mixing = np.repeat(np.linspace(-1, 1, 40), 500)
    noise = rng.standard_normal((len(mixing), 16))
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    library = (mixing[:, None] * w.mean(0) * 5 + (1 - abs(mixing[:, None])) * noise) + 1e-3 * noise
    for temperature in (1 / 150, 1 / 1500):
        expected = dense(w, library, np.zeros(len(library)), 0, temperature)
        got = project(w, library, n_draws=1, temperature=temperature, device="cpu")
        bound = 1e-4 if temperature > 1 / 200 else 1e-3  # float32 logits ten times as large
        assert error(got[0], expected) < bound


def test_the_way_a_library_is_cut_changes_nothing(tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    library, weights = clustered(rng, 3000, 32), rng.standard_normal((20, 32))
    whole = project(weights, library, device="cpu")
    np.save(tmp_path / "library.npy", library)
    stored = zarr.create_array(tmp_path / "z", shape=library.shape, chunks=(700, 32), dtype="f4")
    stored[:] = library
    ds = xr.Dataset(
        {"features": (("stimulus", "feature"), library)},
        coords={"stimulus_id": ("stimulus", [f"s{i}" for i in range(3000)]), "model": "m",
                "layer": "output"},
    )  # fmt: skip
    write(ds, tmp_path / "features.zarr", "features")
    ways = {
        "memmap": np.load(tmp_path / "library.npy", mmap_mode="r"),
        "npy": tmp_path / "library.npy",
        "zarr array": stored,
        "dataset": ds,
        "store": str(tmp_path / "features.zarr"),
        "pieces": (library[i : i + 77] for i in range(0, 3000, 77)),
        "two": [library[:1000], ds.isel(stimulus=slice(1000, None))],
    }
    for name, way in ways.items():
        assert np.array_equal(project(weights, way, device="cpu"), whole), name
    monkeypatch.setattr(module, "_CHUNK", 400)
    monkeypatch.setattr(module, "_ROWS", 50)
    monkeypatch.setattr(module, "_VOXELS", 7)
    assert error(project(weights, library, device="cpu"), whole) < 1e-5


def test_draws_are_disjoint_even_and_follow_from_seed_and_number():
    draw = draw_of(0, 200_000, 5, 0)
    assert np.bincount(draw, minlength=5).min() > 39_000
    assert np.array_equal(draw_of(123_456, 7000, 5, 0), draw[123_456:130_456])
    assert not np.array_equal(draw_of(0, 100, 5, 1), draw[:100])


def test_half_precision_is_stored_and_float32_computed():
    rng = np.random.default_rng(4)
    library, weights = clustered(rng, 2000, 32).astype(np.float16), rng.standard_normal((9, 32))
    got = project(weights, library, n_draws=1, device="cpu")
    assert error(got[0], dense(weights, library, np.zeros(2000), 0)) < 1e-4


def test_errors_name_what_is_at_fault(tmp_path):
    rng = np.random.default_rng(5)
    library, weights = clustered(rng, 300, 8), rng.standard_normal((4, 8))
    broken = library.copy()
    broken[201, 3] = np.nan
    with pytest.raises(SchemaError, match="Embedding 201 of the library is not finite"):
        project(weights, [broken[:50], broken[50:]])
    broken[201] = 0
    with pytest.raises(SchemaError, match="Embedding 201 of the library is zero"):
        project(weights, broken)
    with pytest.raises(SchemaError, match="weights have 8 features; the library's"):
        project(weights, library[:, :7])
    with pytest.raises(SchemaError, match="int64"):
        project(weights, np.ones((5, 8), dtype=np.int64))
    with pytest.raises(SchemaError, match="pieces differ"):
        project(weights, [library, library[:, :5]])
    with pytest.raises(ConfigError, match="of 5 draws got none of the library's 3 embeddings"):
        project(weights, library[:3])
    with pytest.raises(ConfigError, match="draws got none"):
        project(weights, iter([]))
    with pytest.raises(ConfigError, match="temperature"):
        project(weights, library, temperature=0)
    with pytest.raises(UnavailableError):
        project(weights, tmp_path / "missing.npy")
    weights[2] = 0
    with pytest.raises(SchemaError, match="1 of 4 voxels have no weight, the first is 2"):
        project(weights, library)
    weights[2, 0] = np.inf
    with pytest.raises(SchemaError, match="not finite, the first is 2"):
        project(weights, library)


def test_weights_of_an_encoder_rank_embeddings_as_its_predictions_do():
    from brainalign.encoding import fit_encoder, predict

    rng = np.random.default_rng(6)
    X = rng.standard_normal((80, 10)) * rng.uniform(0.01, 5, 10) + 3
    y = X @ rng.standard_normal((10, 6)) + rng.standard_normal((80, 6))
    ids = [f"s{i:02d}" for i in range(80)]
    features = xr.Dataset(
        {"features": (("stimulus", "feature"), X)},
        coords={"stimulus_id": ("stimulus", ids), "model": "m", "layer": "output"},
    )
    responses = xr.Dataset(
        {"responses": (("presentation", "neuroid"), y.astype(np.float32))},
        coords={
            "stimulus_id": ("presentation", ids),
            **{c: ("presentation", np.zeros(80, int)) for c in ("repetition", "session", "run")},
            "subject": ("presentation", ["a"] * 80),
            "neuroid_id": ("neuroid", [f"n{i}" for i in range(6)]),
            "roi": ("neuroid", [""] * 6), "hemisphere": ("neuroid", [""] * 6),
        },
    )  # fmt: skip
    encoder = fit_encoder(features, responses, alphas=[1.0, 10.0], device="cpu")
    w = embedding_weights(encoder)
    predicted = predict(encoder, features).values
    difference = X @ w.T - predicted
    assert np.allclose(difference - difference[0], 0, atol=1e-4 * np.abs(predicted).max())
    with pytest.raises(SchemaError, match="joins several layers"):
        embedding_weights(encoder.assign_attrs(sources="[]"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same():
    rng = np.random.default_rng(7)
    library, weights = clustered(rng), rng.standard_normal((50, 64))
    assert (
        error(project(weights, library, device="cuda"), project(weights, library, device="cpu"))
        < 1e-4
    )
