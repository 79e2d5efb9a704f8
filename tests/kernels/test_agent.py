"""Agent attention: its paths against each other, its identities and its blocks."""

from __future__ import annotations

import pytest
import torch

from brainalign_kernels import (
    AgentAttentionCSWin,
    AgentAttentionDeiT,
    AgentAttentionPVT,
    AgentAttentionSD,
    AgentAttentionSwin,
    ShapeError,
    agent_attention,
    count_calls,
    softmax_attention,
)

PATHS = ("reference", "compiled")


def inputs(b, h, g, n, s, m, d, e, dtype=torch.float64, seed=0):
    make = torch.Generator().manual_seed(seed)
    shapes = (b, h, n, d), (b, g, s, d), (b, g, s, e), (b, h, m, d)
    return [
        torch.randn(x, generator=make, dtype=torch.float64).to(dtype).requires_grad_()
        for x in shapes
    ]


def bias(*shape, seed=3):
    make = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=make, dtype=torch.float64)


@pytest.mark.parametrize(
    "shape",
    [(2, 4, 4, 9, 9, 4, 5, 5), (1, 4, 2, 7, 13, 3, 8, 6), (1, 2, 1, 1, 1, 1, 4, 3)],
)
@pytest.mark.parametrize("biased", ["none", "additive", "masked"])
def test_paths_agree(shape, biased):
    x = inputs(*shape)
    b, h, _, n, s, m = shape[:6]
    options = {"scale": 0.6}
    if biased != "none":
        options["position_bias"] = bias(1, h, m, s).requires_grad_()
        options["agent_bias"] = bias(b, 1, n, m).requires_grad_()
    if biased == "masked":
        keep = bias(b, 1, 1, s, seed=5) > 0
        keep[0] = False
        options["position_bias"] = keep
    leaves = [t for t in (*x, *options.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    made = {i: agent_attention(*x, **options, impl=i) for i in PATHS}
    cotangent = bias(*made["reference"].shape, seed=4)
    grads = {i: torch.autograd.grad((o * cotangent).sum(), leaves) for i, o in made.items()}
    torch.testing.assert_close(made["compiled"], made["reference"], atol=1e-12, rtol=0)
    for got, expected in zip(grads["compiled"], grads["reference"], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    if biased == "masked":
        assert (made["compiled"][0] == 0).all()


@pytest.mark.parametrize("impl", PATHS)
def test_every_query_an_agent_is_a_product_of_two_softmaxes(impl):
    q, k, v, _ = inputs(2, 3, 3, 8, 8, 1, 5, 4)
    got = agent_attention(q, k, v, q, impl=impl)
    logits = 5**-0.5 * q
    expected = (logits @ q.mT).softmax(-1) @ ((logits @ k.mT).softmax(-1) @ v)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    assert float((got - softmax_attention(q, k, v)).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("impl", PATHS)
def test_one_agent_gives_every_query_the_same(impl):
    q, k, v, a = inputs(1, 2, 2, 6, 9, 1, 4, 4)
    out = agent_attention(q, k, v, a, impl=impl)
    expected = softmax_attention(a, k, v).expand_as(out)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("impl", PATHS)
def test_second_scale_and_shortcut(impl):
    q, k, v, a = inputs(2, 4, 2, 9, 9, 4, 5, 5)
    got, values = agent_attention(
        q, k, v, a, k_scale2=0.3, k_shortcut=0.075, return_agent_values=True, impl=impl
    )
    s = 5**-0.5
    k4, v4 = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    expected_values = (s * a @ k4.mT).softmax(-1) @ v4
    torch.testing.assert_close(values, expected_values, atol=1e-12, rtol=0)
    expected = (s**0.3 * q @ a.mT).softmax(-1) @ expected_values + 0.075 * v4
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_gradcheck():
    x = inputs(1, 2, 1, 3, 4, 2, 3, 2)
    b1, b2 = bias(1, 2, 2, 4).requires_grad_(), bias(1, 2, 3, 2).requires_grad_()

    def run(q, k, v, a, b1, b2):
        return agent_attention(
            q, k, v, a, position_bias=b1, agent_bias=b2, k_scale2=0.3, impl="reference"
        )

    assert torch.autograd.gradcheck(run, (*x, b1, b2))


@pytest.mark.parametrize(("n", "s", "m"), [(0, 3, 2), (3, 0, 2), (3, 4, 0), (0, 0, 0)])
@pytest.mark.parametrize("impl", PATHS)
def test_empty(n, s, m, impl):
    x = inputs(2, 2, 2, n, s, m, 3, 5)
    out = agent_attention(*x, impl=impl)
    assert out.shape == (2, 2, n, 5) and (out == 0).all()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("impl", PATHS)
def test_half_precision(dtype, bound, impl):
    half = [x.detach().to(dtype) for x in inputs(2, 4, 4, 33, 33, 9, 16, 16)]
    expected = agent_attention(*[x.double() for x in half], impl="reference")
    out = agent_attention(*half, impl=impl)
    assert out.dtype == dtype
    assert float((out.double() - expected).abs().max()) < bound


def test_auto_takes_the_fast_path():
    with count_calls() as calls:
        agent_attention(*inputs(1, 2, 2, 4, 4, 2, 3, 3))
    assert dict(calls) == {("agent_attention", "compiled"): 1}


def test_errors():
    q, k, v, a = inputs(1, 2, 2, 4, 6, 3, 3, 3)
    with pytest.raises(ShapeError, match="agents must be"):
        agent_attention(q, k, v, a[:, :1])
    with pytest.raises(ShapeError, match="type and device"):
        agent_attention(q, k, v, a.float())
    with pytest.raises(ShapeError, match="position_bias must broadcast"):
        agent_attention(q, k, v, a, position_bias=bias(1, 2, 4, 3))
    with pytest.raises(ShapeError, match="agent_bias must broadcast"):
        agent_attention(q, k, v, a, agent_bias=bias(1, 2, 3, 4))
    with pytest.raises(ShapeError, match="4 queries and 6 keys"):
        agent_attention(q, k, v, a, k_shortcut=0.1)
    with pytest.raises(ShapeError, match="needs a positive one"):
        agent_attention(q, k, v, a, scale=-1.0, k_scale2=0.3)
    with pytest.raises(ShapeError, match="must be a square"):
        AgentAttentionSwin(8, 2, (4, 4), agent_num=5)
    with pytest.raises(ShapeError, match="multiple of num_heads"):
        AgentAttentionDeiT(9, 2, 4, agent_num=4)
    with pytest.raises(ShapeError, match="a class token and 4 x 4 patches"):
        AgentAttentionDeiT(8, 2, 4, agent_num=4)(torch.zeros(1, 16, 8))
    with pytest.raises(ShapeError, match="sr_ratio"):
        AgentAttentionPVT(8, 2, (3, 3), agent_num=4, sr_ratio=4)
    with pytest.raises(ShapeError, match="Stripes must divide"):
        AgentAttentionCSWin(8, 2, 6, (4, 6), agent_num=4)
    with pytest.raises(ShapeError, match="must be a square; got 15"):
        AgentAttentionSD(8, 2, 4)(torch.zeros(1, 15, 8))


def blocks():
    yield AgentAttentionSwin(8, 2, (4, 6), agent_num=4), (2, 24, 8)
    yield AgentAttentionDeiT(8, 2, (5, 4), agent_num=4), (2, 21, 8)
    yield AgentAttentionPVT(8, 2, (6, 7), agent_num=9, sr_ratio=2), (2, 42, 8)
    yield AgentAttentionCSWin(8, 2, 6, (3, 6), agent_num=4), (3, 2, 36, 8)
    yield AgentAttentionSD(8, 2, agent_num=4), (2, 25, 8)


@pytest.mark.parametrize(("block", "shape"), list(blocks()), ids=lambda x: type(x).__name__)
def test_blocks_paths_agree_and_reach_every_parameter(block, shape):
    block = block.double()
    x = bias(*shape)
    made = {}
    for impl in PATHS:
        block.impl = impl
        block.zero_grad()
        with count_calls() as calls:
            out = block(x)
        assert dict(calls) == {("agent_attention", impl): 1}
        (out * bias(*out.shape, seed=8)).sum().backward()
        made[impl] = [out.detach(), *(p.grad for p in block.parameters())]
    for got, expected in zip(made["compiled"], made["reference"], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    assert made["compiled"][0].shape == shape[-3:]
    assert all((g != 0).any() for n, g in zip(
        (n for n, _ in block.named_parameters()), made["reference"][1:], strict=True
    ) if n != "to_k.bias")  # fmt: skip


def test_stable_diffusion_block_on_a_map_that_is_not_square():
    block = AgentAttentionSD(8, 2, agent_num=4).double()
    x = bias(1, 12, 8)
    assert not torch.equal(block(x, size=(2, 6)), block(x, size=(3, 4)))


def test_stripes_are_windows_of_the_map():
    block = AgentAttentionCSWin(4, 1, 4, (2, 4), agent_num=1).double()
    x = bias(3, 1, 16, 4)
    changed = x.clone()
    changed[:, :, 8:] += 1.0
    torch.testing.assert_close(block(x)[:, :8], block(changed)[:, :8])
    assert not torch.allclose(block(x)[:, 8:], block(changed)[:, 8:])


def test_compile_and_export():
    x = [t.detach() for t in inputs(1, 2, 2, 4, 4, 2, 3, 3)]
    compiled = torch.compile(lambda *x: agent_attention(*x), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*x), agent_attention(*x))
    block = AgentAttentionPVT(8, 2, (6, 6), agent_num=4, sr_ratio=2)
    tokens = torch.randn(2, 36, 8, generator=torch.Generator().manual_seed(0))
    exported = torch.export.export(block, (tokens,)).module()
    torch.testing.assert_close(exported(tokens), block(tokens))
