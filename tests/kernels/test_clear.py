"""CLEAR: its paths against each other, its identities and its module."""

from __future__ import annotations

import math

import pytest
import torch

from brainalign_kernels import (
    ClearAttention,
    ShapeError,
    clear_attention,
    clear_mask,
    clear_scale,
    count_calls,
    softmax_attention,
)
from brainalign_kernels.clear import flex, tiles

PATHS = ("reference", "compiled")


def normal(*shape, seed=0, dtype=torch.float64):
    make = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=make, dtype=torch.float64).to(dtype)


def inputs(b, h, g, n, d, e, dtype=torch.float64):
    sizes = (b, h, n, d), (b, g, n, d), (b, g, n, e)
    return [normal(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(sizes)]


@pytest.mark.parametrize(
    ("heads", "groups", "shape", "n_text", "radius", "n_pooled"),
    [
        (2, 2, (20, 17), 5, 2, 0),
        (2, 1, (17, 24), 0, 3, 6),
        (2, 2, (9, 40), 3, 2.5, 4),
        (4, 2, (5, 7), 2, 3, 3),
        (1, 1, (1, 30), 1, 4, 0),
        (1, 1, (1, 1), 0, 1, 0),
    ],
)
def test_paths_agree(heads, groups, shape, n_text, radius, n_pooled):
    x = inputs(2, heads, groups, n_text + shape[0] * shape[1], 6, 5)
    pooled = (
        [normal(2, groups, n_pooled, c, seed=9).requires_grad_() for c in (6, 5)]
        if n_pooled
        else []
    )
    options = {"shape": shape, "n_text": n_text, "radius": radius, "scale": 0.7}
    options["pooled"] = tuple(pooled) or None
    made = {i: clear_attention(*x, **options, impl=i) for i in PATHS}
    cotangent = normal(*made["reference"].shape, seed=7)
    leaves = [*x, *pooled]
    grads = {i: torch.autograd.grad((o * cotangent).sum(), leaves) for i, o in made.items()}
    torch.testing.assert_close(made["compiled"], made["reference"], atol=1e-12, rtol=0)
    for got, expected in zip(grads["compiled"], grads["reference"], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_small_discs_go_by_tiles_and_large_ones_do_not():
    assert tiles.windows_pay((20, 17), 2) and tiles.windows_pay((64, 64), 16)
    assert not tiles.windows_pay((5, 7), 3) and not tiles.windows_pay((64, 64), 32)


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("n_text", [0, 3])
def test_disc_larger_than_the_image_is_softmax(impl, n_text):
    x = inputs(2, 2, 2, n_text + 30, 4, 4)
    got = clear_attention(*x, shape=(5, 6), n_text=n_text, radius=9, impl=impl)
    torch.testing.assert_close(got, softmax_attention(*x), atol=1e-12, rtol=0)


def test_disc_is_strict_and_text_sees_no_pooled_tokens():
    mask = clear_mask((3, 3), 2, 1, n_pooled=1)
    assert torch.equal(mask[2:, 2:11], torch.eye(9, dtype=torch.bool))
    assert mask[:2, :11].all() and not mask[:2, 11].any()
    assert mask[2:, :2].all() and mask[2:, 11].all()
    centre = clear_mask((3, 3), 0, math.nextafter(1, 2))[4].view(3, 3)
    assert centre.int().tolist() == [[0, 1, 0], [1, 1, 1], [0, 1, 0]]


def test_flex_attention_sees_the_same_and_gives_the_same():
    flex_attention = pytest.importorskip("torch.nn.attention.flex_attention")
    shape, n_text, radius, n_pooled = (6, 7), 3, 2.5, 4
    tokens = n_text + 42
    seen = flex.visible(shape, n_text, radius)
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens + n_pooled)[None]
    expected = clear_mask(shape, n_text, radius, n_pooled=n_pooled)
    assert torch.equal(seen(None, None, i, j), expected)
    q, k, v = (x.detach() for x in inputs(1, 2, 2, tokens, 16, 16, torch.float32))
    mask = flex._block_mask(shape, n_text, radius, 0, "cpu")
    got = flex_attention.flex_attention(q, k, v, block_mask=mask)
    expected = clear_attention(q, k, v, shape=shape, n_text=n_text, radius=radius)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_scale_rule():
    assert clear_scale(4608, 4) == pytest.approx(0.5)
    assert clear_scale(4608**2, 1) == pytest.approx(2**0.5)
    assert clear_scale(461, 3, pooled=True) == pytest.approx(clear_scale(4610, 3))


def test_gradcheck():
    x = inputs(1, 2, 1, 7, 2, 2)
    pooled = [normal(1, 1, 2, 2, seed=s).requires_grad_() for s in (4, 5)]

    def run(q, k, v, pk, pv):
        return clear_attention(
            q, k, v, shape=(2, 3), n_text=1, radius=1.5, pooled=(pk, pv), impl="reference"
        )

    assert torch.autograd.gradcheck(run, (*x, *pooled))


@pytest.mark.parametrize(("shape", "n_text"), [((0, 3), 0), ((0, 0), 4), ((1, 1), 0)])
@pytest.mark.parametrize("impl", PATHS)
def test_no_image_and_one_token(shape, n_text, impl):
    x = inputs(2, 2, 2, n_text + shape[0] * shape[1], 3, 5)
    out = clear_attention(*x, shape=shape, n_text=n_text, radius=2, impl=impl)
    torch.testing.assert_close(out, softmax_attention(*x), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("impl", PATHS)
def test_half_precision(dtype, bound, impl):
    half = [x.detach() for x in inputs(1, 2, 2, 404, 16, 16, dtype)]
    options = {"shape": (20, 20), "n_text": 4, "radius": 3}
    expected = clear_attention(*[x.double() for x in half], **options, impl="reference")
    out = clear_attention(*half, **options, impl=impl)
    assert out.dtype == dtype
    assert float((out.double() - expected).abs().max()) < bound


def test_auto_takes_the_fast_path():
    with count_calls() as calls:
        clear_attention(*inputs(1, 1, 1, 6, 3, 3), shape=(2, 3), radius=2)
    assert dict(calls) == {("clear_attention", "compiled"): 1}


def test_errors():
    x = inputs(1, 2, 2, 6, 3, 3)
    with pytest.raises(ShapeError, match="are 7 tokens; got 6"):
        clear_attention(*x, shape=(2, 3), n_text=1, radius=2)
    with pytest.raises(ShapeError, match="radius must be positive"):
        clear_attention(*x, shape=(2, 3), radius=0)
    with pytest.raises(ShapeError, match="cannot be negative"):
        clear_mask((2, -3), 0, 2)
    with pytest.raises(ShapeError, match="Pooled keys and values"):
        clear_attention(*x, shape=(2, 3), radius=2, pooled=(x[1][:, :1], x[2][:, :1]))
    with pytest.raises(ShapeError, match="only with it"):
        ClearAttention(8, 2, 2)(torch.zeros(1, 6, 8), (2, 3), torch.zeros(1, 2, 8))
    with pytest.raises(ShapeError, match="multiple of num_heads"):
        ClearAttention(9, 2, 2)
    with pytest.raises(ShapeError, match="n_tokens >= 2"):
        clear_scale(1, 4)


def test_pooling_starts_as_the_mean_and_cuts_what_is_over():
    block = ClearAttention(4, 1, 2, down_factor=2).double()
    x = normal(1, 1, 15, 4)
    cells = x.view(1, 1, 3, 5, 4)[:, :, :2, :4]
    expected = torch.stack([cells[:, :, :, :2].mean((2, 3)), cells[:, :, :, 2:].mean((2, 3))], 2)
    torch.testing.assert_close(block.pool(x, (3, 5)), expected)


@pytest.mark.parametrize("encoder_stream", [False, True])
def test_module_reaches_every_parameter(encoder_stream):
    block = ClearAttention(
        8, 2, 2, down_factor=4, encoder_stream=encoder_stream, proportional_attention=True
    ).double()
    image, text = normal(2, 272, 8), normal(2, 3, 8, seed=1)
    made = {}
    for impl in PATHS:
        block.impl = impl
        block.zero_grad()
        if encoder_stream:
            outs = block(image, (16, 17), text)
            assert [o.shape for o in outs] == [image.shape, text.shape]
        else:
            outs = (block(torch.cat([text, image], dim=1), (16, 17)),)
        sum((o * normal(*o.shape, seed=3)).sum() for o in outs).backward()
        made[impl] = [*outs, *(p.grad for p in block.parameters())]
    for got, expected in zip(made["compiled"], made["reference"], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-11, rtol=0)
    assert all((p.grad != 0).any() for p in block.parameters())


def test_compile_and_export():
    block = ClearAttention(4, 1, 2, down_factor=4)
    x = normal(1, 259, 4, dtype=torch.float32)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, (16, 16)), block(x, (16, 16)))
    exported = torch.export.export(block, (x, (16, 16))).module()
    torch.testing.assert_close(exported(x, (16, 16)), block(x, (16, 16)))
