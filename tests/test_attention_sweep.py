"""The sweep of attention mechanisms: training, loading, measuring, comparing, reporting."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from brainalign.config import sweep_models, validate_config
from brainalign.encoding.attention_sweep import (
    Alignment,
    encoding_alignment,
    rsa_alignment,
    sweep_section,
)
from brainalign.errors import ConfigError, SchemaError, UnknownNameError
from brainalign.evaluation.rsa import rdms_dataset

SWEEP = {
    "mechanisms": {"softmax": "softmax", "window3": "neighborhood:k=3"},
    "seeds": [0, 1],
    "scenes": 48,
    "steps": 2,
    "batch_size": 16,
    "measure": 6,
    "encoding": "simulated",
}
CONFIG = {
    "title": "A small sweep",
    "question": "Does the mechanism matter?",
    "output": "out",
    "seed": 10_000,
    "attention_sweep": SWEEP,
    "studies": {
        "simulated": {
            "title": "Simulated brain",
            "loader": "simulated",
            "subjects": ["sim1"],
            "analyses": ["encoding"],
            "models": ["pixels"],
            "parameters": {
                "model": "v1",
                "scenes": {"n": 48, "size": 32},
                "simulation": {"neuroids": 60, "null": 0.3},
            },
        }
    },
    "models": {
        "v1": {"name": "v1", "layers": ["*"], "title": "V1 energy"},
        "pixels": {"name": "pixels", "layers": ["*"], "baseline": True},
    },
    "encoding": {"folds": 3, "inner": "gcv", "permutations": 0, "bootstraps": 100,
                 "alphas": [1e-2, 1, 100, 10000, 1e6], "predictions": False},
    "evaluation": {"bootstraps": 100},
}  # fmt: skip


def changed(**sweep) -> dict:
    config = json.loads(json.dumps(CONFIG))
    config["attention_sweep"] |= sweep
    return config


# The configuration


def test_models_of_the_sweep():
    models = sweep_models(validate_config(CONFIG))
    kinds = [name.split("-")[0] for name in models]
    assert {k: kinds.count(k) for k in kinds} == {"trained": 4, "untrained": 4, "swapped": 2}
    assert models["untrained-window3-1"]["name"].startswith("random:open_clip:local-dir:")
    swapped = models["swapped-window3-0"]
    assert swapped["folder"] == models["trained-softmax-0"]["folder"]
    assert (swapped["attention"], swapped["trained_attention"]) == ("neighborhood:k=3", "softmax")
    assert sweep_models(validate_config({k: v for k, v in CONFIG.items() if k[0] != "a"})) == {}


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"reference": "sofmax"}, "Did you mean 'softmax'"),
        ({"reference": "window3"}, "swapped: false"),
        ({"encoding": "simulate"}, "Did you mean 'simulated'"),
        ({"seeds": [10_000]}, "9999"),
        ({"mechanisms": {"softmax": "softmax"}}, "mechanisms"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_any_work(sweep, said):
    with pytest.raises(ConfigError, match=said):
        validate_config(changed(**sweep))


def test_scenes_of_the_brain_are_none_of_training():
    with pytest.raises(ConfigError, match="no training may use it"):
        validate_config({**CONFIG, "seed": 1})


# Training and loading

clip = pytest.importorskip("brainalign.small_models.clip")
pytest.importorskip("open_clip")
pytest.importorskip("transformers")
from safetensors import safe_open  # noqa: E402

TINY = {"n_scenes": 48, "steps": 2, "batch_size": 16, "seed": 3, "n_measure": 6, "tower": "vit"}


def weights(folder: Path) -> dict[str, np.ndarray]:
    with safe_open(folder / "open_clip_model.safetensors", "np") as file:
        return {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """Networks of one seed; a window of 8 by 8 patches is the whole picture."""
    folder = tmp_path_factory.mktemp("trained")
    return {
        name: clip.train_clip(folder / name, **TINY, attention=spec, scenes=folder / "scenes")
        for name, spec in {
            "softmax": "softmax", "everything": "neighborhood:k=8", "window": "neighborhood:k=3",
        }.items()
    }  # fmt: skip


def test_mechanisms_begin_alike_see_the_same_batches_and_part_by_the_mechanism_alone(trained):
    softmax, everything, window = (weights(trained[k]) for k in ("softmax", "everything", "window"))
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    for key, value in softmax.items():
        # float16 on disk, and Adam's first steps are signs of gradients: all but a few agree.
        same = np.isclose(value, everything[key], atol=2e-3)
        assert same.mean() > 0.99, key
    assert not np.isclose(softmax[name], window[name], atol=2e-3).mean() > 0.99


def test_training_with_a_mechanism_goes_on_from_a_checkpoint(tmp_path, trained):
    settings = {**TINY, "attention": "neighborhood:k=3", "checkpoint": tmp_path / "state"}
    scenes = trained["window"].parent / "scenes"
    assert clip.train_clip(tmp_path / "cut", **settings, scenes=scenes, stop_at=1) is None
    resumed = clip.train_clip(tmp_path / "cut", **settings, scenes=scenes)
    for key, value in weights(trained["window"]).items():
        np.testing.assert_array_equal(value, weights(resumed)[key], err_msg=key)
    with pytest.raises(ConfigError, match="other settings"):
        clip.train_clip(tmp_path / "more", **{**settings, "attention": "softmax"}, scenes=scenes)


def test_training_refuses_what_cannot_be(tmp_path):
    for wrong, said in (
        ({"attention": "neighbourhood"}, "There is no attention"),
        ({"attention": "hip"}, "causal"),
        ({"tower": "vitt"}, "Did you mean 'vit'"),
    ):
        with pytest.raises(Exception, match=said):
            clip.train_clip(tmp_path / "out", **{**TINY, **wrong})
    assert list(tmp_path.iterdir()) == []


def test_a_model_comes_back_with_its_mechanism_in_place(trained):
    import torch

    from brainalign.features import load_model
    from brainalign_kernels.adapters import swap_attention

    name = f"open_clip:local-dir:{trained['window']}"
    model = load_model(name, trained_attention="neighborhood:k=3", device="cpu")
    assert model.attention == "neighborhood:d=1,k=3,stride=1"
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = model.encode_image(images)
    model.placed.restore()
    assert not torch.allclose(found, model.encode_image(images), atol=1e-4)
    with swap_attention(model.module.visual, "neighborhood:k=3"):
        torch.testing.assert_close(model.encode_image(images), found)
    untrained = [
        load_model(f"random:open_clip:local-dir:{trained[k]}", device="cpu", seed=3)
        for k in ("softmax", "window")
    ]
    assert untrained[0].weights_sha256 == untrained[1].weights_sha256
    assert [m.attention for m in untrained] == ["softmax", model.attention]


def test_a_mechanism_that_is_not_the_recorded_one_is_refused(trained, tmp_path):
    from brainalign.data.stimuli import read_stimuli
    from brainalign.features import extract, load_model
    from brainalign.small_models.scenes import write_scenes

    with pytest.raises(ConfigError, match=r"was trained with .* 'softmax'; expected 'flow'"):
        load_model(f"open_clip:local-dir:{trained['softmax']}", trained_attention="flow")
    with pytest.raises(ConfigError, match="was trained with"):
        load_model("pixels", trained_attention="flow")
    write_scenes(tmp_path / "scenes", 6, seed=10_001, size=64)
    stimuli = read_stimuli(tmp_path / "scenes")
    model = load_model(f"open_clip:local-dir:{trained['window']}", device="cpu")
    with pytest.raises(ConfigError, match="damage is measured in a model trained with softmax"):
        extract(model, stimuli, "visual.ln_post", attention="flow")
    made = extract(model, stimuli, "visual.ln_post")["visual.ln_post"]
    assert made.attrs["trained_attention"] == model.attention and "attention" not in made.attrs


def test_profile_measures_reach_cost_and_names(trained, tmp_path):
    from brainalign.data.stimuli import read_stimuli
    from brainalign.features import load_model, profile_attention
    from brainalign.small_models.scenes import write_scenes

    write_scenes(tmp_path / "scenes", 12, seed=10_001, size=64)
    stimuli = read_stimuli(tmp_path / "scenes")
    prompts = {c: [f"a picture of {words}"] for c, words in clip.PROMPTS.items()}
    truth = stimuli.index["category"].values.astype(str).tolist()
    found = {}
    for name in ("softmax", "window"):
        model = load_model(f"open_clip:local-dir:{trained[name]}", device="cpu")
        found[name] = profile_attention(
            model, stimuli, prompts=prompts, truth=truth, repeats=1, n_images=8
        )
        assert (model.placed is None) == (name == "softmax")
    window, softmax = found["window"], found["softmax"]
    # A window of 3 by 3 reaches 1 or 1.41 patches, at a border up to 2.83; hardly trained
    # softmax attention is about uniform, and patches of an 8 by 8 grid lie 4.2 apart.
    assert 0.5 < window["distance"] < 1.6 < 3 < softmax["distance"] < 5
    assert json.loads(json.dumps(window)) == window
    pairs = {"window": 64 * 9 + 2 * 64 + 1, "softmax": 65**2}
    for name, count in pairs.items():
        assert found[name]["scores"] == 4 * 2 * count  # layers, heads
        assert found[name]["multiply_adds"] == 4 * 2 * count * 64
        assert found[name]["zero_shot"]["n"] == 12 and found[name]["ms_per_image"] > 0
    model = load_model(f"open_clip:local-dir:{trained['softmax']}", device="cpu")
    swapped = profile_attention(model, stimuli, attention="neighborhood:k=3", repeats=1)
    assert swapped["scores"] == window["scores"] and swapped["trained_attention"] == "softmax"
    assert swapped["zero_shot"] is None
    model = load_model(f"open_clip:local-dir:{trained['window']}", device="cpu")
    with pytest.raises(ConfigError, match="damage is measured"):
        profile_attention(model, stimuli, attention="flow")


# Comparing

MECHANISMS = {"softmax": "softmax", "window3": "neighborhood:k=3", "linear": "linear"}
SEEDS = (0, 1, 2)


def networks(kinds=("trained",)) -> dict[str, dict]:
    return {
        f"{kind}-{mechanism}-{seed}": {"kind": kind, "mechanism": mechanism, "seed": seed}
        for kind in kinds
        for mechanism in MECHANISMS
        for seed in SEEDS
        if (kind, mechanism) != ("swapped", "softmax")
    }


def profile(mechanism: str, distance: float) -> dict:
    return {
        "attention": MECHANISMS[mechanism], "distance": distance, "multiply_adds": 10**6,
        "score_bytes": 4096, "parameters": 10**5, "ms_per_image": 1.5, "machine": "a machine",
        "grid": [8, 8], "zero_shot": {"correct": 0.8, "chance": 1 / 6, "n": 48},
    }  # fmt: skip


def planted(models: dict, *, effect: float, n_stimuli: int = 40, seed: int = 0):
    """RDMs of 5 subjects, and of networks that see the true one under noise.

    `effect` is the noise that neighborhood attention is spared once it is trained.
    """
    rng = np.random.default_rng(seed)
    ids = [f"image{i}" for i in range(n_stimuli)]

    def noisy(base: np.ndarray, sd: float) -> np.ndarray:
        noise = rng.normal(0, sd, base.shape)
        made = np.clip(base + (noise + noise.T) / 2, 0, None)
        np.fill_diagonal(made, 0)
        return made

    points = rng.normal(size=(n_stimuli, 5))
    true = np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))
    subjects = rdms_dataset([noisy(true, 1.5) for _ in range(5)], [f"S{i}" for i in range(5)], ids)
    layers = {}
    for name, m in models.items():
        spared = effect if (m["kind"], m["mechanism"]) == ("trained", "window3") else 0.0
        layers[name] = {
            layer: rdms_dataset([noisy(true, 3.0 - spared)], [layer], ids) for layer in ("a", "b")
        }
    return layers, subjects


def section_of(models, layers, subjects):
    alignment = rsa_alignment(layers, subjects, layer="b", title="RDMs", bootstraps=200)
    profiles = {
        name: profile(m["mechanism"], 1.0 + (m["mechanism"] != "window3") * 2)
        for name, m in models.items()
    }
    return sweep_section(
        models, [alignment], profiles, mechanisms=MECHANISMS, reference="softmax", layer="b",
        budget={"scenes": 48, "steps": 2, "batch_size": 16, "learning_rate": 0.002},
    )  # fmt: skip


def summary_of(section) -> dict[str, float]:
    return {e.label: e.value for e in section.summary}


def test_a_planted_difference_between_mechanisms_is_reported_and_equal_ones_are_not():
    models = networks()
    section = section_of(models, *planted(models, effect=2.0))
    assert summary_of(section)["RDMs: mechanisms that differ from softmax"] == 1
    table = next(f for f in section.figures if f.id == "rsa-table").data
    p = dict(zip(MECHANISMS, table["p (Holm)"].values.tolist(), strict=True))
    assert p["softmax"] == "–" and float(p["window3"].strip("< ")) < 0.05 < float(p["linear"])
    false = [
        summary_of(section_of(models, *planted(models, effect=0.0, seed=s)))[
            "RDMs: mechanisms that differ from softmax"
        ]
        for s in range(1, 7)
    ]
    assert sum(false) <= 1


def test_the_section_has_every_seed_the_controls_and_damage_under_its_name(tmp_path):
    from brainalign.data.section import read_section, write_section

    models = networks(("trained", "untrained", "swapped"))
    layers, subjects = planted(models, effect=2.0)
    section = section_of(models, layers, subjects)
    figures = {f.id: f for f in section.figures}
    shown = figures["rsa-alignment"].data
    assert shown["series"].values.tolist() == ["mean", "seed 0", "seed 1", "seed 2"]
    np.testing.assert_allclose(shown["value"][:, 0], shown["value"][:, 1:].mean("series"))
    assert np.isnan(shown["low"][:, 1:]).all() and np.isfinite(shown["low"][:, 0]).all()
    controls = figures["rsa-controls"].data
    names = controls["series"].values.tolist()
    assert names[1:] == ["before training", "swapped into softmax weights: damage"]
    value = controls["value"].values
    # Softmax in weights trained with softmax is no swap; the planted effect is in the trained only.
    assert np.isnan(value[0, 2]) and value[1, 0] > max(value[1, 1:]) + 0.1
    for table, count in (("rsa-table", 0), ("rsa-controls-table", 2)):
        names = [str(v) for v in figures[table].data.data_vars]
        assert sum(n.startswith("damage: ") for n in names) == count
    assert "measures damage" in section.methods
    write_section(section, tmp_path / "section")
    assert read_section(tmp_path / "section").facts["networks"] == str(len(models))


def test_a_scored_layer_must_be_there_and_every_mechanism_needs_every_seed():
    models = networks()
    layers, subjects = planted(models, effect=0.0, n_stimuli=12)
    with pytest.raises(UnknownNameError, match="has no layer 'c'"):
        rsa_alignment(layers, subjects, layer="c")
    lacking = {k: v for k, v in models.items() if k != "trained-linear-1"}
    kept = {k: v for k, v in layers.items() if k in lacking}
    with pytest.raises(SchemaError, match="'linear' and seed 1"):
        section_of(lacking, kept, subjects)
    with pytest.raises(ConfigError, match="No measure"):
        sweep_section(models, [], {}, mechanisms=MECHANISMS, reference="softmax")


# The whole of it


def planned(folder: Path) -> list[list[str]]:
    """Return the commands that snakemake would run, in an order in which they can."""
    finished = subprocess.run(
        [sys.executable, "-m", "brainalign.cli", "run", "sweep.yaml", "--", "-n", "-p"],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "SNAKEMAKE_PROFILE"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    printed = r"(?:brainalign|python -m brainalign\.small_models\.clip) .*(?= 2> )"
    return [shlex.split(c) for c in re.findall(printed, finished.stdout + finished.stderr)]


def test_the_workflow_trains_measures_and_reports(tmp_path, monkeypatch):
    """Snakemake plans; its commands run here, where the libraries are loaded but once."""
    pytest.importorskip("snakemake")
    from brainalign.cli import main

    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(CONFIG))
    commands = planned(tmp_path)
    words = [c[1] if c[0] == "brainalign" else "train" for c in commands]
    assert {w: words.count(w) for w in set(words)} == {
        "train": 6, "layers": 2, "scenes": 1, "features": 12, "simulate": 1, "encode": 11,
        "profile": 1, "attention-sweep": 1, "evaluate": 1, "report": 1,
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    ranks = ["scenes", "train", "layers", "features", "simulate", "encode", "profile", "evaluate",
             "attention-sweep", "report"]  # fmt: skip

    def rank(i: int) -> tuple[int, bool, int]:
        return ranks.index(words[i]), "--render-only" not in commands[i], i

    for i in sorted(range(len(commands)), key=rank):
        command = commands[i]
        if command[0] == "brainalign":
            assert main(command[1:]) == 0, command
        else:
            assert clip.main(command[3:]) == 0, command
    section = json.loads((tmp_path / "out/sections/attention/section.json").read_text())
    labels = [e["label"] for e in section["summary"]]
    assert "Simulated brain: mechanisms that differ from softmax" in labels
    assert "simulated from V1 energy, which is outside the sweep" in section["methods"]
    page = (tmp_path / "out/report/index.html").read_text()
    assert "Attention mechanisms, each trained from scratch" in page
    assert "damage" in page and "neighborhood:k=3" in page
    from brainalign.encoding import read_result

    results = {
        path.name: {"sim1": read_result(path)}
        for path in sorted((tmp_path / "out/encoding/simulated/sim1").glob("*-softmax-*"))
    }
    alignment = encoding_alignment(results)
    assert isinstance(alignment, Alignment) and alignment.n_stimuli == 48
    # What is swapped for softmax in softmax weights is nothing: no such network is made.
    assert sorted(results) == [f"{k}-softmax-{s}" for k in ("trained", "untrained") for s in (0, 1)]
