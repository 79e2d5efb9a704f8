"""Attention from recordings to the report: a simulated listener, decoders, section, workflow."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import xarray as xr
from plans import plan

from brainalign.auditory import decoders, experiment
from brainalign.auditory.experiment import (
    ResponsiveDecoder,
    decode,
    make_decoder,
    prepare,
    simulate_listening,
)
from brainalign.auditory.sections import PUBLISHED, attention_section, section_from_decoded
from brainalign.auditory.trials import content_groups, listening_trials
from brainalign.cli import _parser, main
from brainalign.config import read_config, validate_config, workflow_root
from brainalign.data.schema import validate
from brainalign.data.section import read_section, write_section
from brainalign.data.store import read
from brainalign.data.studies import Study
from brainalign.errors import ConfigError, SchemaError, UnknownNameError

RATE = 32.0


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Noise with the slow modulation of speech, a clip of each of three talkers."""
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    paths = {}
    for name in ("a", "b", "c"):
        slow = np.repeat(rng.random(60) ** 2, 500)
        paths[name] = folder / f"{name}.wav"
        soundfile.write(paths[name], 0.1 * slow * rng.normal(size=30_000), 2000)
    return paths


@pytest.fixture(scope="module")
def listened(clips):
    return simulate_listening(
        clips, trials=6, seconds=20, rate=RATE, electrodes=4, deaf=2, sound_rate=2000.0,
        unattended=0.2, snr_db=-3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def decoded(listened):
    return {
        kind: decode(*listened, kind, lengths=(1, 5, 10, 60), repeated=True)
        for kind in ("forward", "oracle")
    }


def test_the_simulated_listener(listened):
    responses, features = listened
    validate(responses, "responses")
    validate(features, "features")
    assert responses.sizes == {"time": 3840, "neuroid": 6}
    assert responses["attended"].values[[0, 640, 1280]].tolist() == [0, 1, 0]
    assert responses["hears"].values.tolist() == [True] * 4 + [False] * 2
    assert np.array_equal(responses["run"], features["run"])
    assert (responses["x"] < -30).all()
    with pytest.raises(ConfigError, match="at least 2 of each"):
        simulate_listening({"a": "a.wav"})


def test_the_oracle_and_a_forward_model(decoded):
    oracle, forward = decoded["oracle"], decoded["forward"]
    # No trial holds a window of 60 s.
    assert oracle["length"].values.tolist() == [1, 5, 10]
    assert oracle["accuracy"].values.tolist() == [1, 1, 1]
    assert oracle["n_windows"].values.tolist() == [120, 24, 12]
    assert forward["accuracy"].values[-1] > forward["chance_high"].values[-1]
    # What was simulated is found: who hears, and when.
    assert forward["channel_r"].values[:4].min() > 0.3 > np.abs(forward["channel_r"][4:]).max()
    peak = forward["lag"].values[forward["trf"].values[:4, 0].argmax(axis=1)]
    assert ((peak > 0.02) & (peak < 0.2)).all()


def test_responsive_channels_are_chosen_within_the_training_trials(listened):
    trials = listening_trials(*listened)
    fitted = ResponsiveDecoder(make_decoder("reconstruction", {"alphas": 100.0}), max_lag=0.3)
    fitted.fit(trials[:5])
    assert fitted.selector_.get_support().tolist() == [True] * 4 + [False] * 2
    assert fitted.decoder_.n_channels_ == 4
    own = fitted.score_windows(trials[5:], 5.0)["score"]
    # What the other channels hold does not count.
    changed = replace(trials[5], neural=trials[5].neural * [1, 1, 1, 1, 9, 9])
    np.testing.assert_array_equal(fitted.score_windows([changed], 5.0)["score"], own)
    found = decode(*listened, "forward", responsive={"max_lag": 0.3}, lengths=(10,), repeated=True)
    assert found["accuracy"].values[0] > found["chance_high"].values[0]
    # The others have no response function, and no place on the maps.
    assert (
        np.isfinite(found["trf"]).all(["feature", "lag"]).values.tolist()
        == [True] * 4 + [False] * 2
    )
    assert (found["channel_r"][:4] > 0.3).all() and np.isnan(found["channel_r"][4:]).all()
    *_, responses, heard, weights = attention_section({"forward": {"s1": found}}).figures
    names = [f"s1 {n}" for n in found["neuroid_id"].values[:4]]
    assert set(responses.data["series"].values) < set(names)
    for figure in (heard, weights):
        assert figure.data.sizes["observation"] == 4 and np.isfinite(figure.data["value"]).all()


def test_one_penalty_leaves_channels_without_a_correlation(listened):
    found = decode(*listened, "forward", {"alphas": 100.0}, lengths=(10,), repeated=True)
    assert np.isfinite(found["trf"]).all() and np.isnan(found["channel_r"]).all()
    figures = attention_section({"forward": {"s1": found}}).figures
    assert [f.id for f in figures[-2:]] == ["responses-forward", "weights-forward-s1-left"]
    # Those with the largest weights are drawn.
    power = np.square(found["trf"].values).sum(axis=(1, 2))
    assert (
        figures[-2].data["series"].values[0] == f"s1 {found['neuroid_id'].values[power.argmax()]}"
    )


def test_bad_samples_take_no_part(listened, monkeypatch):
    """Trials are cut at marks, into pieces that stay on one side of every split."""
    responses, features = listened
    bad = np.zeros(responses.sizes["time"], dtype=bool)
    bad[100:120] = bad[140:150] = True
    bad[640 + 600 : 1280] = True
    seen = []

    def watched(decoder, trials, *args, splits, **options):
        seen[:] = [trials, splits]
        return decoders.cross_validate(decoder, trials, *args, splits=splits, **options)

    monkeypatch.setattr(
        experiment, "decoders", SimpleNamespace(**{**vars(decoders), "cross_validate": watched})
    )
    marked = responses.assign_coords(bad=("time", bad))
    found = decode(marked, features, "oracle", lengths=(1, 10), repeated=True)
    trials, splits = seen
    assert [(t.name, t.offset, len(t.neural)) for t in trials[:4]] == [
        ("0", 0, 100), ("0", 150, 490), ("1", 0, 600), ("2", 0, 640)
    ]  # fmt: skip
    assert not any(
        np.concatenate([bad[t.offset + 640 * int(t.name) :][: len(t.neural)] for t in trials])
    )
    assert [test.tolist() for _, test in splits] == [[0, 1], [2], [3], [4], [5], [6]]
    assert all({trials[i].name for i in a}.isdisjoint(trials[i].name for i in b) for a, b in splits)
    own = found["window_length"] == 1
    assert [int(np.sum(own & (found["trial"] == k))) for k in "012"] == [3 + 15, 18, 20]
    starts = found["start"].values[own & (found["trial"] == "0")]
    assert starts.tolist() == [0, 1, 2, *(150 / RATE + np.arange(15))]
    assert found["n_windows"].values.tolist() == [116, 10]
    assert found["n_trials"].values.tolist() == [6, 6]
    # The 20 samples between two marks hold no window.
    assert found.attrs["seconds_left_out"] == 90 / RATE
    assert found.attrs["seconds"] == (3840 - 90) / RATE
    facts = attention_section({"oracle": {"s1": found}}).facts
    assert facts["Left out"].startswith("3 of 120 s: marked")
    # Nor is a choice among training trials made between pieces of one of them.
    whole = content_groups(trials, whole=True)
    assert whole[0] == whole[1] and len(set(content_groups(trials))) >= len(set(whole))
    # A trial without a piece that is long enough is left out.
    bad[640 * 3 : 640 * 4 : 100] = True
    marked = responses.assign_coords(bad=("time", bad))
    found = decode(marked, features, "oracle", lengths=(5,), repeated=True)
    assert found["n_trials"].values.tolist() == [5] and "3" not in found["trial"].values
    assert found.attrs["seconds_left_out"] == (150 + 40 + 640) / RATE
    stimuli = marked.assign_coords(
        stimulus_id=("time", np.array(list("aabcdd"))[responses["run"].values])
    )
    decode(stimuli, features, "oracle", lengths=(5,), split="stimulus", repeated=True)
    assert sorted(test.tolist() for _, test in seen[1]) == [[0, 1], [2], [3, 4]]
    bad[:] = True
    with pytest.raises(SchemaError, match="No trial has 5 s, .* 100% of the samples"):
        decode(responses.assign_coords(bad=("time", bad)), features, "oracle", lengths=(5,))


def test_a_decoder_chooses_between_whole_trials(listened):
    """Pieces of one trial are in one fold of the penalty's choice."""
    trials = listening_trials(*listened)
    pieces = [t.cut(a, b) for t in trials[:3] for a, b in ((0, 300), (310, 640))]
    found = decoders._folds(None, pieces)
    assert sorted(test.tolist() for _, test in found) == [[0, 1], [2, 3], [4, 5]]
    assert decoders._folds(None, trials) is None and decoders._folds(3, pieces) == 3
    fitted = make_decoder("reconstruction", {"alphas": (1e2, 1e3)}).fit(pieces)
    given = make_decoder("reconstruction", {"alphas": (1e2, 1e3), "cv": found}).fit(pieces)
    np.testing.assert_array_equal(fitted.model_.cv_scores_, given.model_.cv_scores_)


def test_one_talker_cannot_be_decoded(listened):
    responses, features = listened
    alone = features.isel(feature=np.flatnonzero(features["talker"] == 0))
    with pytest.raises(SchemaError, match="of one talker.*\n?.*brainalign trf"):
        decode(responses.assign_coords(attended=responses["attended"] * 0), alone)


def test_stimuli_can_be_left_out_together(listened):
    responses, features = listened
    pair = np.array(["p", "q", "r"])[responses["run"].values % 3]
    found = decode(
        responses.assign_coords(stimulus_id=("time", pair)), features, "oracle", lengths=(5,),
        split="stimulus", repeated=True,
    )  # fmt: skip
    assert found["n_trials"].values.tolist() == [6]
    with pytest.raises(ConfigError, match="'stimulus' or 'subject'"):
        decode(responses, features, "oracle", split="run")
    with pytest.raises(ConfigError, match="shorter than all windows"):
        decode(responses, features, "oracle", lengths=(30,))


def test_a_subject_is_left_out(clips):
    """Three listeners who switch: decoders of two find the third one's talker, and follow."""
    settings = {
        "trials": 3, "seconds": 24, "rate": RATE, "electrodes": 4, "deaf": 0, "sound_rate": 2000.0,
        "unattended": 0.2, "snr_db": 0, "switch_every": 12,
    }  # fmt: skip
    made = {s: simulate_listening(clips, subject=s, **settings) for s in ("s1", "s2", "s3")}
    found = {}
    for subject, recording in made.items():
        others = [other for name, other in made.items() if name != subject]
        found[subject] = decode(
            *recording, "reconstruction", {"alphas": 100.0}, others=others, split="subject",
            lengths=(4,), repeated=True,
        )  # fmt: skip
    for subject, ds in found.items():
        assert ds.attrs["subject"] == subject and ds.attrs["split"] == "subject"
        assert ds["n_trials"].values.tolist() == [3]
        assert ds["accuracy"].values[0] > ds["chance_high"].values[0]
        # Half a window, and the delay that the filters wait for.
        assert ds["followed"] == 1 and 1.5 < ds["latency"] < 4
        assert ds["share"][0].values[0] < 0.5 < ds["share"][0].values[-1]
    section = attention_section({"other": found})
    ids = [f.id for f in section.figures]
    assert ids == ["accuracy", "accuracy-other", "switches", "after-a-switch", "latency"]
    latency = section.figures[-1].data["value"]
    assert latency.sel(series="half a window").values.tolist() == [2]
    mean = np.mean([ds["latency"].item() for ds in found.values()])
    assert latency.sel(series="other").values[0] == pytest.approx(mean)
    assert section.summary[-1].value == pytest.approx(mean) and section.summary[-1].unit == "s"
    assert "Fitted to other listeners alone: other." in section.intro
    (s1, features), s2 = made["s1"], made["s2"]
    with pytest.raises(ConfigError, match="of no use to the split 'trial'"):
        decode(s1, features, "oracle", others=[s2])
    with pytest.raises(ConfigError, match="must be others"):
        decode(s1, features, "oracle", split="subject")
    with pytest.raises(ConfigError, match="'s1' is among the others"):
        decode(s1, features, "oracle", split="subject", others=[made["s1"], s2])
    with pytest.raises(SchemaError, match=r"different channels: \{'s1': 3, 's2': 4\}"):
        decode(s1.isel(neuroid=slice(3)), features, "oracle", split="subject", others=[s2])


def test_voices_are_told_apart_by_their_spectrum(clips):
    made = simulate_listening(
        clips, trials=4, seconds=10, rate=RATE, electrodes=3, deaf=0, sound_rate=2000.0,
        spaces=("envelope", "mel"),
    )  # fmt: skip
    settings = {"n_clusters": 3, "epochs": 1, "hidden": 4}
    found = decode(*made, "cluster", settings, lengths=(5,), repeated=True)
    assert np.isfinite(found["score"]).all() and found["n_windows"].values.tolist() == [8]
    envelope = made[1].isel(feature=np.flatnonzero(made[1]["space"] == "envelope"))
    with pytest.raises(SchemaError, match="Prepare the recording with mel"):
        decode(made[0], envelope, "cluster", settings)


def test_names_of_decoders():
    assert make_decoder("reconstruction", {"tmax": 0.25}).tmax == 0.25
    with pytest.raises(UnknownNameError, match="Did you mean 'forward'"):
        make_decoder("forwards")
    with pytest.raises(ConfigError, match="no parameter 'tmx'.*'tmax'"):
        make_decoder("cca", {"tmx": 1})


def test_a_study_is_made_ready(listened):
    responses, features = listened
    study = Study("s", responses={"s1": responses}, extras={"features": {"s1": features}})
    ready, spoken = prepare(study, "s1", rate=RATE)
    assert ready is responses and spoken.sizes == features.sizes
    with pytest.raises(UnknownNameError, match="no features 'mel'"):
        prepare(study, "s1", rate=RATE, spaces=["mel"])
    with pytest.raises(SchemaError, match=r"at 32\.0 Hz and the features are wanted at 64\.0 Hz"):
        prepare(study, "s1")
    with pytest.raises(UnknownNameError, match="no subject 's2'"):
        prepare(study, "s2")
    silent = Study("s", responses={"s1": responses})
    with pytest.raises(SchemaError, match="neither sounds nor features"):
        prepare(silent, "s1", rate=RATE)
    rng = np.random.default_rng(0)
    sounds = [[(rng.normal(size=2000 * 21), 2000.0) for _ in range(2)] for _ in range(6)]
    study = Study("s", responses={"s1": responses}, extras={"talkers": {"s1": sounds}})
    whole = prepare(study, "s1", rate=RATE)[1]
    assert whole.sizes == {"time": 3840, "feature": 2}
    lower = prepare(study, "s1", rate=RATE, sound_rate=1600.0)[1]
    r = [np.corrcoef(whole["features"][:, k], lower["features"][:, k])[0, 1] for k in (0, 1)]
    assert min(r) > 0.9


def test_section(decoded, tmp_path):
    for subject in ("s1", "s2"):
        for kind, ds in decoded.items():
            path = tmp_path / subject / f"{kind}.nc"
            path.parent.mkdir(exist_ok=True)
            ds.assign_attrs(subject=subject).to_netcdf(path)
    paths = sorted(tmp_path.rglob("*.nc"))
    section = section_from_decoded(paths, titles={"forward": "forward model"})
    ids = [f.id for f in section.figures]
    assert ids == [
        "accuracy", "accuracy-forward", "switches", "responses-forward",
        "map-forward-s1-left", "weights-forward-s1-left",
        "map-forward-s2-left", "weights-forward-s2-left",
    ]  # fmt: skip
    curve = section.figures[0].data
    assert curve["series"].values.tolist() == ["forward model", "oracle", "guessing"]
    np.testing.assert_allclose(
        curve["value"].sel(series="forward model"), decoded["forward"]["accuracy"]
    )
    written = read_section(write_section(section, tmp_path / "section"))
    # The oracle knows the answer; it stands beside, and is no finding.
    (accuracy,) = written.summary
    assert accuracy.label.endswith("5 s: forward model") and accuracy.reference == "guessing 0.500"
    assert "[@geirnaert2020]" in written.methods
    xr.Dataset({"a": 1}).to_netcdf(tmp_path / "else.nc")
    with pytest.raises(SchemaError, match="no decoded attention"):
        section_from_decoded([tmp_path / "else.nc"])


def published(ds, **attrs):
    """Show a section of one decoder of the DTU recordings; return what is published beside it."""
    section = attention_section({"linear": {"S1": ds.assign_attrs(attrs)}}, study="fuglsang2017")
    curve = section.figures[0].data
    shown = "linear, published mean" in curve["series"].values
    assert shown == section.summary[0].reference.startswith("published mean")
    return section if shown else None


def test_published_means_stand_beside(listened):
    """Beside the decoder that was published, and no other."""
    settings = {"alphas": 100.0}
    at_64 = [ds.assign_attrs(sampling_rate=64.0) for ds in listened]
    ds = decode(*at_64, "reconstruction", settings, lengths=(1, 5), repeated=True)
    section = published(ds)
    known = PUBLISHED["fuglsang2017"]["reconstruction"]["accuracy"]
    shown = section.figures[0].data["value"].sel(series="linear, published mean")
    assert shown.values.tolist() == [known[1], known[5]]
    assert section.summary[0].reference == "published mean 0.746"
    assert section.figures[1].options["reference_lines"][0]["value"] == 12.2
    assert published(ds, split="stimulus")
    assert not published(ds, split="subject") and not published(ds, responsive="{}")
    assert not published(ds, sampling_rate=32.0)
    for other in ({"tmax": 0.25}, {"space": "mel"}, {"n_channels": 2}):
        changed = {**json.loads(ds.attrs["settings"]), **other}
        assert not published(ds, settings=json.dumps(changed))
    cca = json.dumps(make_decoder("cca").get_params())
    assert published(ds, decoder="cca", settings=cca).summary[0].reference == "published mean 0.721"
    assert not published(ds, decoder="forward")
    # Of listeners who were decoded differently there is no common reference.
    both = {"S1": ds, "S2": ds.assign_attrs(split="subject")}
    section = attention_section({"linear": both}, study="fuglsang2017")
    assert section.summary[0].reference == "guessing 0.500"


def test_maps_of_a_scalp(decoded):
    ds = decoded["forward"].assign_attrs(space="head")
    ds = ds.assign_coords(
        {a: ("neuroid", v) for a, v in zip("xyz", np.eye(3, 6) * 95, strict=True)}
    )
    ds = ds.assign_coords(z=("neuroid", [0.0, 0, 95, np.nan, np.nan, np.nan]))
    ds["trf"][:] = 0.0
    ds["trf"][:, 0, 4] = [1.0, -2, 3, 0, 0, 0]
    ds["trf"][0, 0, 9] = 2.0
    view, weights = attention_section({"forward": {"S1": ds}}).figures[-2:]
    assert view.id == "map-forward-S1-from-above"
    # The right ear, the nose, and the top of the head.
    np.testing.assert_allclose(view.data["x"], [1, 0, 0], atol=1e-9)
    np.testing.assert_allclose(view.data["y"], [0, 1, 0], atol=1e-9)
    # Where the weights of all channels are largest, with their signs.
    assert weights.id == "weights-forward-S1-from-above"
    assert weights.title.startswith(f"Weights {float(ds['lag'][4]) * 1000:.0f} ms after the sound")
    np.testing.assert_allclose(weights.data["value"], [1, -2, 3])


def test_commands(listened, tmp_path, mirror, monkeypatch):
    monkeypatch.setenv("BRAINALIGN_DATA", str(mirror))
    folder, parameters = tmp_path / "sim1", (
        '{"sounds": "panayotov2015", "trials": 3, "seconds": 6, "electrodes": 2, "deaf": 1,'
        ' "sound_rate": 2000, "listener": {"snr_db": 0}}'
    )  # fmt: skip
    assert main(["aad-prepare", "listener", "--subject", "sim1", "--out", str(folder),
                 "--parameters", parameters, "--rate", "32"]) == 0  # fmt: skip
    assert read(folder / "responses.zarr", "responses").sizes == {"time": 576, "neuroid": 3}
    out = tmp_path / "oracle.nc"
    assert main(["aad-decode", str(folder), "--out", str(out), "--decoder", "oracle",
                 "--lengths", "1", "2", "--repeated"]) == 0  # fmt: skip
    assert read(out)["accuracy"].values.tolist() == [1, 1]
    assert main(["aad-section", str(out), "--out", str(tmp_path / "section")]) == 0
    assert read_section(tmp_path / "section").facts["Listeners"] == "1"


PLANS = {
    # Decoders by kind; those that leave out a subject; those with a choice of channels.
    "aad_simulated": (
        {"reconstruction": 4, "cca": 1, "forward": 2, "cluster": 1, "oracle": 1}, ["others"],
    ),
    "aad_dtu": ({"reconstruction": 2, "cca": 1, "forward": 1}, ["others"]),
    "aad_kul": ({"reconstruction": 4, "cca": 1, "forward": 2, "cluster": 1}, ["others"]),
}  # fmt: skip


def listening_commands(name, folder):
    """Return the commands of listening that a configuration would run."""
    planned = re.findall(r"brainalign ((?:aad|trf)\S* .*?) 2> ", plan(name, folder))
    return [_parser().parse_args(shlex.split(line.partition(" > ")[0])) for line in planned]


@pytest.mark.parametrize("name", PLANS)
def test_configurations(name, tmp_path):
    config = read_config(workflow_root() / "configs" / f"{name}.yaml")
    (study,) = config["studies"].values()
    assert study["analyses"] == ["attention"]
    kinds, left_out = PLANS[name]
    decoders, n = config["listening"]["decoders"], len(study["subjects"])
    assert Counter(d["kind"] for d in decoders.values()) == kinds
    assert [k for k, d in decoders.items() if d["split"] == "subject"] == left_out
    commands = listening_commands(name, tmp_path)
    counts = Counter(args.command for args in commands)
    assert counts == {"aad-prepare": n, "aad-decode": n * len(decoders), "aad-section": 1}
    spaces = set(config["listening"]["spaces"])
    for args in commands:
        if args.command == "aad-prepare":
            assert set(args.spaces) == spaces
        elif args.command == "aad-decode":
            decoder = make_decoder(args.decoder, args.settings)
            used = {getattr(decoder, "space", "envelope"), *getattr(decoder, "spaces", [])}
            assert used <= spaces and (args.decoder != "cluster" or "mel" in spaces)
            assert len(args.others) == (n - 1) * (args.split == "subject")
            # Stimuli that come back are accepted where they must, and nowhere else.
            assert args.repeated == (args.split == "subject" or name == "aad_simulated")


def test_response_functions_are_planned(tmp_path):
    commands = listening_commands("trf_podcast", tmp_path)
    counts = Counter(args.command for args in commands)
    assert counts == {"aad-prepare": 9, "trf": 18, "trf-section": 1}
    fits = [args for args in commands if args.command == "trf"]
    assert {args.target for args in fits} == {"envelope", "onsets"}
    assert {tuple(args.delays) for args in fits} == {(-0.1, 0.5)}
    assert all(args.out.name == f"{args.target}.nc" for args in fits)
    assert {args.subject for args in commands if args.command == "aad-prepare"} >= {"01", "09"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"analyses": ["encoding"]}, "Analyses of this loader: attention, trf"),
        ({"analyses": []}, "Analyses of this loader: attention, trf"),
        ({"loader": "zada2025"}, "attention is for the loaders listener"),
        ({"analyses": ["encoding", "trf"], "loader": "kay2017"}, "trf is for the loaders"),
        ({"loader": "kay2017"}, "attention is for the loaders"),
        ({"subjects": None}, "needs its subjects"),
        ({"loader": "listener"}, "needs parameters.sounds"),
    ],
)
def test_configurations_that_cannot_be_used(change, says):
    study = {"loader": "biesmans2016", "analyses": ["attention"], "subjects": ["S1"]} | change
    study = {k: v for k, v in study.items() if v is not None}
    config = {
        "title": "t", "question": "q", "output": "o", "models": {}, "studies": {"s": study},
        "listening": {"decoders": {"linear": {"kind": "reconstruction"}}},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=says):
        validate_config(config)
    config["studies"]["s"] = {
        "loader": "biesmans2016", "analyses": ["attention"], "subjects": ["S1"]
    }  # fmt: skip
    config["listening"]["decoders"]["linear"]["split"] = "subject"
    with pytest.raises(ConfigError, match="leaves out a subject; 's' has no other"):
        validate_config(config)
    del config["listening"]
    with pytest.raises(ConfigError, match="no key listening"):
        validate_config(config | {"studies": {"s": {
            "loader": "biesmans2016", "analyses": ["attention"], "subjects": ["S1"]}}})  # fmt: skip
