"""Halo attention: its paths against each other, against timm, and its identities."""

from __future__ import annotations

import pytest
import torch

from brainalign_kernels import (
    HaloAttention,
    ShapeError,
    count_calls,
    halo_attention,
    softmax_attention,
)

PATHS = ("reference", "compiled")


def normal(*shape, seed=0, dtype=torch.float64):
    make = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=make, dtype=torch.float64).to(dtype)


def inputs(b, h, g, shape, stride, d, e, dtype=torch.float64):
    keys = shape[0] * shape[1]
    queries = (shape[0] // stride) * (shape[1] // stride)
    return [
        normal(*size, seed=i, dtype=dtype).requires_grad_()
        for i, size in enumerate([(b, h, queries, d), (b, g, keys, d), (b, g, keys, e)])
    ]


@pytest.mark.parametrize(
    ("heads", "groups", "shape", "block", "halo", "stride", "d", "e"),
    [
        (2, 2, (8, 12), 4, 2, 1, 6, 6),
        (4, 2, (6, 3), 3, 1, 1, 3, 40),
        (2, 1, (8, 4), 4, 3, 2, 5, 2),
        (1, 1, (5, 5), 5, 0, 1, 4, 4),
        (1, 1, (3, 2), 1, 4, 1, 2, 3),
    ],
)
@pytest.mark.parametrize("relative", ["none", "both", "rows", "scaled"])
def test_paths_agree(heads, groups, shape, block, halo, stride, d, e, relative):
    x = inputs(2, heads, groups, shape, stride, d, e)
    size = (2 * (block + 2 * halo) - 1, d)
    options = {"shape": shape, "block_size": block, "halo_size": halo, "stride": stride}
    if relative != "none":
        options["height_rel"] = normal(*size, seed=5).requires_grad_()
    if relative in ("both", "scaled"):
        options["width_rel"] = normal(*size, seed=6).requires_grad_()
    options["scale_pos"] = relative == "scaled"
    leaves = [*x, *(t for t in options.values() if isinstance(t, torch.Tensor))]
    made = {i: halo_attention(*x, **options, impl=i) for i in PATHS}
    cotangent = normal(*made["reference"].shape, seed=7)
    grads = {i: torch.autograd.grad((o * cotangent).sum(), leaves) for i, o in made.items()}
    torch.testing.assert_close(made["compiled"], made["reference"], atol=1e-12, rtol=0)
    for got, expected in zip(grads["compiled"], grads["reference"], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("impl", PATHS)
def test_one_block_without_halo_is_softmax(impl):
    q, k, v = inputs(2, 2, 2, (4, 4), 1, 5, 5)
    got = halo_attention(q, k, v, shape=(4, 4), block_size=4, halo_size=0, impl=impl)
    torch.testing.assert_close(got, softmax_attention(q, k, v), atol=1e-12, rtol=0)


@pytest.mark.parametrize("impl", PATHS)
def test_padding_takes_part_in_the_softmax(impl):
    q, k, v = inputs(1, 1, 1, (2, 2), 1, 3, 3)
    got = halo_attention(q, k, v, shape=(2, 2), block_size=2, halo_size=1, impl=impl)
    zeros = torch.zeros(1, 1, 12, 3, dtype=torch.float64)
    expected = softmax_attention(q, torch.cat([k, zeros], 2), torch.cat([v, zeros], 2))
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 16, "num_heads": 2, "block_size": 4, "halo_size": 1},
        {"dim": 12, "dim_out": 20, "num_heads": 4, "dim_head": 3, "block_size": 2,
         "halo_size": 3, "qkv_bias": True, "scale_pos_embed": True},
        {"dim": 16, "num_heads": 4, "stride": 2, "block_size": 4, "halo_size": 2},
        {"dim": 16, "num_heads": 4, "stride": 2, "block_size": 4, "halo_size": 1,
         "avg_down": True},
        {"dim": 24, "num_heads": 3, "block_size": 8, "halo_size": 3, "qk_ratio": 0.4},
    ],
)  # fmt: skip
@pytest.mark.parametrize("impl", PATHS)
def test_is_timms_halo_attention(options, impl):
    layers = pytest.importorskip("timm.layers.halo_attn")
    torch.manual_seed(0)
    theirs = layers.HaloAttn(**options).double()
    ours = HaloAttention(**options, impl=impl).double()
    ours.load_state_dict(theirs.state_dict())
    x = normal(2, options["dim"], 8, 16)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, expected = ours(a), theirs(b)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    cotangent = normal(*got.shape, seed=4)
    (got * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, atol=1e-11, rtol=0)
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_p.grad, theirs_p.grad, atol=1e-11, rtol=0)


def test_gradcheck():
    x = inputs(1, 2, 1, (2, 4), 1, 2, 2)
    rel = [normal(7, 2, seed=s).requires_grad_() for s in (5, 6)]
    assert torch.autograd.gradcheck(
        lambda q, k, v, rows, columns: halo_attention(
            q, k, v, shape=(2, 4), block_size=2, halo_size=1, height_rel=rows,
            width_rel=columns, impl="reference",
        ),
        (*x, *rel),
    )  # fmt: skip


@pytest.mark.parametrize(("b", "shape"), [(0, (4, 4)), (2, (0, 4)), (2, (0, 0))])
@pytest.mark.parametrize("impl", PATHS)
def test_empty(b, shape, impl):
    x = inputs(b, 2, 2, shape, 1, 3, 5)
    out = halo_attention(*x, shape=shape, block_size=2, halo_size=1, impl=impl)
    assert out.shape == (b, 2, shape[0] * shape[1], 5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("impl", PATHS)
def test_half_precision(dtype, bound, impl):
    x = [t.detach() for t in inputs(2, 2, 2, (8, 8), 1, 16, 16, dtype)]
    rel = [0.25 * normal(15, 16, seed=s, dtype=dtype) for s in (5, 6)]
    options = {"shape": (8, 8), "block_size": 4, "halo_size": 2}
    out = halo_attention(*x, **options, height_rel=rel[0], width_rel=rel[1], impl=impl)
    exact = [t.double() for t in (*x, *rel)]
    expected = halo_attention(
        *exact[:3], **options, height_rel=exact[3], width_rel=exact[4], impl="reference"
    )
    assert out.dtype == dtype
    assert float((out.double() - expected).abs().max()) < bound


def test_auto_takes_the_fast_path():
    with count_calls() as calls:
        halo_attention(*inputs(1, 1, 1, (2, 2), 1, 3, 3), shape=(2, 2), block_size=2, halo_size=1)
    assert dict(calls) == {("halo_attention", "compiled"): 1}


def test_errors():
    x = inputs(1, 1, 1, (4, 4), 1, 3, 3)
    with pytest.raises(ShapeError, match="multiples of block_size 3"):
        halo_attention(*x, shape=(4, 4), block_size=3, halo_size=1)
    with pytest.raises(ShapeError, match="has 8 keys and 8 queries; got 16 and 16"):
        halo_attention(*x, shape=(2, 4), block_size=2, halo_size=1)
    with pytest.raises(ShapeError, match="stride that divides"):
        halo_attention(*x, shape=(4, 4), block_size=2, halo_size=1, stride=3)
    with pytest.raises(ShapeError, match=r"height_rel must be \(7, 3\)"):
        halo_attention(*x, shape=(4, 4), block_size=2, halo_size=1, height_rel=normal(8, 3))
    with pytest.raises(ShapeError, match="stride must be 1 or 2"):
        HaloAttention(8, num_heads=2, stride=4)
    with pytest.raises(ShapeError, match="multiple of num_heads"):
        HaloAttention(9, num_heads=2)
    with pytest.raises(ShapeError, match=r"takes \(B, 8, h, w\)"):
        HaloAttention(8, num_heads=2)(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ShapeError, match="multiples of 8; got 8 x 9"):
        HaloAttention(8, num_heads=2)(torch.zeros(1, 8, 8, 9))


def test_compile_and_export():
    block = HaloAttention(8, num_heads=2, block_size=4, halo_size=1).eval()
    x = normal(1, 8, 8, 4, dtype=torch.float32)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), block(x))
    exported = torch.export.export(block, (x,)).module()
    torch.testing.assert_close(exported(x), block(x))
