"""Altered copies of an image, which an objective is averaged over."""

import copy

import numpy as np
import pytest
import torch

from brainalign.errors import ConfigError
from brainalign.synthesis import Guidance, ImageEncoder, Jitter, Target, ascend, jittered

STILL = {"shift": 0.0, "zoom": 0.0, "noise": 0.0}


def pictures(n=3, rows=12, columns=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((n, 3, rows, columns), generator=generator, dtype=torch.float64)


def seen_by(jitter, images, calls=1):
    """Return the copies that an objective was handed: (call and copy, image, ...)."""
    shown = []

    def watch(x):
        shown.append(x.unflatten(0, (jitter.copies, len(images))))
        return x.mean((1, 2, 3))

    asked = jittered(watch, jitter)
    values = [asked(images) for _ in range(calls)]
    return torch.cat(shown), values


def test_copies_that_do_not_differ_are_the_image():
    images = pictures()
    copies, (value,) = seen_by(Jitter(3, **STILL), images)
    assert torch.equal(copies, images.expand(3, -1, -1, -1, -1))
    assert torch.allclose(value, images.mean((1, 2, 3)))


def test_copies_are_moved_and_zoomed_as_far_as_asked():
    side = 41
    ramp = (torch.arange(side, dtype=torch.float64) / (side - 1)).expand(1, 3, side, side)
    # A ramp shows where each pixel was taken from.
    moved, _ = seen_by(Jitter(200, shift=0.125, zoom=0, noise=0), ramp)
    by = (moved[:, 0, 0, side // 2, side // 2] - 0.5) * (side - 1)
    assert by.abs().max() <= 0.125 * side and by.abs().max() > 0.12 * side
    assert by.min() < 0 < by.max()
    zoomed, _ = seen_by(Jitter(200, shift=0, zoom=0.25, noise=0), ramp)
    rows = zoomed[:, 0, 0, side // 2]
    factor = (rows[:, side // 2 + 8] - rows[:, side // 2 - 8]) * (side - 1) / 16
    assert torch.allclose(rows[:, side // 2], torch.full((200,), 0.5, dtype=torch.float64))
    assert 0.75 <= factor.min() < 0.76 and 1.24 < factor.max() <= 1.25 + 1e-9
    # Beyond the border the outermost pixel goes on.
    assert (rows[factor > 1.1][:, [0, -1]] - torch.tensor([0.0, 1.0])).abs().max() < 0.01
    # Columns move as rows do, and neither with the other.
    tilted, _ = seen_by(Jitter(50, shift=0.125, zoom=0, noise=0), torch.cat([ramp, ramp.mT]))
    across, down = tilted[:, 0, 0, 20, 20], tilted[:, 1, 0, 20, 20]
    assert abs(np.corrcoef(across, down)[0, 1]) < 0.5
    grey = torch.full((1, 3, side, side), 0.5, dtype=torch.float64)
    noisy, _ = seen_by(Jitter(20, shift=0, zoom=0, noise=0.05), grey)
    assert float(noisy.std()) == pytest.approx(0.05, rel=0.02)
    assert noisy.mean((2, 3, 4)).unique().numel() == 20


def test_images_of_a_batch_do_not_act_on_one_another_and_a_run_repeats():
    images, jitter = pictures(), Jitter(4)
    copies, values = seen_by(jitter, images, calls=2)
    again, repeated = seen_by(jitter, images[1:2], calls=2)
    assert torch.equal(copies[:, 1:2], again)
    for value, same in zip(values, repeated, strict=True):
        assert torch.equal(value[1:2], same)
    assert not torch.allclose(copies[:4], copies[4:])
    assert torch.equal(jittered(lambda x: x.mean((1, 2, 3)), jitter)(images), values[0])


def test_the_gradient_is_that_of_finite_differences(encoder):
    target = Target("A").weights([encoder])
    objective = copy.deepcopy(ImageEncoder(encoder, target, device="cpu")).double().objective
    images = 0.2 + 0.6 * pictures(2, 24, 24)

    def height(x):
        return jittered(objective, Jitter(5))(x).sum()

    x = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(height(x), x)
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    h = 1e-7
    with torch.no_grad():
        numeric = float(height(images + h * along) - height(images - h * along)) / (2 * h)
    exact = float((slope * along).sum())
    assert exact == pytest.approx(numeric, abs=1e-6 * float(slope.norm() * along.norm()))


def test_what_only_one_place_shows_averages_out():
    """A pattern as fine as the pixels keeps little of its slope, one as wide as the image most."""
    side = 32
    x = torch.linspace(0, 2 * np.pi, side, dtype=torch.float64)
    wide = torch.sin(x)[:, None] * torch.sin(x)
    fine = torch.randn((side, side), generator=torch.Generator().manual_seed(0)).double()

    def kept(pattern):
        pattern = pattern / pattern.norm()
        grey = torch.full((1, 3, side, side), 0.5, dtype=torch.float64, requires_grad=True)
        asked = jittered(lambda i: (i * pattern).sum((1, 2, 3)), Jitter(32))
        (slope,) = torch.autograd.grad(asked(grey).sum(), grey)
        return float((slope * pattern).sum() / 3)

    assert kept(fine) < 0.2 and kept(wide) > 0.8


def test_an_ascent_climbs_what_copies_show():
    side = 16
    there = torch.zeros(side, side)
    there[4:12, 4:12] = 1

    def objective(images):
        return (images * there).sum((1, 2, 3)) - (images * (1 - there)).sum((1, 2, 3))

    jitter = Jitter(4, shift=0.125, zoom=0, noise=0)
    options = {"size": side, "steps": 40, "rate": 0.05, "device": "cpu"}
    sharp = np.asarray(ascend(objective, [0], **options)[0]).astype(float)
    soft = np.asarray(ascend(jittered(objective, jitter), [0], **options)[0]).astype(float)
    # What lies just inside is outside of most copies.
    assert sharp[4, 4].mean() > 250 and soft[4, 4].mean() < 5 and soft[7:9, 7:9].mean() > 250


def test_what_makes_no_sense_is_refused():
    for wrong in ({"copies": 0}, {"copies": 2.5}, {"shift": 0.6}, {"zoom": -0.1},
                  {"noise": float("nan")}):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Jitter(**wrong)
    with pytest.raises(ConfigError, match="no 'zom'.*zoom"):
        Jitter.of({"zom": 0.1})
    assert Jitter.of({"copies": 2}) == Jitter(2) and Jitter.of(None) is None
    assert Guidance(jitter=Jitter(2)).jitter == Jitter(2)
