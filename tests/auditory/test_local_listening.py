"""One's own EEG-BIDS and iEEG-BIDS: from events and sound files to decoders."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import soundfile
from layouts import write_brainvision, write_ieeg_bids

from brainalign.auditory.experiment import prepare
from brainalign.auditory.listener import SimulatedListener
from brainalign.auditory.sound import talker_features
from brainalign.cli import main
from brainalign.data.store import read
from brainalign.data.studies.local_listening import load
from brainalign.errors import ConfigError, SchemaError, UnavailableError

mne = pytest.importorskip("mne")
mne_bids = pytest.importorskip("mne_bids")

RATE, SOUND_RATE, SECONDS = 128, 2000, 20
TALKERS = {"left": "stim_left", "right": "stim_right"}
#: Onset (s) and who is attended, of the trials of each run.
TRIALS = ([(1.0, "left"), (22.5, "right")], [(0.0, "right"), (21.0, "left")])


@pytest.fixture(scope="module")
def bids(tmp_path_factory):
    """Two runs of two trials, written by MNE-BIDS: a simulated listener, noise between trials."""
    root, rng = tmp_path_factory.mktemp("eeg"), np.random.default_rng(0)
    (root / "stimuli").mkdir()
    listener = SimulatedListener(4, RATE, unattended=0.1, snr_db=0)
    names, heard = ["Fz", "Cz", "Pz", "Oz"], 0
    for k, trials in enumerate(TRIALS):
        data, rows = rng.normal(size=(45 * RATE, 4)), []
        for onset, who in trials:
            files = [f"t{heard}_{side}.wav" for side in TALKERS]
            sounds = []
            for file in files:
                slow = np.repeat(rng.random(3 * SECONDS) ** 2, SOUND_RATE // 3)
                sound = 0.1 * slow * rng.normal(size=len(slow))
                # The sound goes on after the trial.
                sound = np.concatenate([sound, rng.normal(size=SOUND_RATE) * 0.1])
                soundfile.write(root / "stimuli" / file, sound, SOUND_RATE, subtype="FLOAT")
                sounds.append((sound, float(SOUND_RATE)))
            spoken = talker_features([sounds], ["envelope"], RATE)["features"].values
            attended = [*TALKERS].index(who)
            n, start = RATE * (SECONDS - 1), round(onset * RATE)
            made = listener.listen({"envelope": spoken[:n].T[:, :, None]}, attended, name=files[0])
            data[start : start + n] = made.neural
            rows.append((onset, SECONDS - 1, "listen", who, *files))
            heard += 1
        rows.insert(1, (20.5, 1.0, "rest", "n/a", "n/a", "n/a"))
        recorded = tmp_path_factory.mktemp("recorded") / "run.vhdr"
        write_brainvision(recorded, data, names, RATE)
        raw = mne.io.read_raw_brainvision(recorded, verbose="error")
        raw.info["line_freq"] = 50
        raw.set_montage("standard_1020", verbose="error")
        path = mne_bids.BIDSPath(
            subject="01", task="listen", run=f"{k + 1:02d}", datatype="eeg", root=root
        )
        mne_bids.write_raw_bids(raw, path, verbose="error")
        columns = ["onset", "duration", "trial_type", "attended", *TALKERS.values()]
        pd.DataFrame(rows, columns=columns).to_csv(
            path.copy().update(suffix="events", extension=".tsv").fpath, sep="\t", index=False
        )
    return root


def settings(root, **changes):
    return {
        "root": str(root), "task": "listen", "talkers": TALKERS, "attended": "attended", **changes,
    }  # fmt: skip


def test_eeg_bids(bids):
    study = load(**settings(bids), subjects=["01"])
    ds = study.responses["01"]
    assert ds.attrs["subject"] == "sub-01" and ds["neuroid_id"].values.tolist()[:2] == ["Fz", "Cz"]
    assert np.bincount(ds["run"]).tolist() == [19 * RATE] * 4
    at = [int(np.flatnonzero(ds["run"] == k)[0]) for k in range(4)]
    assert ds["attended"].values[at].tolist() == [0, 1, 1, 0]
    assert ds["recorded_run"].values[at].tolist() == [0, 0, 1, 1]
    assert ds["stimulus_id"].values[at[2]] == "t2_left.wav+t2_right.wav"
    talkers = study.extras["talkers"]["01"]
    assert [len(t) for t in talkers] == [2] * 4
    sound, rate = soundfile.read(bids / "stimuli" / "t1_right.wav")
    np.testing.assert_array_equal(talkers[1][1][0], sound[: 20 * rate])


def test_to_a_decoder_by_commands(bids, tmp_path):
    """The onset, the order of the talkers and the attended one are right: attention is decoded."""
    folder, out = tmp_path / "01", tmp_path / "reconstruction.nc"
    parameters = settings(
        bids, preprocessing={"line": None, "reference": None, "bands": [[1, 9]], "threshold": None}
    )
    assert main(["aad-prepare", "bids_listening", "--subject", "01", "--out", str(folder),
                 "--parameters", json.dumps(parameters), "--rate", "32"]) == 0  # fmt: skip
    assert main(["aad-decode", str(folder), "--out", str(out), "--lengths", "4",
                 "--settings", '{"alphas": 100.0}', "--split", "stimulus"]) == 0  # fmt: skip
    found = read(out)
    assert found["n_windows"].values.tolist() == [16]
    assert found["accuracy"].values[0] > found["chance_high"].values[0]


def test_ieeg_bids_by_file_and_of_one_talker(tmp_path):
    write_ieeg_bids(tmp_path)
    (tmp_path / "sounds").mkdir()
    for name in "ab":
        soundfile.write(tmp_path / "sounds" / f"{name}.wav", np.full(3 * 800, 0.1), 800)
    for run in (1, 2):
        side = tmp_path / "sub-01" / "ieeg" / f"sub-01_task-listen_run-{run:02d}_events.tsv"
        side.write_text(
            "onset\tduration\tone\ttwo\theard\n0.5\t2\ta.wav\tb.wav\tb.wav\n3\tn/a\tn/a\tn/a\tn/a\n"
        )
    given = {"task": "listen", "datatype": "ieeg", "stimuli": "sounds", "subjects": ["sub-01"]}
    study = load(tmp_path, talkers={"1": "one", "2": "two"}, attended="heard", **given)
    ds = study.responses["sub-01"]
    assert set(ds["attended"].values) == {1} and ds.sizes["time"] == 2 * 512
    assert ds["status"].values.tolist() == ["good", "bad", "good", "good"]
    alone = load(tmp_path, talkers={"1": "one"}, **given)
    assert set(alone.responses["sub-01"]["attended"].values) == {0}
    assert len(alone.extras["talkers"]["sub-01"][0]) == 1


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"attended": "attend"}, SchemaError, "Did you mean 'attended'"),
        ({"talkers": {"a": "stim_a", "b": "stim_left"}}, SchemaError, "no column 'stim_a'"),
        ({"attended": "trial_type"}, SchemaError, "no single talker of left"),
        ({"attended": None}, ConfigError, "the column that names the attended one"),
        ({"stimuli": "sounds"}, UnavailableError, "no sound 't0_left.wav'"),
        ({"datatype": "meg"}, ConfigError, "expected 'eeg' or 'ieeg'"),
    ],
)
def test_what_does_not_go_together(bids, change, error, says):
    with pytest.raises(error, match=says):
        load(**settings(bids, **change), subjects=["01"]).responses["01"]


def test_trials_that_do_not_fit(bids, tmp_path):
    study = load(**settings(bids), subjects=["01"])
    with pytest.raises(SchemaError, match=r"at 128\.0 Hz and the features are wanted at 64"):
        prepare(study, "01")
    events = bids / "sub-01" / "eeg" / "sub-01_task-listen_run-02_events.tsv"
    text = events.read_text()
    try:
        events.write_text(text.replace("21.0\t19", "18.0\t19"))
        with pytest.raises(SchemaError, match="run 1, the event at 18.0 s overlaps"):
            load(**settings(bids), subjects=["01"]).responses["01"]
        events.write_text(text.replace("21.0\t19", "30.0\t19"))
        with pytest.raises(SchemaError, match="the run 45 s"):
            load(**settings(bids), subjects=["01"]).responses["01"]
        events.write_text(text.replace("0.0\t19", "0.0\t26"))
        with pytest.raises(SchemaError, match="lasts 26 s; its sounds have 20.98 s"):
            load(**settings(bids), subjects=["01"]).responses["01"]
    finally:
        events.write_text(text)
