"""The probe trained by gradient descent beside closed-form ridge, and its augmentation."""

import json

import numpy as np
import pytest
import torch
import xarray as xr

from brainalign.cli import main
from brainalign.data.splits import halves
from brainalign.data.stimuli import write_stimuli
from brainalign.data.store import read, write
from brainalign.encoding import AdamWProbe, fit_encoder, fit_probe, predict
from brainalign.encoding.probe import augment
from brainalign.errors import SchemaError
from brainalign.features import extract, load_model
from brainalign.linear import Ridge


def test_on_simulated_features_it_predicts_as_well_as_ridge():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((8, 20)) / np.sqrt(20)
    x, held = rng.standard_normal((600, 20)), rng.standard_normal((400, 20))
    y = x @ w.T + 2 + 0.7 * rng.standard_normal((600, 8))
    truth = held @ w.T + 2
    probe = AdamWProbe(n_epochs=60, learning_rate=1e-2, device="cpu", progress=False).fit(x, y)
    ridge = Ridge(alphas=np.logspace(-1, 3, 9)).fit(x, y)
    error = {
        k: np.mean((m.predict(held) - truth) ** 2) / truth.var()
        for k, m in {"probe": probe, "ridge": ridge}.items()
    }
    assert error["ridge"] < 0.03 and error["probe"] < 2 * error["ridge"], error
    assert np.corrcoef(probe.coef_.ravel(), w.ravel())[0, 1] > 0.98
    assert probe.loss_[-1] < 0.6 < probe.loss_[0]
    assert np.allclose(probe.predict(held), held @ probe.coef_.T + probe.intercept_, atol=1e-4)
    again = AdamWProbe(n_epochs=60, learning_rate=1e-2, device="cpu", progress=False).fit(x, y)
    assert np.array_equal(again.coef_, probe.coef_)
    one = AdamWProbe(n_epochs=2, device="cpu", progress=False).fit(x, y[:, 0])
    assert one.predict(held).shape == (400,)
    with pytest.raises(SchemaError, match="finite"):
        probe.fit(x, np.where(y > 3, np.nan, y))
    with pytest.raises(SchemaError, match="599"):
        probe.fit(x, y[:599])


def test_the_learning_rate_halves_and_weights_decay():
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            seen.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]))
            return super().step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Spy)
        x = np.random.default_rng(0).standard_normal((100, 3))
        AdamWProbe(n_epochs=4, device="cpu", progress=False).fit(x, x)
    # Counted from the first epoch, so that the last one has half of the rate.
    rates = [lr for lr, _ in seen]
    assert len(seen) == 8 and {d for _, d in seen} == {2e-2}
    assert rates[::2] == pytest.approx([3e-4 * 0.5 ** (e / 4) for e in range(1, 5)])


def test_augmentation_is_what_it_says():
    images = torch.rand(200, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    fresh = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    plain = lambda x: x  # noqa: E731
    same = augment(images, plain, fresh(), brightness=0, shift=0, noise=0)
    assert torch.equal(same, images)
    ratio = (augment(images, plain, fresh(), shift=0, noise=0) / images).flatten(1)
    assert torch.allclose(ratio.std(1), torch.zeros(200), atol=1e-5)
    assert 0.95 <= ratio.min() < 0.96 and 1.04 < ratio.max() <= 1.0501
    added = augment(images, plain, fresh(), brightness=0, shift=0) - images
    assert added.std().item() == pytest.approx(0.05, rel=0.02) and abs(added.mean()) < 1e-3
    moved = augment(images, plain, fresh(), brightness=0, noise=0, shift=2)
    found = set()
    wide = torch.nn.functional.pad(images, (2,) * 4, mode="replicate")
    for i in range(200):
        fits = [
            (y, x) for y in range(5) for x in range(5)
            if torch.equal(moved[i], wide[i, :, y : y + 12, x : x + 12])
        ]  # fmt: skip
        assert fits
        found.update(fits)
    assert len(found) == 25


def test_brightness_is_of_the_image_and_noise_of_what_the_model_takes():
    images = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    fresh = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    normalise = lambda x: (x - 0.5) / 0.25  # noqa: E731
    bright = augment(images, normalise, fresh(), shift=0, noise=0)
    factor = (bright * 0.25 + 0.5) / images
    assert torch.allclose(factor.flatten(1).std(1), torch.zeros(50), atol=1e-5)
    assert 0.95 <= factor.min() and factor.max() <= 1.0501
    noisy = augment(images, normalise, fresh(), brightness=0, shift=0) - normalise(images)
    assert noisy.std().item() == pytest.approx(0.05, rel=0.02)


def test_images_are_augmented_at_the_size_of_the_model(monkeypatch):
    model = load_model("small-clip", device="cpu")
    seen = []

    def spy(images, normalise, generator, **options):
        seen.append((tuple(images.shape), float(images.min()), float(images.max())))
        return augment(images, normalise, generator, **options)

    monkeypatch.setattr("brainalign.encoding.probe.augment", spy)
    images = torch.rand(4, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    probe = AdamWProbe(model, n_epochs=2, batch_size=2, device="cpu", progress=False)
    probe.fit(images, np.arange(4.0))
    side = model.preprocessing["image_size"][0]
    assert len(seen) == 4 and {shape for shape, _, _ in seen} == {(2, 3, side, side)}
    assert all(0 <= low and high <= 1 for _, low, high in seen) and side != 96
    probe.predict(images)
    assert len(seen) == 4


@pytest.fixture
def subject(tmp_path):
    """A model, 160 images of coarse colours, their features, and responses to the first 120."""
    model = load_model("small-clip", device="cpu")
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (160, 4, 4, 3))
    images = np.kron(coarse, np.ones((1, 16, 16, 1))).astype(np.uint8)
    ids = [f"im{i}" for i in range(160)]
    stimuli = write_stimuli(tmp_path / "x", images, ids)
    features = extract(model, stimuli, "output", pooling="unit", progress=False)["output"]
    z = features["features"].values
    z = (z - z.mean(0)) / z.std(0)
    y = z @ rng.standard_normal((128, 6)) / np.sqrt(128) + 0.1 * rng.standard_normal((160, 6))
    responses = xr.Dataset(
        {"responses": (("presentation", "neuroid"), y[:120].astype(np.float32))},
        coords={
            "stimulus_id": ("presentation", ids[:120]),
            **{k: ("presentation", np.zeros(120, int)) for k in ("repetition", "session", "run")},
            "subject": ("presentation", ["s"] * 120),
            "neuroid_id": ("neuroid", [f"v{i}" for i in range(6)]),
            "roi": ("neuroid", ["A"] * 6), "hemisphere": ("neuroid", ["L"] * 6),
        },
        attrs={"units": "z", "subject": "s"},
    )  # fmt: skip
    return model, stimuli, features, responses, y


def test_it_makes_an_encoder_like_that_of_ridge(subject):
    model, stimuli, features, responses, y = subject
    shown = stimuli.select(stimuli.ids[:120])
    probe = fit_probe(model, shown, responses, n_epochs=12, learning_rate=0.1, noise=0.05,
                      weight_decay=0.0, shift=1, device="cpu", progress=False)  # fmt: skip
    ridge = fit_encoder(features.isel(stimulus=slice(120)), responses, device="cpu")
    assert set(ridge.attrs) <= set(probe.attrs) and probe["weights"].dims == ridge["weights"].dims
    held = features.isel(stimulus=slice(120, None))
    r = {
        name: np.mean([np.corrcoef(predict(e, held).values[:, v], y[120:, v])[0, 1]
                       for v in range(6)])
        for name, e in (("probe", probe), ("ridge", ridge))
    }  # fmt: skip
    assert r["ridge"] > 0.5 and r["probe"] > r["ridge"] - 0.15, r


def test_the_command_fits_one_half_of_the_images(subject, tmp_path):
    _, stimuli, _, responses, _ = subject
    write(responses, tmp_path / "s.zarr", "responses")
    words = ["probe", "small-clip", "--stimuli", str(tmp_path / "x"), "--n-epochs", "1",
             "--responses", str(tmp_path / "s.zarr"), "--device", "cpu", "--seed", "3"]  # fmt: skip
    made = {}
    for half in (1, 2):
        out = tmp_path / f"{half}.zarr"
        assert main([*words, "--half", str(half), "--out", str(out)]) == 0
        made[half] = read(out, "encoder").load()
    inside = halves(np.array(stimuli.sha256[:120]), 3)
    for half, encoder in made.items():
        assert encoder.attrs["n_stimuli"] == (inside == half).sum() < 120
        assert json.loads(encoder.attrs["config"])["half"] == half
    again = fit_probe("small-clip", stimuli, responses.isel(presentation=inside == 1), n_epochs=1,
                      seed=3, device="cpu", progress=False)  # fmt: skip
    assert np.array_equal(again["weights"].values, made[1]["weights"].values)
    assert not np.array_equal(made[1]["weights"].values, made[2]["weights"].values)
