"""Reversed attention: the path by blocks against A^T V, dependencies, gates and pruning."""

from __future__ import annotations

import pytest
import torch

from brainalign_kernels import (
    DependencyTransformer,
    ReversedAttention,
    ShapeError,
    UnsupportedError,
    count_calls,
    dependency_mask,
    pruning_scores,
    reversed_attention,
)
from brainalign_kernels.reversed import blocks

IMPLS = ("reference", "compiled")


def randn(*shape, seed=0, dtype=torch.float64):
    make = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=make, dtype=torch.float64).to(dtype).requires_grad_()


def case(b=2, h=4, g=4, n=7, s=9, d=5, e=3, dtype=torch.float64):
    q, k, v = (
        randn(*shape, seed=i, dtype=dtype)
        for i, shape in enumerate([(b, h, n, d), (b, g, s, d), (b, h, n, e)])
    )
    p = randn(b, h, n, seed=3).softmax(dim=1).to(dtype).detach().requires_grad_()
    m = randn(b, n, seed=4).sigmoid().to(dtype).detach().requires_grad_()
    return q, k, v, p, m


def run(inputs, impl, **options):
    q, k, v, p, m = inputs
    return reversed_attention(q, k, v, head_probabilities=p, gate=m, impl=impl, **options)


def gradients(out, inputs):
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * cotangent).sum(), inputs)


@pytest.mark.parametrize("g", [4, 2])
@pytest.mark.parametrize("size", [(7, 9), (1, 1), (33, 33)])
@pytest.mark.parametrize("masked", ["none", "bool", "bias", "causal", "causal and bool"])
def test_paths_agree(g, size, masked):
    inputs = case(g=g, n=size[0], s=size[1])
    make = torch.Generator().manual_seed(5)
    keep = torch.rand((2, 1, *size), generator=make) > 0.4
    keep[:, :, 0] = False
    mask = {"bias": torch.where(keep, 0.3, -torch.inf).double()}.get(masked)
    mask = keep if "bool" in masked else mask
    options = {"mask": mask, "is_causal": "causal" in masked, "scale": 0.7}
    expected = run(inputs, "reference", **options)
    got = run(inputs, "compiled", **options)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)
    slopes = gradients(got, inputs)
    for x, y in zip(slopes, gradients(expected, inputs), strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-10)
    if mask is not None:
        # A child without parents sends nothing: its value has no effect.
        assert (slopes[2][:, :, 0] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_the_size_of_blocks_changes_nothing(causal, monkeypatch):
    inputs = case(n=41, s=41)
    expected = run(inputs, "compiled", is_causal=causal)
    slopes = gradients(expected, inputs)
    monkeypatch.setattr(blocks, "_CPU", 1)
    monkeypatch.setattr(blocks, "_GPU", 1)
    got = run(inputs, "compiled", is_causal=causal)
    torch.testing.assert_close(got, expected)
    for x, y in zip(gradients(got, inputs), slopes, strict=True):
        torch.testing.assert_close(x, y)


def test_is_the_transposed_attention():
    q, k, v, p, m = case()
    attention = (q @ k.transpose(-1, -2) * 5**-0.5).softmax(dim=-1)
    expected = attention.transpose(-1, -2) @ (v * p[..., None] * m[:, None, :, None])
    for impl in IMPLS:
        torch.testing.assert_close(run((q, k, v, p, m), impl), expected)
        torch.testing.assert_close(
            reversed_attention(q, k, v, impl=impl), attention.transpose(-1, -2) @ v
        )


def test_mass_is_conserved():
    # Parents receive, in all, what children send: the columns of A^T sum to one.
    inputs = case()
    _, _, v, p, m = inputs
    sent = (v * p[..., None] * m[:, None, :, None]).sum(dim=2)
    for impl in IMPLS:
        torch.testing.assert_close(run(inputs, impl).sum(dim=2), sent)


def test_dependency_mask_and_pruning_scores():
    q, k, v, p, m = case()
    made = dependency_mask(q, k, head_probabilities=p, gate=m)
    assert made.shape == (2, 7, 9)
    torch.testing.assert_close(made.sum(dim=-1), pruning_scores(p, m))
    torch.testing.assert_close(pruning_scores(p, m), m)
    # With one value for all heads, the received sum over heads is the dependency mask's.
    u = v[:, :1].expand_as(v)
    received = run((q, k, u, p, m), "compiled").sum(dim=1)
    torch.testing.assert_close(received, made.transpose(1, 2) @ v[:, 0])
    nobody = torch.zeros(2, 1, 7, 1, dtype=torch.bool)
    assert (dependency_mask(q, k, mask=nobody) == 0).all()


def test_gradcheck():
    inputs = case(b=1, h=2, g=1, n=3, s=4, d=3, e=2)
    keep = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    keep[:, :, 1] = False
    for impl in IMPLS:
        for mask in (None, keep):
            assert torch.autograd.gradcheck(
                lambda *x, impl=impl, mask=mask: run(x, impl, mask=mask), inputs
            )


@pytest.mark.parametrize(("n", "s"), [(0, 3), (3, 0), (0, 0)])
def test_empty(n, s):
    inputs = case(n=n, s=s)
    for impl in IMPLS:
        out = run(inputs, impl)
        assert out.shape == (2, 4, s, 3) and (out == 0).all()
        assert all((g == 0).all() for g in gradients(out, inputs))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision(dtype, bound):
    inputs = case(n=33, s=33, d=16, e=16, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    cotangent = torch.linspace(-1, 1, 2 * 4 * 33 * 16, dtype=torch.float64).view(2, 4, 33, 16)
    cotangent = cotangent.to(dtype)
    expected = run(wide, "reference")
    slopes = torch.autograd.grad(expected, wide, cotangent.double())
    expected = expected.detach()
    for impl in IMPLS:
        out = run(inputs, impl)
        assert out.dtype == dtype
        assert float((out.detach().double() - expected).abs().max() / expected.abs().max()) < bound
        for got, exact in zip(torch.autograd.grad(out, inputs, cotangent), slopes, strict=True):
            assert float((got.double() - exact).abs().max() / exact.abs().max()) < bound


def test_auto_takes_the_fast_path_and_masks_with_gradients_do_not():
    q, k, v, _, _ = case()
    bias = randn(1, 4, 7, 9)
    with count_calls() as calls:
        reversed_attention(q, k, v)
        reversed_attention(q, k, v, mask=bias.detach())
        out = reversed_attention(q, k, v, mask=bias)
    assert calls["reversed_attention", "compiled"] == 2
    assert calls["reversed_attention", "reference"] == 1
    assert gradients(out, (bias,))[0].abs().max() > 0
    with pytest.raises(UnsupportedError, match="no gradient for the mask"):
        reversed_attention(q, k, v, mask=bias, impl="compiled")


def test_no_array_of_tokens_by_tokens(monkeypatch):
    n, sizes = 1000, []
    form = blocks._weights

    def recorded(*args):
        made = form(*args)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(blocks, "_weights", recorded)
    monkeypatch.setattr(blocks, "_GPU", blocks._CPU)
    inputs = case(b=1, h=1, g=1, n=n, s=n, d=8, e=8, dtype=torch.float32)
    gradients(run(inputs, "compiled"), inputs)
    # Forwards and backwards, each child once.
    assert sum(sizes) == 2 * n * n
    assert max(sizes) <= blocks._CPU < n * n


def test_without_gradients():
    q, k, v, _, _ = case()
    expected = reversed_attention(q, k, v, impl="reference")
    with torch.no_grad():
        torch.testing.assert_close(reversed_attention(q, k, v, impl="compiled"), expected)
    with torch.inference_mode():
        out = reversed_attention(*(x.clone() for x in (q, k, v)), impl="compiled")
        torch.testing.assert_close(out, expected)


def test_errors():
    q, k, v, p, m = case()
    with pytest.raises(ShapeError, match="head_probabilities must have shape"):
        reversed_attention(q, k, v, head_probabilities=p[:, :1])
    with pytest.raises(ShapeError, match="gate must have shape"):
        reversed_attention(q, k, v, gate=m[:, :2])
    with pytest.raises(ShapeError, match="must agree"):
        reversed_attention(q, k, v[:, :, :3])
    with pytest.raises(ShapeError, match="mask must have 4 axes"):
        reversed_attention(q, k, v, mask=torch.ones(7, 9, dtype=torch.bool))
    with pytest.raises(ShapeError, match="prune_after must lie in 1 to 2"):
        DependencyTransformer(8, 2, 2, prune_after=(3,))
    with pytest.raises(ShapeError, match="0 < keep <= 1"):
        DependencyTransformer(8, 2, 2, keep=0.0)
    with pytest.raises(ShapeError, match="tau must be positive"):
        ReversedAttention(8, 2, tau=0.0)


def test_the_operators_are_registered_well():
    q, k, v, _, _ = case(b=1, h=2, g=2)
    mask = torch.rand(1, 1, 7, 9) > 0.2
    operators = torch.ops.brainalign_kernels
    for m in (None, mask):
        torch.library.opcheck(operators.reversed_attention.default, (q, k, v, m, False, 0.5))
        grad = randn(1, 2, 9, 3, seed=8).detach()
        rest = [x.detach() for x in (q, k, v)]
        torch.library.opcheck(
            operators.reversed_attention_backward.default, (grad, *rest, m, False, 0.5)
        )


def test_module_gates_multiply_through_layers():
    torch.manual_seed(0)
    first, second = ReversedAttention(8, 2).double(), ReversedAttention(8, 2).double()
    x = randn(2, 6, 8)
    out, messages = first(x)
    expected = first.controller(x).squeeze(-1).sigmoid()
    torch.testing.assert_close(messages.gate, expected)
    again = second(out, messages.gate)[1]
    torch.testing.assert_close(again.gate, expected * second.controller(out)[..., 0].sigmoid())
    made = second.dependencies(out, messages.gate)
    torch.testing.assert_close(made.sum(dim=-1), again.scores)
    # A child whose gate is closed changes nothing for the others.
    closed = torch.ones(2, 6, dtype=torch.float64)
    closed[:, 3] = 0.0
    torch.testing.assert_close(second.dependencies(x, closed)[:, 3], torch.zeros(2, 6).double())


def test_light_version_keeps_the_tokens_that_send_most():
    torch.manual_seed(1)
    x = torch.randn(2, 21, 8)
    full = DependencyTransformer(8, 4, 2)
    light = DependencyTransformer(8, 4, 2, prune_after=(2, 3), keep=0.5, leading=1)
    light.load_state_dict(full.state_dict())
    everything = full(x)
    assert everything.tokens.shape == (2, 21, 8)
    assert (everything.kept == torch.arange(21)).all()
    out = light(x)
    # 20 patches, half of them twice: 10, then 5, and the first token.
    assert out.tokens.shape == (2, 6, 8) and out.gate.shape == out.kept.shape == (2, 6)
    assert (out.kept[:, 0] == 0).all() and (out.kept.diff(dim=1) > 0).all()
    gate, tokens = None, x
    for block in full.blocks[:2]:
        tokens, messages = block(tokens, gate)
        gate = messages.gate
    best = messages.scores[:, 1:].topk(10, dim=1).indices + 1
    assert all(set(k.tolist()) <= {0, *b.tolist()} for k, b in zip(out.kept, best, strict=True))
    whole = DependencyTransformer(8, 4, 2, prune_after=(2, 3), keep=1.0)
    whole.load_state_dict(full.state_dict())
    torch.testing.assert_close(whole(x).tokens, everything.tokens)


def test_compile_and_export():
    torch.manual_seed(2)
    model = DependencyTransformer(8, 3, 2, prune_after=(2,), keep=0.5)
    x = torch.randn(2, 9, 8)
    out = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    made = compiled(x)
    torch.testing.assert_close(made.tokens, out.tokens)
    weight = model.blocks[0].attention.qkv.weight
    expected = torch.autograd.grad(out.tokens.square().sum(), weight)[0]
    got = torch.autograd.grad(made.tokens.square().sum(), weight)[0]
    torch.testing.assert_close(got, expected)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x)[0], out.tokens)
    assert "brainalign_kernels.reversed_attention" in str(exported.graph)
