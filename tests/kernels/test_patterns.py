"""Effective attention matrices, and their drawing."""

from __future__ import annotations

import pytest
import torch

from brainalign_kernels import ShapeError, UnsupportedError, linear_attention, softmax_attention
from brainalign_kernels.neighborhood import neighborhood_attention, neighborhood_mask
from brainalign_kernels.patterns import draw_attention, effective_attention


def qkv(h=2, g=2, n=6, s=9, d=4, e=3, dtype=torch.float64):
    make = torch.Generator().manual_seed(0)
    shapes = (2, h, n, d), (2, g, s, d), (2, g, s, e)
    return [torch.randn(x, generator=make, dtype=torch.float64).to(dtype) for x in shapes]


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_softmax_weights_come_back(channels):
    q, k, v = qkv()
    expected = (0.3 * q @ k.transpose(-1, -2)).softmax(-1)
    got = effective_attention(lambda x: softmax_attention(q, k, x, scale=0.3), v, channels=channels)
    torch.testing.assert_close(got, expected)


def test_grouped_queries_and_half_precision():
    q, k, v = qkv(h=4, g=2, dtype=torch.bfloat16)
    got = effective_attention(lambda x: softmax_attention(q, k, x), v)
    keys = k.double().repeat_interleave(2, dim=1)
    expected = (0.5 * q.double() @ keys.transpose(-1, -2)).softmax(-1)
    assert got.shape == (2, 4, 6, 9)
    assert float((got.double() - expected).abs().max()) < 0.01


def test_linear_attention_and_its_sign():
    q, k, v = qkv(n=9)
    got = effective_attention(lambda x: linear_attention(q, k, x, is_causal=True), v)
    torch.testing.assert_close(got, (q @ k.transpose(-1, -2)).tril())


def test_equal_logits_show_the_window():
    options = {"shape": (4, 5), "kernel_size": 3, "dilation": 1}
    zeros = torch.zeros(1, 1, 20, 2)
    got = effective_attention(
        lambda x: neighborhood_attention(zeros, zeros, x, **options), torch.randn(1, 1, 20, 2)
    )[0, 0]
    torch.testing.assert_close(got, neighborhood_mask((4, 5), kernel_size=3).float() / 9)


@pytest.mark.parametrize(
    "attend",
    [
        lambda v: v.relu(),
        lambda v: v + 1,
        lambda v: v.flip(-1),
        lambda v: v * v.norm(),
    ],
)
def test_what_is_not_linear_is_refused(attend):
    with pytest.raises(UnsupportedError, match="not linear in v"):
        effective_attention(attend, qkv()[2])


def test_it_is_differentiable():
    q, k, v = qkv()
    q.requires_grad_()
    matrix = effective_attention(lambda x: softmax_attention(q, k, x), v)
    grad = torch.autograd.grad(matrix[..., 0].sum(), q)[0]
    weights = (0.5 * q @ k.transpose(-1, -2)).softmax(-1)
    torch.testing.assert_close(grad, torch.autograd.grad(weights[..., 0].sum(), q)[0])


def test_drawing():
    pytest.importorskip("matplotlib")
    matrix = torch.zeros(21, 21)
    matrix[8, 1 + 2 * 5 + 3] = 1.0
    figure = draw_attention(matrix, shape=(4, 5), queries=[0, 8], title="a window")
    *axes, bar = figure.get_axes()
    assert [a.get_title() for a in axes] == ["a window", "query 0", "query 8"]
    assert bar.get_ylabel() == "weight" and bar.get_ylim() == (0, 1)
    assert axes[0].images[0].get_array().shape == (21, 21)
    drawn = axes[2].images[0].get_array()
    assert drawn.shape == (4, 5) and drawn[2, 3] == 1 and drawn.sum() == 1
    assert [tuple(x[0] for x in a.get_lines()[0].get_data()) for a in axes[2:]] == [(2, 1)]
    assert not axes[1].get_lines()
    assert len(draw_attention(matrix).get_axes()) == 2
    assert draw_attention(matrix, top=0.2).get_axes()[0].images[0].get_clim() == (0, 0.2)
    figure = draw_attention(-matrix, shape=(4, 5))
    assert figure.get_axes()[0].images[0].get_clim() == (-1, 1)
    with pytest.raises(ShapeError, match="not on a grid"):
        draw_attention(matrix, shape=(5, 5))
    with pytest.raises(ShapeError, match="there are 21"):
        draw_attention(matrix, shape=(4, 5), queries=[21])
