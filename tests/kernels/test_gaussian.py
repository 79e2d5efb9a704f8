"""Gaussian adaptive attention: merged Gaussians against the product, and its corner cases."""

from __future__ import annotations

import pytest
import torch

from brainalign_kernels import (
    GaussianAdaptiveAttention,
    GaussianAdaptiveBlock,
    ShapeError,
    UnsupportedError,
    count_calls,
    gaussian_adaptive_attention,
)
from brainalign_kernels.gaussian.attention import gaussian_weights

PATHS = ("reference", "compiled")


def inputs(shape, heads, gaussians, seed=0, scale=1.0):
    make = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(shape, generator=make, dtype=torch.float64)
    offsets = torch.randn((heads, gaussians), generator=make, dtype=torch.float64)
    c = torch.randn((heads, gaussians), generator=make, dtype=torch.float64).exp()
    c[0, 0] = -c[0, 0]
    return [t.requires_grad_() for t in (x, offsets, c)]


@pytest.mark.parametrize("padding", [None, 0.0])
@pytest.mark.parametrize(
    ("shape", "axis", "heads", "gaussians"),
    [
        ((2, 11, 6), 1, 1, 3),
        ((2, 13, 5), 1, 4, 2),
        ((12, 7), 0, 4, 1),
        ((2, 3, 4, 9), -1, 3, 5),
        ((3, 5), 1, 5, 2),
        ((3, 3), 1, 5, 2),
        ((3, 9), 1, 5, 2),
        ((7,), 0, 2, 2),
    ],
)
def test_paths_agree(shape, axis, heads, gaussians, padding):
    x, offsets, c = inputs(shape, heads, gaussians)
    if padding is not None:
        with torch.no_grad():
            x[torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.2] = padding
    made = [
        gaussian_weights(x, offsets, c, axis=axis, padding_value=padding, impl=impl)
        for impl in PATHS
    ]
    for got, expected in zip(made[1], made[0], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    cotangent = torch.randn(shape, dtype=torch.float64)
    expected, got = (torch.autograd.grad((m[0] * cotangent).sum(), (x, offsets, c)) for m in made)
    for a, b in zip(got, expected, strict=True):
        assert bool(torch.isfinite(b).all())
        torch.testing.assert_close(a, b, atol=1e-9 * float(b.abs().max()) + 1e-15, rtol=0)
    if padding is not None:
        held = x == padding
        assert bool(held.any()) and torch.equal(made[1][0][held], x[held])


@pytest.mark.parametrize("impl", PATHS)
def test_weights_of_every_head_sum_to_one(impl):
    # Wide Gaussians: the sums before the division are far above eps.
    x, offsets, c = inputs((4, 11, 3), 3, 2)
    offsets, c = 0.1 * offsets, c.abs() + 1.0
    out, weights = gaussian_weights(x, offsets, c, axis=1, impl=impl)
    for part in (weights[:, :3], weights[:, 3:6], weights[:, 6:]):
        torch.testing.assert_close(part.sum(1), torch.ones(4, 3, dtype=torch.float64))
    torch.testing.assert_close(out, x * weights)


@pytest.mark.parametrize("impl", PATHS)
def test_one_gaussian_is_a_softmax_of_squares(impl):
    x, _, _ = inputs((2, 9), 1, 1)
    c = torch.tensor([0.8], dtype=torch.float64)
    offset = torch.tensor([0.3], dtype=torch.float64)
    z = (x - x.mean(1, keepdim=True) - 0.3) / (x.var(1, keepdim=True) + 1e-8).sqrt()
    expected = x * (-z.square() / (2 * 0.64)).softmax(1)
    torch.testing.assert_close(gaussian_adaptive_attention(x, offset, c, impl=impl), expected)


@pytest.mark.parametrize("impl", PATHS)
def test_sum_below_eps_is_not_normalised(impl):
    # Both values lie 100 widths from the centres: the sum of the weights is below eps.
    x = torch.tensor([[-1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    c = torch.tensor([0.12], dtype=torch.float64, requires_grad=True)
    offset = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    z = x / (x.var(1, keepdim=True) + 1e-8).sqrt()
    density = (-z.square() / (2 * c**2)).exp() / (2 * torch.pi * c**2).sqrt()
    assert float(density.sum().detach()) < 1e-6
    out = gaussian_adaptive_attention(x, offset, c, eps=1e-6, impl=impl)
    z = x / (x.var(1, keepdim=True) + 1e-6).sqrt()
    density = (-z.square() / (2 * c**2)).exp() / (2 * torch.pi * c**2).sqrt()
    torch.testing.assert_close(out, x * density / 1e-6)
    assert torch.autograd.gradcheck(
        lambda *a: gaussian_adaptive_attention(*a, eps=1e-6, impl=impl), (x, offset, c)
    )


@pytest.mark.parametrize("impl", PATHS)
def test_axis_of_size_one_and_constant_rows(impl):
    for shape in ((3, 1, 4), (3, 5, 4)):
        x = torch.full(shape, 2.5, dtype=torch.float64, requires_grad=True)
        for offset in (0.0, 0.7):
            offsets = torch.full((1, 2), offset, dtype=torch.float64, requires_grad=True)
            c = torch.tensor([[0.5, 1.5]], dtype=torch.float64, requires_grad=True)
            out = gaussian_adaptive_attention(x, offsets, c, impl=impl)
            grads = torch.autograd.grad(out.sum(), (x, offsets, c))
            assert all(bool(torch.isfinite(t).all()) for t in (out, *grads))
            if offset == 0.0:
                torch.testing.assert_close(out, x / shape[1])


def test_empty():
    _, offsets, c = inputs((1, 1), 2, 3)
    for impl in PATHS:
        for shape in ((0, 4, 3), (2, 0, 3), (2, 4, 0)):
            x = torch.zeros(shape, dtype=torch.float64)
            assert gaussian_adaptive_attention(x, offsets, c, impl=impl).shape == shape


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("padding", [None, 0.0])
def test_gradcheck(impl, padding):
    x, offsets, c = inputs((2, 7, 2), 2, 2)
    assert torch.autograd.gradcheck(
        lambda *a: gaussian_adaptive_attention(*a, padding_value=padding, impl=impl),
        (x, offsets, c),
    )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision(dtype, bound):
    half = [t.detach().to(dtype) for t in inputs((4, 33, 8), 3, 3)]
    exact = gaussian_adaptive_attention(*[t.double() for t in half], impl="reference")
    for impl in PATHS:
        out = gaussian_adaptive_attention(*half, impl=impl)
        assert out.dtype == dtype
        assert float((out.double() - exact).abs().max()) < bound


def test_module_and_block():
    first = GaussianAdaptiveAttention(
        3, num_heads=2, axis=1, generator=torch.Generator().manual_seed(0)
    )
    again = GaussianAdaptiveAttention(
        3, num_heads=2, axis=1, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(first.c, again.c) and (first.c > 0).all()
    assert (first.mean_offsets == 0).all()
    second = GaussianAdaptiveAttention(2, num_heads=3, axis=2)
    x = torch.randn(2, 6, 7)
    hidden = gaussian_adaptive_attention(x, first.mean_offsets, first.c, axis=1) + x
    expected = gaussian_adaptive_attention(hidden, second.mean_offsets, second.c, axis=2) + hidden
    torch.testing.assert_close(GaussianAdaptiveBlock([first, second])(x), expected)


def test_auto_takes_the_fast_path():
    x, offsets, c = inputs((2, 5), 1, 1)
    with count_calls() as calls:
        gaussian_adaptive_attention(x, offsets, c)
    assert dict(calls) == {("gaussian_adaptive_attention", "compiled"): 1}


def test_refuses():
    x, offsets, c = inputs((2, 5), 2, 3)
    with pytest.raises(ShapeError, match="axis is 2"):
        gaussian_adaptive_attention(x, offsets, c, axis=2)
    with pytest.raises(ShapeError, match="one shape"):
        gaussian_adaptive_attention(x, offsets, c[:, :2])
    with pytest.raises(ShapeError, match="floating-point"):
        gaussian_adaptive_attention(x.long(), offsets, c)
    with pytest.raises(ShapeError, match="At least one Gaussian"):
        GaussianAdaptiveAttention(0)
    with pytest.raises(UnsupportedError, match="no implementation 'triton'"):
        gaussian_adaptive_attention(x, offsets, c, impl="triton")


def test_compile_and_export():
    module = GaussianAdaptiveAttention(2, num_heads=4, axis=1, padding_value=0.0)
    x = torch.randn(2, 13, 5)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x))
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))
