"""What holds for every attention with queries, keys and values, whatever it computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from brainalign_kernels import (
    UnsupportedError,
    agent_attention,
    clear_attention,
    count_calls,
    dsf_attention,
    flow_attention,
    gated_linear_attention,
    global_local_cross_attention,
    halo_attention,
    hip_attention,
    lightnet_attention,
    lightning_attention,
    linear_attention,
    moh_attention,
    neighborhood_attention,
    pair_wise_cross_attention,
    reversed_attention,
    sink_attention,
    softmax_attention,
    visual_attention_redistribution,
)

H, D, E = 4, 8, 8


def ones(x: Tensor) -> Tensor:
    """Neutral gates (B, H, N) in the type of x (B, H, N, any)."""
    return x.new_ones(x.shape[:3])


#: Calls of q, k, v and impl; the tokens are a grid of N / 2 rows and 2 columns where it matters.
CASES = {
    "agent": lambda q, k, v, impl: agent_attention(q, k, v, q[:, :, ::2], impl=impl),
    "clear": lambda q, k, v, impl: clear_attention(
        q, k, v, shape=(q.shape[2] // 2, 2), n_text=q.shape[2] % 2, radius=2, impl=impl
    ),
    "dsf linear": lambda q, k, v, impl: dsf_attention(q, k, v, kind="linear", impl=impl),
    "dsf softmax": lambda q, k, v, impl: dsf_attention(q, k, v, kind="softmax", impl=impl),
    "flow": lambda q, k, v, impl: flow_attention(q, k, v, impl=impl),
    "flow causal": lambda q, k, v, impl: flow_attention(q, k, v, is_causal=True, impl=impl),
    "gated linear": lambda q, k, v, impl: gated_linear_attention(q, k, v, -ones(q), impl=impl),
    "glca": lambda q, k, v, impl: global_local_cross_attention(
        q, k, v, torch.arange(q.shape[2]).expand(q.shape[0], -1), impl=impl
    ),
    "halo": lambda q, k, v, impl: halo_attention(
        q, k, v, shape=(q.shape[2], 1), block_size=1, halo_size=1, impl=impl
    ),
    "hip": lambda q, k, v, impl: hip_attention(
        q, k, v, top_k=4, block_size_q=2, block_size_k=2, impl=impl
    ),
    "lightnet": lambda q, k, v, impl: lightnet_attention(q, k, v, impl=impl),
    "lightning": lambda q, k, v, impl: lightning_attention(
        q, k, v, -torch.arange(H, device=q.device) / H, impl=impl
    ),
    "linear": lambda q, k, v, impl: linear_attention(
        q.sigmoid(), k.sigmoid(), v, eps=1e-6, impl=impl
    ),
    "moh": lambda q, k, v, impl: moh_attention(
        q, k, v, ones(q).mT, selected=torch.arange(H).expand(q.shape[0], q.shape[2], H) < 2,
        impl=impl,
    ),
    "neighborhood": lambda q, k, v, impl: neighborhood_attention(
        q, k, v, shape=(q.shape[2],), kernel_size=min(3, q.shape[2]), impl=impl
    ),
    "pwca": lambda q, k, v, impl: pair_wise_cross_attention(
        q, k, v, torch.arange(q.shape[0]).flip(0), impl=impl
    ),
    "reversed": lambda q, k, v, impl: reversed_attention(
        q, k, v.repeat_interleave(2, dim=1), impl=impl
    ),
    "sink": lambda q, k, v, impl: sink_attention(q, k, v, q.new_zeros(H), impl=impl),
    "softmax": lambda q, k, v, impl: softmax_attention(q, k, v, impl=impl),
    "var": lambda q, k, v, impl: visual_attention_redistribution(
        q, k, v, torch.arange(q.shape[2]) == 1, torch.arange(q.shape[2]) > 0, impl=impl
    ),
}  # fmt: skip
IMPLS = ("reference", "compiled", "auto")


def inputs(batch=2, tokens=6, groups=2, dtype=torch.float64):
    make = torch.Generator().manual_seed(0)
    return [
        torch.randn((batch, heads, tokens, D), generator=make).to(dtype).requires_grad_()
        for heads in (H, groups, groups)
    ]


def gradients(out, x):
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return torch.autograd.grad((out * weights).sum(), x)


def largest(x):
    return float(x.detach().double().abs().max()) if x.numel() else 0.0


@pytest.mark.parametrize("name", CASES)
def test_auto_takes_the_compiled_path_with_grouped_queries(name):
    made = {}
    for impl in IMPLS:
        x = inputs()
        with count_calls() as calls:
            out = CASES[name](*x, impl)
        paths = {path for _, path in calls}
        assert paths == {"compiled" if impl == "auto" else impl}
        assert out.shape == (2, H, 6, E)
        made[impl] = (out, *gradients(out, x))
    for impl in ("compiled", "auto"):
        for got, expected in zip(made[impl], made["reference"], strict=True):
            torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("batch", "tokens"), [(0, 6), (2, 0), (2, 1), (0, 0)])
def test_empty_and_single(name, impl, batch, tokens):
    if name == "neighborhood" and tokens == 0:
        return  # An axis must hold its window.
    x = inputs(batch, tokens)
    out = CASES[name](*x, impl)
    assert out.shape == (batch, H, tokens, E)
    found = gradients(out, x)
    assert all(bool(torch.isfinite(t).all()) for t in (out, *found))
    if out.numel() == 0:
        assert all(largest(t) == 0 for t in found)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_accumulates_in_single(name, dtype, bound):
    """Beside float64 on the same rounded inputs, gradients too; many tokens add up."""
    tokens = 64
    cut = [x.detach().requires_grad_() for x in inputs(1, tokens, dtype=dtype)]
    exact = [x.detach().double().requires_grad_() for x in cut]
    expected = CASES[name](*exact, "reference")
    wanted = (expected, *gradients(expected, exact))
    for impl in ("reference", "auto"):
        out = CASES[name](*cut, impl)
        assert out.dtype == dtype
        for got, t in zip((out, *gradients(out, cut)), wanted, strict=True):
            assert largest(got.double() - t) < bound * largest(t)


@pytest.mark.parametrize("name", CASES)
def test_errors_name_the_ways_out(name):
    q, k, v = (x.detach() for x in inputs())
    with pytest.raises(UnsupportedError, match="expected one of auto, reference, compiled, triton"):
        CASES[name](q, k, v, "quick")
    for broken in (
        (q[0], k, v), (q, k[:, :, :, :3], v), (q, k, v.float()), (q[:, :3], k, v),
        (q.long(), k.long(), v.long()),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="q, k, v|got"):
            CASES[name](*broken, "auto")
