"""The V1 energy model, its published front end, and pixels."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from brainalign.features import extract, load_model
from brainalign.features.baselines import V1Energy, gabor_bank

ORIENTATIONS = 8


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Images:
    """A set of stimuli in memory."""

    hash = "0"

    def __init__(self, images):
        self.images = images
        self.ids = [f"image{i}" for i in range(len(images))]

    def __len__(self):
        return len(self.images)

    def open(self, i):
        return self.images[i]


@pytest.fixture(scope="module")
def v1():
    return load_model("v1", device="cpu")


def grating(orientation=0.0, frequency=8.0, phase=0.0, contrast=1.0, side=192):
    """Return luminance; orientation in degrees counter-clockwise from horizontal."""
    y, x = np.mgrid[:side, :side] / side
    theta = np.deg2rad(orientation)
    u = x * np.sin(theta) + y * np.cos(theta)
    wave = 0.5 + 0.5 * contrast * np.cos(2 * np.pi * frequency * u + phase)
    return torch.tensor(wave, dtype=torch.float32)[None, None]


def responses(model, image, layer="amplitude"):
    """Return the central cells: frequency -> (orientation, row, column)."""
    caught = []
    handle = getattr(model.module, layer).register_forward_hook(lambda m, i, o: caught.append(o[0]))
    with torch.no_grad():
        model.module(image)
    handle.remove()
    out, at = {}, 0
    for f in model.module.frequencies:
        cells = min(model.module.grid, int(2 * f))
        size = ORIENTATIONS * cells * cells
        part = caught[0][at : at + size].reshape(ORIENTATIONS, cells, cells)
        inner = slice(cells // 4, cells - cells // 4)
        out[f] = part[:, inner, inner]
        at += size
    assert at == len(caught[0])
    return out


@pytest.mark.parametrize("orientation", range(ORIENTATIONS))
def test_orientation_tuning(v1, orientation):
    tuned = responses(v1, grating(orientation * 22.5))[8].mean((1, 2))
    assert int(tuned.argmax()) == orientation
    assert float(tuned[(orientation + 4) % 8]) < 0.02 * float(tuned[orientation])
    assert float(tuned[(orientation + 1) % 8]) < 0.8 * float(tuned[orientation])


def test_matched_grating_of_full_contrast_gives_one(v1):
    for frequency in (4, 8, 16):
        tuned = responses(v1, grating(0, frequency))[frequency][0].mean()
        assert float(tuned) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("frequency", [4, 8, 16])
def test_frequency_tuning(v1, frequency):
    tuned = {f: float(r[0].mean()) for f, r in responses(v1, grating(0, frequency)).items()}
    assert max(tuned, key=tuned.get) == frequency


def test_phase_invariance(v1):
    phases = np.linspace(0, 2 * np.pi, 9)[:-1]
    energy = torch.stack([responses(v1, grating(45, 8, p))[8][2] for p in phases])
    variation = energy.std(0) / energy.mean(0)
    assert float(variation.max()) < 0.03
    # A linear filter at the same place is not invariant: the test can fail.
    bank = v1.module.bank[0, 2]
    side = 48
    linear = torch.stack(
        [
            torch.nn.functional.conv2d(grating(45, 8, p, side=side) - 0.5, bank[None, None])[
                0, 0, 10, 10
            ]
            for p in phases
        ]
    )
    assert float(linear.std() / linear.abs().mean()) > 0.5


def test_amplitude_follows_contrast_and_normalisation_saturates(v1):
    low, high = (responses(v1, grating(0, 8, contrast=c))[8][0].mean() for c in (0.25, 1))
    assert float(high / low) == pytest.approx(4, rel=0.01)
    low, high = (
        responses(v1, grating(0, 8, contrast=c), "normalised")[8][0].mean() for c in (0.25, 1)
    )
    assert 1 < float(high / low) < 2.5


def test_uniform_image_gives_nothing(v1):
    for level in (0, 0.5, 1):
        for layer in ("amplitude", "normalised"):
            flat = responses(v1, torch.full((1, 1, 192, 192), float(level)), layer)
            assert max(float(r.abs().max()) for r in flat.values()) < 1e-4


def test_options_and_shapes():
    model = load_model("v1", options={"frequencies": [2, 8], "grid": 4}, device="cpu")
    assert model.traced["amplitude"].shape == (8 * (16 + 16),)
    assert model.blocks() == ["amplitude", "normalised"]
    assert model.preprocessing["options"] == {"frequencies": [2, 8], "grid": 4}
    assert V1Energy().bank.shape[:2] == (2, 8)


def test_gabor_bank_is_the_published_one(mirror):
    with h5py.File(mirror / "kay2017_vwfa_ffa" / "model_template.mat") as file:
        stored = np.array(
            [[file[file["gbrs"][p, o, 0]][()].T for o in range(8)] for p in range(2)]
        ).squeeze()
    # Stored values are up to 0.009.
    np.testing.assert_allclose(gabor_bank(15, 8, 52).numpy(), stored, atol=1e-9)


def test_kay2017_features_are_the_published_ones(mirror):
    folder = mirror / "kay2017_vwfa_ffa"
    model = load_model("v1:kay2017", device="cpu")
    chosen = [(s, i) for s in range(1, 24, 2) for i in (1, 6)]
    images = []
    for s, i in chosen:
        with Image.open(folder / "experiment1stimuli" / f"stimulus{s:02d}_{i:02d}.png") as image:
            images.append(model.transform(image.convert("RGB")))
    with torch.inference_mode():
        ours = model.encode_image(torch.stack(images)).numpy().reshape(-1, 32, 32, 8)
    with h5py.File(folder / "model_template.mat") as file:
        f = file["f"]
        assert f.shape == (23, 8192, 10) or f.shape == (10, 8192, 23)
        f = f[()] if f.shape[0] == 23 else f[()].transpose(2, 1, 0)
    theirs = np.stack([f[s - 1, :, i - 1].reshape(32, 32, 8).transpose(1, 0, 2) for s, i in chosen])
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.9999
    assert np.abs(ours - theirs).max() < 0.01


def test_pixels_are_the_image():
    model = load_model("pixels", options={"side": 2}, image_size=4, device="cpu")
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2, :2] = (255, 0, 0)
    pixels[2:, 2:] = 255
    x = model.transform(Image.fromarray(pixels))[None]
    rgb = model.encode_image(x).reshape(3, 2, 2)
    assert rgb[0].tolist() == [[1, 0], [0, 1]]
    assert rgb[1].tolist() == rgb[2].tolist() == [[0, 0], [0, 1]]
    luminance = extract(model, Images([Image.fromarray(pixels)]))["luminance"]["features"]
    np.testing.assert_allclose(luminance, [[0.299, 0, 0, 1]], atol=1e-6)
    assert model.blocks() == ["luminance", "rgb"]
    wide = Image.fromarray(np.zeros((40, 90, 3), np.uint8))
    assert model.transform(wide).shape == (3, 4, 4)


def test_gamma_makes_luminance():
    image = Image.fromarray(np.full((8, 8), 128, np.uint8))
    for gamma in (1, 2):
        model = load_model("v1", options={"gamma": gamma}, image_size=8, device="cpu")
        assert float(model.transform(image).mean()) == pytest.approx((128 / 255) ** gamma, abs=1e-6)
