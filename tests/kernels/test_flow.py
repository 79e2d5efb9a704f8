"""Flow-Attention: paths against each other, what conservation implies, causality, precision."""

from __future__ import annotations

import pytest
import torch

from brainalign_kernels import FlowAttention, ShapeError, count_calls, flow_attention
from brainalign_kernels._causal import causal_product
from brainalign_kernels.flow.reference import flow


def qkv(b, h, g, n, s, d, e, dtype=torch.float64, seed=0):
    make = torch.Generator().manual_seed(seed)
    shapes = (b, h, n, d), (b, g, s, d), (b, g, s, e)
    return [
        torch.randn(x, generator=make, dtype=torch.float64).to(dtype).requires_grad_()
        for x in shapes
    ]


def output_and_gradients(impl, inputs, **options):
    out = flow_attention(*inputs, impl=impl, **options)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return out, *torch.autograd.grad((out * cotangent).sum(), inputs)


@pytest.mark.parametrize(
    ("shape", "causal"),
    [
        ((2, 4, 4, 7, 11, 5, 3), False),
        ((1, 4, 2, 1, 9, 8, 6), False),
        ((2, 2, 1, 13, 1, 4, 4), False),
        ((2, 4, 2, 13, 13, 5, 3), True),
        ((1, 2, 2, 65, 65, 8, 8), True),
        ((1, 3, 3, 1, 1, 4, 2), True),
    ],
)
def test_paths_agree(shape, causal):
    inputs = qkv(*shape)
    options = {"is_causal": causal, "chunk_size": 16}
    expected = output_and_gradients("reference", inputs, **options)
    got = output_and_gradients("compiled", inputs, **options)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("chunk", [1, 3, 8, 29, 100])
def test_chunk_size_changes_nothing(chunk):
    inputs = qkv(2, 2, 2, 29, 29, 6, 4)
    expected = output_and_gradients("reference", inputs, is_causal=True)
    got = output_and_gradients("compiled", inputs, is_causal=True, chunk_size=chunk)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-10)


def test_causal_product_is_the_running_sum():
    q, k, v = (x.detach() for x in qkv(2, 3, 3, 23, 23, 4, 5))
    states = (k[..., :, None] * v[..., None, :]).cumsum(dim=2)
    expected = (q[..., None, :] @ states).squeeze(-2)
    torch.testing.assert_close(causal_product(q, k, v, 7), expected)


def test_the_last_causal_output_is_a_mean_of_the_values_at_equal_tokens():
    # All tokens equal: every flow is conserved, O^ is at most 1 for each source, and the
    # competition is the same for all, so that the causal sums reduce to running means.
    q, k, _ = qkv(1, 2, 2, 1, 1, 4, 4)
    v = torch.randn(1, 2, 12, 4, dtype=torch.float64)
    q, k = q.expand(1, 2, 12, 4), k.expand(1, 2, 12, 4)
    n = torch.arange(1, 13).double()[:, None]
    for impl in ("reference", "compiled"):
        out = flow_attention(q, k, v, is_causal=True, eps=0.0, impl=impl)
        expected = torch.sigmoid(torch.tensor(1.0)).double() * v.cumsum(dim=2) / n
        torch.testing.assert_close(out, expected, atol=1e-7, rtol=0)


def test_incoming_flow_is_conserved():
    # With eps = 0 the weights of one query before competition and allocation sum to one.
    q, k, _ = qkv(1, 2, 2, 5, 8, 4, 4)
    ones = torch.ones(1, 2, 8, 1, dtype=torch.float64)
    tokens = flow(q, k, is_causal=False, eps=0.0)
    weights = tokens.queries @ tokens.keys.transpose(-1, -2) @ ones
    torch.testing.assert_close(weights, torch.ones_like(weights))
    torch.testing.assert_close(
        tokens.competition.sum(-1), torch.full((1, 2), 8.0, dtype=torch.float64)
    )


@pytest.mark.parametrize("impl", ["reference", "compiled"])
def test_later_tokens_change_nothing(impl):
    q, k, v = (x.detach() for x in qkv(1, 2, 2, 21, 21, 4, 4))
    before = flow_attention(q, k, v, is_causal=True, chunk_size=8, impl=impl)
    for at in (1, 8, 13):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, at:] = 7.0
        after = flow_attention(*changed, is_causal=True, chunk_size=8, impl=impl)
        torch.testing.assert_close(after[:, :, :at], before[:, :, :at])
        assert (after[:, :, at] - before[:, :, at]).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    # eps keeps the first causal token off the clip, where there is no derivative.
    inputs = qkv(1, 2, 1, 4, 4, 3, 2)
    for impl in ("reference", "compiled"):
        assert torch.autograd.gradcheck(
            lambda *x, impl=impl: flow_attention(
                *x, is_causal=causal, eps=0.05, chunk_size=2, impl=impl
            ),
            inputs,
        )


@pytest.mark.parametrize(("n", "s"), [(0, 3), (3, 0), (0, 0)])
def test_empty(n, s):
    inputs = qkv(2, 2, 2, n, s, 3, 5)
    for impl in ("reference", "compiled"):
        out, *grads = output_and_gradients(impl, inputs, is_causal=n == s)
        assert out.shape == (2, 2, n, 5) and (out == 0).all()
        assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_half_precision(causal, dtype, bound):
    half = [x.detach().to(dtype) for x in qkv(2, 4, 4, 130, 130, 16, 16)]
    expected = flow_attention(*[x.double() for x in half], is_causal=causal, impl="reference")
    for impl in ("reference", "compiled"):
        out = flow_attention(*half, is_causal=causal, impl=impl)
        assert out.dtype == dtype
        assert float((out.double() - expected).abs().max() / expected.abs().max()) < bound


def test_long_sequences_stay_accurate_in_single_precision():
    inputs = [x.detach() for x in qkv(1, 1, 1, 20000, 20000, 8, 4)]
    wide = flow_attention(*inputs, is_causal=True)
    single = flow_attention(*[x.float() for x in inputs], is_causal=True)
    assert float((single.double() - wide).abs().max() / wide.abs().max()) < 2e-5


def test_auto_takes_the_fast_path():
    q, k, v = qkv(1, 2, 2, 4, 4, 3, 3)
    with count_calls() as calls:
        flow_attention(q, k, v)
        flow_attention(q, k, v, is_causal=True)
    assert dict(calls) == {("flow_attention", "compiled"): 2}


def test_errors():
    q, k, v = qkv(1, 2, 2, 4, 5, 3, 3)
    with pytest.raises(ShapeError, match="same tokens"):
        flow_attention(q, k, v, is_causal=True)
    with pytest.raises(ShapeError, match="chunk_size must be at least 1"):
        flow_attention(q, k, v, chunk_size=0)
    with pytest.raises(ShapeError, match="not a multiple of n_heads"):
        FlowAttention(4, 10, 4, 3)


@pytest.mark.parametrize("causal", [False, True])
def test_module_and_export(causal):
    torch.manual_seed(0)
    module = FlowAttention(6, 8, 5, 2, is_causal=causal, chunk_size=4)
    x = torch.randn(2, 11, 6)
    out = module(x)
    assert out.shape == (2, 11, 5)
    torch.testing.assert_close(module(x, x, x), out)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), out)
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x), out)
