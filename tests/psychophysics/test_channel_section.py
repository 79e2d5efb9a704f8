"""The section of channels, and its way through the commands."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter

import numpy as np
import pytest
import torch
import xarray as xr
from plans import plan

from brainalign.cli import _parser, main
from brainalign.config import validate_config
from brainalign.data.section import read_section, write_section
from brainalign.data.stimuli import write_stimuli
from brainalign.data.trials import read_trials
from brainalign.errors import ConfigError
from brainalign.psychophysics import (
    LinearReadout,
    SimulatedObserver,
    channels_section,
    masking_design,
    observe,
    probability_correct,
)
from brainalign.psychophysics.analysis import accuracy_matrix, threshold_indices
from brainalign.psychophysics.sections import (
    _sensitivity_map,
    _threshold_curves,
    _thresholds,
    example_pictures,
)
from brainalign.psychophysics.stimuli import divide_images

CLASSES = ("bird", "boat", "car", "cat")
IDS = [f"i{i}" for i in range(60)]
CATEGORY = [CLASSES[i % 4] for i in range(60)]


def trials_of(name, bandwidth, seed, *, crossed=True):
    observer = SimulatedObserver(
        CLASSES, bandwidth=bandwidth, centre=30.0, sensitivity=0.8, seed=seed, name=name
    )
    design = masking_design(IDS, CATEGORY, crossed=crossed, seed=7)
    return observe(observer, design, batch_size=5000)


def areas():
    f, c = np.tile([1.75 * 2**i for i in range(7)], 4), np.repeat([0.02, 0.04, 0.08, 0.16], 7)
    value = probability_correct(
        f, c, bandwidth=2.0, centre=14.0, sensitivity=0.8, guess=0.0, lapse=0.0
    )
    noise = np.random.default_rng(0).lognormal(0, 0.2, (1, 20, len(f)))
    return xr.Dataset(
        {"energy": (("area", "stimulus", "cell"), (1 / value - 1) * noise),
         "spread": (("area", "stimulus"), np.ones((1, 20)))},
        coords={"area": ["V1"], "frequency": ("cell", f), "noise_sd": ("cell", c)},
    )  # fmt: skip


def test_section_of_people_models_and_areas(tmp_path):
    pytest.importorskip("plotly")
    from brainalign.report.figures import draw

    people = xr.concat(
        [trials_of(f"p{i}", 1.5, i).expand_dims(person=[i]) for i in range(2)], "person"
    )
    people = people.stack(all=("person", "trial")).reset_index("all", drop=True)
    people = people.rename(all="trial").drop_vars("person", errors="ignore")
    image = np.random.default_rng(0).random((48, 48)).astype(np.float32)
    section = channels_section(
        {"people": people, "wide net": trials_of("net", 4.0, 5)},
        people=["people"], areas=areas(),
        examples=example_pictures(image, [0, 0.04, 0.16], contrast=0.2, mean=0.449),
        published={"the same": people}, missing=["One thing: it was not there."], n_bootstrap=20,
    )  # fmt: skip
    figures = {f.id: f for f in section.figures}
    assert {"pictures", "channels", "curves", "curves-areas", "bandwidths", "sensitivity",
            "thresholds", "accuracy-0", "accuracy-1", "fidelity-0", "trials-needed", "consistency",
            "compared", "people-elsewhere", "consistency-elsewhere"} == set(figures)  # fmt: skip
    table = figures["channels"].data
    assert table["kind"].values.tolist() == ["people", "model", "area"]
    assert table["drawn over"].values.tolist() == ["images and subjects", "images", "images"]
    told = [float(t.split(" (")[0]) for t in table["bandwidth, octaves"].values.astype(str)]
    width = dict(zip(table["observer"].values, told, strict=True))
    assert figures["curves"].data["series"].values.tolist() == ["people", "wide net"]
    beside = figures["curves-areas"].data
    assert beside["series"].values.tolist() == [
        "V1", "people (people as observer)", "wide net (model as observer)"
    ]  # fmt: skip
    # The observers' curves are those of the figure of observers.
    for name in ("value", "low", "high"):
        own = figures["curves"].data[name].values
        assert np.array_equal(beside[name].values[:, 1:], own) and np.isfinite(own).all()
    assert width["people"] == pytest.approx(1.5, rel=0.25)
    assert width["wide net"] == pytest.approx(4.0, rel=0.25)
    assert width["V1"] == pytest.approx(2.0, rel=0.15)
    ratio = figures["compared"].data["bandwidth"].values.astype(str).tolist()
    low = [float(r.split("(")[1].split(" to")[0]) for r in ratio]
    # The network's channel is wider than people's beyond what images explain, the area's is not.
    assert low[0] > 1.5 and low[1] < 1.4
    # The same people, among themselves.
    alike, again = (figures[f"consistency{x}"].data["value"].values for x in ("", "-elsewhere"))
    assert again == pytest.approx(alike[:1])
    needed = figures["trials-needed"].data["value"].values
    assert (needed[-1] < needed[0] / 2).all()
    assert section.exclusions == ["One thing: it was not there."]
    write_section(section, tmp_path / "s")
    for figure in read_section(tmp_path / "s").figures:
        draw(figure, "f")


def test_sensitivity_of_each_band_is_on_the_published_scale():
    """Against the channel that the simulated observer has, and the published rule's indices."""
    observers = {"narrow": trials_of("narrow", 1.5, 1), "wide": trials_of("wide", 4.0, 2)}
    # Of another observer, who was shown fewer bands.
    few = trials_of("few", 4.0, 3)
    observers["few"] = few.isel(trial=np.isin(few["frequency"].values, [14.0, 28.0, 56.0]))
    thresholds = _thresholds(observers, None, 0.95, 100, 0)
    shown = _sensitivity_map(thresholds, []).data
    assert shown["row"].values.tolist() == ["narrow", "wide", "few"]
    assert shown["column"].values.tolist() == ["1.75", "3.5", "7", "14", "28", "56", "112"]
    value, low, high = (shown[v].values for v in ("value", "low", "high"))
    assert np.isnan(value[2]).tolist() == [True] * 3 + [False] * 3 + [True]
    f = 1.75 * 2.0 ** np.arange(7)
    for row, bandwidth in ((0, 1.5), (1, 4.0)):
        true = np.log2(0.8) - (2 * np.log2(f / 30.0) / bandwidth) ** 2
        # What the levels of noise bracket.
        told = (true > -4) & (true < -1)
        assert told.any() and (low[row] < true)[told].all() and (true < high[row])[told].all()
        assert np.abs(value[row] - true)[told].max() < 0.5
    # Bands that no noise masks stand at 8 times the strongest.
    assert value[0, 0] == pytest.approx(np.log2(0.01 / (8 * 0.16))) and low[0, 0] == value[0, 0]
    curves = _threshold_curves(thresholds, 0.95).data
    assert curves["value"].dims == ("x", "series")
    assert curves["series"].values.tolist() == ["narrow", "wide", "few"]
    assert np.log2(0.01 / curves["value"].values.T) == pytest.approx(value, nan_ok=True)
    assert np.log2(0.01 / curves["low"].values.T) == pytest.approx(high, nan_ok=True)
    # The published scale: index j of a band is a sensitivity of 2**(j - 4).
    j = threshold_indices(accuracy_matrix(observers["wide"]).values)
    assert np.abs((j - 4) - value[1])[(0 < j) & (j < 4)].max() < 1.5


def test_who_has_no_channel_or_no_map_is_named(monkeypatch):
    monkeypatch.setattr("brainalign.psychophysics.sections._HEATMAPS", 1)
    sees, guesses = trials_of("sees", 2.0, 0), trials_of("guesses", 2.0, 1)
    guesses["correct"][:] = np.random.default_rng(0).random(guesses.sizes["trial"]) < 1 / 16
    section = channels_section({"sees": sees, "guesses": guesses}, n_bootstrap=20)
    curves = next(f for f in section.figures if f.id == "curves")
    assert curves.data["series"].values.tolist() == ["sees"]
    assert curves.caption.endswith("Without a channel (see the table): guesses.")
    sensitivity = next(f for f in section.figures if f.id == "sensitivity")
    assert sensitivity.caption.endswith("a row says little: guesses.")
    assert sensitivity.data["row"].values.tolist() == ["sees", "guesses"]
    assert [f.id for f in section.figures if f.id.startswith("accuracy-")] == ["accuracy-0"]
    assert "1 of 2 observers have no map of accuracy: guesses" in section.exclusions


@pytest.mark.parametrize("named", [True, False])
def test_one_run_of_one_participant_is_compared(named):
    ids = [f"i{i}" for i in range(700)]
    category = [CLASSES[i % 4] for i in range(700)]

    def seen_by(name, bandwidth, crossed):
        observer = SimulatedObserver(
            CLASSES, bandwidth=bandwidth, centre=30.0, sensitivity=0.8, seed=3, name=name
        )
        design = masking_design(ids, category, crossed=crossed, seed=7)
        return observe(observer, design, batch_size=30000)

    person = seen_by("p", 1.5, False)
    if not named:
        person = person.drop_vars("stimulus_id")
    section = channels_section(
        {"person": person, "net": seen_by("net", 4.0, True)}, people=["person"], n_bootstrap=40
    )
    figures = {f.id: f for f in section.figures}
    middle, low, high = (
        float(w) for w in figures["compared"].data["bandwidth"].values.astype(str)[0]
        .replace("(", "").replace(")", "").replace(" to", "").split()
    )  # fmt: skip
    assert 1.3 < low < 4 / 1.5 < high and low < middle < high
    shade = figures["curves"].data.sel(series="person")
    assert (shade["low"] <= shade["high"]).all() and float((shade["high"] - shade["low"]).max()) > 0
    assert figures["channels"].data["drawn over"].values.tolist() == ["trials", "images"]


def test_section_refuses_nobody():
    with pytest.raises(ConfigError, match="Observers are needed"):
        channels_section({})
    with pytest.raises(ConfigError, match="people"):
        channels_section({"a": trials_of("a", 2.0, 0)}, people=["b"])


def test_tested_images_are_balanced():
    tested, others = divide_images(CATEGORY, 10, seed=1)
    assert sorted([*tested, *others]) == list(range(60))
    counts = np.unique(np.array(CATEGORY)[tested], return_counts=True)[1]
    assert counts.max() - counts.min() <= 1
    assert (divide_images(CATEGORY, 10, seed=1)[0] == tested).all()
    with pytest.raises(ConfigError, match="61 images"):
        divide_images(CATEGORY, 61)


def test_commands_from_images_to_section(tmp_path, capsys, monkeypatch):
    # Bars that differ in their slope, as photographs do in nothing.
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    images = []
    for i in range(48):
        wave = np.sin(2 * np.pi * 3 * (x if i % 2 else y) / 32 + rng.uniform(0, 6))
        images.append((127 + 100 * wave + rng.normal(0, 9, wave.shape)).clip(0, 255).astype("u1"))
    folder = tmp_path / "bars"
    write_stimuli(
        folder, images, [f"b{i}" for i in range(48)],
        extra={"category": [("across", "along")[i % 2] for i in range(48)]},
    )  # fmt: skip
    common = ["--stimuli", str(folder), "--size", "32", "--contrast", "0.4"]
    # Pictures are made where the model is.
    made_on = []

    def spy(*args, device, **options):
        made_on.append(device)
        return observe(*args, device=device, **options)

    monkeypatch.setattr("brainalign.psychophysics.observe", spy)
    out = tmp_path / "trials.nc"
    command = [
        "channel-trials",
        "random:small-clip",
        *common,
        "--noise-sds",
        "0",
        "0.04",
        "0.16",
        "--by",
        "readout",
        "--images",
        "12",
    ]
    assert main([*command, "--title", "a net", "--device", "cpu", "--out", str(out)]) == 0
    assert made_on == [torch.device("cpu")]
    trials = read_trials(out)
    assert trials.sizes["trial"] == 12 * 12 and str(trials["subject"].values) == "a net"
    clean = trials["correct"].values[trials["noise_sd"].values == 0]
    assert clean.mean() > 0.9
    assert main(["channel", "--trials", str(out), "--bootstraps", "20"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["n_trials"] == 12 * 12
    section = ["channel-section", str(out), *common, "--bootstraps", "20"]
    assert main([*section, "--out", str(tmp_path / "section")]) == 0
    assert {f.id for f in read_section(tmp_path / "section").figures} >= {"pictures", "channels"}
    assert main([*command[:-1], "48", "--out", str(out)]) == 2
    assert "needs images to learn from" in capsys.readouterr().err


def test_readout_learns_from_two_categories_or_more():
    from brainalign.errors import SchemaError

    with pytest.raises(SchemaError, match="2 categories or more"):
        LinearReadout("pixels", torch.rand(4, 16, 16), ["a"] * 4)


BLOCK = {
    "title": "t", "question": "q", "output": "o",
    "studies": {"s": {"loader": "simulated", "subjects": ["a"], "analyses": ["encoding"]}},
    "models": {"m": {"name": "small-clip", "layers": ["output"]}},
    "psychophysics": {"stimuli": {"study": "s"}, "images": 9, "observers": {"o": {"model": "m"}}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stimuli": {"study": "t"}}, "stimuli.study is 't'"),
        ({"observers": {"o": {"model": "x"}}}, "observers.o.model is 'x'"),
        ({"areas": {"study": "s", "model": "x"}}, "areas.model is 'x'"),
        ({"areas": {"study": "s", "model": "m", "subject": "b"}}, "areas.subject is 'b'"),
        ({"observers": {"o": {"model": "m", "by": "txt"}}}, "Did you mean 'text'"),
    ],
)
def test_configurations_that_cannot_be(change, said):
    with pytest.raises(ConfigError, match=said):
        validate_config({**BLOCK, "psychophysics": {**BLOCK["psychophysics"], **change}})


def test_readouts_need_images_that_are_not_tested():
    block = {"stimuli": {"study": "s"}, "observers": {"o": {"model": "m", "by": "readout"}}}
    with pytest.raises(ConfigError, match=r"psychophysics\.images"):
        validate_config({**BLOCK, "psychophysics": block})
    areas = {**BLOCK["psychophysics"], "areas": {"study": "s", "model": "m"}}
    done = validate_config({**BLOCK, "psychophysics": areas})["psychophysics"]
    assert done["areas"]["subject"] == "a" and done["observers"]["o"]["title"] == "o"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("critical_band", {"channel-trials": 4, "channel-areas": 1, "channel-section": 1}),
        ("critical_band_photographs", {"channel-trials": 1, "channel-section": 1}),
    ],
)
def test_configurations_are_planned_whole(name, expected, tmp_path):
    text = plan(name, tmp_path)
    planned = re.findall(r"^Shell command: brainalign (.*?) 2> ", text, re.MULTILINE)
    commands = [_parser().parse_args(shlex.split(line)) for line in planned]
    counts = Counter(args.command for args in commands)
    assert {c: n for c, n in counts.items() if c.startswith("channel-")} == expected
    assert counts["report"] == 1
    shown = [args for args in commands if args.command == "channel-trials"]
    assert all(args.noise_sds == [0.0, 0.02, 0.04, 0.08, 0.16] for args in shown)
    if name == "critical_band_photographs":
        [args] = shown
        assert (args.by, args.size, str(args.stimuli)) == ("outputs", 224, "data/photographs")
        assert args.options == {"num_classes": 1001, "pad_type": "same"}
