"""The sections that methods hand to the report: what they say follows from the data."""

from __future__ import annotations

import numpy as np
import pytest

from brainalign.data.section import read_section, write_section
from brainalign.data.simulate import simulate
from brainalign.data.stimuli import write_stimuli
from brainalign.encoding import encode, write_result
from brainalign.encoding.sections import encoding_section, section_from_folders
from brainalign.errors import ConfigError, UnknownNameError
from brainalign.evaluation.rsa import choose_layer_rsa, rdm, rdms_dataset, stack_rdms
from brainalign.evaluation.sections import rsa_section, rsa_section_from_folders
from brainalign.features import extract, load_model, write_manifest

N = 48
CATEGORIES = ("people", "bodies", "places", "words", "food", "objects")


@pytest.fixture(scope="module")
def stimuli(tmp_path_factory):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (N, 8, 8, 3), dtype=np.uint8)
    ids = [f"s{i:02d}" for i in range(N)]
    extra = {"category": [CATEGORIES[i % 6] for i in range(N)]}
    return write_stimuli(tmp_path_factory.mktemp("s") / "stimuli", images, ids, extra=extra)


def features_of(values, stimuli, layer, model="net"):
    import xarray as xr

    return xr.Dataset(
        {"features": (("stimulus", "feature"), values.astype("float32"))},
        coords={"stimulus_id": ("stimulus", stimuli.ids), "model": model, "layer": layer},
    )


@pytest.fixture(scope="module")
def layers(stimuli):
    rng = np.random.default_rng(1)
    kind = np.eye(6)[np.arange(N) % 6] @ rng.standard_normal((6, 12)) * 2
    return {
        "a": features_of(kind + rng.standard_normal((N, 12)), stimuli, "a"),
        "b": features_of(rng.standard_normal((N, 12)), stimuli, "b"),
    }


def estimates(section):
    return {e.label: e for e in section.summary}


def test_encoding_section_reports_what_was_planted(stimuli, layers, tmp_path):
    category = stimuli.index["category"].values
    results, truth = {}, {}
    for seed, subject in enumerate(("s1", "s2")):
        made = simulate(
            layers, category=category, neuroids=160, ncsnr=(1.0, 2.0), subject=subject, seed=seed,
            layers={"V1": "a", "": "a"},
        )  # fmt: skip
        rng = np.random.default_rng(seed)
        noise = {"z": features_of(rng.standard_normal((N, 12)), stimuli, "z", "noise")}
        options = {"splits": 4, "n_permutations": 200, "n_bootstrap": 100, "seed": 0}
        results[subject] = {
            "net": encode(layers, made.responses, **options),
            "noise": encode(noise, made.responses, **options),
        }
        truth[subject] = made.truth
    names = dict(zip(stimuli.ids, category.tolist(), strict=True))
    section = encoding_section(
        results, titles={"net": "Net", "noise": "Noise"}, baselines=["noise"], category=names,
        truth=truth,
    )  # fmt: skip
    found = estimates(section)
    headline = section.summary[0]
    assert headline.label == "Net in all ROIs"
    assert headline.low < headline.value < headline.high
    everywhere = np.concatenate(
        [r["net"].best["r"].values[r["net"].best["roi"].values != ""] for r in results.values()]
    )
    assert headline.value == pytest.approx(np.nanmean(everywhere), abs=0.02)
    assert headline.value > float(headline.reference.split()[-1]) + 0.2
    # Layer a drives all neuroids but those whose ROI takes the last layer, b.
    driven = [t["layer"].values[~t["null"].values.astype(bool)] for t in truth.values()]
    chosen = [
        r["net"].best["best_layer"].values[~truth[s]["null"].values.astype(bool)]
        for s, r in results.items()
    ]
    share = 100 * (np.concatenate(driven) == np.concatenate(chosen)).mean()
    assert found["Planted layer recovered"].value == pytest.approx(share)
    assert share > 80
    assert found["Error of the noise ceiling"].value < 0.15
    figures = {f.id: f for f in section.figures}
    assert {"quality", "surface-s1", "surface-s2", "layers", "models", "against-ceiling"} <= set(
        figures
    )
    surface = figures["surface-s1"].data
    best = results["s1"]["net"].best
    row = int(best["vertex"].values[0]) + 10242 * (str(best["hemisphere"].values[0]) == "R")
    assert surface["r"].values[row] == pytest.approx(float(best["r"].values[0]), abs=1e-6)
    assert np.isfinite(surface["r"].values).sum() == np.isfinite(best["r"].values).sum()
    write_section(section, tmp_path / "section")
    assert read_section(tmp_path / "section").summary == section.summary

    folders = [
        write_result(result, tmp_path / "encoded" / subject / model)
        for subject, by in results.items()
        for model, result in by.items()
    ]
    (tmp_path / "data").mkdir()
    again = section_from_folders(
        folders, data=tmp_path / "data", stimuli=stimuli, titles={"net": "Net", "noise": "Noise"},
        baselines=["noise"],
    )  # fmt: skip
    assert again.summary[0].value == pytest.approx(headline.value)


def test_encoding_section_without_models_says_so(tmp_path, stimuli):
    with pytest.raises(ConfigError, match="No model"):
        section_from_folders([], data=tmp_path, stimuli=stimuli, titles={})


def target(layers, stimuli, n_subjects=3):
    rng = np.random.default_rng(3)
    truth = layers["a"]["features"].values
    parts = {
        f"p{i}": rdm(truth + rng.standard_normal(truth.shape), stimulus_id=stimuli.ids)
        for i in range(n_subjects)
    }
    both = stack_rdms(parts)
    return both.assign_coords(subject=("rdm_name", list(parts)))


def test_rsa_section_prefers_the_layer_that_made_the_target(layers, stimuli):
    rdms = {"net": {n: rdm(ds) for n, ds in layers.items()}, "noise": {"z": rdm(layers["b"])}}
    other = rdms_dataset(rdms["net"]["a"]["rdm"].values, ["other"], stimuli.ids)
    section = rsa_section(
        rdms, target(layers, stimuli), {"other": other}, stimuli=stimuli,
        titles={"net": "Net", "noise": "Noise"}, baselines=["noise"], bootstraps=100,
    )  # fmt: skip
    found = estimates(section)
    best = found["Net, highest of 2 layers (a)"]
    nested = found["Net, layer chosen on other stimuli"]
    assert best.low > found["Noise (z)"].high
    assert nested.value == pytest.approx(best.value, abs=0.1)
    assert nested.low < nested.value < nested.high
    assert found["other and mean the target"].value > 0.5
    assert {f.id for f in section.figures} == {"layers", "subjects", "others", "rdms"}


def test_choosing_a_layer_on_noise_gains_nothing(stimuli):
    rng = np.random.default_rng(5)
    noise = stack_rdms(
        {
            f"l{i}": rdm(rng.standard_normal((N, 20)), stimulus_id=stimuli.ids, name=f"l{i}")
            for i in range(12)
        }
    )
    data = rdm(rng.standard_normal((N, 20)), stimulus_id=stimuli.ids)
    chosen = choose_layer_rsa(noise, data, n_halvings=5)
    from brainalign.evaluation.rsa import compare_rdms

    assert float(compare_rdms(noise, data).max()) > float(chosen["value"])
    assert float(chosen["low"]) < 0 < float(chosen["high"])
    assert float(chosen["share"].sum()) == pytest.approx(1)


def test_unknown_target_names_the_near_ones(layers, stimuli, tmp_path):
    from brainalign.data.store import write

    made = rdms_dataset(rdm(layers["a"])["rdm"].values, ["x"], stimuli.ids)
    write(made, tmp_path / "data" / "extras" / "human_it.nc", "rdms")
    with pytest.raises(UnknownNameError, match="'human_it'"):
        rsa_section_from_folders(
            [], data=tmp_path / "data", stimuli=stimuli, titles={}, target="human"
        )


def test_mobilenet_peaks_near_block_4_against_human_it(
    mirror, weights_folder, tmp_path, monkeypatch
):
    """The known answers of the 92 images: rho about .39 near blocks.4, untrained below .2."""
    from brainalign.data.bundle import write_bundle
    from brainalign.data.studies import kriegeskorte2008

    monkeypatch.setenv("BRAINALIGN_DATA", str(tmp_path / "data"))
    folder = kriegeskorte2008.fetch(mirror=mirror)
    study = kriegeskorte2008.load(folder)
    bundle = write_bundle(study, tmp_path / "bundle")
    shape = {"options": {"num_classes": 1001, "pad_type": "same"}}
    pixel = {"mean": (128 / 255,) * 3, "std": (128 / 255,) * 3}
    trained = load_model(
        "timm:mobilenetv2_100", **shape, **pixel,
        weights=weights_folder / "mobilenetv2_100" / "mobilenetv2_100_tf_1001.safetensors",
    )  # fmt: skip
    models = {"net": trained, "random": load_model("random:timm:mobilenetv2_100", **shape, **pixel)}
    manifests = [
        write_manifest(
            extract(model, study.stimuli, ["blocks.?"], store=tmp_path / "store"),
            tmp_path / f"{name}.json",
        )
        for name, model in models.items()
    ]
    section = rsa_section_from_folders(
        manifests, data=bundle, stimuli=study.stimuli, titles={"net": "Net", "random": "Random"},
        baselines=["random"], bootstraps=100,
    )  # fmt: skip
    found = estimates(section)
    best = found["Net, highest of 7 layers (blocks.4)"]
    assert best.value == pytest.approx(0.39, abs=0.01)
    assert best.low > 0.2
    untrained = next(e for label, e in found.items() if label.startswith("Random"))
    assert untrained.value < 0.2
    assert found["Net, layer chosen on other stimuli"].value <= best.value
    assert found["monkey IT and mean human IT"].value == pytest.approx(0.4912, abs=5e-5)
