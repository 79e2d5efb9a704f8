"""Preprocessing with a gradient: resized by matrices as torch interpolates, and repeatable."""

import pytest
import torch
from torch.nn.functional import interpolate

from brainalign.features import load_model
from brainalign.features.differentiable import Preprocess


@pytest.fixture(scope="module")
def model():
    return load_model("small-clip", device="cpu")


def cropped(preprocess, images):
    """Resize and crop by torch's own antialiased interpolation."""
    rows, columns = images.shape[-2:]
    side, size = preprocess.side, preprocess.size
    factor = max(side[0] / rows, side[1] / columns)
    shape = side if preprocess.squash else (round(rows * factor), round(columns * factor))
    out = interpolate(images, tuple(shape), mode=preprocess.interpolation, align_corners=False,
                      antialias=True)  # fmt: skip
    out = out.clamp(0, 1) if preprocess.interpolation == "bicubic" else out
    top, left = (round((n - m) / 2) for n, m in zip(shape, size, strict=True))
    return out[..., top : top + size[0], left : left + size[1]]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(160, 160), (97, 150), (40, 40), (31, 64), (64, 200)])
def test_it_resizes_as_torch_interpolates(model, interpolation, shape):
    preprocess = Preprocess(model, interpolation)
    images = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    for side, squash in (([64, 64], False), ([73, 73], False), ([64, 64], True), ([80, 70], True)):
        preprocess.side, preprocess.squash = side, squash
        x, y = images.clone().requires_grad_(), images.clone().requires_grad_()
        ours, theirs = preprocess.resize(x), cropped(preprocess, y)
        assert ours.shape == theirs.shape == (2, 3, *preprocess.size)
        assert (ours - theirs).abs().max() < 1e-6
        along = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
        mine, other = (torch.autograd.grad((o * along).sum(), i)[0]
                       for o, i in ((ours, x), (theirs, y)))  # fmt: skip
        assert (mine - other).abs().max() < 1e-5
        assert mine.abs().max() > 0.1


def test_an_image_of_the_models_size_is_left_as_it_is(model):
    preprocess = Preprocess(model, None)
    images = torch.rand(2, 3, *preprocess.size)
    assert torch.equal(preprocess.resize(images), images)
    assert torch.equal(preprocess(images), preprocess.normalise(images))


def test_a_pass_without_gradients_spoils_no_later_one(model):
    preprocess = Preprocess(model, "bilinear")
    images = torch.rand(1, 3, 111, 113)
    with torch.inference_mode():
        preprocess(images)
    images.requires_grad_()
    (slope,) = torch.autograd.grad(preprocess(images).sum(), images)
    assert slope.abs().max() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_two_backward_passes_on_a_gpu_are_the_same_bit_by_bit(model, interpolation):
    preprocess = Preprocess(model, interpolation).to("cuda")
    drawn = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 512, 512, generator=drawn).cuda().requires_grad_()
    along = torch.randn(4, 3, *preprocess.size, generator=drawn).cuda()
    first, second = (
        torch.autograd.grad((preprocess(images) * along).sum(), images)[0] for _ in range(2)
    )
    assert torch.equal(first, second)
