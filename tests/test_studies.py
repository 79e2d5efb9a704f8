"""Studies: registries, terms, what is refused, and every known number of the three data sets."""

from __future__ import annotations

import hashlib
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr
from scipy.stats import kendalltau, pearsonr, rankdata, spearmanr

from brainalign.data import studies
from brainalign.data.fetch import RemoteFile
from brainalign.data.schema import validate
from brainalign.data.studies import (
    Study,
    choudhari2024,
    geirhos2021,
    haxby2001,
    kay2017,
    kriegeskorte2008,
    panayotov2015,
)
from brainalign.errors import (
    ChecksumError,
    ConfigError,
    SchemaError,
    UnavailableError,
    UnknownNameError,
)

UPPER = np.triu_indices(92, 1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BRAINALIGN_DATA", str(tmp_path / "cache"))
    monkeypatch.delenv("BRAINALIGN_MIRROR", raising=False)
    return tmp_path / "cache"


# What every study has.


def test_names_and_near_names():
    assert studies.names() == [
        "allen2022",
        "biesmans2016",
        "choudhari2024",
        "fuglsang2017",
        "geirhos2021",
        "haxby2001",
        "kay2017",
        "kriegeskorte2008",
        "panayotov2015",
        "zada2025",
    ]
    assert studies.get("kay2017") is kay2017
    with pytest.raises(UnknownNameError, match="Did you mean 'haxby2001'"):
        studies.get("haxby2010")


@pytest.mark.parametrize("name", studies.names())
def test_constants(name):
    module = studies.get(name)
    for constant in ("TITLE", "LICENCE", "TERMS", "CITATION", "FOLDER"):
        assert getattr(module, constant).strip()
    assert module.MUST_AGREE is (name == "allen2022")
    entries = studies.references(module)
    assert name in entries
    for key, entry in entries.items():
        assert entry.startswith("@article{" + key + ",") and entry.count("{") == entry.count("}")
        assert all(f in entry for f in ("author =", "title =", "year =", "doi ="))


@pytest.mark.parametrize(
    ("module", "n_files", "n_bytes"),
    [
        (choudhari2024, 15, 8_529_054),
        (geirhos2021, 93, 8_287_146),
        (kay2017, 233, 10_524_361),
        (kriegeskorte2008, 5, 5_145_240),
        (haxby2001, 164, 3_932_639),
        (panayotov2015, 6, 241_594),
    ],
)
def test_registries(module, n_files, n_bytes):
    assert len(module.REGISTRY) == n_files
    assert sum(entry.bytes for entry in module.REGISTRY.values()) == n_bytes
    for name, entry in module.REGISTRY.items():
        assert len(bytes.fromhex(entry.sha256)) == 32
        assert entry.url.startswith("https://") and entry.url.endswith(Path(name).name[-4:])


def asks_agreement(server_file: bytes = b"data") -> SimpleNamespace:
    return SimpleNamespace(
        __name__="brainalign.data.studies.gated",
        TITLE="A gated study",
        TERMS="Do not try to identify the subjects.",
        MUST_AGREE=True,
        FOLDER="gated",
        REGISTRY={
            "a.bin": RemoteFile(
                hashlib.sha256(server_file).hexdigest(), "http://127.0.0.1:9/a", len(server_file)
            )
        },
    )


def test_terms_must_be_accepted(tmp_path):
    (tmp_path / "mirror/gated").mkdir(parents=True)
    (tmp_path / "mirror/gated/a.bin").write_bytes(b"data")
    with pytest.raises(UnavailableError) as refused:
        studies.fetch_study(asks_agreement(), tmp_path / "out", mirror=tmp_path / "mirror")
    assert "Do not try to identify the subjects." in str(refused.value)
    assert "brainalign fetch gated --accept-terms" in refused.value.remedy
    assert not (tmp_path / "out").exists()
    folder = studies.fetch_study(
        asks_agreement(), tmp_path / "out", mirror=tmp_path / "mirror", accept_terms=True
    )
    assert (folder / "a.bin").read_bytes() == b"data"


DOWNLOADED = [name for name in studies.names() if studies.get(name).REGISTRY]


@pytest.mark.parametrize("name", DOWNLOADED)
def test_fetch_from_the_mirror(mirror, own_cache, name):
    module = studies.get(name)
    folder = module.fetch(mirror=mirror, progress=False)
    assert folder == own_cache / module.FOLDER
    found = {
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith(".")
    }
    assert found == set(module.REGISTRY)
    assert isinstance(module.load(), Study)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_offline_and_unfetched(monkeypatch, name):
    def offline(*args, **kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    module = studies.get(name)
    start = time.monotonic()
    with pytest.raises(UnavailableError, match="BRAINALIGN_MIRROR"):
        module.fetch(progress=False)
    assert time.monotonic() - start < 5
    with pytest.raises(UnavailableError, match=f"missing in .*brainalign fetch {name}"):
        module.load()


def test_changed_file_is_refused(mirror, tmp_path):
    folder = shutil.copytree(mirror / kriegeskorte2008.FOLDER, tmp_path / "copy")
    path = folder / "92_modelRDMs.mat"
    path.chmod(0o644)
    body = bytearray(path.read_bytes())
    body[1000] ^= 1
    path.write_bytes(body)
    with pytest.raises(ChecksumError, match=r"92_modelRDMs\.mat"):
        kriegeskorte2008.load(folder)


def test_loading_from_the_mirror_leaves_it_alone(mirror):
    before = sorted(p.name for p in (mirror / haxby2001.FOLDER).iterdir())
    haxby2001.load(mirror / haxby2001.FOLDER)
    assert sorted(p.name for p in (mirror / haxby2001.FOLDER).iterdir()) == before


def test_stimuli_are_written_once_and_mended(tmp_path, caplog):
    made = []

    def images():
        made.append(1)
        yield np.zeros((4, 4), np.uint8)
        yield np.full((4, 4, 3), 9, np.uint8)

    def cached(source="v1"):
        return studies.cached_stimuli(tmp_path / "s", images, ["a", "b"], source)

    first = cached()
    assert cached().hash == first.hash and len(made) == 1
    first.paths[1].write_bytes(b"no image")
    with caplog.at_level("WARNING"):
        assert cached().hash == first.hash and len(made) == 2
    assert "damaged" in caplog.text
    cached("v2")
    assert len(made) == 3


# Kriegeskorte 2008.


@pytest.fixture(scope="module")
def objects(mirror, tmp_path_factory) -> Study:
    return kriegeskorte2008.load(
        mirror / kriegeskorte2008.FOLDER, stimuli_folder=tmp_path_factory.mktemp("objects") / "s"
    )


def upper(rdms: xr.Dataset) -> np.ndarray:
    return np.stack([rdm[UPPER] for rdm in rdms["rdm"].values])


def test_92_images(objects):
    stimuli = objects.stimuli
    assert stimuli.ids == kriegeskorte2008.image_ids() and len(set(stimuli.sha256)) == 92
    first = np.asarray(stimuli.open(0))
    assert first.shape == (175, 175, 3) and first[0, 0].tolist() == [128, 128, 128]
    category = stimuli.index["category"].values
    assert [str(c) for c in dict.fromkeys(category)] == [n for n, _ in kriegeskorte2008.CATEGORIES]
    assert [int((category == n).sum()) for n, _ in kriegeskorte2008.CATEGORIES] == [
        12, 12, 12, 12, 23, 21,
    ]  # fmt: skip
    assert np.array_equal(stimuli.index["face"], np.char.find(category.astype(str), "face") >= 0)
    assert np.array_equal(stimuli.index["human"], np.arange(92) < 24)
    assert np.array_equal(stimuli.index["animal"], np.arange(92) < 48)


def test_category_vectors(objects):
    vectors = objects.extras["category"]
    assert vectors["category_name"].values.tolist() == [
        "animate", "inanim", "human", "nonhumani", "body", "face", "natObj", "artiObj", "rand24",
        "rand48", "other48", "monkeyape",
    ]  # fmt: skip
    assert vectors["member"].sel(category_name="rand24").sum() == 22
    assert np.array_equal(vectors["member"].sel(category_name="animate"), np.arange(92) < 48)


def test_rdms_follow_the_schema(objects):
    sizes = {"human_it": 8, "human_it_mean": 1, "monkey_it": 1, "behaviour": 16, "models": 8}
    for name, n in sizes.items():
        rdms = validate(objects.extras[name], "rdms")
        assert rdms.sizes == {"rdm_name": n, "stimulus": 92, "stimulus_2": 92}
        assert np.isfinite(rdms["rdm"]).all()
        assert rdms["stimulus_id"].values.tolist() == objects.stimuli.ids
    human = objects.extras["human_it"]
    assert human["subject"].values.tolist() == ["BE", "BE", "KO", "KO", "SN", "SN", "TI", "TI"]
    assert human["session"].values.tolist() == [1, 2] * 4
    assert objects.extras["models"]["rdm_name"].values.tolist() == [
        "animacy", "FaceBodyManmadeNatobj", "monkeyIT", "EVA", "HMAX", "V1", "Silhouette", "RADON",
    ]  # fmt: skip


def test_which_rdm_is_which(objects):
    extras = objects.extras
    mean = upper(extras["human_it"]).mean(axis=0)
    np.testing.assert_allclose(upper(extras["human_it_mean"])[0], mean, atol=1e-7)
    models = extras["models"].sel(rdm_name="monkeyIT")["rdm"].values
    np.testing.assert_array_equal(models, extras["monkey_it"]["rdm"].values[0])
    classes = extras["models"].sel(rdm_name="FaceBodyManmadeNatobj")["rdm"].values
    assert classes[0, 1] == 0 and classes[0, 12] == 1


def test_monkey_and_human_it(objects):
    monkey, human = upper(objects.extras["monkey_it"])[0], upper(objects.extras["human_it_mean"])[0]
    assert pearsonr(monkey, human)[0] == pytest.approx(0.4912, abs=5e-5)
    assert spearmanr(monkey, human)[0] == pytest.approx(0.4389, abs=5e-5)
    assert kendalltau(monkey, human)[0] == pytest.approx(0.3040, abs=5.5e-5)


@pytest.mark.parametrize(
    ("name", "r", "rho"),
    [
        ("animacy", 0.577, 0.588),
        ("FaceBodyManmadeNatobj", 0.418, 0.405),
        ("EVA", 0.374, 0.354),
        ("HMAX", 0.217, 0.222),
        ("V1", 0.042, 0.039),
        ("Silhouette", 0.162, 0.125),
        ("RADON", 0.055, 0.061),
    ],
)
def test_models_against_human_it(objects, name, r, rho):
    model = objects.extras["models"].sel(rdm_name=name)["rdm"].values[UPPER]
    human = upper(objects.extras["human_it_mean"])[0]
    # The known values were rounded twice: EVA is .37347, HMAX .21648.
    assert pearsonr(model, human)[0] == pytest.approx(r, abs=6e-4)
    assert spearmanr(model, human)[0] == pytest.approx(rho, abs=6e-4)


def test_behaviour_against_it(objects):
    behaviour = upper(objects.extras["behaviour"]).mean(axis=0)
    human, monkey = (upper(objects.extras[n])[0] for n in ("human_it_mean", "monkey_it"))
    found = [f(behaviour, it)[0] for f in (pearsonr, spearmanr) for it in (human, monkey)]
    np.testing.assert_allclose(found, [0.468, 0.512, 0.392, 0.394], atol=6e-4)


def test_reliability_of_human_it(objects):
    sessions = upper(objects.extras["human_it"]).reshape(4, 2, -1)
    within = [np.corrcoef(*pair)[0, 1] for pair in sessions]
    np.testing.assert_allclose(within, [0.291, 0.099, 0.398, 0.119], atol=6e-4)
    between = np.corrcoef(sessions.mean(axis=1))[np.triu_indices(4, 1)]
    assert between.mean() == pytest.approx(0.284, abs=6e-4)


def test_noise_ceilings_of_rdms(objects):
    def ceiling(v, correlate):
        n = range(len(v))
        lower = [correlate(v[i], np.delete(v, i, axis=0).mean(axis=0))[0] for i in n]
        return np.mean(lower), np.mean([correlate(v[i], v.mean(axis=0))[0] for i in n])

    def z(v):
        return (v - v.mean(axis=1, keepdims=True)) / v.std(axis=1, keepdims=True)

    means = upper(objects.extras["human_it"]).reshape(4, 2, -1).mean(axis=1)
    np.testing.assert_allclose(ceiling(z(means), pearsonr), [0.394, 0.680], atol=6e-4)
    ranked = rankdata(means, axis=1)
    # The upper one is .666, as rsatoolbox has it; .672 is known for another way to average.
    np.testing.assert_allclose(ceiling(ranked, spearmanr), [0.372, 0.666], atol=6e-4)
    behaviour = upper(objects.extras["behaviour"])
    np.testing.assert_allclose(ceiling(z(behaviour), pearsonr), [0.572, 0.635], atol=6e-4)


# Kay & Yeatman 2017.


@pytest.fixture(scope="module")
def kay(mirror, tmp_path_factory) -> Study:
    return kay2017.load(
        mirror / kay2017.FOLDER, stimuli_folder=tmp_path_factory.mktemp("kay") / "s"
    )


def test_niko_order():
    order = kay2017.niko_images().tolist()
    assert order[:4] == [1, 10, 11, 12] and order[-3:] == [90, 91, 92]
    assert order[11:13] == [2, 20] and sorted(order) == list(range(1, 93))


def test_experiment_2(kay):
    ds = validate(kay.responses["subject1"], "responses")
    assert ds.sizes == {"presentation": 115, "neuroid": 2, "resample": 100}
    assert ds["roi"].values.tolist() == ["VWFA", "FFA"]
    assert ds["stimulus_id"].values.tolist() == kay.stimuli.ids
    assert ds["stimulus_id"].values[:5].tolist() == [
        "BLANK", "FACECON4", "FACECON6", "FACECON10", "FACE",
    ]  # fmt: skip
    assert ds["stimulus_id"].values[23:].tolist() == kriegeskorte2008.image_ids()
    where = {c: i for i, c in enumerate(ds["condition"].values)}
    numbers = [int(ds["image_number"].values[where[c]]) for c in ("NIKO01", "NIKO02", "NIKO12")]
    assert numbers == [1, 10, 2]
    boot = ds["bootstrap"].values.astype(np.float64)
    np.testing.assert_array_equal(np.median(ds["bootstrap"], axis=0), ds["responses"])
    q16, q84 = np.percentile(boot, [16, 84], axis=0, method="hazen")
    np.testing.assert_allclose((q84 - q16) / 2, ds["standard_error"], atol=1e-6)


def test_experiment_2_by_category(kay):
    ds = kay.responses["subject1"]
    ffa = ds["responses"].values[:, 1]
    known = {
        "human face": 2.60, "non-human face": 1.39, "human body part": 0.40,
        "non-human body part": 0.11, "natural object": 0.20, "artificial object": 0.15,
    }  # fmt: skip
    for category, value in known.items():
        assert ffa[ds["category"].values == category].mean() == pytest.approx(value, abs=0.006)
    images = ds["image_number"].values > 0
    face = np.char.find(ds["category"].values[images].astype(str), "face") >= 0
    above = ffa[images][face][:, None] > ffa[images][~face][None]
    assert above.mean() == pytest.approx(0.988, abs=6e-4)


def test_order_of_the_92_by_rdm(kay, objects):
    beta = kay.responses["subject1"]["responses"].values[23:].astype(float)
    human = upper(objects.extras["human_it_mean"])[0]

    def r(v):
        return pearsonr(np.abs(v[:, None] - v[None])[UPPER], human)[0]

    assert r(beta[:, 1]) == pytest.approx(0.183, abs=6e-4)
    assert r(beta[:, 0]) == pytest.approx(-0.003, abs=6e-4)
    assert r(beta[kay2017.niko_images() - 1, 1]) == pytest.approx(0.085, abs=6e-4)


def grey(image, box=None, size=70) -> np.ndarray:
    return np.asarray(image.convert("L").crop(box).resize((size, size)), dtype=float).ravel()


def test_order_of_the_92_by_image(kay, objects):
    """The object fills the middle 246 pixels; an image turned on its side does not match."""
    box = (252, 252, 498, 498)
    theirs = np.stack([grey(kay.stimuli.open(i), box) for i in range(23, 115)])
    ours = np.stack([grey(objects.stimuli.open(i)) for i in range(92)])
    r = np.corrcoef(theirs, ours)[:92, 92:]
    assert (r.argmax(axis=1) == np.arange(92)).sum() == 87
    turned = np.stack([v.reshape(70, 70).T.ravel() for v in theirs])
    assert np.diag(np.corrcoef(turned, ours)[:92, 92:]).mean() < np.diag(r).mean() / 2


def test_first_conditions_show_the_images_of_experiment_1(kay):
    stimuli = kay.extras["experiment1_stimuli"]
    correlations = []
    for i in range(1, 23):
        shown = np.asarray(kay.stimuli.open(i).convert("L"))[125:625, 125:625]
        first = np.asarray(stimuli.open(10 * i).convert("L"))
        correlations.append(np.corrcoef(shown.ravel(), first.ravel())[0, 1])
    assert min(correlations) > 0.93
    blank = np.asarray(kay.stimuli.open(0))
    assert np.all(blank == 127) and np.all(np.asarray(stimuli.open(0)) == 127)


def test_luminance_is_linear(kay):
    np.testing.assert_array_equal(kay2017.decode_luminance([0, 180, 255]), [0, 127, 254])
    stimuli = kay.extras["experiment1_stimuli"]
    assert len(stimuli) == 230 and stimuli.ids[:2] == ["BLANK-01", "BLANK-02"]
    image = np.asarray(stimuli.open(stimuli.ids.index("WORD-01")))
    assert image.shape == (500, 500, 3) and image[0, 0].tolist() == [127] * 3
    # The same face at less contrast spreads less around the background.
    spread = {
        name: np.asarray(stimuli.open(stimuli.ids.index(f"{name}-01"))).std()
        for name in ("FACECON4", "FACECON6", "FACECON10", "FACE")
    }
    assert list(spread.values()) == sorted(spread.values())


def test_experiment_1(kay):
    ds = validate(kay.extras["experiment1"], "responses")
    categories = ds["category"].values.tolist()
    assert categories[0] == "" and categories.count("") == 1
    assert [i + 1 for i, c in enumerate(categories) if c == "FACE"] == [2, 3, 4, 5, 15, 16]
    assert [i + 1 for i, c in enumerate(categories) if c == "WORD"] == [6, 7, 8, 9, 19, 20]
    assert ds["stimulus_id"].values[8] == "WORD" and ds["stimulus_id"].values[22] == "HOUSE"
    other = kay.responses["subject1"]["responses"].values[:23]
    found = [np.corrcoef(ds["responses"].values[:, j], other[:, j])[0, 1] for j in (0, 1)]
    np.testing.assert_allclose(found, [0.833, 0.855], atol=6e-4)
    assert (ds["standard_error"] > 0).all()


def test_features_templates_and_projections(kay):
    v1 = validate(kay.extras["v1"], "features")
    f = v1["features"].values.reshape(23, 10, 8192)
    template = kay.extras["templates"]["template"]
    np.testing.assert_allclose(template.sel(template_name="WORD"), f[8].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(template.sel(template_name="FACE"), f[4].mean(axis=0), atol=1e-6)
    match = v1["features"].values.astype(float) @ template.values.T
    stored = kay.extras["projections"]["template_match"].values
    np.testing.assert_allclose(match.T, stored, rtol=2e-5, atol=1e-4)
    np.testing.assert_allclose(
        v1["features"].values.mean(axis=1), kay.extras["projections"]["energy"], atol=1e-6
    )


def test_feature_axes_are_rows_and_columns(kay):
    """Energy stands where the image departs from the background; transposed it does not."""
    v1 = kay.extras["v1"]
    stimuli = kay.extras["experiment1_stimuli"]
    straight, turned = [], []
    for name in ("POLYGON-01", "HOUSE-01", "WORD-01", "FACE-01"):
        i = stimuli.ids.index(name)
        assert v1["stimulus_id"].values[i] == name
        energy = np.zeros((32, 32))
        np.add.at(energy, (v1["row"].values, v1["column"].values), v1["features"].values[i])
        image = np.abs(np.asarray(stimuli.open(i).convert("L"), dtype=float) - 127)
        coarse = image[:496, :496].reshape(31, 16, 31, 16).mean(axis=(1, 3))
        straight.append(np.corrcoef(energy[:31, :31].ravel(), coarse.ravel())[0, 1])
        turned.append(np.corrcoef(energy.T[:31, :31].ravel(), coarse.ravel())[0, 1])
    assert np.mean(straight) > np.mean(turned) + 0.1


def test_gabors(kay):
    gabor = kay.extras["gabors"]["gabor"]
    assert gabor.sizes == {"phase": 2, "orientation": 8, "row": 52, "column": 52}
    assert gabor["orientation"].values.tolist() == [i * 22.5 for i in range(8)]
    # Orientation 0 is horizontal: it varies along rows, not along columns.
    horizontal = gabor.sel(orientation=0).isel(phase=0).values
    assert np.abs(np.diff(horizontal, axis=0)).sum() > 2 * np.abs(np.diff(horizontal, axis=1)).sum()


# Haxby 2001.


@pytest.fixture(scope="module")
def slices(mirror) -> Study:
    return haxby2001.load(mirror / haxby2001.FOLDER)


def test_haxby_time_series(slices, mirror):
    import nibabel

    ds = validate(slices.responses["sub001"], "responses")
    assert ds.sizes == {"time": 1452, "neuroid": 530} and ds.attrs["sampling_rate"] == 0.4
    bold = np.asarray(nibabel.load(mirror / haxby2001.FOLDER / "bold.nii.gz").dataobj)
    for n in (0, 100, 529):
        i, j, k = (int(ds[a].values[n]) for a in "ijk")
        np.testing.assert_array_equal(ds["responses"].values[:, n], bold[i, j, k])
    assert bold[..., 0].size == 800 and not bold[bold.std(axis=3) == 0].any()
    assert ds["x"].values[0] == pytest.approx(60.45 - 3.1 * ds["i"].values[0], abs=1e-4)


def test_haxby_labels(slices):
    ds = slices.responses["sub001"]
    label, run = ds["condition"].values, ds["run"].values
    counts = dict(zip(*np.unique(label, return_counts=True), strict=True))
    assert counts.pop("rest") == 588
    assert set(counts) == {
        "face", "house", "shoe", "cat", "scissors", "scrambledpix", "bottle", "chair",
    }  # fmt: skip
    assert set(counts.values()) == {108}
    assert np.array_equal(np.unique(run, return_counts=True)[1], [121] * 12)
    assert ds["volume"].values.max() == 120


def test_haxby_numbers_and_words_agree(mirror, slices):
    names = [
        "rest", "face", "house", "shoe", "cat", "scissors", "scrambledpix", "bottle", "chair",
    ]  # fmt: skip
    rows = (mirror / haxby2001.FOLDER / "attributes.txt").read_text().split("\n")
    numbers = [int(row.split()[0]) for row in rows if row.strip()]
    assert [names[n] for n in numbers] == slices.responses["sub001"]["condition"].values.tolist()


def test_haxby_events_are_the_labels(slices):
    ds, events = slices.responses["sub001"], slices.extras["events"]
    label = np.full((12, 121), "rest", dtype="U12")
    for i in range(events.sizes["event"]):
        e = events.isel(event=i)
        start = round(float(e["onset"]) / haxby2001.TR)
        label[int(e["run"]), start : start + 9] = str(e["trial_type"].values)
    assert events.sizes["event"] == 96 and set(events["duration"].values) == {22.5}
    assert np.array_equal(label.ravel(), ds["condition"].values)


def test_haxby_onset_files_have_their_own_numbering(mirror, slices):
    folder = mirror / haxby2001.FOLDER / "haxby2001"
    key = (folder / "models/model001/condition_key.txt").read_text().split("\n")
    names = {row.split()[1]: row.split()[2] for row in key if row.strip()}
    events = slices.extras["events"]
    for number, name in names.items():
        onsets = folder / "sub001/model/model001/onsets/task001_run003" / f"{number}.txt"
        there = (events["run"] == 2) & (events["trial_type"] == name)
        assert float(onsets.read_text().split()[0]) == float(events["onset"].values[there][0])


def test_haxby_runs_are_the_chunks(mirror, slices):
    import nibabel

    ds = slices.responses["sub001"]
    index = tuple(ds[a].values for a in "ijk")
    for run in (0, 7):
        path = f"haxby2001/sub001/BOLD/task001_run{run + 1:03d}/bold_1slice.nii.gz"
        data = np.asarray(nibabel.load(mirror / haxby2001.FOLDER / path).dataobj)
        np.testing.assert_array_equal(ds["responses"].values[ds["run"] == run], data[index].T)


def test_haxby_coarse_volumes(slices):
    coarse = validate(slices.extras["coarse"], "responses")
    assert coarse.sizes["neuroid"] == 129 and coarse.sizes["time"] == 1452
    counts = coarse["roi_mask"].sum("neuroid")
    assert counts.sel(roi_name="brain") == 129 and counts.sel(roi_name="vt") == 1
    assert coarse["hoc"].values.max() == 44
    assert slices.extras["motion"].sizes == {"time": 1452, "parameter": 6}


def full_folder(folder: Path, subject: int = 1, *, mask_shape=(5, 4, 3), n_labels=20) -> Path:
    """Write nilearn's folder of the full study, small."""
    import nibabel

    rng = np.random.default_rng(0)
    affine = np.diag([3.5, 3.75, 3.75, 1.0])
    home = folder / "haxby2001"
    own = home / f"subj{subject}"
    own.mkdir(parents=True)
    (home / "MD5SUMS").write_text("")

    def save(path, data):
        nibabel.save(nibabel.Nifti1Image(data, affine), path)

    save(own / "bold.nii.gz", rng.integers(1, 999, (5, 4, 3, 20)).astype(np.int16))
    brain = np.ones(mask_shape, np.int16)
    brain[0] = 0
    save(home / "mask.nii.gz", brain)
    save(own / "anat.nii.gz", np.ones((2, 2, 2), np.int16))
    names = ("4_vt", "8b_face_vt", "8b_house_vt", "8_face_vt", "8_house_vt")
    for i, name in enumerate(names):
        mask = np.zeros((5, 4, 3, 1), np.int16)
        mask[1:3, i % 4] = 1
        save(own / f"mask{name}.nii.gz", mask)
    rows = [f"{'rest' if i % 5 else 'face'} {i // 10}" for i in range(n_labels)]
    (own / "labels.txt").write_text("\n".join(["labels chunks", *rows, ""]))
    return folder


def test_haxby_full_through_nilearn(tmp_path, monkeypatch):
    import nibabel

    folder = full_folder(tmp_path / "data")
    study = haxby2001.load_full(1, data_dir=folder)
    ds = validate(study.responses["subj1"], "responses")
    assert ds.sizes["neuroid"] == 4 * 4 * 3 and ds.sizes["time"] == 20
    assert ds["run"].values.tolist() == [0] * 10 + [1] * 10
    assert set(ds["condition"].values) == {"rest", "face"}
    bold = np.asarray(nibabel.load(folder / "haxby2001/subj1/bold.nii.gz").dataobj)
    i, j, k = (int(ds[a].values[7]) for a in "ijk")
    np.testing.assert_array_equal(ds["responses"].values[:, 7], bold[i, j, k])
    assert int(ds["roi_mask"].sel(roi_name="vt").sum()) == 6
    vt = haxby2001.load_full(1, data_dir=folder, mask="vt").responses["subj1"]
    assert vt.sizes["neuroid"] == 6 and bool(vt["roi_mask"].sel(roi_name="vt").all())
    monkeypatch.setenv("BRAINALIGN_MIRROR", str(folder))
    assert list(haxby2001.load(full=[1]).responses) == ["subj1"]


def test_haxby_full_refuses(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="subjects 1 to 6"):
        haxby2001.load_full(7, data_dir=tmp_path)
    with pytest.raises(ConfigError, match="'brain' or 'vt'"):
        haxby2001.load_full(1, data_dir=tmp_path, mask="v1")
    with pytest.raises(SchemaError, match="mask brain has shape"):
        haxby2001.load_full(1, data_dir=full_folder(tmp_path / "a", mask_shape=(5, 4, 4)))
    with pytest.raises(SchemaError, match="19 labels for 20 volumes"):
        haxby2001.load_full(1, data_dir=full_folder(tmp_path / "b", n_labels=19))

    def offline(*args, **kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    with pytest.raises(UnavailableError, match="through nilearn"):
        haxby2001.load_full(2, data_dir=tmp_path / "none")


def test_bundles_hold_everything(kay, objects, slices, tmp_path):
    from brainalign.data.bundle import read_bundle, write_bundle

    for study in (kay, objects, slices):
        write_bundle(study, tmp_path / study.name)
        found = read_bundle(tmp_path / study.name)
        for name, extra in study.extras.items():
            if isinstance(extra, xr.Dataset):
                assert set(found.extras[name].variables) == set(extra.variables)
                for v in extra.data_vars:
                    np.testing.assert_array_equal(found.extras[name][v].values, extra[v].values)
        for subject, ds in study.responses.items():
            np.testing.assert_array_equal(found.responses[subject]["responses"], ds["responses"])
