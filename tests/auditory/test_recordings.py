"""Recordings from MNE and BIDS folders as responses."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from layouts import write_ieeg_bids, write_tsv

from brainalign.data.electrophysiology import (
    from_raw,
    join_runs,
    read_bids_recording,
    read_channels,
    read_electrodes,
    standard_positions,
)
from brainalign.data.schema import validate
from brainalign.errors import (
    MissingDependencyError,
    SchemaError,
    UnavailableError,
    UnknownNameError,
)

mne = pytest.importorskip("mne")
pytest.importorskip("mne_bids")


@pytest.fixture(scope="module")
def bids(tmp_path_factory):
    root = tmp_path_factory.mktemp("bids")
    return root, write_ieeg_bids(root)


def test_ieeg_bids_with_two_runs(bids):
    root, made = bids
    ds, events = read_bids_recording(root, "01", "listen")
    validate(ds, "responses")
    assert ds["neuroid_id"].values.tolist() == ["LA1", "LA2", "LB1", "NA"]
    assert ds.attrs["sampling_rate"] == 256 and ds.attrs["units"] == "uV"
    np.testing.assert_allclose(ds["responses"], np.concatenate(made["data"])[:, :4], atol=1e-3)
    assert np.bincount(ds["run"]).tolist() == [1024, 1024]
    # Bad in one run is bad.
    assert ds["status"].values.tolist() == ["good", "bad", "good", "good"]
    # An electrode may be called NA; it has no position.
    assert ds["x"].values.tolist()[:3] == [-50, -55, 40] and np.isnan(ds["x"][3])
    assert ds["hemisphere"].values.tolist() == ["L", "L", "R", ""]
    assert ds.attrs["space"] == "MNI152NLin2009aSym"
    assert events["run"].tolist() == [0, 0, 1, 1] and events["onset"].tolist() == [0.5, 2] * 2
    bad = np.flatnonzero(ds["bad"].values)
    assert bad.tolist() == [*range(512, 640), *range(1536, 1664)]


def test_another_space_in_metres(bids):
    root, _ = bids
    ds, _ = read_bids_recording(root, "sub-01", "listen", space="Other")
    np.testing.assert_allclose(ds["x"][:3], [-50, -55, 40])
    # x of the patient's own scanner space does not tell the hemisphere.
    assert set(ds["hemisphere"].values) == {""} and ds.attrs["space"] == "Other"
    with pytest.raises(UnknownNameError, match="MNI152NLin2009aSym, Other"):
        read_bids_recording(root, "01", "listen", space="MNI305")


def test_what_is_not_there(bids, tmp_path):
    root, _ = bids
    with pytest.raises(UnavailableError, match="no ieeg recording of sub-02"):
        read_bids_recording(root, "02", "listen")
    with pytest.raises(UnavailableError, match="no folder"):
        read_bids_recording(tmp_path / "none", "02", "listen")
    write_tsv(tmp_path / "a_electrodes.tsv", "name x y", [("A", 1, 2)])
    with pytest.raises(SchemaError, match="no column 'z'"):
        read_electrodes(tmp_path / "a_electrodes.tsv")
    write_tsv(tmp_path / "a_channels.tsv", "name status", [("A", "good")])
    with pytest.raises(SchemaError, match="no column 'type'"):
        read_channels(tmp_path / "a_channels.tsv")


def raw(names=("Fp1", "Cz", "EOG"), n=300):
    info = mne.create_info(list(names), 100.0, ["eeg", "eeg", "eog"])
    data = 1e-6 * np.arange(3 * n).reshape(3, n)
    made = mne.io.RawArray(data, info, verbose="error")
    return made.set_montage("standard_1020", on_missing="ignore", verbose="error")


def test_a_recording_in_memory():
    made = raw()
    made.info["bads"] = ["Cz"]
    made.set_annotations(mne.Annotations([1.0, 2.0], [0.5, 0.1], ["bad blink", "speech"]))
    ds = from_raw(made, subject="s1", run=3)
    np.testing.assert_allclose(ds["responses"][:, 1], np.arange(300, 600), rtol=1e-6)
    assert ds["status"].values.tolist() == ["good", "bad"] and set(ds["run"].values) == {3}
    assert np.flatnonzero(ds["bad"]).tolist() == list(range(100, 150))
    # Cz is on top of the head, Fp1 in front on the left.
    assert ds["z"][1] > 80 and ds["y"][0] > 60 > 0 > ds["x"][0]
    with pytest.raises(SchemaError, match="there are eeg, eog"):
        from_raw(made, subject="s1", kinds=("seeg",))


def test_cropped_recordings_keep_their_marks():
    made = raw()
    made.set_annotations(mne.Annotations([1.0], [0.5], ["BAD"]))
    ds = from_raw(made.crop(0.9, 2.0), subject="s1")
    assert np.flatnonzero(ds["bad"]).tolist() == list(range(10, 60))


def test_runs_share_their_channels():
    a, b = (from_raw(raw(n), subject="s1") for n in (("Fp1", "Cz", "E"), ("Cz", "Oz", "E")))
    both = join_runs([a, b])
    assert both["neuroid_id"].values.tolist() == ["Cz"]
    np.testing.assert_array_equal(both["responses"][300:, 0], b["responses"][:, 0])
    b.attrs["sampling_rate"] = 64.0
    with pytest.raises(SchemaError, match=r"\[64.0, 100.0\]"):
        join_runs([a, b])


def test_positions_of_a_cap():
    at = standard_positions("biosemi64")
    assert len(at) == 64 and at.index[47] == "Cz" and at.loc["Cz", "z"] > 80
    with pytest.raises(UnknownNameError, match="biosemi64"):
        standard_positions("biosemi65")


def test_without_mne_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mne", None)
    with pytest.raises(MissingDependencyError, match=r"brainalign\[auditory\]"):
        standard_positions()
