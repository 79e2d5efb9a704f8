"""Dual cross-attention: rollout, chosen queries, pairs, and the weighted loss."""

from __future__ import annotations

import pytest
import torch

from brainalign_kernels import (
    DualCrossTransformer,
    GlobalLocalCrossAttention,
    PairWiseCrossAttention,
    ShapeError,
    UncertaintyWeightedLoss,
    attention_rollout,
    class_rollout,
    count_calls,
    global_local_cross_attention,
    pair_wise_cross_attention,
    select_top,
    softmax_attention,
    uncertainty_weighted_loss,
)

IMPLS = ("reference", "compiled")


def randn(*shape, seed=0, dtype=torch.float64):
    make = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=make, dtype=torch.float64).to(dtype).requires_grad_()


def qkv(b=3, h=4, g=4, n=9, s=9, d=5, e=3, dtype=torch.float64):
    shapes = (b, h, n, d), (b, g, s, d), (b, g, s, e)
    return [randn(*x, seed=i, dtype=dtype) for i, x in enumerate(shapes)]


def gradients(out, inputs):
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * cotangent).sum(), inputs)


def chosen(n, b=3):
    return torch.stack([torch.randperm(n)[:4] for _ in range(b)]) if n else torch.zeros(b, 0).long()


CASES = {
    "global-local": (global_local_cross_attention, lambda n: chosen(n)),
    "pair-wise": (pair_wise_cross_attention, lambda n: torch.tensor([1, 2, 0])),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("g", [4, 2])
@pytest.mark.parametrize("n", [1, 9, 33])
def test_paths_agree(name, g, n):
    torch.manual_seed(0)
    function, made = CASES[name]
    inputs, extra = qkv(g=g, n=n, s=n), made(n)
    expected = function(*inputs, extra, scale=0.6, impl="reference")
    got = function(*inputs, extra, scale=0.6, impl="compiled")
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)
    for x, y in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck_empty_and_half(name):
    torch.manual_seed(0)
    function, made = CASES[name]
    small = qkv(h=1, g=1, n=3, s=3, d=2, e=2)
    extra = torch.tensor([[0, 2], [1, 0], [2, 1]]) if name == "global-local" else made(3)
    for impl in IMPLS:
        assert torch.autograd.gradcheck(lambda *x, impl=impl: function(*x, extra, impl=impl), small)
        assert function(*qkv(n=0, s=0), made(0), impl=impl).numel() == 0
        half = qkv(n=33, s=33, d=16, e=16, dtype=torch.bfloat16)
        at = made(33)
        out = function(*half, at, impl=impl)
        exact = function(*(x.double() for x in half), at, impl="reference")
        assert out.dtype == torch.bfloat16
        assert float((out.double() - exact).abs().max() / exact.abs().max()) < 2e-2


def test_global_local_is_self_attention_at_the_chosen_tokens():
    q, k, v = qkv()
    everything = softmax_attention(q, k, v)
    at = torch.tensor([[0, 5], [0, 2], [0, 8]])
    out = global_local_cross_attention(q, k, v, at)
    for b in range(3):
        torch.testing.assert_close(out[b], everything[b, :, at[b]])


def test_an_image_paired_with_itself_is_self_attention():
    q, k, v = qkv()
    torch.testing.assert_close(
        pair_wise_cross_attention(q, k, v, torch.arange(3)), softmax_attention(q, k, v)
    )
    pairs = torch.tensor([2, 0, 1])
    out = pair_wise_cross_attention(q, k, v, pairs)
    first = softmax_attention(
        q[:1], torch.cat([k[:1], k[2:]], dim=2), torch.cat([v[:1], v[2:]], dim=2)
    )
    torch.testing.assert_close(out[:1], first)
    changed = v.detach().clone()
    changed[1] = 9.0
    # Image 1 is in neither half of image 0, but the second half of image 2.
    other = pair_wise_cross_attention(q, k, changed, pairs)
    torch.testing.assert_close(other[0], out[0])
    assert (other[2] - out[2]).abs().min() > 0


def test_rollout():
    queries = [randn(2, 3, 7, 4, seed=i) for i in range(4)]
    keys = [randn(2, 3, 7, 4, seed=10 + i) for i in range(4)]
    attentions = [
        (0.5 * q @ k.transpose(-1, -2)).softmax(-1) for q, k in zip(queries, keys, strict=True)
    ]
    whole = attention_rollout(attentions)
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, 7, dtype=torch.float64))
    unit = torch.eye(7, dtype=torch.float64)
    first, second = (0.5 * a.mean(1) + 0.5 * unit for a in attentions[:2])
    torch.testing.assert_close(attention_rollout(attentions[:2]), second @ first)
    tensors = [*queries, *keys]
    for token in (0, 3, -1):
        slopes = []
        for impl in IMPLS:
            row = class_rollout(queries, keys, token=token, impl=impl)
            torch.testing.assert_close(row, whole[:, token])
            slopes.append(gradients(row, tensors))
        for x, y in zip(*slopes, strict=True):
            torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-9)


def test_select_top():
    scores = torch.tensor([[9.0, 0.1, 0.5, 0.3, 0.2, 0.4], [0.0, 5.0, 1.0, 2.0, 4.0, 3.0]])
    assert select_top(scores, 0.4).tolist() == [[0, 2, 5], [0, 1, 4]]
    assert select_top(scores, 0.0).tolist() == [[0], [0]]
    assert select_top(scores, 0.1, leading=0).tolist() == [[0], [1]]
    assert select_top(scores, 1.0).shape == (2, 6)
    assert select_top(torch.zeros(1, 101), 0.3).shape == (1, 31)


def test_uncertainty_weighted_loss():
    losses, w = torch.tensor([2.0, 3.0, 0.5]), torch.tensor([0.0, 1.0, -1.0])
    expected = 0.5 * sum(float(x) / 2.718281828**float(y) + float(y)
                         for x, y in zip(losses, w, strict=True))  # fmt: skip
    assert float(uncertainty_weighted_loss(losses, w)) == pytest.approx(expected, rel=1e-6)
    # The best weight of a constant loss is its logarithm.
    module = UncertaintyWeightedLoss(3)
    assert float(module(losses)) == pytest.approx(2.75)
    with torch.no_grad():
        module.weights.copy_(losses.log())
    module(losses).backward()
    torch.testing.assert_close(module.weights.grad, torch.zeros(3), atol=1e-6, rtol=0)


def test_transformer_in_training_and_in_use():
    torch.manual_seed(1)
    model = DualCrossTransformer(8, 3, 2, ratio=0.25).double()
    x, pairs = randn(3, 13, 8), torch.tensor([1, 2, 0])
    with count_calls() as calls:
        out = model(x, pairs)
    assert {path for _, path in calls} == {"compiled"}
    assert calls["pair_wise_cross_attention", "compiled"] == 3
    assert out.local.shape == (3, 4, 8) and (out.indices[:, 0] == 0).all()
    assert out.paired.shape == x.shape
    # Pairs regularise by the shared weights and leave the other branches alone.
    alone = model(x)
    assert alone.paired is None
    torch.testing.assert_close(alone.tokens, out.tokens)
    torch.testing.assert_close(alone.local, out.local)
    same = model(x, torch.arange(3))
    torch.testing.assert_close(same.paired, same.tokens)
    weight = model.blocks[0].attention.qkv.weight
    assert torch.autograd.grad(out.paired.square().sum(), weight)[0].abs().max() > 0
    model.eval()
    torch.testing.assert_close(model(x).tokens, out.tokens)
    with pytest.raises(ShapeError, match="for training"):
        model(x, pairs)


def test_transformer_impls_agree():
    torch.manual_seed(2)
    x, pairs, made = randn(3, 13, 8), torch.tensor([1, 2, 0]), []
    for impl in IMPLS:
        torch.manual_seed(3)
        model = DualCrossTransformer(8, 2, 2, ratio=0.25, impl=impl).double()
        made.append(model(x, pairs))
    for got, expected in zip(*made, strict=True):
        torch.testing.assert_close(got, expected)


def test_errors():
    q, k, v = qkv()
    with pytest.raises(ShapeError, match="indices must hold int64"):
        global_local_cross_attention(q, k, v, torch.zeros(3, 2))
    with pytest.raises(ShapeError, match="pairs must hold int64"):
        pair_wise_cross_attention(q, k, v, torch.tensor([1, 0]))
    with pytest.raises(ShapeError, match="Expected attentions"):
        attention_rollout([])
    with pytest.raises(ShapeError, match="one q and one k"):
        class_rollout([q], [k, k])
    with pytest.raises(ShapeError, match="no token 9"):
        class_rollout([q], [k], token=9)
    with pytest.raises(ShapeError, match="0 <= ratio <= 1"):
        select_top(torch.zeros(2, 5), 1.5)
    with pytest.raises(ShapeError, match=r"one shape \(n,\)"):
        uncertainty_weighted_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ShapeError, match="not a multiple of num_heads"):
        PairWiseCrossAttention(9, 2)
    with pytest.raises(ShapeError, match="depth must be at least 1"):
        DualCrossTransformer(8, 0, 2)


def test_compile_and_export():
    torch.manual_seed(4)
    model, x = DualCrossTransformer(8, 2, 2, ratio=0.3), torch.randn(2, 9, 8)
    pairs = torch.tensor([1, 0])
    out = model(x, pairs)
    made = torch.compile(model, fullgraph=True, backend="eager")(x, pairs)
    for got, expected in zip(made, out, strict=True):
        torch.testing.assert_close(got, expected)
    model.eval()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x)[1], out.local)
    local = GlobalLocalCrossAttention(8, 2)
    at = torch.tensor([[0, 3], [0, 1]])
    compiled = torch.compile(local, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, at), local(x, at))
