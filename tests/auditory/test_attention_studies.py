"""Studies of listening: fetched from a local server, in the layouts of their archives."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from layouts import write_edf, write_tsv
from scipy.io import savemat
from test_fetch import Server

from brainalign.auditory.sound import talker_features
from brainalign.data import archives
from brainalign.data.studies import (
    biesmans2016,
    choudhari2024,
    fuglsang2017,
    panayotov2015,
    zada2025,
)
from brainalign.errors import ChecksumError, SchemaError, UnavailableError, UnknownNameError

mne = pytest.importorskip("mne")

RATE, SECONDS = 128, 4


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BRAINALIGN_DATA", str(tmp_path / "cache"))
    monkeypatch.delenv("BRAINALIGN_MIRROR", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setattr(archives, "ZENODO", f"{server.url}/api/records")
    monkeypatch.setattr(archives, "OPENNEURO_TAGS", f"{server.url}/tags")
    monkeypatch.setattr(archives, "OPENNEURO_FILES", f"{server.url}/bucket")
    yield server
    server.close()


def serve_zenodo(server, record: int, files: dict[str, bytes]) -> None:
    """Serve a record as Zenodo's API describes it."""
    listed = []
    for name, body in files.items():
        path = f"/api/records/{record}/files/{name}/content"
        server.files[path] = body
        listed.append(
            {
                "id": name,
                "key": name,
                "size": len(body),
                "checksum": "md5:" + hashlib.md5(body).hexdigest(),
                "links": {"self": server.url + path},
            }
        )
    answer = {
        "id": record,
        "metadata": {"title": "Attention", "license": {"id": "cc-by-nc-4.0"}},
        "files": listed,
    }
    server.files[f"/api/records/{record}"] = json.dumps(answer).encode()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return buffer.getvalue()


def matlab(**variables) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, variables)
    return buffer.getvalue()


def wav(samples, rate=8000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def cells(values) -> np.ndarray:
    """A MATLAB cell array of one row."""
    out = np.empty((1, len(values)), dtype=object)
    out[0, :] = values
    return out


# Biesmans 2016 (KU Leuven).


@pytest.fixture
def leuven(server):
    rng = np.random.default_rng(0)
    n = RATE * SECONDS
    eeg = [10 * rng.normal(size=(n - 7 * k, 64)) for k in range(3)]
    what = [
        ("L", "part1_track1_hrtf.wav", "part1_track2_hrtf.wav", "HRTF", 0),
        ("R", "part1_track2_dry.wav", "part1_track1_dry.wav", "dry", 0),
        ("L", "rep_part1_track2_dry.wav", "rep_part1_track1_dry.wav", "dry", 1),
    ]
    trials = [
        {
            "RawData": {"Channels": np.arange(1, 65), "EegData": x},
            "FileHeader": {"SampleRate": RATE},
            "TrialID": k + 1,
            "attended_ear": ear,
            "stimuli": cells([left, right]).T,
            "condition": condition,
            "experiment": 1 + 2 * repeated,
            "part": 1,
            "attended_track": 1,
            "repetition": repeated,
            "subject": "S2",
        }
        for k, (x, (ear, left, right, condition, repeated)) in enumerate(
            zip(eeg, what, strict=True)
        )
    ]
    sounds = {f"part1_track{k}_dry.wav": 0.2 * rng.normal(size=8000 * 6) for k in (1, 2)}
    body = zipped({f"stimuli/{name}": wav(x) for name, x in sounds.items()})
    mat = matlab(trials=cells(trials))
    serve_zenodo(
        server,
        4004271,
        {"S2.mat": mat, "stimuli.zip": body, "preprocess_data.m": b"% not fetched"},
    )
    return {"eeg": eeg, "sounds": sounds}


def test_leuven_is_fetched_once_and_read(server, leuven, own_cache, caplog):
    with caplog.at_level("INFO"):
        folder = biesmans2016.fetch(subjects=["S2"], progress=False)
    assert folder == own_cache / "biesmans2016" and "cc-by-nc-4.0" in caplog.text
    assert not (folder / "preprocess_data.m").exists()
    asked = len(server.requests)
    biesmans2016.fetch(subjects=["S2"], progress=False)
    assert len(server.requests) == asked

    study = biesmans2016.load()
    ds = study.responses["S2"]
    assert list(study.responses) == ["S2"] and ds.attrs["sampling_rate"] == 128
    np.testing.assert_allclose(ds["responses"], np.concatenate(leuven["eeg"]), rtol=1e-6)
    assert np.bincount(ds["run"]).tolist() == [512, 505, 498]
    assert ds["neuroid_id"].values[47] == "Cz" and float(ds["z"][47]) > 80
    first = [int(np.flatnonzero(ds["run"] == k)[0]) for k in range(3)]
    # L, R, L: the attended story is on the left, on the right, on the left.
    assert ds["attended"].values[first].tolist() == [0, 1, 0]
    # Sides, filters and repetitions do not make another stimulus.
    assert set(ds["stimulus_id"].values) == {"part1_track1+part1_track2"}
    trials = study.extras["trials"]["S2"]
    assert trials["condition"].values.tolist() == ["HRTF", "dry", "dry"]
    assert trials["repetition"].values.tolist() == [0, 0, 1]


def test_leuven_talkers_fit_the_recording(leuven):
    biesmans2016.fetch(subjects=["S2"], progress=False)
    study = biesmans2016.load()
    talkers = study.extras["talkers"]["S2"]
    (left, rate), (right, _) = talkers[1]
    assert rate == 8000
    np.testing.assert_allclose(
        left[:1000], leuven["sounds"]["part1_track2_dry.wav"][:1000], atol=1e-4
    )
    np.testing.assert_allclose(
        right[:1000], leuven["sounds"]["part1_track1_dry.wav"][:1000], atol=1e-4
    )
    lengths = np.bincount(study.responses["S2"]["run"]).tolist()
    features = talker_features(talkers, ("envelope",), 128.0, n_times=lengths)
    assert features.sizes == {"time": 1515, "feature": 2}


def test_leuven_refusals(server, leuven, tmp_path):
    with pytest.raises(UnavailableError, match=r"no file 'S1\.mat'"):
        biesmans2016.fetch(progress=False)
    with pytest.raises(UnknownNameError, match="no subject 'S17'"):
        biesmans2016.fetch(subjects=["S17"], progress=False)
    with pytest.raises(UnavailableError, match="brainalign fetch biesmans2016"):
        biesmans2016.load()
    folder = biesmans2016.fetch(subjects=["S2"], progress=False)
    with pytest.raises(UnavailableError, match=r"S3\.mat was not fetched"):
        biesmans2016.load(subjects=["S3"])
    body = bytearray((folder / "S2.mat").read_bytes())
    body[-1] ^= 1
    (folder / "S2.mat").write_bytes(body)
    with pytest.raises(ChecksumError, match="md5:"):
        biesmans2016.load()


def test_wrong_bytes_and_silent_archives(server, leuven, tmp_path, monkeypatch):
    path = "/api/records/4004271/files/S2.mat/content"
    server.files[path] = server.files[path][:-1] + b"?"
    with pytest.raises(UnavailableError, match="wrong bytes"):
        biesmans2016.fetch(tmp_path / "a", subjects=["S2"], progress=False)
    assert not (tmp_path / "a" / "S2.mat").exists()
    monkeypatch.setattr(archives, "ZENODO", f"{server.url}/elsewhere")
    with pytest.raises(UnavailableError, match="HTTP 404"):
        biesmans2016.fetch(tmp_path / "b", progress=False)
    server.files["/elsewhere/4004271"] = b"<html>"
    with pytest.raises(SchemaError, match="no record of Zenodo"):
        biesmans2016.fetch(tmp_path / "b", progress=False)
    monkeypatch.setattr(archives, "ZENODO", "http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match="BRAINALIGN_MIRROR"):
        biesmans2016.fetch(tmp_path / "b", progress=False)


def test_mirror_with_its_registry_needs_no_archive(server, leuven, tmp_path, monkeypatch):
    biesmans2016.fetch(tmp_path / "mirror" / "biesmans2016", subjects=["S2"], progress=False)
    monkeypatch.setattr(archives, "ZENODO", "http://127.0.0.1:9")
    folder = biesmans2016.fetch(tmp_path / "own", mirror=tmp_path / "mirror", progress=False)
    assert list(biesmans2016.load(folder).responses) == ["S2"]


# Fuglsang 2017 (DTU).


def copenhagen_data(n_trials=3, single=False):
    """The struct `data` as the authors' preproc_data.m leaves it."""
    rng = np.random.default_rng(1)
    n = 64 * SECONDS
    eeg = [rng.normal(size=(n, 66)) for _ in range(n_trials)]
    a, b = ([rng.random((n, 1)) for _ in range(n_trials)] for _ in range(2))
    a[2], b[2] = b[0], a[0]
    who = [1, 2, 2]
    names = [*(f"A{k}" for k in range(64)), "EXG1", "EXG2"]
    names[47] = "Cz"
    events = np.zeros((1, n_trials), dtype=[("sample", "O"), ("value", "O")])
    for k in range(n_trials):
        events[0, k] = (1.0, cells([float(who[k])]))
    data = {
        "eeg": cells(eeg),
        "wavA": cells(a),
        "wavB": cells(b),
        "fsample": {"eeg": 64.0, "wavA": 64.0, "wavB": 64.0},
        "event": {"eeg": events},
        "dim": {"chan": {"eeg": cells([cells(names)] * n_trials)}},
    }
    return data, eeg, a, b


def test_copenhagen_is_read_as_its_authors_made_it(server):
    data, eeg, a, b = copenhagen_data()
    body = zipped({"S1_data_preproc.mat": matlab(data=data), "S1_noise_preproc.mat": b""})
    serve_zenodo(server, 1199011, {"DATA_preproc.zip": body, "AUDIO.zip": b"not fetched"})
    fuglsang2017.fetch(progress=False)
    study = fuglsang2017.load()
    ds, features = study.responses["S1"], study.extras["features"]["S1"]
    assert list(study.responses) == ["S1"] and ds.sizes == {"time": 768, "neuroid": 66}
    np.testing.assert_allclose(ds["responses"], np.concatenate(eeg), rtol=1e-5)
    assert ds["neuroid_id"].values[[47, 64, 65]].tolist() == ["Cz", "EXG1", "EXG2"]
    assert np.isfinite(ds["x"][47]) and np.isnan(ds["x"][64])
    # The man is talker 0; he is attended in the first trial only.
    assert ds["attended"].values[[0, 256, 512]].tolist() == [0, 1, 1]
    x = features["features"].values
    np.testing.assert_allclose(x[:256], np.concatenate([a[0], b[0]], axis=1), rtol=1e-5)
    np.testing.assert_allclose(x[256:512], np.concatenate([b[1], a[1]], axis=1), rtol=1e-5)
    assert features.attrs["sampling_rate"] == ds.attrs["sampling_rate"] == 64
    # One pair of stories, attended in turn, is one stimulus.
    ids = ds["stimulus_id"].values[[0, 256, 512]]
    assert ids[0] == ids[2] != ids[1]
    with pytest.raises(UnknownNameError, match="holds no subject 'S2'"):
        fuglsang2017.load(subjects=["S2"])


def test_copenhagen_of_another_layout_is_refused(server):
    data, *_ = copenhagen_data()
    data["wavB"][0, 1] = data["wavB"][0, 1][:-5]
    body = zipped({"S1_data_preproc.mat": matlab(data=data)})
    serve_zenodo(server, 1199011, {"DATA_preproc.zip": body})
    fuglsang2017.fetch(progress=False)
    with pytest.raises(SchemaError, match="trial 2 has EEG of 256 samples and envelopes of"):
        _ = fuglsang2017.load().responses["S1"]


# Zada 2025 (Podcast).


@pytest.fixture
def podcast(server, tmp_path):
    rate, n, names = 512, 512 * 3, ["LGA1", "LGA2", "DI1", "DC1"]
    rng = np.random.default_rng(2)
    data = np.round(50 * rng.normal(size=(n, 4)), 1)
    made = tmp_path / "made"
    made.mkdir()
    write_edf(made / "raw.edf", data, names, rate)
    info = mne.create_info(names[1:3], rate, "ecog")
    gamma = 1e-6 * rng.random((2, n))
    fif = made / "sub-03_task-podcast_desc-highgamma_ieeg.fif"
    mne.io.RawArray(gamma, info, verbose="error").save(fif, verbose="error")
    write_tsv(
        made / "channels.tsv",
        "name type units low_cutoff high_cutoff sampling_frequency status status_description",
        [
            ("LGA1", "ECOG", "uV", "n/a", "n/a", "512.0", "bad", "no localization"),
            ("LGA2", "ECOG", "uV", "n/a", "n/a", "512.0", "good", "n/a"),
            ("DI1", "ECOG", "uV", "n/a", "n/a", "512.0", "good", "n/a"),
            ("DC1", "MISC", "uV", "n/a", "n/a", "512.0", "good", "n/a"),
            ("EDF Annotations", "MISC", "n/a", "n/a", "n/a", "1728.0", "good", "n/a"),
        ],
    )
    write_tsv(
        made / "electrodes.tsv",
        "name x y z size group",
        [("LGA2", -57.2, 15.6, 30.8, 4.15, "S"), ("DI1", -37.0, 11.0, -15.0, 4.15, "D")],
    )
    start = "sub-03/ieeg/sub-03"
    space = f"{start}_space-MNI152NLin2009aSym"
    small = {
        "dataset_description.json": json.dumps({"Name": "Podcast", "License": "CC0"}).encode(),
        f"{start}_task-podcast_channels.tsv": (made / "channels.tsv").read_bytes(),
        f"{space}_electrodes.tsv": (made / "electrodes.tsv").read_bytes(),
        f"{space}_coordsystem.json": json.dumps(
            {"iEEGCoordinateSystem": "MNI152NLin2009aSym", "iEEGCoordinateUnits": "mm"}
        ).encode(),
        "stimuli/podcast_transcript.csv": b'word,start,end\nAct,3.71,3.79\n"one,",3.99,4.2\n,,\n',
    }
    prep = f"derivatives/ecogprep/sub-03/ieeg/{fif.name}"
    sound = 0.1 * rng.normal(size=(8000 * 4, 2))
    large = {
        f"{start}_task-podcast_ieeg.edf": (made / "raw.edf").read_bytes(),
        prep: fif.read_bytes(),
        "stimuli/podcast.wav": wav(sound),
    }
    tag = "/tags/ds005574/1.0.2/"
    for name, body in small.items():
        server.files[tag + name] = body
    for name, body in large.items():
        key = f"SHA256E-s{len(body)}--{hashlib.sha256(body).hexdigest()}{Path(name).suffix}"
        up = "../" * name.count("/")
        server.files[tag + name] = f"{up}.git/annex/objects/4p/X3/{key}/{key}".encode()
        server.files[f"/bucket/ds005574/{name}"] = body
    return {"data": data, "gamma": gamma, "sound": sound}


def test_podcast_high_gamma(podcast):
    zada2025.fetch(subjects=["sub-03"], progress=False)
    study = zada2025.load()
    ds = study.responses["sub-03"]
    assert ds["neuroid_id"].values.tolist() == ["LGA2", "DI1"]
    np.testing.assert_allclose(ds["responses"], 1e6 * podcast["gamma"].T, rtol=1e-5)
    assert ds["x"].values.tolist() == [-57.2, -37] and set(ds["hemisphere"].values) == {"L"}
    assert ds.attrs["space"] == "MNI152NLin2009aSym" and ds.attrs["sampling_rate"] == 512
    ((sound, rate),) = study.extras["talkers"]["sub-03"][0]
    assert rate == 8000
    np.testing.assert_allclose(sound, podcast["sound"].mean(axis=1), atol=1e-4)
    words = study.extras["words"]
    assert words["word"].values.tolist() == ["Act", "one,"]
    assert words["onset"].values.tolist() == [3.71, 3.99]


def test_podcast_as_it_was_recorded(podcast, tmp_path):
    folder = zada2025.fetch(tmp_path / "r", subjects=["sub-03"], signals=["raw"], progress=False)
    ds = zada2025.load(folder, signal="raw").responses["sub-03"]
    assert ds["neuroid_id"].values.tolist() == ["LGA1", "LGA2", "DI1"]
    assert ds["status"].values.tolist() == ["bad", "good", "good"]
    np.testing.assert_allclose(ds["responses"], podcast["data"][:, :3], atol=0.01)
    with pytest.raises(UnavailableError, match="'highgamma' of all subjects"):
        zada2025.load(folder)


# Choudhari 2024 (result files).


def test_result_files_are_found(mirror):
    study = choudhari2024.load(mirror / choudhari2024.FOLDER)
    assert list(study.extras) == ["CU-204", "LIJ-174"]
    patient = study.extras["CU-204"]
    for kind in ("results", "accuracies"):
        assert sorted(patient[kind]) == ["Both", "Spec", "Traj"]
        assert all(path.is_file() for path in patient[kind].values())
    assert len(patient["electrodes"]) == 42
    assert len(study.extras["LIJ-174"]["electrodes"]) == 17


def test_clips_of_three_talkers(mirror):
    sounds = panayotov2015.load(mirror / panayotov2015.FOLDER).extras["sounds"]
    assert list(sounds) == ["198", "3436", "5703"] and all(p.is_file() for p in sounds.values())


def test_sound_files_need_their_package(monkeypatch):
    from brainalign.data.sounds import read_sound
    from brainalign.errors import MissingDependencyError

    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(MissingDependencyError, match=r"brainalign\[auditory\]"):
        read_sound("a.wav")
