"""Octave noise: against slow code and pyrtools, its spectrum, its power, and the range rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brainalign.errors import ConfigError, SchemaError
from brainalign.psychophysics import stimuli
from brainalign.psychophysics.pyramid import (
    band_frequencies,
    laplacian_pyramid,
    n_bands,
    octave_noise,
)
from brainalign.psychophysics.stimuli import (
    draw_noise,
    keep_in_range,
    low_contrast,
    mask,
    masking_design,
)

TAPS = np.sqrt(2) * np.array([1, 4, 6, 4, 1]) / 16


def blurred(image):
    """Correlate along both axes, pixel by pixel, after reflecting about the edge."""
    padded = np.pad(image, 2, mode="reflect")
    out = np.zeros(image.shape)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            out[y, x] = TAPS @ padded[y : y + 5, x : x + 5] @ TAPS
    return out


def slow_pyramid(image, levels):
    pyramid = []
    for _ in range(levels - 1):
        smaller = blurred(image)[::2, ::2]
        between = np.zeros(image.shape)
        between[::2, ::2] = smaller
        pyramid.append(image - blurred(between))
        image = smaller
    return [*pyramid, image]


@pytest.mark.parametrize("shape", [(40, 40), (33, 46), (14, 7), (70, 83), (81, 9)])
def test_pyramid_is_that_of_slow_code(shape):
    image = np.random.default_rng(0).standard_normal(shape)
    levels = n_bands(*shape)
    fast = laplacian_pyramid(torch.from_numpy(image))
    slow = slow_pyramid(image, levels)
    assert len(fast) == levels
    for a, b in zip(fast, slow, strict=True):
        assert a.numpy() == pytest.approx(b, abs=1e-12)


@pytest.mark.parametrize("shape", [(224, 224), (96, 96), (97, 131), (64, 90)])
def test_pyramid_is_that_of_pyrtools(shape):
    pyrtools = pytest.importorskip("pyrtools", reason="pyrtools is not installed")
    image = np.random.default_rng(0).standard_normal(shape)
    theirs = pyrtools.pyramids.LaplacianPyramid(image)
    ours = laplacian_pyramid(torch.from_numpy(image))
    assert len(ours) == theirs.num_scales == n_bands(*shape)
    for k, level in enumerate(ours):
        assert level.numpy() == pytest.approx(theirs.pyr_coeffs[(k, 0)], abs=1e-10)
    top = theirs.recon_pyr(levels=0)
    for band in range(len(ours)):
        alone = theirs.recon_pyr(levels=len(ours) - 1 - band)
        expected = alone * np.sqrt((top**2).mean() / (alone**2).mean())
        assert octave_noise(torch.from_numpy(image), band).numpy() == pytest.approx(
            expected, abs=1e-9
        )


def test_cached_images_and_traced_ones_agree():
    white = torch.randn(3, 70, 83, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    traced = white.clone().requires_grad_()
    plain = laplacian_pyramid(white)
    for a, b in zip(plain, laplacian_pyramid(traced), strict=True):
        assert b.requires_grad and torch.allclose(a, b, rtol=0, atol=1e-12)
    for a, b in zip(plain, laplacian_pyramid(white.float()), strict=True):
        assert b.dtype == torch.float32 and (a - b).abs().max() < 2e-6 * a.abs().max()
    assert [a.shape for a in laplacian_pyramid(white[:0])] == [(0, *a.shape[1:]) for a in plain]
    for band in range(len(plain)):
        noise = octave_noise(white, band)
        assert torch.allclose(noise, octave_noise(traced, band), rtol=0, atol=1e-11)
        assert torch.equal(noise[1], octave_noise(white[1], band))
    octave_noise(traced, 1).square().sum().backward()
    assert traced.grad is not None and (traced.grad != 0).all()


def test_bands():
    assert band_frequencies(224, 224).tolist() == [1.75 * 2**f for f in range(7)]
    assert band_frequencies(64, 90).tolist() == [2, 4, 8, 16, 32]
    with pytest.raises(ConfigError, match="bands 0 to 4"):
        octave_noise(torch.zeros(64, 64), 5)
    with pytest.raises(ConfigError, match="1 to 5 levels"):
        laplacian_pyramid(torch.zeros(64, 64), 6)
    with pytest.raises(SchemaError, match="int64"):
        laplacian_pyramid(torch.zeros(64, 64, dtype=torch.int64))


def test_spectrum_of_the_noise():
    size = 128
    white, _ = draw_noise(range(24), size, size)
    white = white.double()
    fy, fx = np.meshgrid(*[np.fft.fftfreq(size) * size] * 2, indexing="ij")
    radius = np.hypot(fy, fx)
    centres = band_frequencies(size, size)
    rms = octave_noise(white, len(centres) - 1).square().mean((1, 2)).sqrt()
    means = []
    for band, centre in enumerate(centres):
        noise = octave_noise(white, band)
        assert noise.square().mean((1, 2)).sqrt().numpy() == pytest.approx(rms.numpy(), rel=1e-9)
        power = (np.abs(np.fft.fft2(noise.numpy())) ** 2).mean(0)
        power /= power.sum()
        means.append(2 ** (power * np.log2(np.maximum(radius, 0.5))).sum())
        octave = (radius >= centre / 2**1.5) & (radius < centre / 2**0.5)
        three = (radius >= centre / 2**2.5) & (radius < centre * 2**0.5)
        if 1 < band < len(centres) - 1:
            assert power[octave].sum() > 0.6 and power[three].sum() > 0.9, centre
    # A level's power lies an octave below its published centre, less in the highest band.
    assert np.array(means[:-1]) / centres[:-1] == pytest.approx(0.51, abs=0.05)
    assert means[-1] / centres[-1] == pytest.approx(0.78, abs=0.02)


def test_low_contrast_by_hand():
    x = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    assert low_contrast(x).flatten().tolist() == pytest.approx([0.349, 0.549, 0.449, 0.449])


def test_range_rule_by_hand():
    image = torch.full((1, 1, 5), 0.4)
    image[0, 0, 4] = 0.9
    # In range; below; above; so far below or above that no image pixel mends it.
    noise = torch.tensor([[[0.3, -0.6, 0.7, -1.0, 1.2]]])
    _, generators = draw_noise([7], 1, 5)
    out = keep_in_range(image, noise, torch.tensor([0.1]), generators)
    assert out[0, 0, :3].tolist() == pytest.approx([0.7, 0.1, 0.9])
    assert ((out >= 0) & (out <= 1)).all()
    assert abs(out[0, 0, 3] - 0.4) < 0.45 and out[0, 0, 3] not in (0.1, 0.9)
    assert out[0, 0, 4] not in (0.1, 0.9)
    with pytest.raises(SchemaError, match=r"leave 0\.\.1 before"):
        keep_in_range(image + 0.5, noise, torch.tensor([0.1]), generators)


def test_mask_is_the_same_in_any_batch_and_only_where_noise_is():
    images = torch.rand(5, 48, 60, generator=torch.Generator().manual_seed(0))
    sds, bands, seeds = [0.0, 0.04, 0.04, 0.04, 0.16], [0, 1, 3, 1, 2], [5, 6, 7, 6, 8]
    out = mask(images, sds, bands, seeds)
    for i in range(5):
        alone = mask(images[[i]], sds[i : i + 1], bands[i : i + 1], seeds[i : i + 1])
        assert torch.allclose(alone[0], out[i], atol=1e-6)
    plain = low_contrast(images)
    assert torch.equal(out[0], plain[0])
    # One seed, one noise; and no more than the range rule changes.
    assert torch.allclose(out[1] - plain[1], out[3] - plain[3], atol=1e-6)
    assert ((out >= 0) & (out <= 1)).all()
    white, _ = draw_noise([7], 48, 60)
    assert torch.allclose(out[2] - plain[2], octave_noise(0.04 * white, 3)[0], atol=1e-6)
    assert not torch.allclose(mask(images[[2]], [0.04], [3], [9])[0], out[2], atol=1e-3)


def test_strong_noise_stays_in_range():
    images = torch.rand(4, 32, 32, generator=torch.Generator().manual_seed(1))
    out = mask(images, [0.8] * 4, [0, 1, 2, 3], [1, 2, 3, 4])
    assert ((out >= 0) & (out <= 1)).all() and (out == 0.1).any() and (out == 0.9).any()
    assert torch.equal(out, mask(images, [0.8] * 4, [0, 1, 2, 3], [1, 2, 3, 4]))


def test_mask_refuses_what_does_not_fit():
    with pytest.raises(SchemaError, match="Grey floating-point"):
        mask(torch.zeros(1, 3, 8, 8), [0], [0], [0])
    with pytest.raises(SchemaError, match="2 noise_sd"):
        mask(torch.zeros(1, 8, 8), [0, 1], [0], [0])
    with pytest.raises(SchemaError, match="at least 0"):
        mask(torch.zeros(1, 8, 8), [-1], [0], [0])


def test_designs():
    ids = [f"i{i}" for i in range(70)]
    classes = ["cat", "dog"] * 35
    every = masking_design(ids, classes)
    assert every.sizes["trial"] == 70 * 35
    assert len(np.unique(every["seed"])) == 70 * 35
    once = masking_design(ids, classes, crossed=False, seed=3)
    assert sorted(once["stimulus_id"].values) == sorted(ids)
    _, counts = np.unique(once["condition"].values, return_counts=True)
    assert counts.tolist() == [2] * 35
    cats = once.isel(trial=once["category"].values == "cat")
    assert np.unique(cats["condition"].values, return_counts=True)[1].tolist() == [1] * 35
    assert masking_design(ids, classes, crossed=False, seed=3).identical(once)
    assert dict(zip(ids, classes, strict=True))[str(once["stimulus_id"].values[0])] == str(
        once["category"].values[0]
    )
    with pytest.raises(ConfigError, match="bands 0 to 4"):
        masking_design(ids, classes, size=(64, 64), bands=[5])


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ),
    ],
)
def test_pictures_in_float32_are_those_of_float64(device, monkeypatch):
    """In every band and level; devices draw different noise, so that of the CPU is given to all."""

    def of_the_cpu(seeds, height, width, *, device="cpu"):
        noise, _ = draw_noise(seeds, height, width)
        return noise.to(device), [torch.Generator(device).manual_seed(int(s)) for s in seeds]

    monkeypatch.setattr(stimuli, "draw_noise", of_the_cpu)
    side = 96
    cells = [(sd, f) for sd in (0.0, 0.02, 0.04, 0.08, 0.16) for f in range(n_bands(side, side))]
    images = torch.rand(len(cells), side, side, generator=torch.Generator().manual_seed(3))
    sds, bands = zip(*cells, strict=True)
    seeds = range(len(cells))
    exact = mask(images.double(), sds, bands, seeds)
    shown = mask(images.to(device), sds, bands, seeds)
    assert shown.dtype == torch.float32 and shown.device.type == device
    # Pixels that leave the range are among them.
    moved = low_contrast(images.double()) - exact
    assert exact.min() >= 0 and moved.abs().max() > 0.4
    torch.testing.assert_close(shown.cpu().double(), exact, atol=2e-6, rtol=0)
