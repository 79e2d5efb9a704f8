"""The browser's experiment: a scripted observer of known channel goes from first click to file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from brainalign.cli import main
from brainalign.data.stimuli import index_categories, write_stimuli
from brainalign.data.trials import read_trials
from brainalign.errors import ConfigError, SchemaError, UnavailableError
from brainalign.psychophysics import mask, write_experiment
from brainalign.psychophysics.observers import grey_images

sys.path.insert(0, str(Path(__file__).parents[1]))
from chromium import chromium

CLASSES = [f'c{i}, "{i}"' for i in range(15)] + ["</script><b>"]
SIZE, N = 32, 400
CHANNEL = {"bandwidth": 2.0, "centre": 8.0, "sensitivity": 0.8}


@pytest.fixture(scope="module")
def stimuli(tmp_path_factory):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40, 40), dtype=np.uint8) for _ in range(N)]
    categories = [CLASSES[i % 16] for i in range(N)]
    return write_stimuli(
        tmp_path_factory.mktemp("set") / "images", images, [f"p{i}" for i in range(N)],
        extra={"category": categories},
    )  # fmt: skip


def written(page):
    text = (page.parent / "trials.js").read_text()
    return json.loads(text.removeprefix("const EXPERIMENT = ").removesuffix(";\n"))


def test_pictures_are_those_that_networks_see(stimuli, tmp_path):
    few = stimuli.select([f"p{i}" for i in range(64)])
    page = write_experiment(tmp_path / "e", few, size=(SIZE, SIZE), n_practice=16, seed=3)
    made = written(page)
    assert page.is_file() and len(made["trials"]) == 48 and len(made["practice"]) == 16
    ids = {t["stimulus_id"] for t in made["trials"]}
    assert not ids & {t["stimulus_id"] for t in made["practice"]}
    assert {t["category"] for t in made["practice"]} == set(CLASSES)
    for trial in made["trials"][:5]:
        again = mask(
            grey_images(few.select([trial["stimulus_id"]]), (SIZE, SIZE)),
            [trial["noise_sd"]], [trial["band"]], [int(trial["seed"])],
        )  # fmt: skip
        with Image.open(page.parent / "images" / trial["image"]) as picture:
            shown = torch.from_numpy(np.array(picture)) / 255
        assert (shown - again[0]).abs().max() <= 0.5001 / 255
    same = written(write_experiment(tmp_path / "f", few, size=(SIZE, SIZE), n_practice=16, seed=3))
    other = written(write_experiment(tmp_path / "g", few, size=(SIZE, SIZE), n_practice=16, seed=4))
    assert same == made and other["id"] != made["id"]


def test_what_cannot_be_an_experiment(stimuli, tmp_path):
    few = stimuli.select([f"p{i}" for i in range(20)])
    for said, error, options in (
        ("is no class", SchemaError, {"classes": CLASSES[:8]}),
        ("2 to 16 classes", ConfigError, {"classes": [*CLASSES, "one more"]}),
        ("for practice alone", ConfigError, {"n_practice": 20}),
        ("above 0", ConfigError, {"duration": 0}),
        ("square", ConfigError, {"size": (32, 40)}),
    ):
        with pytest.raises(error, match=said):
            write_experiment(tmp_path / "x", few, **{"size": (SIZE, SIZE), **options})
    assert not (tmp_path / "x").exists()


def test_a_folder_for_each_category(tmp_path):
    for name in ("cat/a.png", "cat/b.png", "dog/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / name)
    found = index_categories(tmp_path)
    assert found.ids == ["cat/a", "cat/b", "dog/a"]
    assert found.index["category"].values.tolist() == ["cat", "cat", "dog"]
    with pytest.raises(UnavailableError, match="folder for each category"):
        index_categories(tmp_path / "cat")


# Answers by the psychometric function of a log-Gaussian channel, written here once more. It presses
# real buttons. Frames come at once: nobody looks.
OBSERVER = """
const [channel, seed] = arguments;
let state = seed;
const random = () => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return state / 4294967296;
};
window.requestAnimationFrame = (f) => Promise.resolve().then(() => f(performance.now()));
const of = Object.fromEntries(EXPERIMENT.trials.map((t) => [t.image, t]));
const buttons = [...document.querySelectorAll("#choices button")];
const next = document.getElementById("next");
let image;
const look = () => {
  image = document.querySelector("#picture img")?.src.split("/").pop() ?? image;
  if (next.checkVisibility()) next.click();
  if (image && !buttons[0].disabled && document.getElementById("trial").checkVisibility()) {
    const trial = of[image];
    const octaves = Math.log2(trial.frequency / channel.centre);
    const s = channel.sensitivity * 2 ** -((2 * octaves / channel.bandwidth) ** 2);
    const p = 1 / 16 + (1 - 1 / 16 - 0.02) / (1 + (trial.noise_sd * s / 0.01) ** 2);
    const right = EXPERIMENT.classes.indexOf(trial.category);
    const wrong = (right + 1 + Math.floor(15 * random())) % 16;
    buttons[random() < p ? right : wrong].click();
  }
};
new MutationObserver(look).observe(document, { attributes: true, childList: true, subtree: true });
look();
"""
CENTRE = """
const box = document.querySelector(arguments[0]).getBoundingClientRect();
return [box.x + box.width / 2, box.y + box.height / 2];
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as started:
        started.size(1280, 1000)
        yield started


def click(browser, selector):
    x, y = browser.run(CENTRE, selector)
    for kind in ("mousePressed", "mouseReleased"):
        browser.cdp("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


def visible(browser, page, seconds=20):
    browser.wait(f"return document.getElementById('{page}').checkVisibility()", seconds)


def to_first_block(browser, page, code, *, practice):
    browser.go(page.as_uri())
    visible(browser, "consent")
    click(browser, "#subject")
    browser.cdp("Input.insertText", text=code)
    click(browser, "#begin")
    # Without consent nothing begins.
    assert browser.run("return document.getElementById('consent').checkVisibility()")
    click(browser, "#agree")
    click(browser, "#begin")
    visible(browser, "instructions")
    click(browser, "#start")
    for i in range(practice):
        browser.wait(f"return progress.textContent.startsWith('Practice {i + 1} ') && "
                     "!document.querySelector('#choices button').disabled", 20)  # fmt: skip
        browser.key("1")
    visible(browser, "pause")


@pytest.mark.browser
def test_from_first_click_to_channel(browser, stimuli, tmp_path, capsys):
    status = main(
        ["channel-experiment", str(tmp_path / "e"), "--stimuli", str(stimuli.folder), "--size",
         str(SIZE), "--practice", "2", "--block", "200", "--fixation", "0", "--side", "256"]
    )  # fmt: skip
    page = Path(capsys.readouterr().out.strip())
    assert status == 0 and page.name == "index.html"
    browser.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    to_first_block(browser, page, "s1", practice=2)
    browser.run(OBSERVER, CHANNEL, 7)
    visible(browser, "end", 90)
    assert not [e for e in browser.log("browser") if e["level"] == "SEVERE"]
    asked = [
        e["message"] for e in browser.log("performance") if "requestWillBeSent" in e["message"]
    ]
    assert any("file://" in m for m in asked)
    assert not [m for m in asked if '"url":"http' in m]
    file = tmp_path / browser.run("return document.getElementById('file').textContent")
    for _ in range(50):
        if file.is_file():
            break
        browser.wait("return true")
    trials = read_trials(file)
    made = {t["stimulus_id"]: t for t in written(page)["trials"]}
    assert trials.sizes["trial"] == N - 2 == len(made)
    assert set(trials["stimulus_id"].values.tolist()) == set(made)
    for name in ("category", "seed", "condition"):
        told = dict(zip(trials["stimulus_id"].values, trials[name].values, strict=True))
        assert told == {i: t[name] for i, t in made.items()}, name
    assert set(trials["response"].values.tolist()) == set(CLASSES)
    assert trials["subject"].values[0] == "s1" and (trials["rt"].values >= 0).all()
    assert main(["channel", "--trials", str(file), "--bootstraps", "20"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["guess"] == 1 / 16 and not {"flat", "below_half"} & set(found["flags"])
    for name, true in CHANNEL.items():
        low, high = found["intervals"][name]
        assert low < true < high and high / low < 5, (name, low, high)


@pytest.mark.browser
def test_an_interrupted_run_goes_on(browser, stimuli, tmp_path):
    few = stimuli.select([f"p{i}" for i in range(16)])
    page = write_experiment(
        tmp_path / "e", few, size=(SIZE, SIZE), n_practice=0, fixation=0, duration=0.02, block=4
    )
    browser.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    to_first_block(browser, page, "s2", practice=0)
    click(browser, "#next")
    for i in range(3):
        browser.wait(
            f"return progress.textContent === '{i + 1} of 16' && "
            "!document.querySelector('#choices button').disabled && "
            # Long enough, the picture is gone again.
            "!document.querySelector('#picture img')", 20
        )  # fmt: skip
        browser.key("q")
    browser.wait("return progress.textContent === '4 of 16'", 20)
    seen = browser.run("return JSON.parse(localStorage[`brainalign-${EXPERIMENT.id}`]).answers")
    browser.go("about:blank")
    browser.go(page.as_uri())
    visible(browser, "resume")
    assert "3 of 16" in browser.run("return document.getElementById('resume-text').textContent")
    click(browser, "#go-on")
    browser.run(OBSERVER, CHANNEL, 1)
    visible(browser, "end")
    kept = browser.run("return JSON.parse(localStorage[`brainalign-${EXPERIMENT.id}`]).answers")
    assert kept[:3] == seen and len(kept) == 16
    # "q" is the fifth button.
    assert [k[1] for k in kept[:3]] == [written(page)["classes"][4]] * 3
    assert sorted(k[0] for k in kept) == list(range(16))
    click(browser, "#finish")
    visible(browser, "consent")
    assert not browser.run("return document.getElementById('resume').checkVisibility()")
