"""Differentiable encoders agree with `predict`, and targets weigh the neuroids they name."""

import json

import numpy as np
import pytest
import tiny_pipeline as tiny
import torch
import xarray as xr
from PIL import Image

from brainalign.data.stimuli import write_stimuli
from brainalign.encoding import predict
from brainalign.errors import ConfigError, SchemaError, UnknownNameError
from brainalign.features import extract, load_model
from brainalign.features.differentiable import Preprocess
from brainalign.synthesis import ImageEncoder, Target, same_neuroids
from brainalign.synthesis.sampling import predict_target


def images_of(stimuli):
    return torch.from_numpy(
        np.stack([np.asarray(stimuli.open(i)) for i in range(len(stimuli))])
    ).movedim(-1, 1).float() / 255  # fmt: skip


@pytest.mark.parametrize(("layer", "pooling"), [("output", "unit"), ("output", "mean"),
                                                ("visual.layer2.1", "mean"),
                                                ("visual.layer1.0", "flatten")])  # fmt: skip
def test_it_predicts_what_predict_does(model, stimuli, layer, pooling):
    encoder = tiny.encoder(model, stimuli, layer, pooling)
    features = extract(model, stimuli, layer, pooling=pooling, progress=False)[layer]
    if pooling == "unit":
        assert np.allclose(np.linalg.norm(features["features"], axis=1), 1, atol=1e-5)
    expected = predict(encoder, features).values
    # Nothing but the encoder is given.
    ours = ImageEncoder(encoder, device="cpu")(images_of(stimuli)).numpy()
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


def test_images_of_another_size_are_resized_as_the_model_does(model, encoder, tmp_path):
    rng = np.random.default_rng(3)
    coarse = rng.uniform(0, 255, (3, 6, 6, 3)).astype(np.uint8)
    pictures = [Image.fromarray(c).resize((150, 150), Image.Resampling.BICUBIC) for c in coarse]
    large = write_stimuli(tmp_path / "x", pictures, ["a", "b", "c"])
    features = extract(model, large, "output", pooling="unit", progress=False)["output"]
    expected = predict(encoder, features).values
    spread = np.abs(expected - expected.mean(0)).max()
    images = images_of(large)
    own = ImageEncoder(encoder, device="cpu")(images).numpy()
    bilinear = ImageEncoder(encoder, device="cpu", interpolation="bilinear")(images).numpy()
    # PIL rounds to 8 bits after resizing.
    assert np.abs(own - expected).max() < 0.02 * spread
    assert 0 < np.abs(bilinear - own).max() < 0.3 * spread


def test_it_has_the_gradient_of_its_values(encoder, stimuli):
    import copy

    weights = Target("A", against="B").weights([encoder])
    deep = copy.deepcopy(ImageEncoder(encoder, weights, device="cpu")).double()
    x = images_of(stimuli)[:1].double().requires_grad_()
    (slope,) = torch.autograd.grad(deep.objective(x).sum(), x)
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    h = 1e-8
    with torch.no_grad():
        numeric = (deep.objective(x + h * along) - deep.objective(x - h * along)).item() / (2 * h)
    size = (slope.norm() * along.norm()).item()
    assert (slope * along).sum().item() == pytest.approx(numeric, abs=1e-6 * size)


def test_targets_weigh_what_they_name(encoder, stimuli, model):
    y = predict(encoder, extract(model, stimuli, "output", pooling="unit", progress=False))
    a, b = (y.values[:, encoder["roi"].values == r].mean(1) for r in ("A", "B"))
    for target, expected in {
        Target("A"): a,
        Target("A", against="B"): a - b,
        Target("all"): y.values.mean(1),
        Target(neuroids=("v3", "v1")): y.values[:, [1, 3]].mean(1),
    }.items():
        w = target.weights([encoder])
        found, contributions = predict_target(encoder, w, stimuli)
        assert np.allclose(found, expected, atol=1e-5), target.name
        assert np.allclose(contributions, (w[0] * y.values.mean(0))[w[0] != 0], atol=1e-5)
    with pytest.raises(UnknownNameError, match="C"):
        Target("C").weights([encoder])
    with pytest.raises(UnknownNameError, match="v99"):
        Target(neuroids=("v99",)).weights([encoder])
    for wrong in ({}, {"roi": "A", "neuroids": ("v1",)}, {"roi": "A", "cluster": 0},
                  {"roi": "A", "cluster": 2, "n_clusters": 2}):  # fmt: skip
        with pytest.raises(ConfigError):
            Target(**wrong)


def test_a_planted_cluster_is_found(encoder):
    planted = encoder.copy(deep=True)
    rng = np.random.default_rng(0)
    one, two = np.linalg.qr(rng.standard_normal((encoder.sizes["feature"], 2)))[0].T
    inside = np.flatnonzero(encoder["roi"].values == "A")
    planted["weights"][inside] = (
        rng.uniform(1, 9, (4, 1)) * np.stack([one, two, one, one]) * planted["feature_scale"].values
    )
    large, small = (Target("A", cluster=k, n_clusters=2).weights([planted])[0] for k in (0, 1))
    assert large[inside] == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    assert small[inside] == pytest.approx([0, 1, 0, 0])


def test_clusters_are_of_directions_of_the_features_as_they_are(encoder):
    inside = np.flatnonzero(encoder["roi"].values == "A")
    one, two = np.eye(encoder.sizes["feature"])[:2]
    scale = np.ones(encoder.sizes["feature"])
    scale[1] = 100
    # At 0, 5, 84 and 90 degrees; standardised they are at 0, 84, 90 and 90.
    directions = np.stack([one, one + 0.09 * two, one + 9 * two, two])
    planted = encoder.assign(
        weights=encoder["weights"].copy(deep=True), feature_scale=("feature", scale)
    )
    planted["weights"][inside] = directions * scale
    (found,) = Target("A", cluster=0, n_clusters=2).clusters([planted])
    assert found[inside].tolist() == [0, 0, 1, 1]
    assert (np.delete(found, inside) == -1).all()


def test_parts_and_several_encoders_are_averaged(model, stimuli, encoder):
    parts = [
        encoder.isel(neuroid=slice(0, 5)),
        tiny.encoder(model, stimuli, "visual.layer3.0", "mean").isel(neuroid=slice(5, 12)),
    ]
    other = tiny.encoder(model, stimuli, "visual.layer1.0", "mean", seed=4, subject="sub-02")
    target = Target("A")
    weights = target.weights([parts, other])
    assert sum(w.sum() for w in weights[:2]) == pytest.approx(0.5)
    flat = [*parts, other]
    module = ImageEncoder(flat, weights, device="cpu")
    assert len(module.towers) == 1  # One forward pass for three layers.
    expected = (
        predict_target(parts, target.weights([parts]), stimuli)[0]
        + predict_target(other, target.weights([other]), stimuli)[0]
    ) / 2
    assert np.allclose(module.objective(images_of(stimuli)).numpy(), expected, atol=1e-4)
    with pytest.raises(SchemaError, match="different layers"):
        Target("A", cluster=0, n_clusters=2).weights([parts])


def test_encoders_of_joined_layers_are_followed(model, stimuli, encoder):
    joined = xr.concat([encoder, encoder], dim="feature", coords="minimal", compat="override",
                       data_vars=["weights", "feature_mean", "feature_scale"])  # fmt: skip
    source = {
        "model": str(encoder["model"].values), "layer": "output", "n_features": 128,
        **{k: encoder.attrs[k] for k in ("pooling", "preprocessing", "weights_sha256")},
    }  # fmt: skip
    joined.attrs["sources"] = json.dumps([source, source])
    once = ImageEncoder(encoder.assign(intercept=0 * encoder["intercept"]), device="cpu")
    twice = ImageEncoder(joined.assign(intercept=0 * encoder["intercept"]), device="cpu")
    x = images_of(stimuli)
    assert torch.allclose(twice(x), 2 * once(x), atol=1e-4)


def test_neuroids_are_found_in_an_encoder_of_other_data(encoder):
    order = np.array([3, 0, 9, 1, 7])
    other = encoder.isel(neuroid=order)
    (moved,) = same_neuroids(Target("A").weights([encoder]), [encoder], [other])
    assert moved == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0])
    (moved,) = same_neuroids(Target("A", "B").weights([encoder]), [encoder], [other])
    assert moved == pytest.approx([1 / 3, 1 / 3, 1 / 3, -1 / 2, -1 / 2])
    with pytest.raises(SchemaError, match="in common"):
        same_neuroids(Target("A").weights([encoder]), [encoder], [encoder.isel(neuroid=[1, 2])])
    with pytest.raises(SchemaError, match="sub-02"):
        same_neuroids(Target("A").weights([encoder]), [encoder],
                      [encoder.assign_attrs(subject="sub-02")])  # fmt: skip


def test_encoders_of_several_subjects_find_each_their_own_neuroids(encoder):
    second = encoder.assign_attrs(subject="sub-02")
    target = Target("A")
    weights = target.weights([encoder, second])
    # One subject has two other encoders, which share what its own weighs; the other lacks neuroids.
    some = second.isel(neuroid=[3, 7])
    first, again, left = same_neuroids(weights, [encoder, second], [encoder, encoder, some])
    assert first == pytest.approx(weights[0] / 2) and again == pytest.approx(first)
    assert left == pytest.approx([1 / 2, 0])
    # Two models of one subject count together.
    (both,) = same_neuroids(target.weights([encoder, encoder]), [encoder, encoder], [encoder])
    assert both == pytest.approx(target.weights([encoder])[0])
    with pytest.raises(SchemaError, match="not in both"):
        same_neuroids(weights, [encoder, second], [encoder])
    with pytest.raises(ValueError, match="shorter"):
        same_neuroids(weights[:1], [encoder, second], [encoder, second])
    nobody = [e.assign_attrs(subject="") for e in (encoder, second)]
    with pytest.raises(SchemaError, match="must name its subject"):
        same_neuroids(target.weights(nobody), nobody, nobody)


def test_layers_that_guide_together_are_clustered_together(model, stimuli, encoder):
    """Two layers see one half of a region's difference each; only both see all of it."""
    rng = np.random.default_rng(0)
    planted = np.arange(encoder.sizes["neuroid"]) % 2
    common = rng.standard_normal((2, encoder.sizes["feature"]))

    def planted_in(layer, seed):
        w = common[planted] + 0.2 * np.random.default_rng(seed).standard_normal(
            (len(planted), encoder.sizes["feature"])
        )
        return encoder.assign(
            weights=(encoder["weights"].dims, w * encoder["feature_scale"].values)
        ).assign_coords(layer=layer)

    both = [planted_in("a", 1), planted_in("b", 2)]
    target = Target("A", cluster=0, n_clusters=2)
    first, second = target.clusters(both)
    inside = encoder["roi"].values == "A"
    assert np.array_equal(first, second) and (first[~inside] == -1).all()
    assert len({(a, b) for a, b in zip(first[inside], planted[inside], strict=True)}) == 2
    # A neuroid that one layer alone has cannot be compared with the others.
    with pytest.raises(SchemaError, match="different layers"):
        target.clusters([both[0], both[1].isel(neuroid=slice(1, None))])


def test_what_cannot_be_followed_is_refused(encoder, model, stimuli):
    with pytest.raises(SchemaError, match="weights"):
        ImageEncoder(encoder.assign_attrs(weights_sha256="0" * 64), device="cpu")
    delayed = encoder.assign(weights=encoder["weights"].expand_dims(delay=[0.0], axis=2))
    with pytest.raises(SchemaError, match="delays"):
        ImageEncoder(delayed, device="cpu")
    with pytest.raises(SchemaError, match="reduced"):
        ImageEncoder(encoder.isel(feature=slice(0, 20)), device="cpu")
    with pytest.raises(ConfigError, match="unit"):
        extract(model, stimuli, "visual.layer1.0", pooling="unit")
    # Luminance is the square of what a pixel says: no linear normalisation.
    with pytest.raises(ConfigError, match="preprocessing"):
        Preprocess(load_model("v1:kay2017", device="cpu"), None)
