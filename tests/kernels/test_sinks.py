"""Attention sinks: measures, redistribution, and the learned sink logit."""

from __future__ import annotations

import pytest
import torch

from brainalign_kernels import (
    ShapeError,
    SinkAttention,
    UnsupportedError,
    count_calls,
    image_centric_rows,
    redistribute_attention,
    sink_attention,
    sink_metric,
    sink_share,
    sink_tokens,
    softmax_attention,
    visual_attention_redistribution,
)

PATHS = ("reference", "compiled")


def qkv(b, h, g, n, s, d, e, dtype=torch.float64, seed=0, scale=1.0):
    make = torch.Generator().manual_seed(seed)
    shapes = (b, h, n, d), (b, g, s, d), (b, g, s, e)
    return [
        (scale * torch.randn(x, generator=make, dtype=torch.float64)).to(dtype).requires_grad_()
        for x in shapes
    ]


def masks(kind, b, n, s):
    keep = torch.rand((b, 1, n, s), generator=torch.Generator().manual_seed(1)) > 0.4
    keep[:, :, 0] = False
    mask = {"bool": keep, "bias": torch.where(keep, 0.3, -torch.inf).double()}.get(kind)
    return keep if kind == "causal and bool" else mask


# --- measures ---------------------------------------------------------------------------------


def test_sink_metric_by_hand():
    attention = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.6, 0.1, 0.3]])
    expected = torch.tensor([2.1 / 3, 0.6 / 2, 0.3])
    torch.testing.assert_close(sink_metric(attention), expected)
    # One layer of two heads, another of one head; the first token is a sink in two of three.
    other = torch.eye(3)
    share = sink_share([torch.stack([attention, other]), attention[None]], threshold=0.35)
    torch.testing.assert_close(share, torch.tensor([2 / 3, 1 / 3, 1 / 3]))
    stacked = sink_share(torch.stack([attention, other, attention]), threshold=0.35)
    torch.testing.assert_close(stacked, share)


def test_uniform_causal_attention_has_a_harmonic_metric():
    tokens = 6
    uniform = torch.ones(tokens, tokens, dtype=torch.float64).tril()
    uniform = uniform / uniform.sum(dim=1, keepdim=True)
    harmonic = [sum(1 / (i + 1) for i in range(k, tokens)) / (tokens - k) for k in range(tokens)]
    torch.testing.assert_close(sink_metric(uniform), torch.tensor(harmonic, dtype=torch.float64))


def test_sink_tokens_by_hand():
    hidden = torch.zeros(1, 3, 4)
    hidden[0, 0] = torch.tensor([8.0, 0.0, 0.0, 0.0])
    hidden[0, 1] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    # The first: 8 over a root mean square of 4; the third is zero and must not divide by zero.
    assert sink_tokens(hidden, [0], tau=1.9).tolist() == [[True, False, False]]
    assert sink_tokens(hidden, torch.tensor([0, 1]), tau=2.1).tolist() == [[False] * 3]
    assert sink_tokens(hidden, [1, 3], tau=0.9).tolist() == [[False, True, False]]
    assert sink_tokens(hidden.bfloat16(), [0], tau=1.9).tolist() == [[True, False, False]]


def test_measures_refuse():
    with pytest.raises(ShapeError, match="same tokens"):
        sink_metric(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="same number of tokens"):
        sink_share([torch.eye(3), torch.eye(4)])
    with pytest.raises(ShapeError, match="between 0 and 3"):
        sink_tokens(torch.zeros(1, 2, 4), [4])
    with pytest.raises(ShapeError, match="at least one"):
        sink_tokens(torch.zeros(1, 2, 4), [])


# --- redistribution ---------------------------------------------------------------------------


def scene(b=2, h=3, q=14, t=14, seed=0):
    make = torch.Generator().manual_seed(seed)
    attention = torch.randn((b, h, q, t), generator=make, dtype=torch.float64).mul(1.5).softmax(-1)
    image = torch.zeros(t, dtype=torch.bool)
    image[3:9] = True
    sinks = torch.zeros((b, t), dtype=torch.bool)
    sinks[:, [0, 5]] = True
    return attention, sinks, image


def test_redistribution_keeps_row_sums_and_moves_the_freed_mass():
    attention, sinks, image = scene()
    changed = redistribute_attention(attention, sinks, image, p=0.6, rho=0.5, image_mass=0.2)
    torch.testing.assert_close(changed.sum(-1), attention.sum(-1), rtol=0, atol=1e-14)
    rows = (changed != attention).any(-1)
    centric = image_centric_rows(attention, sinks, image, rho=0.5, image_mass=0.2)
    late = torch.arange(14) >= 9
    assert 0 < int(rows.sum()) < rows[..., 9:].numel()
    assert torch.equal(rows, centric & late)
    before, after = attention[rows], changed[rows]
    torch.testing.assert_close(after[:, [0, 5]], 0.6 * before[:, [0, 5]])
    rest = [3, 4, 6, 7, 8]
    freed = 0.4 * before[:, [0, 5]].sum(-1, keepdim=True)
    share = before[:, rest] / before[:, rest].sum(-1, keepdim=True)
    torch.testing.assert_close(after[:, rest], before[:, rest] + freed * share)
    others = [1, 2, 9, 10, 11, 12, 13]
    assert torch.equal(after[:, others], before[:, others])


def test_redistribution_leaves_alone():
    attention, sinks, image = scene()
    options = {"rho": 0.5, "image_mass": 0.2}
    assert torch.equal(redistribute_attention(attention, sinks, image, p=1.0, **options), attention)
    text_sinks = sinks & ~image
    assert torch.equal(redistribute_attention(attention, text_sinks, image, **options), attention)
    none = torch.zeros(14, dtype=torch.bool)
    assert torch.equal(redistribute_attention(attention, sinks, none, **options), attention)
    # Every image token a sink: no place to move to.
    full = redistribute_attention(attention, image, image, rho=2.0, image_mass=0.0)
    assert torch.equal(full, attention)
    only = torch.zeros(14, dtype=torch.bool)
    only[2] = True
    moved = redistribute_attention(attention, sinks, image, queries=only, rho=1.0, image_mass=0.0)
    assert (moved != attention).any(-1).nonzero()[:, 2].unique().tolist() == [2]


def test_one_sample_without_image_sinks_does_not_follow_the_other():
    attention, sinks, image = scene()
    sinks[1, 5] = False
    changed = redistribute_attention(attention, sinks, image, rho=1.0, image_mass=0.0)
    assert torch.equal(changed[1], attention[1]) and not torch.equal(changed[0], attention[0])


def test_decoding_query_is_the_last_token():
    attention, sinks, image = scene(q=1)
    one = redistribute_attention(attention, sinks, image, rho=1.0, image_mass=0.0)
    assert (one != attention).any(-1).all()
    image[13] = True
    assert torch.equal(
        redistribute_attention(attention, sinks, image, rho=1.0, image_mass=0.0), attention
    )


def test_redistribution_gradcheck():
    attention, sinks, image = scene(b=1, h=2)
    rows = image_centric_rows(attention, sinks, image)
    assert bool(rows.any())
    raw = attention.log().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: redistribute_attention(x.softmax(-1), sinks, image), (raw,)
    )
    # An attention of zero on the whole image must not give NaN.
    zero = (attention * ~image).requires_grad_()
    redistribute_attention(zero, sinks, image, image_mass=0.0, rho=1.0).sum().backward()
    assert bool(torch.isfinite(zero.grad).all())


@pytest.mark.parametrize("kind", ["none", "bool", "bias", "causal", "causal and bool"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_redistribution_paths_agree(kind, heads):
    q, k, v = qkv(2, *heads, 14, 14, 5, 3)
    _, sinks, image = scene()
    options = {"mask": masks(kind, 2, 14, 14), "is_causal": "causal" in kind, "image_mass": 0.1}
    queries = torch.arange(14) >= 2
    made = {
        impl: visual_attention_redistribution(
            q, k, v, sinks, image, queries=queries, impl=impl, **options
        )
        for impl in PATHS
    }
    plain = softmax_attention(q, k, v, mask=options["mask"], is_causal=options["is_causal"])
    assert (made["reference"] - plain).abs().max() > 1e-3
    torch.testing.assert_close(made["compiled"], made["reference"], atol=1e-12, rtol=0)
    cotangent = torch.randn_like(plain)
    expected, got = (torch.autograd.grad((made[i] * cotangent).sum(), (q, k, v)) for i in PATHS)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)
    if options["mask"] is not None:
        assert (made["compiled"][:, :, 0] == 0).all()


def test_redistribution_in_half_precision():
    q, k, v = (x.detach().bfloat16() for x in qkv(1, 4, 4, 14, 14, 8, 8))
    _, sinks, image = scene(b=1)
    exact = visual_attention_redistribution(
        q.double(), k.double(), v.double(), sinks, image, impl="reference"
    )
    for impl in PATHS:
        out = visual_attention_redistribution(q, k, v, sinks, image, impl=impl)
        assert out.dtype == torch.bfloat16
        assert float((out.double() - exact).abs().max()) < 2e-2


@pytest.mark.parametrize(("n", "s"), [(0, 14), (0, 0), (1, 1)])
def test_redistribution_of_little(n, s):
    q, k, v = qkv(2, 2, 2, n, s, 3, 5)
    marks = torch.ones(s, dtype=torch.bool)
    for impl in PATHS:
        out = visual_attention_redistribution(q, k, v, marks, marks, impl=impl)
        assert out.shape == (2, 2, n, 5) and bool(torch.isfinite(out).all())


def test_redistribution_refuses():
    attention, sinks, image = scene()
    with pytest.raises(ShapeError, match="sinks must be bool"):
        redistribute_attention(attention, sinks.double(), image)
    with pytest.raises(ShapeError, match="image must be bool"):
        redistribute_attention(attention, sinks, image[:-1])
    with pytest.raises(ShapeError, match="expected 0-1"):
        redistribute_attention(attention, sinks, image, p=1.5)
    with pytest.raises(ShapeError, match="queries must be bool"):
        redistribute_attention(attention, sinks, image, queries=image[:3])
    with pytest.raises(ShapeError, match="cannot be the last of"):
        redistribute_attention(attention[..., :1], sinks[..., :1], image[:1])
    with pytest.raises(ShapeError, match=r"\(B, H, Q, T\)"):
        image_centric_rows(attention[0], sinks, image)


# --- the sink logit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(2, 4, 4, 7, 7, 5, 5), (1, 4, 2, 3, 11, 8, 6), (1, 2, 1, 1, 1, 4, 4)]
)
@pytest.mark.parametrize("kind", ["none", "bool", "bias", "causal", "causal and bool"])
def test_sink_paths_agree(shape, kind):
    q, k, v = qkv(*shape)
    b, h, _, n, s = shape[:5]
    make = torch.Generator().manual_seed(2)
    options = {"mask": masks(kind, b, n, s), "is_causal": "causal" in kind, "scale": 0.7}
    for size in ((h,), (b, h, n), (1, 1, n)):
        sink = torch.randn(size, generator=make, dtype=torch.float64).requires_grad_()
        made = [sink_attention(q, k, v, sink, impl=impl, **options) for impl in PATHS]
        cotangent = torch.randn(made[0].shape, generator=make, dtype=torch.float64)
        torch.testing.assert_close(made[1], made[0], atol=1e-12, rtol=0)
        expected, got = (torch.autograd.grad((o * cotangent).sum(), (q, k, v, sink)) for o in made)
        for a, c in zip(got, expected, strict=True):
            torch.testing.assert_close(a, c, atol=1e-12, rtol=0)
        if options["mask"] is not None:
            assert (made[1][:, :, 0] == 0).all()


@pytest.mark.parametrize("impl", PATHS)
def test_sink_of_minus_infinity_is_softmax(impl):
    q, k, v = qkv(2, 4, 2, 6, 6, 5, 5)
    sink = torch.full((4,), -torch.inf, dtype=torch.float64, requires_grad=True)
    for kind in ("none", "bool", "causal"):
        options = {"mask": masks(kind, 2, 6, 6), "is_causal": kind == "causal"}
        plain = softmax_attention(q, k, v, **options)
        out = sink_attention(q, k, v, sink, impl=impl, **options)
        torch.testing.assert_close(out, plain, atol=1e-13, rtol=0)
        grads = torch.autograd.grad(out.sum(), (q, k, v, sink))
        plain_grads = torch.autograd.grad(plain.sum(), (q, k, v))
        for a, b in zip(grads, plain_grads, strict=False):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
        assert (grads[3] == 0).all()


@pytest.mark.parametrize("impl", PATHS)
def test_sink_scales_by_the_sigmoid_of_its_distance(impl):
    q, k, v = qkv(2, 3, 3, 6, 9, 4, 5)
    sink = torch.tensor([-2.0, 0.5, 40.0], dtype=torch.float64)
    lse = (0.5 * q @ k.transpose(-1, -2)).logsumexp(-1)
    plain = softmax_attention(q, k, v, scale=0.5)
    expected = plain * (lse - sink[:, None]).sigmoid()[..., None]
    out = sink_attention(q, k, v, sink, scale=0.5, impl=impl)
    torch.testing.assert_close(out, expected, atol=1e-13, rtol=0)


def test_sink_gradcheck():
    q, k, v = qkv(1, 2, 1, 3, 4, 3, 2)
    sink = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    keep = masks("bool", 1, 3, 4)
    for impl in PATHS:
        assert torch.autograd.gradcheck(
            lambda *x, impl=impl: sink_attention(*x, mask=keep, impl=impl), (q, k, v, sink)
        )


@pytest.mark.parametrize(("n", "s"), [(0, 3), (3, 0), (0, 0)])
def test_sink_empty(n, s):
    q, k, v = qkv(2, 2, 2, n, s, 3, 5)
    for impl in PATHS:
        out = sink_attention(q, k, v, torch.zeros(2), impl=impl)
        assert out.shape == (2, 2, n, 5) and (out == 0).all()


@pytest.mark.parametrize("kind", ["none", "causal", "bool"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_sink_half_precision(dtype, bound, kind):
    half = [x.detach().to(dtype) for x in qkv(2, 4, 4, 33, 33, 16, 16)]
    sink = torch.tensor([3.7, 0.123, -torch.inf, 11.3])
    options = {"mask": masks(kind, 2, 33, 33), "is_causal": kind == "causal"}
    exact = sink_attention(*[x.double() for x in half], sink.double(), impl="reference", **options)
    for impl in PATHS:
        out = sink_attention(*half, sink, impl=impl, **options)
        assert out.dtype == dtype
        assert float((out.double() - exact).abs().max()) < bound


def test_large_logits_are_finite():
    q, k, v = qkv(1, 2, 2, 5, 5, 8, 8, dtype=torch.float32, scale=30.0)
    sink = torch.tensor([1e4, -1e4], requires_grad=True)
    for impl in PATHS:
        out = sink_attention(q, k, v, sink, impl=impl)
        assert (out[:, 0] == 0).all() and bool(torch.isfinite(out).all())
        grads = torch.autograd.grad(out.sum(), (q, k, v, sink))
        assert all(bool(torch.isfinite(g).all()) for g in grads)


def test_auto_takes_the_fast_path():
    q, k, v = qkv(1, 2, 2, 14, 14, 3, 3)
    _, sinks, image = scene(b=1)
    with count_calls() as calls:
        sink_attention(q, k, v, torch.zeros(2))
        visual_attention_redistribution(q, k, v, sinks, image)
        sink_attention(q, k, v, torch.zeros(2), impl="reference")
    assert dict(calls) == {
        ("sink_attention", "compiled"): 1,
        ("visual_attention_redistribution", "compiled"): 1,
        ("sink_attention", "reference"): 1,
    }


def test_sink_refuses():
    q, k, v = qkv(1, 4, 2, 4, 6, 3, 3)
    for bad in (torch.zeros(3), torch.zeros(1, 4, 6), torch.zeros(4, dtype=torch.long)):
        with pytest.raises(ShapeError, match="sink must be floating point"):
            sink_attention(q, k, v, bad)
    with pytest.raises(ShapeError, match="mask must have 4 axes"):
        sink_attention(q, k, v, torch.zeros(4), mask=torch.ones(4, 6, dtype=torch.bool))
    with pytest.raises(ShapeError, match="mask must have 4 axes"):
        sink_attention(q, k, v, torch.zeros(4), mask=torch.ones(1, 3, 4, 6, dtype=torch.bool))
    with pytest.raises(UnsupportedError, match="no implementation 'triton'"):
        sink_attention(q, k, v, torch.zeros(4), impl="triton")


def test_module_learns_its_sinks():
    module = SinkAttention(4, initial=-1.0)
    q, k, v = qkv(1, 4, 2, 5, 5, 3, 3, dtype=torch.float32)
    out = module(q, k, v, is_causal=True)
    torch.testing.assert_close(out, sink_attention(q, k, v, -torch.ones(4), is_causal=True))
    out.square().sum().backward()
    # Attending to nothing shrinks the output.
    assert (module.sink.grad < 0).all()


def test_compile_and_export():
    q, k, v = (x.detach() for x in qkv(1, 2, 2, 14, 14, 3, 3))
    _, sinks, image = scene(b=1)

    class Model(torch.nn.Module):
        def forward(self, q, k, v, sinks, image):
            first = sink_attention(q, k, v, torch.ones(2), is_causal=True)
            return first, visual_attention_redistribution(q, k, v, sinks, image)

    args = (q, k, v, sinks, image)
    expected = Model()(*args)
    compiled = torch.compile(Model(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args), expected)
    torch.testing.assert_close(torch.export.export(Model(), args).module()(*args), expected)
