"""HiP: batched search against the one by one, the softmax over what it keeps, identities."""

from __future__ import annotations

import pytest
import torch

from brainalign_kernels import (
    ShapeError,
    UnsupportedError,
    count_calls,
    hip_attention,
    hip_blocks,
    softmax_attention,
)
from brainalign_kernels.hip import gathered

PATHS = ("reference", "compiled")


def inputs(b, h, g, n, s, d, e, dtype=torch.float64):
    sizes = (b, h, n, d), (b, g, s, d), (b, g, s, e)
    return [
        torch.randn(size, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for i, size in enumerate(sizes)
    ]


CASES = [
    ((2, 2, 2, 40, 40, 5, 4), {"top_k": 8, "block_size_q": 8, "block_size_k": 2}),
    ((1, 4, 2, 13, 37, 4, 4), {"top_k": 7, "block_size_q": 5, "block_size_k": 3}),
    ((1, 2, 2, 33, 33, 4, 6), {"top_k": 6, "block_size_q": 4, "block_size_k": 1, "window": 5,
                               "sinks": 3}),
    ((1, 2, 1, 40, 43, 4, 4), {"top_k": 12, "block_size_q": 8, "block_size_k": 2, "group_k": 3,
                               "window": 7, "sinks": 2}),
    ((1, 4, 4, 30, 30, 4, 4), {"top_k": 4, "block_size_q": 6, "block_size_k": 2,
                               "head_group": 2}),
    ((1, 2, 2, 41, 41, 4, 4), {"top_k": 6, "block_size_q": 8, "block_size_k": 2, "head_group": 2,
                               "published_slots": True, "window": 4}),
    ((1, 1, 1, 1, 29, 4, 4), {"top_k": 4, "block_size_q": 8, "block_size_k": 2}),
]  # fmt: skip


def searched(options):
    return {n: x for n, x in options.items() if n != "sinks"}


@pytest.mark.parametrize(("size", "options"), CASES)
def test_paths_agree(size, options):
    q, k, v = inputs(*size)
    found = {i: hip_blocks(q, k, **searched(options), impl=i) for i in PATHS}
    assert torch.equal(found["compiled"][0], found["reference"][0])
    assert torch.equal(found["compiled"][1], found["reference"][1])
    made = {i: hip_attention(q, k, v, **options, impl=i) for i in PATHS}
    cotangent = torch.randn(
        made["reference"].shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64
    )
    grads = {i: torch.autograd.grad((o * cotangent).sum(), (q, k, v)) for i, o in made.items()}
    torch.testing.assert_close(made["compiled"], made["reference"], atol=1e-12, rtol=0)
    for got, expected in zip(grads["compiled"], grads["reference"], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_parts_change_nothing(monkeypatch):
    size, options = CASES[2]
    x = inputs(*size)
    whole = hip_attention(*x, **options, impl="compiled")
    monkeypatch.setattr(gathered, "_PART", 1)
    torch.testing.assert_close(hip_attention(*x, **options, impl="compiled"), whole)


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize(("n", "s"), [(19, 19), (5, 22), (1, 1)])
@pytest.mark.parametrize("more", [{}, {"window": 6, "sinks": 2}, {"head_group": 2}])
def test_keeping_all_keys_is_causal_softmax(impl, n, s, more):
    q, k, v = inputs(2, 2, 1, n, s, 4, 3)
    options = {"top_k": s, "block_size_q": 4, "block_size_k": 2, **more}
    causal = torch.ones(1, 1, n, s, dtype=torch.bool).tril(s - n)
    expected = softmax_attention(q, k, v, mask=causal)
    torch.testing.assert_close(
        hip_attention(q, k, v, **options, impl=impl), expected, atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("impl", PATHS)
def test_window_alone_is_what_a_block_without_searchable_keys_has(impl):
    q, k, v = inputs(1, 1, 1, 8, 8, 4, 4)
    got = hip_attention(
        q, k, v, top_k=1, block_size_q=4, block_size_k=1, window=2, unsearched=8, impl=impl
    )
    row, key = torch.arange(8)[:, None], torch.arange(8)
    end = row // 4 * 4 + 4
    mask = (key >= end - 2) & (key < end) & (key <= row)
    expected = softmax_attention(q, k, v, mask=mask[None, None])
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    assert (got[:, :, :2] == 0).all()
    grads = torch.autograd.grad(got.sum(), (q, k, v))
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("impl", PATHS)
def test_search_finds_a_key_that_stands_out_with_its_neighbours(impl):
    torch.manual_seed(0)
    q = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    q[..., 0] = 1.0
    k = 0.01 * torch.randn(1, 1, 64, 4, dtype=torch.float64)
    k[:, :, 32:48, 0] += 5.0
    kept, count = hip_blocks(q, k, top_k=8, block_size_q=4, block_size_k=1, impl=impl)
    assert count.item() == 8
    assert ((kept >= 32) & (kept < 48)).all()


def test_scoring_by_all_blocks_is_in_the_reference():
    q, k, v = inputs(1, 2, 2, 24, 24, 4, 4)
    options = {"top_k": 6, "block_size_q": 4, "block_size_k": 2, "all_blocks": True}
    with count_calls() as calls:
        hip_attention(q, k, v, **options)
    assert dict(calls) == {("hip_attention", "reference"): 1}
    with pytest.raises(UnsupportedError, match="first block"):
        hip_attention(q, k, v, **options, impl="compiled")


def test_gradcheck():
    x = inputs(1, 2, 1, 6, 8, 2, 2)
    assert torch.autograd.gradcheck(
        lambda *x: hip_attention(
            *x, top_k=2, block_size_q=2, block_size_k=1, window=1, sinks=1, impl="reference"
        ),
        x,
    )


@pytest.mark.parametrize(("b", "n", "s"), [(2, 0, 0), (2, 0, 5), (0, 4, 4)])
@pytest.mark.parametrize("impl", PATHS)
def test_empty(b, n, s, impl):
    out = hip_attention(*inputs(b, 2, 2, n, s, 3, 5), top_k=2, block_size_q=2, impl=impl)
    assert out.shape == (b, 2, n, 5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(dtype, bound):
    half = [x.detach().to(dtype) for x in inputs(1, 2, 2, 48, 48, 16, 16)]
    options = {"top_k": 8, "block_size_q": 8, "block_size_k": 2, "window": 8, "sinks": 2}
    expected = hip_attention(*[x.float() for x in half], **options, impl="reference")
    for impl in PATHS:
        out = hip_attention(*half, **options, impl=impl)
        assert out.dtype == dtype
        assert float((out.float() - expected).abs().max()) < bound


def test_auto_takes_the_fast_path():
    x = inputs(1, 1, 1, 9, 9, 3, 3)
    with count_calls() as calls:
        hip_attention(*x, top_k=4)
        hip_blocks(*x[:2], top_k=4)
    assert dict(calls) == {("hip_attention", "compiled"): 1, ("hip_blocks", "compiled"): 1}


def test_errors():
    x = inputs(1, 3, 3, 6, 6, 3, 3)
    with pytest.raises(ShapeError, match="top_k >= group_k"):
        hip_attention(*x, top_k=2, group_k=4)
    with pytest.raises(ShapeError, match="cannot be negative"):
        hip_attention(*x, top_k=2, window=-1)
    with pytest.raises(ShapeError, match="multiple of head_group"):
        hip_attention(*x, top_k=2, head_group=2)
    with pytest.raises(ShapeError, match="last of the keys' tokens; got 6 queries and 5"):
        hip_blocks(x[0], x[1][:, :, :5], top_k=2)
    with pytest.raises(ShapeError, match="positive scale"):
        hip_attention(*x, top_k=2, scale=-1.0)


def test_compile_and_export():
    q, k, v = (x.detach().float() for x in inputs(1, 2, 2, 24, 24, 4, 4))

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return hip_attention(q, k, v, top_k=4, block_size_q=4, window=4, sinks=1)

    expected = Model()(q, k, v)
    compiled = torch.compile(Model(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), expected)
    torch.testing.assert_close(torch.export.export(Model(), (q, k, v)).module()(q, k, v), expected)
