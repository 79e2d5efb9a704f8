"""The data contract: schemas, atomic checksummed artefacts, stimuli, sections."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr

from brainalign.data import store
from brainalign.data.schema import SCHEMAS, validate
from brainalign.data.section import Estimate, Figure, Section, read_section, write_section
from brainalign.data.stimuli import index_images, read_stimuli, write_stimuli
from brainalign.errors import (
    ChecksumError,
    DiskSpaceError,
    SchemaError,
    UnavailableError,
    UnknownNameError,
)


def make_responses(n=6, v=5, seed=0):
    rng = np.random.default_rng(seed)
    p, u = "presentation", "neuroid"
    return xr.Dataset(
        {"responses": ((p, u), rng.standard_normal((n, v)).astype("float32"))},
        coords={
            "stimulus_id": (p, [f"ü{i // 2}" for i in range(n)]),
            "repetition": (p, np.arange(n) % 2),
            "session": (p, np.ones(n, int)),
            "run": (p, np.ones(n, int)),
            "subject": (p, ["s1"] * n),
            "neuroid_id": (u, [f"v{i}" for i in range(v)]),
            "roi": (u, ["FFA"] * (v - 1) + [""]),
            "hemisphere": (u, ["L"] * v),
            "ncsnr": (u, rng.random(v)),
        },
    )


@pytest.mark.parametrize("suffix", [".zarr", ".nc"])
def test_round_trip_keeps_values_text_and_provenance(tmp_path, suffix):
    ds = make_responses()
    attrs = store.provenance(config={"a": 1}, seed=3)
    path = store.write(ds, tmp_path / f"r{suffix}", "responses", provenance=attrs)
    back = store.read(path, "responses")
    assert np.array_equal(back["responses"].values, ds["responses"].values)
    assert back["stimulus_id"].values.tolist() == ds["stimulus_id"].values.tolist()
    assert back["stimulus_id"].dtype.kind == "U"
    assert back.attrs["seed"] == "3"
    assert json.loads(back.attrs["config"]) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_every_zarr_array_is_checksummed_and_a_flipped_bit_raises(tmp_path):
    path = store.write(make_responses(), tmp_path / "r.zarr", "responses")
    for meta in path.glob("*/zarr.json"):
        assert json.loads(meta.read_text())["codecs"][-1]["name"] == "crc32c", meta
    store.verify(path)
    chunk = path / "responses" / "c" / "0" / "0"
    raw = bytearray(chunk.read_bytes())
    raw[3] ^= 1
    chunk.write_bytes(bytes(raw))
    with pytest.raises(ChecksumError, match="do not match"):
        store.verify(path)
    with pytest.raises(ValueError, match="checksum"):
        store.read(path)["responses"].values  # noqa: B018


def test_large_stores_are_sharded_and_chunked_by_neuroid(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "NEUROIDS_PER_CHUNK", 4)
    monkeypatch.setattr(store, "CHUNKS_PER_SHARD", 2)
    path = store.write(make_responses(v=20), tmp_path / "r.zarr", "responses")
    import zarr

    array = zarr.open_group(path, mode="r")["responses"]
    assert array.chunks == (6, 4) and array.shards == (6, 8)
    index = json.loads((path / "responses" / "zarr.json").read_text())["codecs"][0]
    assert index["configuration"]["codecs"][-1]["name"] == "crc32c"
    store.verify(path)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = store.write(make_responses(seed=0), tmp_path / "r.zarr", "responses")
    before = store.sha256_path(path)
    with pytest.raises(FileExistsError):
        store.write(make_responses(seed=1), path, "responses")
    monkeypatch.setattr(
        xr.Dataset, "to_zarr", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(OSError, match="No space"):
        store.write(make_responses(seed=1), path, "responses", overwrite=True)
    assert store.sha256_path(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.zarr"]


def test_overwrite_swaps_in_the_new_store(tmp_path):
    path = store.write(make_responses(seed=0), tmp_path / "r.zarr", "responses")
    new = make_responses(seed=1)
    store.write(new, path, "responses", overwrite=True)
    assert np.array_equal(store.read(path)["responses"].values, new["responses"].values)
    assert [p.name for p in tmp_path.iterdir()] == ["r.zarr"]


def test_a_full_disk_is_refused_before_writing(tmp_path, monkeypatch):
    usage = store.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskSpaceError, match="free"):
        store.write(make_responses(), tmp_path / "r.zarr", "responses")
    assert not list(tmp_path.iterdir())


def test_missing_artefact_says_so(tmp_path):
    with pytest.raises(UnavailableError, match="no artefact"):
        store.read(tmp_path / "none.zarr")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.drop_vars("roi"), "'roi' is missing"),
        (lambda d: d.rename(neuroid="voxel"), "'responses' has"),
        (lambda d: d.drop_vars("stimulus_id"), "'stimulus_id' on 'presentation' is missing"),
        (lambda d: d.assign_coords(hemisphere=("neuroid", list("LLXLL"))), "'X' at neuroid 2"),
        (lambda d: d.assign_coords(ncsnr=("neuroid", [0.1, -1, 0, 0, 0])), "at neuroid 1"),
        (lambda d: d.assign_coords(neuroid_id=("neuroid", list("aabcd"))), "'a' stands 2 times"),
        (lambda d: d.assign_coords(run=("presentation", np.ones(6))), "expected integer"),
        (lambda d: d.isel(neuroid=slice(0, 0)), "'neuroid' has length 0"),
        (
            lambda d: d.rename(presentation="time"),
            "sampling_rate",
        ),
    ],
)
def test_the_validator_names_what_is_at_fault(change, message):
    with pytest.raises(SchemaError, match=message):
        validate(change(make_responses()), "responses")


def test_unknown_kind_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="'responses'"):
        validate(make_responses(), "response")


def test_rdms_must_be_symmetric_with_zero_diagonal():
    rdm = np.array([[[0, 1.0], [1.0, 0]]])
    ds = xr.Dataset(
        {"rdm": (("rdm_name", "stimulus", "stimulus_2"), rdm)},
        coords={
            "rdm_name": ["IT"],
            "stimulus_id": ("stimulus", ["a", "b"]),
            "stimulus_id_2": ("stimulus_2", ["a", "b"]),
        },
    )
    validate(ds, "rdms")
    bad = ds.copy(deep=True)
    bad["rdm"].values[0, 0, 1] = 2
    with pytest.raises(SchemaError, match="'IT' is not symmetric"):
        validate(bad, "rdms")
    bad = ds.copy(deep=True)
    bad["rdm"].values[0, 0, 0] = 2
    with pytest.raises(SchemaError, match="diagonal"):
        validate(bad, "rdms")


def test_design_schemas_all_exist():
    assert set(SCHEMAS) >= {
        "responses",
        "features",
        "token_features",
        "encoder",
        "scores",
        "trials",
        "captions",
        "images",
    }


def test_scores_beyond_their_range_are_refused():
    u = "neuroid"
    ds = make_responses().drop_vars(
        ["responses", "stimulus_id", "repetition", "session", "run", "subject"]
    )
    ds = ds.assign(r=(u, np.zeros(5)), r2=(u, np.zeros(5)), p=(u, np.full(5, 0.5)))
    validate(ds, "scores")
    with pytest.raises(SchemaError, match=r"'p' is .*1.5.* at neuroid 4"):
        validate(ds.assign(p=(u, [0, 0, 0, 0, 1.5])), "scores")


def test_stimuli_round_trip_and_tampering(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (8, 9, 3), dtype=np.uint8) for _ in range(3)]
    ids = ["a", "../b", "<c>"]
    stimuli = write_stimuli(tmp_path / "s", images, ids, extra={"category": ["x", "y", "z"]})
    back = read_stimuli(tmp_path / "s")
    assert back.ids == ids and back.hash == stimuli.hash and len(back) == 3
    assert np.array_equal(np.asarray(back.open(1)), images[1])
    assert back.select(["<c>"]).ids == ["<c>"]
    with pytest.raises(UnknownNameError, match="'<d>'"):
        back.select(["<d>"])
    back.verify()
    back.paths[0].write_bytes(back.paths[1].read_bytes())
    with pytest.raises(ChecksumError):
        back.verify()
    back.paths[0].unlink()
    with pytest.raises(UnavailableError, match="1 of 3"):
        read_stimuli(tmp_path / "s")
    assert index_images(tmp_path / "s" / "images").ids == ["000001", "000002"]


def test_wrong_number_of_images_leaves_nothing(tmp_path):
    with pytest.raises(SchemaError, match="1 images came with 2"):
        write_stimuli(tmp_path / "s", [np.zeros((4, 4), np.uint8)], ["a", "b"])
    assert not list(tmp_path.iterdir())


def make_section():
    data = xr.Dataset(
        {"value": (("row", "column"), np.eye(2))}, coords={"row": ["a", "b"], "column": ["c", "d"]}
    )
    figure = Figure("f1", "heatmap", "T", "Look at the diagonal.", data, {"units": "r"})
    return Section("s", "Title", "Intro", [figure], [Estimate("r", 0.5, 0.4, 0.6)])


def test_section_round_trip(tmp_path):
    from PIL import Image

    section = make_section()
    section.figures[0].images["<x>"] = Image.new("RGB", (4, 4))
    write_section(section, tmp_path / "s", provenance={"seed": "1"})
    back = read_section(tmp_path / "s")
    assert back.summary == section.summary and back.title == "Title"
    assert np.array_equal(back.figures[0].data["value"].values, np.eye(2))
    assert back.figures[0].images["<x>"].is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "heatmaps"}, "'heatmap'"),
        ({"id": "../x"}, "letters"),
        ({"caption": " "}, "no caption"),
        ({"kind": "points"}, "needs 'item'"),
    ],
)
def test_a_figure_at_fault_is_refused(tmp_path, change, message):
    section = make_section()
    for name, value in change.items():
        setattr(section.figures[0], name, value)
    with pytest.raises(SchemaError, match=message):
        write_section(section, tmp_path / "s")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sharded", [False, True])
def test_fingerprints_tell_values_without_reading_them(tmp_path, monkeypatch, sharded):
    rng = np.random.default_rng(0)
    y = rng.standard_normal((20, 64)).astype(np.float32)
    shards = {"x": (20, 32)} if sharded else None

    def stored(name, values):
        ds = xr.Dataset({"x": (("presentation", "neuroid"), values)})
        store.write(ds, tmp_path / name, None, chunks={"x": (20, 8)}, shards=shards)
        return store.read(tmp_path / name)

    changed = y.copy()
    changed[7, 61] += 1e-6
    first, again, other = (stored(f"{i}.zarr", v) for i, v in enumerate((y, y.copy(), changed)))
    monkeypatch.setattr(xr.Variable, "values", property(lambda self: pytest.fail("was read")))
    one, two, three = (store.fingerprint(ds, "x") for ds in (first, again, other))
    assert one == two != three
    monkeypatch.undo()
    # What was changed in memory is told by its values.
    loud = first.assign(x=first["x"] * 2)
    assert store.fingerprint(loud, "x") not in (one, store.fingerprint(first.load(), "x"))
    assert store.fingerprint(loud, "x") == store.fingerprint(first.assign(x=first["x"] * 2), "x")


def test_fingerprint_of_a_store_without_checksums(tmp_path):
    import zarr

    group = zarr.create_group(tmp_path / "a.zarr")
    group.create_array("x", data=np.zeros((4, 4)), chunks=(2, 2), dimension_names=("a", "b"))
    group["x"][:] = 1.0
    ds = xr.open_zarr(tmp_path / "a.zarr", chunks=None, consolidated=False)
    before = store.fingerprint(ds, "x")
    assert store.fingerprint(ds, "x") == before
    group["x"][:] = np.arange(16.0).reshape(4, 4)
    assert store.fingerprint(ds, "x") != before
