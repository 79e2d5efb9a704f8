"""Mixture of heads: gathered against all heads, the work left out, identities, routing."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from brainalign_kernels import (
    MoHAggregatedAttention,
    MoHAttention,
    MoHViTAttention,
    ShapeError,
    count_calls,
    load_balance_loss,
    moh_attention,
    moh_routing,
    softmax_attention,
)

IMPLS = ("reference", "compiled")


def randn(*shape, seed=0, dtype=torch.float64):
    make = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=make, dtype=torch.float64).to(dtype).requires_grad_()


def case(b=2, h=4, g=4, n=9, s=11, d=5, e=3, share=0.4, dtype=torch.float64):
    q, k, v = randn(b, h, n, d, dtype=dtype), randn(b, g, s, d, seed=1, dtype=dtype), None
    v, gates = randn(b, g, s, e, seed=2, dtype=dtype), randn(b, n, h, seed=3, dtype=dtype)
    make = torch.Generator().manual_seed(4)
    return (q, k, v, gates), torch.rand((b, n, h), generator=make) < share


def modules(**options):
    common = {"shared_head": 1, "routed_head": 2} | options
    return {
        "dit": MoHAttention(12, 4, **common),
        "vit": MoHViTAttention(12, 4, (3, 4), cpb_hidden=8, **common),
        "aggregated": MoHAggregatedAttention(12, 4, (3, 4), (2, 2), cpb_hidden=8, **common),
    }


class QueryRows(TorchFunctionMode):
    """Counts the rows of the queries that reach PyTorch's attention."""

    rows = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.rows += args[0].shape[:-1].numel()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("g", [4, 2])
@pytest.mark.parametrize("masked", ["none", "bool", "bias", "row of heads"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_paths_agree(g, masked, share):
    inputs, selected = case(g=g, share=share)
    make = torch.Generator().manual_seed(5)
    keep = torch.rand((2, 1, 9, 11), generator=make) > 0.4
    keep[:, :, 2] = False
    bias = randn(1, 4, 9, 11, seed=6)
    mask = {"bool": keep, "bias": bias, "row of heads": randn(2, 4, 1, 11)}.get(masked)
    wanted = (*inputs, mask) if masked in ("bias", "row of heads") else inputs
    made = {}
    for impl in IMPLS:
        out = moh_attention(*inputs, selected=selected, mask=mask, scale=0.6, impl=impl)
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        total = (out * cotangent).sum() + sum(0 * x.sum() for x in wanted)
        made[impl] = (out, *torch.autograd.grad(total, wanted))
    for got, expected in zip(made["compiled"], made["reference"], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)
    out = made["compiled"][0]
    assert (out[~selected.transpose(1, 2)] == 0).all()
    assert (out[selected.transpose(1, 2)].abs().sum() > 0) == (share > 0)


def test_unselected_heads_are_not_computed():
    (q, k, v, _), _ = case(b=1, h=8, g=8, n=64, s=64)
    routing = moh_routing(
        randn(1, 64, 6, seed=8), 2, shared=randn(1, 64, 2), balance=randn(1, 64, 2)
    )
    with QueryRows() as counted:
        moh_attention(q, k, v, routing.gates, selected=routing.selected, impl="compiled")
    # Two shared and two routed heads of eight, for each of 64 tokens.
    assert counted.rows == int(routing.selected.sum()) == 4 * 64
    with QueryRows() as everything:
        softmax_attention(q, k, v)
    assert everything.rows == 8 * 64


@pytest.mark.parametrize("name", ["dit", "vit", "aggregated"])
def test_values_of_a_head_nobody_chose_are_not_read(name):
    torch.manual_seed(0)
    module = modules(routed_head=1)[name].double()
    x = randn(1, 12, 12).detach()
    torch.nn.init.zeros_(module.wg.weight)
    with torch.no_grad():
        module.wg.weight[0] = 50 * x.mean(dim=(0, 1)).sign()
        x = x.abs() * x.mean(dim=(0, 1)).sign()
        projection = module.qkv if name != "aggregated" else module.kv
        # Values of the last head, which no token chooses: one NaN spreads to all that reads them.
        projection.bias = torch.nn.Parameter(projection.weight.new_zeros(len(projection.weight)))
        projection.bias[-3:] = torch.nan
        module.impl = "compiled"
        out, routing = module(x)
        assert (routing.indices == 0).all()
        assert torch.isfinite(out).all()
        module.impl = "reference"
        assert module(x)[0].isnan().any()


@pytest.mark.parametrize("shared", [0, 1, 3, 4])
@pytest.mark.parametrize("impl", IMPLS)
def test_zero_routers_and_all_heads_are_multi_head_attention(shared, impl):
    # The gates of all heads are H p: with zero routers p = 1 / H, and they are the constant 1.
    torch.manual_seed(1)
    module = MoHAttention(12, 4, shared_head=shared, routed_head=4 - shared, impl=impl).double()
    for name, p in module.named_parameters():
        if name.startswith("wg"):
            torch.nn.init.zeros_(p)
    x = randn(2, 7, 12)
    out, routing = module(x)
    torch.testing.assert_close(routing.gates, torch.ones_like(routing.gates))
    plain = torch.nn.MultiheadAttention(12, 4, batch_first=True).double()
    with torch.no_grad():
        plain.in_proj_weight.copy_(module.qkv.weight)
        plain.in_proj_bias.zero_()
        plain.out_proj.weight.copy_(module.proj.weight)
        plain.out_proj.bias.copy_(module.proj.bias)
    torch.testing.assert_close(out, plain(x, x, x)[0])


def test_routing_and_its_loss():
    logits, shared, balance = randn(2, 50, 6), randn(2, 50, 3, seed=1), randn(2, 50, 2, seed=2)
    made = moh_routing(logits, 2, shared=shared, balance=balance)
    common, routed = made.gates[..., :3], made.gates[..., 3:]
    alpha = 2 * balance.softmax(-1)
    torch.testing.assert_close(common.sum(-1), 3 * alpha[..., 0])
    torch.testing.assert_close(routed.sum(-1), 2 * alpha[..., 1])
    assert ((routed > 0).sum(-1) == 2).all() and (made.selected == (made.gates > 0)).all()
    best = logits.topk(2).indices
    assert (made.indices == best).all()
    assert load_balance_loss(made) > 2.0
    # All heads alike: p = 1/E and each used by K/E of the tokens, so the loss is K.
    even = torch.eye(6).repeat(4, 1)[None] * 1e-9
    torch.testing.assert_close(load_balance_loss(moh_routing(even, 1)), torch.tensor(1.0))
    assert torch.autograd.gradcheck(lambda x: load_balance_loss(moh_routing(x, 2)), logits[:1, :4])


def test_gradcheck():
    inputs, selected = case(b=1, h=2, g=1, n=3, s=4, d=3, e=2, share=0.6)
    for impl in IMPLS:
        assert torch.autograd.gradcheck(
            lambda *x, impl=impl: moh_attention(*x, selected=selected, impl=impl), inputs
        )


@pytest.mark.parametrize("name", ["dit", "vit", "aggregated"])
@pytest.mark.parametrize(("shared", "routed"), [(2, 0), (4, 0), (0, 2), (1, 3), (2, 1), (0, 4)])
def test_modules_agree(name, shared, routed):
    torch.manual_seed(2)
    module = modules(shared_head=shared, routed_head=routed)[name].double()
    x, made = randn(2, 12, 12), []
    for impl in IMPLS:
        module.impl = impl
        with count_calls() as calls:
            out, _ = module(x)
        assert [path for _, path in calls] == [impl]
        used = [p for n, p in module.named_parameters() if n != "wg.weight" or routed > 1]
        made.append((out, *torch.autograd.grad(out.square().sum(), (x, *used))))
    for got, expected in zip(*made, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize(("n", "s"), [(0, 3), (3, 0), (1, 1)])
def test_empty_and_single(n, s):
    inputs, selected = case(n=n, s=s, share=0.7)
    for impl in IMPLS:
        out = moh_attention(*inputs, selected=selected, impl=impl)
        assert out.shape == (2, 4, n, 3) and torch.isfinite(out).all()
        assert s > 0 or (out == 0).all()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(dtype, bound):
    inputs, selected = case(n=33, s=33, d=16, e=16, dtype=dtype)
    expected = moh_attention(*(x.double() for x in inputs), selected=selected, impl="reference")
    for impl in IMPLS:
        out = moh_attention(*inputs, selected=selected, impl=impl)
        assert out.dtype == dtype
        assert float((out.double() - expected).abs().max() / expected.abs().max()) < bound


def test_errors():
    (q, k, v, gates), selected = case()
    with pytest.raises(ShapeError, match="gates must have shape"):
        moh_attention(q, k, v, gates.transpose(1, 2))
    with pytest.raises(ShapeError, match="selected must be boolean"):
        moh_attention(q, k, v, gates, selected=selected.double())
    with pytest.raises(ShapeError, match="0 <= routed_head <= E"):
        moh_routing(gates, 5)
    with pytest.raises(ShapeError, match="balance"):
        moh_routing(gates, 2, shared=gates)
    with pytest.raises(ShapeError, match="no head would be used"):
        MoHAttention(12, 4, shared_head=0, routed_head=0)
    with pytest.raises(ShapeError, match="at most num_heads"):
        MoHAttention(12, 4, shared_head=3, routed_head=2)
    with pytest.raises(ShapeError, match="must be odd"):
        MoHAggregatedAttention(12, 4, (3, 4), (2, 2), shared_head=1, routed_head=1, window_size=2)
    with pytest.raises(ShapeError, match=r"Expected tokens \(B, 3 \* 4, dim\)"):
        modules()["vit"](torch.zeros(1, 13, 12))


def test_the_operator_is_registered_well():
    (q, k, v, gates), selected = case()
    args = [x.detach() for x in (q, k, v, gates)]
    operator = torch.ops.brainalign_kernels.moh_attention.default
    torch.library.opcheck(operator, (*args, selected, None, 0.5))


@pytest.mark.parametrize("name", ["dit", "vit", "aggregated"])
def test_compile_and_export(name):
    torch.manual_seed(3)
    module, x = modules()[name], torch.randn(2, 12, 12)
    out, _ = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x)[0], out)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x)[0], out)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x)[0], out)
        exported = torch.export.export(module, (x,))
        torch.testing.assert_close(exported.module()(x)[0], out)
    if name != "aggregated":
        assert "brainalign_kernels.moh_attention" in str(exported.graph)
