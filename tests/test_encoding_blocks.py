"""Blocks and parts of neuroids give what all of them give at once, within the memory allowed."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
import xarray as xr
from zarr.storage import LocalStore

from brainalign.data.store import read, write
from brainalign.encoding import (
    compare_models,
    encode,
    gather,
    gather_folders,
    layer_roi,
    read_result,
    roi_members,
    select,
    write_result,
)
from brainalign.encoding.blocks import Plan, Sizes, part_slice, plan_blocks
from brainalign.encoding.nested import Solvers
from brainalign.encoding.rois import ALL_ROIS
from brainalign.errors import ConfigError, LeakError, SchemaError
from brainalign.evaluation import noise_ceiling
from brainalign.evaluation.significance import bootstrap_counts

pytestmark = pytest.mark.filterwarnings("ignore::brainalign.linear.AlphaEdgeWarning")

module = importlib.import_module("brainalign.encoding.encode")
N, STIMULI, CHUNK = 300, 60, 50
OPTIONS = {
    "alphas": np.logspace(0, 4, 5), "inner_cv": "gcv", "splits": 3, "n_permutations": 200,
    "n_bootstrap": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def study():
    """Three layers, and neuroids of which half follow the first; ROIs and an overlapping mask."""
    rng = np.random.default_rng(0)
    ids = [f"im{i:02d}" for i in range(STIMULI)]
    x = rng.standard_normal((3, STIMULI, 8)).astype(np.float32)
    layers = {
        name: xr.Dataset(
            {"features": (("stimulus", "feature"), values)},
            coords={"stimulus_id": ("stimulus", ids), "model": "net", "layer": name},
        )
        for name, values in zip(("a", "b", "c"), x, strict=True)
    }
    weights = rng.standard_normal((8, N)) * (np.arange(N) % 2)
    y = np.tile(x[0] @ weights, (2, 1)) + rng.standard_normal((2 * STIMULI, N))
    zeros = ("presentation", np.zeros(2 * STIMULI, int))
    mask = np.zeros((N, 1), dtype=bool)
    mask[90:210:3] = True
    responses = xr.Dataset(
        {
            "responses": (("presentation", "neuroid"), y.astype(np.float32)),
            "roi_mask": (("neuroid", "roi_name"), mask),
        },
        coords={
            "stimulus_id": ("presentation", ids * 2),
            "repetition": ("presentation", np.repeat([0, 1], STIMULI)),
            "session": zeros,
            "run": zeros,
            "subject": ("presentation", ["s1"] * 2 * STIMULI),
            "neuroid_id": ("neuroid", [f"v{i}" for i in range(N)]),
            "roi": ("neuroid", ["V1"] * 100 + ["V2"] * 100 + [""] * 100),
            "hemisphere": ("neuroid", ["L"] * N),
            "roi_name": ["face"],
        },
    )
    return layers, responses


@pytest.fixture(scope="module")
def whole(study):
    return encode(*study, **OPTIONS)


@pytest.fixture
def store(study, tmp_path):
    path = tmp_path / "responses.zarr"
    write(study[1], path, "responses", chunks={"responses": (2 * STIMULI, CHUNK)})
    return path


def limited(monkeypatch, neuroids, keep=True, workers=1):
    """Return the memory_gib into which blocks of about so many neuroids fit."""
    sizes = Sizes(2 * STIMULI, STIMULI, [8] * 3, 3, 1, OPTIONS["n_bootstrap"], 200, True)
    blocks = importlib.import_module("brainalign.encoding.blocks")
    monkeypatch.setattr(blocks, "resident_bytes", lambda: 0)
    each = sizes.solvers(keep) + sizes.block(neuroids)
    return (blocks.RESERVE + 2 * sizes.result(N) + workers * each) / 2**30


def same(one, two):
    """What must not depend on how neuroids are put together."""
    assert one.layers == two.layers and one.exclusions == two.exclusions
    for a, b in ((one.scores, two.scores), (one.best, two.best)):
        for name in ("r", "r2", "normalised", "ceiling", "ncsnr", "validation_r2"):
            np.testing.assert_allclose(a[name].values, b[name].values, atol=2e-6)
        np.testing.assert_array_equal(a["alpha"].values, b["alpha"].values)
        np.testing.assert_array_equal(a["neuroid_id"].values, b["neuroid_id"].values)
        for name in ("p", "q"):
            np.testing.assert_allclose(a[name].values, b[name].values, atol=0.01)
        assert a.attrs == b.attrs
    for name in ("best_layer", "layer_agreement"):
        np.testing.assert_array_equal(one.best[name].values, two.best[name].values)
    for over in ("stimuli", "both"):
        xr.testing.assert_allclose(layer_roi(one, over=over), layer_roi(two, over=over), atol=1e-6)
    assert list(one.encoders) == list(two.encoders)
    for name in one.encoders:
        xr.testing.assert_allclose(one.encoders[name].load(), two.encoders[name].load(), rtol=1e-4)
    if one.predictions is not None and two.predictions is not None:
        xr.testing.assert_allclose(one.predictions.load(), two.predictions.load(), atol=1e-5)


@pytest.mark.parametrize("keep", [True, False])
def test_blocks_equal_all_at_once_and_read_each_chunk_once(study, whole, store, monkeypatch, keep):
    reads: Counter[str] = Counter()
    get = LocalStore.get

    async def counted(self, key, *args, **kwargs):
        if "responses/c/" in key:
            reads[key] += 1
        return await get(self, key, *args, **kwargs)

    monkeypatch.setattr(LocalStore, "get", counted)
    steps = []
    begin = module._Work.encode
    monkeypatch.setattr(
        module._Work, "encode", lambda self, b: (steps.append(b), begin(self, b))[1]
    )
    built = []
    build = Solvers._build
    monkeypatch.setattr(
        Solvers, "_build", lambda self, *key: (built.append(key), build(self, *key))[1]
    )
    memory = limited(monkeypatch, 120)
    if not keep:
        monkeypatch.setattr(module, "plan_blocks", lambda *args: Plan(100, False, 120))
    result = encode(study[0], read(store, "responses"), memory_gib=memory, **OPTIONS)
    assert [(b.start, b.stop) for b in steps] == [(0, 100), (100, 200), (200, 300)]
    assert len(reads) == N // CHUNK and set(reads.values()) == {1}
    once = 3 * (3 + 1)  # layers x (folds and all rows)
    assert len(built) == once if keep else len(built) >= 3 * once
    same(result, whole)


def test_without_excluded_neuroids_the_null_is_the_same_in_any_layout(whole, study, monkeypatch):
    blocks = encode(*study, memory_gib=limited(monkeypatch, 60), **OPTIONS)
    one, two = (np.sort(r.null["r"].values, axis=1) for r in (whole, blocks))
    assert one.shape == two.shape == (4, 200)
    np.testing.assert_allclose(one, two, atol=2e-6)


def test_two_devices_share_the_blocks(study, whole, store, monkeypatch, tmp_path):
    """Workers on one CPU: the same result, each chunk read once, each with solvers of its own."""
    used = {}
    begin = module._Work.encode

    both = threading.Barrier(2, timeout=60)

    def noted(self, block):
        mine = used.setdefault(threading.get_ident(), [])
        mine.append(block.start)
        if len(mine) == 1 and block.start:
            both.wait()
        elif mine == [0]:
            made = begin(self, block)
            both.wait()  # until the second worker has taken a block
            return made
        return begin(self, block)

    monkeypatch.setattr(module._Work, "encode", noted)
    memory = limited(monkeypatch, 60, workers=2)
    options = {**OPTIONS, "memory_gib": memory, "device": "cpu,cpu"}
    result = encode(study[0], read(store), checkpoint=tmp_path / "parts", **options)
    assert sorted(b for blocks in used.values() for b in blocks) == list(range(0, 300, 50))
    assert len(used) == 2
    same(result, whole)
    one, two = (np.sort(r.null["r"].values, axis=1) for r in (whole, result))
    np.testing.assert_allclose(one, two, atol=2e-6)


def test_an_error_on_one_device_stops_the_others(study, monkeypatch):
    monkeypatch.setattr(module, "plan_blocks", lambda *args: Plan(20, True, 20))
    seen = []

    def fail(self, block):
        seen.append(block.start)
        raise RuntimeError("broken")

    monkeypatch.setattr(module._Work, "encode", fail)
    with pytest.raises(RuntimeError, match="broken"):
        encode(*study, device=["cpu", "cpu"], **OPTIONS)
    assert seen == [0]


def test_devices_share_the_memory_limit(monkeypatch):
    import torch

    blocks = importlib.import_module("brainalign.encoding.blocks")
    monkeypatch.setattr(blocks, "resident_bytes", lambda: 0)
    sizes = Sizes(9000, 9000, [512], 5, 1, 0, 0, False)
    cpu = torch.device("cpu")
    one, two = (plan_blocks(sizes, 10**6, 1000, 8.0, [cpu] * n) for n in (1, 2))
    for plan, n in ((one, 1), (two, 2)):
        need = n * (sizes.solvers(plan.keep) + sizes.block(plan.step))
        assert need + blocks.RESERVE + 2 * sizes.result(10**6) <= 8 * 2**30
    assert two.step < one.step / 2
    # Few neuroids are divided, at the limits of chunks.
    assert plan_blocks(sizes, 5000, 1000, 8.0, [cpu] * 2).step == 3000


@pytest.mark.parametrize("permutation", ["predictions", "refit"])
def test_maxima_over_blocks(study, permutation, monkeypatch):
    options = {**OPTIONS, "permutation": permutation, "n_permutations": 20}
    if permutation == "predictions":
        options["splits"] = [(np.arange(40), np.arange(40, 60))]
    one = encode(*study, **options)
    monkeypatch.setattr(module, "plan_blocks", lambda *args: Plan(130, True, 130))
    blocks = encode(*study, **options)
    np.testing.assert_allclose(one.null["maximum"], blocks.null["maximum"], atol=1e-6)
    for name in ("p", "p_max"):
        np.testing.assert_array_equal(one.best[name], blocks.best[name])


def test_parts_gathered_equal_the_whole(study, whole, store, tmp_path):
    options = {**OPTIONS, "keep_predictions": False}
    folders = []
    for k in (2, 3, 1):
        part = encode(study[0], read(store), part=(k, 3), **options)
        assert part.best.sizes["neuroid"] == 100 and part.best.attrs["part"] == f"{k}/3"
        folders.append(write_result(part, tmp_path / str(k), provenance={"code": "1"}))
    with pytest.raises(SchemaError, match="Part 1 of 3 is missing"):
        gather([read_result(f) for f in folders[:2]])
    with pytest.raises(SchemaError, match="100 neuroids stand in more than one part"):
        gather([read_result(folders[0])] * 2)
    result = read_result(gather_folders(folders, tmp_path / "all", provenance={"made": "2"}))
    assert result.predictions is None
    assert result.best.attrs["code"] == "1" and result.best.attrs["made"] == "2"
    for ds in (result.best, result.scores):
        assert "part" not in ds.attrs
        ds.attrs = {k: v for k, v in ds.attrs.items() if k in whole.best.attrs}
    same(result, whole)
    other = encode(study[0], read(store), part=(1, 3), **{**options, "seed": 1})
    with pytest.raises(SchemaError, match="seed is 0 in one and 1 in another"):
        gather([read_result(folders[0]), other])


def test_bootstrap_sums_equal_samples_drawn_one_by_one(study, whole):
    counts = bootstrap_counts(
        STIMULI, 40, groups=whole.bootstrap["stimulus_id"].values, seed=0
    ).astype(int)
    mean = whole.predictions["training_mean"].values[whole.predictions["fold"].values]
    y = whole.predictions["measured"].values - mean
    p = whole.predictions["predicted"].values - mean
    share = noise_ceiling(whole.best["ncsnr"].values, 2)
    usable = share >= 0.1
    members = roi_members(whole.best, [ALL_ROIS, "V1", "V2", "face"])
    assert [len(m) for m in members.values()] == [203, 100, 100, 40]
    r, normalised = np.empty((40, 4)), np.empty((40, 4))
    for s, times in enumerate(counts):
        rows = np.repeat(np.arange(STIMULI), times)
        each = np.array([np.corrcoef(y[rows, v], p[rows, v])[0, 1] for v in range(N)])
        r[s] = [each[m].mean() for m in members.values()]
        whole_share = np.full(N, np.nan)
        whole_share[usable] = (each * abs(each))[usable] / share[usable]
        normalised[s] = [np.nanmean(whole_share[m]) for m in members.values()]
    for measure, samples in (("r", r), ("normalised", normalised)):
        table = layer_roi(whole, measure=measure, rois=list(members)).sel(layer="chosen layer")
        low, high = np.quantile(samples, [0.025, 0.975], axis=0)
        np.testing.assert_allclose(table["low"], low, atol=1e-4)
        np.testing.assert_allclose(table["high"], high, atol=1e-4)
        assert (table["low"] < table["value"]).all() and (table["value"] < table["high"]).all()


def test_intervals_over_neuroids(whole):
    width = {
        over: float((t["high"] - t["low"]).sel(layer="chosen layer", roi="V1"))
        for over in ("stimuli", "neuroids", "both")
        for t in [layer_roi(whole, over=over)]
    }
    r = whole.best["r"].values[:100]
    assert width["neuroids"] == pytest.approx(2 * 1.96 * r.std() / 10, rel=0.3)
    assert width["both"] > width["stimuli"]


def test_samples_that_differ_are_not_compared(study, whole):
    other = encode(*study, **{**OPTIONS, "n_bootstrap": 30})
    with pytest.raises(SchemaError, match="different bootstrap samples"):
        compare_models({"a": whole, "b": other})
    none = encode(*study, **{**OPTIONS, "n_bootstrap": 0})
    with pytest.raises(ConfigError, match="holds no bootstrap samples"):
        layer_roi(none)
    assert np.isfinite(layer_roi(whole, rois=["all"], over="neuroids")["low"]).all()
    with pytest.raises(ConfigError, match="no samples of stimuli for 'all'"):
        layer_roi(whole, rois=["all"])
    fewer = encode(study[0], study[1].isel(neuroid=slice(50)), **OPTIONS)
    with pytest.raises(SchemaError, match="300 and 50, 50 in common"):
        compare_models({"a": whole, "b": fewer})


def test_a_run_that_was_stopped_goes_on(study, whole, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "plan_blocks", lambda *args: Plan(100, True, 100))
    begin = module._Work.encode
    seen = []

    def stop_at(self, block):
        seen.append(block.start)
        if block.start == stopped:
            raise KeyboardInterrupt
        return begin(self, block)

    monkeypatch.setattr(module._Work, "encode", stop_at)
    stopped = 200
    with pytest.raises(KeyboardInterrupt):
        encode(*study, checkpoint=tmp_path / "parts", **OPTIONS)
    assert seen == [0, 100, 200]
    stopped = -1
    changed = {**OPTIONS, "seed": 1}
    encode(*study, checkpoint=tmp_path / "parts", **changed)
    assert seen[3:] == [0, 100, 200]  # other options: nothing is taken over
    # Other responses of the same neuroids to the same stimuli: nothing is taken over either.
    louder = study[1].assign(responses=study[1]["responses"] * 2)
    encode(study[0], louder, checkpoint=tmp_path / "parts", **OPTIONS)
    assert seen[6:] == [0, 100, 200]
    result = encode(*study, checkpoint=tmp_path / "parts", **OPTIONS)
    assert seen[9:] == [200]
    assert not (tmp_path / "parts").exists()
    same(result, whole)


def test_blocks_without_a_usable_neuroid(study, monkeypatch):
    layers, responses = study[0], study[1].copy(deep=True)
    responses["responses"][:, :130] = 0
    responses["responses"][3, 120:125] = np.nan
    one = encode(layers, responses, **OPTIONS)
    monkeypatch.setattr(module, "plan_blocks", lambda *args: Plan(50, True, 50))
    blocks = encode(layers, responses, **OPTIONS)
    assert blocks.excluded == one.excluded == {"NaN or infinite": 5, "constant": 125}
    np.testing.assert_allclose(one.best["r"], blocks.best["r"], atol=2e-6)
    xr.testing.assert_allclose(layer_roi(one)["low"], layer_roi(blocks)["low"], atol=1e-6)
    responses["responses"][:] = 0
    with pytest.raises(SchemaError, match="No neuroid is left"):
        encode(layers, responses, **OPTIONS)


def test_neuroids_chosen_on_tested_stimuli_are_refused_in_blocks(study, monkeypatch):
    layers, responses = study
    mask = responses["responses"].std("presentation") > 1
    chosen = select(responses, mask, chosen_on=responses, name="vary")
    monkeypatch.setattr(module, "plan_blocks", lambda *args: Plan(50, True, 50))
    for part in (None, (2, 2)):
        with pytest.raises(LeakError, match="60 of these are tested"):
            encode(layers, chosen, part=part, **OPTIONS)


def test_rank_deficient_features_are_noted_once_a_layer(study, monkeypatch, recwarn):
    layers = dict(study[0])
    twice = xr.concat([layers["b"], layers["b"]], "feature")
    layers["b"] = twice.assign_coords(model="net", layer="b")
    monkeypatch.setattr(module, "plan_blocks", lambda *args: Plan(100, True, 100))
    result = encode(layers, study[1], **OPTIONS)
    found = [line for line in result.exclusions if "directions" in line]
    assert len(found) == 1 and found[0].startswith("layer 'b': its features span 8 of 16")
    assert not [w for w in recwarn if "directions" in str(w.message)]


def test_what_needs_all_neuroids_is_refused_where_they_do_not_fit(study, monkeypatch):
    memory = limited(monkeypatch, 60)
    with pytest.raises(ConfigError, match="needs all 300 neuroids at once"):
        encode(*study, choose="roi", memory_gib=memory, **OPTIONS)
    with pytest.raises(ConfigError, match="part 1 of 2 holds few"):
        encode(*study, choose="all", part=(1, 2), **OPTIONS)
    with pytest.raises(ConfigError, match=r"The memory limit is 10.2 MiB.*of 3 folds"):
        encode(*study, memory_gib=0.01, **OPTIONS)


def test_chunks_larger_than_the_memory_are_named(monkeypatch, caplog):
    import torch

    blocks = importlib.import_module("brainalign.encoding.blocks")
    monkeypatch.setattr(blocks, "resident_bytes", lambda: 0)
    sizes = Sizes(9000, 9000, [512], 5, 1, 0, 0, False)
    plan = plan_blocks(sizes, 20_000, 4096, 4.0, [torch.device("cpu")])
    assert plan.step % 4096 == 0 and plan.step >= 4096
    small = plan_blocks(sizes, 20_000, 20_000, 4.0, [torch.device("cpu")])
    assert small.step == small.room < 20_000
    assert f"only {small.room} fit into 4.00 GiB: they are read more than once" in caplog.text


@pytest.mark.parametrize(
    ("n", "chunk", "m"), [(300, 50, 3), (300, 50, 4), (301, 50, 7), (9, 50, 4)]
)
def test_parts_cover_all_neuroids_once(n, chunk, m):
    parts = [part_slice(n, chunk, (k, m)) for k in range(1, m + 1)]
    assert [i for s in parts for i in range(s.start, s.stop)] == list(range(n))
    assert min(s.stop - s.start for s in parts) > 0
    if n // chunk >= m:
        assert all(s.start % chunk == 0 for s in parts)
    for wrong in ((0, m), (m + 1, m), (1, n + 1)):
        with pytest.raises(ConfigError, match="no part"):
            part_slice(n, chunk, wrong)


PEAK = """
import sys
import numpy as np, torch, xarray as xr
torch.set_num_threads(1)
from brainalign.data.store import read
from brainalign.encoding import encode
from brainalign.memory import peak_bytes, resident_bytes
layers = {"a": read(sys.argv[1], "features").load()}
responses = read(sys.argv[2], "responses")
encode(layers, responses.isel(neuroid=slice(8)), n_bootstrap=5, n_permutations=8, inner_cv="gcv")
began, limit = resident_bytes(), resident_bytes() + 288 * 2**20
ids = responses["stimulus_id"].values
encode(layers, responses, memory_gib=limit / 2**30, n_bootstrap=5, n_permutations=20,
       alphas=[10, 100], inner_cv="gcv", splits=[(ids[:600], ids[600:700])], keep_predictions=False)
print((peak_bytes() - began) / (limit - began))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_limit_is_kept(tmp_path):
    rng = np.random.default_rng(0)
    n, v = 1000, 40_000  # 153 MiB; with the copies that are made of a block, 500
    ids = [f"im{i:04d}" for i in range(n)]
    features = xr.Dataset(
        {"features": (("stimulus", "feature"), rng.standard_normal((n, 32), dtype=np.float32))},
        coords={"stimulus_id": ("stimulus", ids), "model": "net", "layer": "a"},
    )
    zeros = ("presentation", np.zeros(n, int))
    responses = xr.Dataset(
        {
            "responses": (
                ("presentation", "neuroid"), rng.standard_normal((n, v), dtype=np.float32)
            )
        },
        coords={
            "stimulus_id": ("presentation", ids), "repetition": zeros, "session": zeros,
            "run": zeros, "subject": ("presentation", ["s1"] * n),
            "neuroid_id": ("neuroid", np.arange(v).astype(str)),
            "roi": ("neuroid", [""] * v), "hemisphere": ("neuroid", ["L"] * v),
        },
    )  # fmt: skip
    write(features, tmp_path / "f.zarr", "features")
    write(responses, tmp_path / "r.zarr", "responses", chunks={"responses": (n, 1000)})
    finished = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "f.zarr"), str(tmp_path / "r.zarr")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    share = float(finished.stdout)
    assert 0.2 < share <= 1.0, share
