"""The section of channels, and its way through the commands."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr

from brainalign.cli import main
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
from brainalign.psychophysics.sections import example_pictures
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
        missing=["One thing: it was not there."], n_bootstrap=20,
    )  # fmt: skip
    figures = {f.id: f for f in section.figures}
    assert {"pictures", "channels", "curves", "curves-areas", "bandwidths", "accuracy-0",
            "accuracy-1", "fidelity-0", "trials-needed", "consistency",
            "compared"} == set(figures)  # fmt: skip
    table = figures["channels"].data
    assert table["kind"].values.tolist() == ["people", "model", "area"]
    assert table["drawn over"].values.tolist() == ["images and subjects", "images", "images"]
    told = [float(t.split(" (")[0]) for t in table["bandwidth, octaves"].values.astype(str)]
    width = dict(zip(table["observer"].values, told, strict=True))
    assert figures["curves"].data["series"].values.tolist() == ["people", "wide net"]
    assert figures["curves-areas"].data["series"].values.tolist() == ["V1"]
    assert width["people"] == pytest.approx(1.5, rel=0.25)
    assert width["wide net"] == pytest.approx(4.0, rel=0.25)
    assert width["V1"] == pytest.approx(2.0, rel=0.15)
    ratio = figures["compared"].data["bandwidth"].values.astype(str).tolist()
    low = [float(r.split("(")[1].split(" to")[0]) for r in ratio]
    # The network's channel is wider than people's beyond what images explain, the area's is not.
    assert low[0] > 1.5 and low[1] < 1.4
    needed = figures["trials-needed"].data["value"].values
    assert (needed[-1] < needed[0] / 2).all()
    assert section.exclusions == ["One thing: it was not there."]
    write_section(section, tmp_path / "s")
    for figure in read_section(tmp_path / "s").figures:
        draw(figure, "f")


def test_who_has_no_channel_is_named_below_the_curves():
    sees, guesses = trials_of("sees", 2.0, 0), trials_of("guesses", 2.0, 1)
    guesses["correct"][:] = np.random.default_rng(0).random(guesses.sizes["trial"]) < 1 / 16
    section = channels_section({"sees": sees, "guesses": guesses}, n_bootstrap=20)
    curves = next(f for f in section.figures if f.id == "curves")
    assert curves.data["series"].values.tolist() == ["sees"]
    assert curves.caption.endswith("Without a channel (see the table): guesses.")


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


def test_commands_from_images_to_section(tmp_path, capsys):
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
    import torch

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
