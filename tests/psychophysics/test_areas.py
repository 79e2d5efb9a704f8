"""Channels of areas: by hand, of filters whose channel is known, and of a fitted encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from brainalign.encoding import fit_encoder, predict
from brainalign.errors import ConfigError, SchemaError
from brainalign.features import extract, load_model
from brainalign.psychophysics import (
    band_frequencies,
    fit_area,
    masking_design,
    move_areas,
    octave_noise,
    probability_correct,
)
from brainalign.psychophysics.areas import area_responses, fidelity
from brainalign.psychophysics.stimuli import draw_noise

SIZE = 64


@pytest.fixture(scope="module")
def images():
    """Return images with power that falls as that of photographs."""
    white, _ = draw_noise(range(40), SIZE, SIZE)
    f = np.fft.fftfreq(SIZE) * SIZE
    radius = torch.from_numpy(np.maximum(np.hypot(*np.meshgrid(f, f)), 1)).float()
    pink = torch.fft.ifft2(torch.fft.fft2(white) / radius).real
    pink -= pink.amin((1, 2), keepdim=True)
    return pink / pink.amax((1, 2), keepdim=True)


def gain(centre, bandwidth):
    f = np.fft.fftfreq(SIZE) * SIZE
    radius = np.maximum(np.hypot(*np.meshgrid(f, f, indexing="ij")), 1e-9)
    g = 2.0 ** -((2 * np.log2(radius / centre) / bandwidth) ** 2)
    g[0, 0] = 0
    return g


def filtered(centre, bandwidth):
    g = torch.from_numpy(gain(centre, bandwidth))

    def respond(pictures):
        # The neuroids tile the visual field: one for each place.
        out = torch.fft.ifft2(torch.fft.fft2(pictures.double()) * g).real
        return out.flatten(1).numpy()

    return respond


def test_fidelity_by_hand():
    # 2 pictures, 1 condition: D^2 = (3 + 1) / (1 + 1).
    assert fidelity([[3.0], [1.0]], [1.0, 1.0]).tolist() == pytest.approx([1 / 3])


@pytest.mark.parametrize(("centre", "bandwidth"), [(6.0, 1.0), (10.0, 3.0)])
def test_known_filter_comes_back(images, centre, bandwidth):
    names = [f"i{i}" for i in range(len(images))]
    design = masking_design(
        names, ["a"] * len(names), size=(SIZE, SIZE), noise_sds=(0, 0.01, 0.02, 0.04), seed=1
    )
    moved = move_areas({"v": filtered(centre, bandwidth)}, design, images, names, contrast=0.2)
    fit = fit_area(moved.sel(area="v"), n_bootstrap=40)
    # What the noise's own spectrum says of this filter, band by band.
    g, spread = gain(centre, bandwidth), float(moved["spread"].mean())
    white, _ = draw_noise(range(1000, 1040), SIZE, SIZE)
    bands = band_frequencies(SIZE, SIZE)
    power = [
        (np.abs(np.fft.fft2(octave_noise(white, b).numpy())) ** 2).mean(0) / SIZE**2
        for b in range(len(bands))
    ]
    # Noise of standard deviation c moves the pattern by c^2 sum(power g^2): a unit at D = 1.
    known = 0.01 * np.sqrt([(p * g**2).sum() / spread for p in power])
    f, c = moved["frequency"].values, moved["noise_sd"].values
    expected = 1 / (1 + (c * known[np.searchsorted(bands, f)] / 0.01) ** 2)
    assert fit.fidelity["value"].values == pytest.approx(expected, abs=0.03)
    assert fit.channel.usable and fit.slope == pytest.approx(2, abs=0.3)
    exact = moved.sel(area="v").isel(stimulus=[0, 1]).assign(
        energy=(("stimulus", "cell"), np.tile(1 / expected - 1, (2, 1))),
        spread=("stimulus", np.ones(2)),
    )  # fmt: skip
    true = fit_area(exact, n_bootstrap=2).channel
    for name in ("bandwidth", "centre", "sensitivity"):
        low, high = fit.intervals[name]
        assert getattr(fit.channel, name) == pytest.approx(getattr(true, name), rel=0.1), name
        assert low < getattr(fit.channel, name) < high < 2 * low
    # Half the label is where the noise's power lies; the noise is an octave or more wide itself.
    assert centre / 0.51 == pytest.approx(fit.channel.centre, rel=0.3)
    assert bandwidth < fit.channel.bandwidth < bandwidth + 1.5


def test_exact_channel_comes_back():
    f, c = np.tile([2.0, 4, 8, 16, 32], 4), np.repeat([0.02, 0.04, 0.08, 0.16], 5)
    true = {"bandwidth": 2.5, "centre": 11.0, "sensitivity": 0.7}
    value = probability_correct(f, c, slope=1.6, guess=0.2, lapse=0.0, **true)
    moved = xr.Dataset(
        {"energy": (("stimulus", "cell"), np.tile(1 / value - 1, (6, 1))),
         "spread": ("stimulus", np.ones(6))},
        coords={"frequency": ("cell", f), "noise_sd": ("cell", c)},
    )  # fmt: skip
    fit = fit_area(moved, n_bootstrap=2)
    for name, expected in true.items():
        assert getattr(fit.channel, name) == pytest.approx(expected, rel=1e-3)
    assert fit.floor == pytest.approx(0.2, abs=1e-3) and fit.channel.flags == ()
    still = moved.assign(energy=0.01 * moved["energy"].clip(max=1))
    assert "flat" in fit_area(still, n_bootstrap=2).channel.flags
    alike = moved.assign(energy=(("stimulus", "cell"), np.tile(c * 10, (6, 1))))
    assert "flat" in fit_area(alike, n_bootstrap=2).channel.flags
    # A channel whose middle lies beyond all bands has no end above.
    beyond = probability_correct(
        f, c, slope=2.0, guess=0.0, lapse=0.0, bandwidth=6.0, centre=500.0, sensitivity=40.0
    )
    noise = np.random.default_rng(0).lognormal(0, 0.3, (6, len(f)))
    high = fit_area(
        moved.assign(energy=(("stimulus", "cell"), (1 / beyond - 1) * noise)), n_bootstrap=20
    )
    assert high.channel.flags == ("centre_open", "sensitivity_open")
    assert high.intervals["centre"][1] == high.intervals["sensitivity"][1] == np.inf
    with pytest.raises(SchemaError, match="alike"):
        fit_area(moved.assign(spread=0 * moved["spread"]))
    with pytest.raises(SchemaError, match="3 bands"):
        fit_area(moved.isel(cell=f < 5))


class Towers(nn.Module):
    """Averages over windows: one layer sees coarse things alone, the other all."""

    def __init__(self):
        super().__init__()
        self.coarse = nn.AvgPool2d(8)
        self.fine = nn.AvgPool2d(1)

    def forward(self, x):
        return self.coarse(x).flatten(1) + self.fine(x).flatten(1)[:, :192]


def test_areas_of_an_encoder(images, tmp_path):
    from brainalign.data.stimuli import write_stimuli

    pictures = (images * 255).round().byte().numpy()
    names = [f"i{i}" for i in range(len(images))]
    stimuli = write_stimuli(tmp_path / "s", list(pictures), names)
    model = load_model(Towers(), image_size=SIZE, mean=[0.4] * 3, std=[0.2] * 3, device="cpu")
    model.preprocessing["interpolation"] = "bicubic"
    features = extract(model, stimuli, layers=["coarse", "fine"], pooling="flatten")
    rng = np.random.default_rng(0)
    encoders = {}
    for layer, roi in (("coarse", "A"), ("fine", "B")):
        x = features[layer]["features"].values
        y = x @ rng.standard_normal((x.shape[1], 6)) + rng.standard_normal(6)
        responses = xr.Dataset(
            {"responses": (("presentation", "neuroid"), y.astype(np.float32))},
            coords={
                "stimulus_id": ("presentation", names),
                "repetition": ("presentation", np.zeros(len(names), dtype=int)),
                "session": ("presentation", np.zeros(len(names), dtype=int)),
                "run": ("presentation", np.zeros(len(names), dtype=int)),
                "subject": "s",
                "neuroid_id": ("neuroid", [f"{roi}{i}" for i in range(6)]),
                "roi": ("neuroid", [roi] * 6),
                "hemisphere": ("neuroid", ["L"] * 6),
            },
        )
        made = fit_encoder(features[layer], responses, alphas=1.0)
        # Weights fitted to few images are as smooth as these; those of an area need not be.
        weights = rng.standard_normal(made["weights"].shape).astype(np.float32)
        encoders[layer] = made.assign(weights=(made["weights"].dims, weights))
    areas = area_responses(encoders, model)
    assert list(areas) == ["A", "B"]
    # The same numbers as of the encoder, up to each neuroid's scale.
    seen = torch.from_numpy(pictures.astype(np.float32) / 255)
    expected = predict(encoders["fine"], features["fine"]).values
    got = areas["B"](seen)
    for a, b in zip(got.T, expected.T, strict=True):
        assert np.corrcoef(a, b)[0, 1] == pytest.approx(1, abs=1e-5)
    design = masking_design(names, ["a"] * len(names), size=(SIZE, SIZE), noise_sds=(0, 0.04, 0.08))
    moved = move_areas(areas, design, images, names)
    squared = moved["energy"].sum("stimulus") / moved["spread"].sum("stimulus")
    quiet = moved["noise_sd"].values == 0.04
    ratio = squared.sel(area="B").values[quiet] / squared.sel(area="A").values[quiet]
    # Noise finer than its windows leaves the coarse area alone.
    assert ratio[-1] > 10 and ratio[0] < 1
    with pytest.raises(SchemaError, match="crossed=True"):
        move_areas(areas, design.isel(trial=slice(None, -1)), images, names)
    with pytest.raises(ConfigError, match="No area"):
        move_areas({}, design, images, names)
