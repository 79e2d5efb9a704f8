"""`brainalign trf`: known answers of a real listener, and of simulated ones."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import xarray as xr
from paced_speech import paced

from brainalign.auditory.listener import SimulatedListener
from brainalign.auditory.sections import section_from_responses
from brainalign.auditory.trf import (
    ALPHAS,
    held_out,
    read_recordings,
    response_peaks,
    trf_record,
)
from brainalign.cli import main
from brainalign.data.section import read_section
from brainalign.data.store import read, write
from brainalign.errors import SchemaError
from brainalign.linear import AlphaEdgeWarning, TimeBlocks

RATE = 64


def run(capsys, *words):
    status = main(["trf", *map(str, words)])
    captured = capsys.readouterr()
    return status, json.loads(captured.out) if status == 0 else captured.err


@pytest.fixture(scope="module")
def dtu(mirror):
    files = sorted((mirror / "dtu_eeg_s1").glob("*.npz"))
    if not files:
        pytest.skip("the mirror has no dtu_eeg_s1")
    return files


def test_a_real_listener(dtu, capsys):
    status, found = run(capsys, *dtu, "--target", "envelope", "--alphas", "1e4")
    assert status == 0
    assert (found["n_trials"], found["n_channels"], found["seconds"]) == (10, 64, 500)
    backward, forward = found["backward"], found["forward"]
    assert backward["r"] == pytest.approx(0.264, abs=0.005)
    assert len(backward["r_by_fold"]) == 5 and len(backward["r_by_trial"]) == 10
    assert backward["null"]["r"] == pytest.approx(0.028, abs=0.01)
    assert len(backward["null"]["r_by_shift"]) == 9 and backward["p"] == pytest.approx(0.1)
    assert forward["r"] > 0.03 > max(forward["null"]["r_by_shift"])
    assert forward["channels_above_all_shifts"] > 32
    assert all(0 < peak["latency"] < 0.4 for peak in forward["peaks"]) and forward["peaks"]


def test_penalties_are_chosen_for_a_real_listener(dtu):
    """With the whole grid: a decoder's penalty lies within it, and no channel asks for more."""
    trials = read_recordings(dtu, "envelope")
    roles = TimeBlocks(5).roles([len(t.neural) for t in trials], 26, RATE)
    shifts = [k / 10 for k in range(1, 10)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", AlphaEdgeWarning)
        backward = held_out(trials, "envelope", roles[:1], direction="backward", shifts=shifts)
        forward = held_out(trials, "envelope", roles, direction="forward", shifts=shifts[::3])
    own, *null = backward.mean()[:, 0]
    assert own > 0.2 and max(null) < 0.08 and abs(np.mean(null)) < 0.04
    assert ALPHAS[0] < backward.alpha[0, 0, 0] < ALPHAS[-1]
    own, *null = forward.mean().mean(axis=1)
    assert own > 0.04 and max(null) < 0.02
    # Penalties at the ends are those of channels that are hardly predicted whatever they are.
    r = np.nanmean(forward.r[:, :, 0], axis=1)
    end = np.isin(forward.alpha[:, 0], [ALPHAS[0], ALPHAS[-1]])
    assert r[end].mean() < 0.7 * r[~end].mean()


def test_one_envelope_in_all_trials_trips_the_leak_check(dtu, capsys):
    status, said = run(capsys, *dtu, "--split", "trial")
    assert status == 2 and "both the train and the test side" in said


@pytest.fixture(scope="module")
def simulated():
    listener = SimulatedListener(5, RATE, snr_db=-8, latency=(0.1, 0.1), seed=1)
    rng = np.random.default_rng(0)
    return [
        listener.listen({"envelope": paced((1, RATE * 20, 1), rng, RATE)}, name=str(i))
        for i in range(5)
    ]


@pytest.mark.parametrize("split", ["time", "trial"])
def test_a_simulated_listener(simulated, split):
    found = trf_record(simulated, "envelope", split=split, n_shifts=4, alphas=[1e1, 1e3])
    assert found["leak"] is False and found["trials_with_a_stimulus_of_their_own"] == 5
    for direction in ("backward", "forward"):
        part = found[direction]
        assert part["r"] > 0.25 and max(part["null"]["r_by_shift"]) < 0.12
        assert abs(part["null"]["r"]) < 0.06 and part["p"] == pytest.approx(0.2)
    assert found["forward"]["channels_above_all_shifts"] == 5
    first, second = found["forward"]["peaks"][:2]
    assert first["latency"] == pytest.approx(0.1, abs=1.5 / RATE) and first["weight"] > 0
    assert second["latency"] == pytest.approx(0.2, abs=2.5 / RATE) and second["weight"] < 0


@pytest.mark.parametrize("direction", ["backward", "forward"])
def test_a_grid_that_ends_too_soon_is_told(simulated, direction):
    """Of the stimulus as it was, once for all folds."""
    roles = TimeBlocks(3).roles([RATE * 20] * 5, 26, RATE)
    options = {"direction": direction, "shifts": [0.3, 0.6]}
    with pytest.warns(AlphaEdgeWarning, match="In 3 fits 3 times, .* the upper end") as told:
        held_out(simulated, "envelope", roles, alphas=[1e-3, 1e-2], **options)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", AlphaEdgeWarning)
        held_out(simulated, "envelope", roles, **options)


def test_a_leak_can_be_allowed_and_is_told(simulated):
    again = [simulated[0], *simulated]
    found = trf_record(again, "envelope", split="trial", n_shifts=0, alphas=[1e2], allow_leak=True)
    assert found["leak"] is True and "null" not in found["backward"]


def test_what_is_held_out_is_not_seen(simulated):
    """Held-out samples of the recording that are noise leave nothing to find."""
    roles = TimeBlocks(4).roles([RATE * 20] * 5, 26, RATE)[:1]
    rng = np.random.default_rng(0)
    spoilt = []
    for trial, role in zip(simulated, roles[0], strict=True):
        neural = trial.neural.copy()
        neural[role == 2] = rng.standard_normal((int((role == 2).sum()), 5))
        spoilt.append(type(trial)(neural, trial.features, trial.attended, RATE, trial.name))
    for direction in ("backward", "forward"):
        told = held_out(simulated, "envelope", roles, direction=direction, alphas=[1e2])
        lost = held_out(spoilt, "envelope", roles, direction=direction, alphas=[1e2])
        assert told.mean().mean() > 0.25 and abs(lost.mean().mean()) < 0.1
        assert told.r.shape == (1, 5, 1, 1 if direction == "backward" else 5)


def test_peaks():
    times = np.arange(7) / 10
    coef = np.array([[9.0, 1, 3, 1, -2, 1, 8], [0, 0, 1, 0, -5, 0, 0]])
    found = response_peaks(coef, times)
    assert [(p["latency"], p["channel"], p["weight"]) for p in found] == [(0.2, 0, 3), (0.4, 1, -5)]
    assert found[1]["power"] == pytest.approx(np.sqrt((4 + 25) / 2))
    (only,) = response_peaks(np.array([[0.0, 1, 0, 8, 0]]), times[:5])
    assert only["latency"] == pytest.approx(0.3)


def test_files(simulated, tmp_path, capsys):
    trial = simulated[0]
    envelope = trial.features["envelope"][0, :, 0]
    np.savez(tmp_path / "a.npz", eeg=trial.neural, envelope=envelope, fs=RATE / 2)
    status, found = run(
        capsys, tmp_path / "a.npz", "--shifts", 0, "--folds", 3, "--delays", 0, 0.2
    )  # fmt: skip
    assert status == 0 and found["sampling_rate"] == 32 and found["delays"] == [0, 0.21875]
    assert "Did you mean 'envelope'" in run(capsys, tmp_path / "a.npz", "--target", "envelop")[1]
    np.savez(tmp_path / "b.npz", eeg=trial.neural, meg=trial.neural, envelope=envelope)
    assert "Name the array of the recording" in run(capsys, tmp_path / "b.npz")[1]
    assert run(capsys, tmp_path / "b.npz", "--recording", "meg", "--shifts", 0)[0] == 0
    (tmp_path / "c.npz").write_text("no arrays")
    assert "Give .npz files" in run(capsys, tmp_path / "c.npz")[1]
    status, said = run(capsys, tmp_path / "a.npz", "--split", "trial")
    assert status == 2 and "one trial" in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"eeg": np.zeros((3, 400))}, "eeg (3, 400)"),
        ({"eeg": np.full((400, 3), np.nan)}, "1200 values of the recording are not finite"),
        ({"eeg": np.full((400, 3), "a")}, "expected numbers"),
        ({"fs": np.array([64.0, 32.0])}, "expected one number, in Hz"),
        ({"fs": np.array([[32.0]])}, "rates of [32.0, 64.0] Hz"),
        ({"eeg": np.zeros((400, 2))}, "[2, 3] channels"),
        ({"eeg": np.array([None])}, "Give .npz files"),
    ],
)
def test_files_that_do_not_go_together(change, says, tmp_path, capsys):
    rng = np.random.default_rng(0)
    good = {"eeg": rng.normal(size=(400, 3)), "envelope": rng.random(400), "fs": 64.0}
    np.savez(tmp_path / "a.npz", **good)
    np.savez(tmp_path / "b.npz", **(good | change))
    status, said = run(capsys, tmp_path / "a.npz", tmp_path / "b.npz")
    assert status == 2 and says in said


def test_files_that_are_cut_or_of_one_name(tmp_path, capsys):
    rng = np.random.default_rng(0)
    paths = [tmp_path / s / "trial.npz" for s in ("s1", "s2")]
    for path in paths:
        path.parent.mkdir()
        np.savez(path, eeg=rng.normal(size=(600, 2)), envelope=rng.random(600))
    status, found = run(capsys, *paths, "--shifts", 0, "--folds", 2, "--alphas", 10)
    assert status == 0 and list(found["backward"]["r_by_trial"]) == [str(p) for p in paths]
    paths[1].write_bytes(paths[0].read_bytes()[:900])
    assert "Give .npz files" in run(capsys, *paths)[1]
    np.save(tmp_path / "a.npy", np.zeros(3))
    assert "is a single array" in run(capsys, tmp_path / "a.npy")[1]
    status, said = run(capsys, tmp_path / "none.npz")
    assert status == 2 and "none.npz" in said


@pytest.fixture
def story(tmp_path):
    """One listener, one talker, one run: electrodes that follow him, others, and a bad stretch."""
    rng = np.random.default_rng(0)
    n = RATE * 100
    spoken = paced((1, n, 1), rng, RATE)
    hearing = SimulatedListener(3, RATE, snr_db=-5, latency=(0.1, 0.1), seed=1)
    neural = hearing.listen({"envelope": spoken}).neural
    neural = np.concatenate([neural, rng.standard_normal((n, 3))], axis=1)
    neural[1000:1200] = 1e4 * rng.standard_normal((200, 6))
    run, xyz = np.zeros(n, dtype=int), np.array([[-60.0, -20, 5]] * 3 + [[50.0, 30, 10]] * 3)
    bad = np.zeros(n, dtype=bool)
    bad[1000:1200] = True
    names = [f"E{k}" for k in range(6)]
    responses = xr.Dataset(
        {"responses": (("time", "neuroid"), neural.astype(np.float32))},
        coords={
            "run": ("time", run), "session": ("time", run), "attended": ("time", run),
            "bad": ("time", bad), "subject": "s1", "neuroid_id": ("neuroid", names),
            "roi": ("neuroid", [""] * 6), "hemisphere": ("neuroid", list("LLLRRR")),
            **{a: ("neuroid", xyz[:, i], {"units": "mm"}) for i, a in enumerate("xyz")},
        },
        attrs={"sampling_rate": float(RATE), "units": "uV", "subject": "s1", "space": "MNI152"},
    )  # fmt: skip
    features = xr.Dataset(
        {"features": (("time", "feature"), spoken[0].astype(np.float32))},
        coords={
            "run": ("time", run), "talker": ("feature", [0]), "space": ("feature", ["envelope"]),
            "units": ("feature", ["a"]), "model": "sound", "layer": "envelope",
        },
        attrs={"sampling_rate": float(RATE)},
    )  # fmt: skip
    write(responses, tmp_path / "s1" / "responses.zarr", "responses")
    write(features, tmp_path / "s1" / "features.zarr", "features")
    return tmp_path / "s1"


def test_a_prepared_recording_of_one_talker(story, tmp_path, capsys):
    out = tmp_path / "envelope.nc"
    status, record = run(capsys, story, "--out", out, "--shifts", 4, "--alphas", 10, 1000)
    assert status == 0 and record["n_trials"] == 1
    assert record["forward"]["channels_above_all_shifts"] >= 3
    ds = read(out)
    # Bad samples, a thousand times as large, would drown the rest if they were fitted or scored.
    assert ds["channel_r"].values[:3].min() > 0.3 > np.abs(ds["channel_r"].values[3:]).max()
    assert ds["channel_null"].shape == (4, 6) and float(np.abs(ds["channel_null"]).max()) < 0.2
    assert ds.attrs["forward_r"] == pytest.approx(record["forward"]["r"])
    assert ds.attrs["backward_null"] == pytest.approx(record["backward"]["null"]["r"])
    peak = ds["lag"].values[ds["trf"].values[:3, 0].argmax(axis=1)]
    assert peak == pytest.approx(0.1, abs=1.5 / RATE)
    folder = tmp_path / "section"
    assert main(["trf-section", str(out), "--out", str(folder), "--title", "A story"]) == 0
    section = read_section(folder)
    assert section.title == "A story" and section.facts["Channels"] == "6"
    assert [f.id for f in section.figures] == [
        "predicted-envelope", "responses-envelope", "map-envelope-s1-left",
        "weights-envelope-s1-left", "map-envelope-s1-right", "weights-envelope-s1-right",
    ]  # fmt: skip
    back, forward = section.summary
    assert back.value == pytest.approx(record["backward"]["r"]) and back.value > forward.value
    assert forward.reference == f"shifted sound {record['forward']['null']['r']:.3f}"


def test_prepared_recordings_stand_alone(story, tmp_path, capsys):
    assert "it stands alone" in run(capsys, story, story)[1]
    np.savez(tmp_path / "a.npz", eeg=np.zeros((9, 2)), envelope=np.zeros(9))
    assert "--out needs a recording" in run(capsys, tmp_path / "a.npz", "--out", tmp_path / "o")[1]
    (tmp_path / "empty").mkdir()
    assert run(capsys, tmp_path / "empty")[0] == 2
    assert "no features 'mel'" in run(capsys, story, "--target", "mel")[1]
    xr.Dataset({"a": 1}).to_netcdf(tmp_path / "else.nc")
    with pytest.raises(SchemaError, match="no response functions"):
        section_from_responses([tmp_path / "else.nc"])
