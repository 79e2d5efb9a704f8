"""Softmax attention: its two paths against each other and against PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from brainalign_kernels import ShapeError, UnsupportedError, count_calls, softmax_attention


def qkv(b, h, g, n, s, d, e, dtype=torch.float64, seed=0):
    make = torch.Generator().manual_seed(seed)
    shapes = (b, h, n, d), (b, g, s, d), (b, g, s, e)
    return [
        torch.randn(x, generator=make, dtype=torch.float64).to(dtype).requires_grad_()
        for x in shapes
    ]


@pytest.mark.parametrize(
    "shape", [(2, 4, 4, 7, 7, 5, 5), (1, 4, 2, 3, 11, 8, 6), (1, 2, 1, 1, 1, 4, 4)]
)
@pytest.mark.parametrize("masked", ["none", "bool", "bias", "causal", "causal and bool"])
def test_paths_agree(shape, masked):
    q, k, v = qkv(*shape)
    make = torch.Generator().manual_seed(1)
    size = (shape[0], 1, shape[3], shape[4])
    keep = torch.rand(size, generator=make) > 0.4
    keep[:, :, 0] = False
    mask = {"bool": keep, "bias": torch.where(keep, 0.3, -torch.inf).double()}.get(masked)
    mask = keep if masked == "causal and bool" else mask
    options = {"mask": mask, "is_causal": "causal" in masked, "scale": 0.7}
    made = {i: softmax_attention(q, k, v, impl=i, **options) for i in ("reference", "compiled")}
    cotangent = torch.randn(made["reference"].shape, generator=make, dtype=torch.float64)
    grads = {i: torch.autograd.grad((o * cotangent).sum(), (q, k, v)) for i, o in made.items()}
    torch.testing.assert_close(made["compiled"], made["reference"], atol=1e-12, rtol=0)
    for got, expected in zip(grads["compiled"], grads["reference"], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    if mask is not None:
        assert (made["compiled"][:, :, 0] == 0).all()


def test_is_scaled_dot_product_attention():
    q, k, v = qkv(2, 3, 3, 9, 9, 4, 4)
    torch.testing.assert_close(
        softmax_attention(q, k, v, impl="reference"), scaled_dot_product_attention(q, k, v)
    )


def test_gradcheck():
    q, k, v = qkv(1, 2, 1, 3, 4, 3, 2)
    keep = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    keep[..., 1, :] = False
    assert torch.autograd.gradcheck(
        lambda *x: softmax_attention(*x, mask=keep, impl="reference"), (q, k, v)
    )


@pytest.mark.parametrize(("n", "s"), [(0, 3), (3, 0), (0, 0)])
def test_empty(n, s):
    q, k, v = qkv(2, 2, 2, n, s, 3, 5)
    for impl in ("reference", "compiled"):
        out = softmax_attention(q, k, v, impl=impl)
        assert out.shape == (2, 2, n, 5) and (out == 0).all()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision(dtype, bound):
    exact = qkv(2, 4, 4, 33, 33, 16, 16)
    half = [x.detach().to(dtype) for x in exact]
    expected = softmax_attention(*[x.double() for x in half], impl="reference")
    for impl in ("reference", "compiled"):
        out = softmax_attention(*half, impl=impl)
        assert out.dtype == dtype
        assert float((out.double() - expected).abs().max()) < bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_large_negative_mask_is_no_empty_row(dtype):
    """In half precision -1e9 must not become -inf: where all keys have it, all are seen."""
    q, k, v = (x.detach() for x in qkv(1, 2, 2, 3, 4, 8, 8, dtype))
    mask = torch.zeros(1, 1, 3, 4)
    mask[..., 0, :], mask[..., 1, 1:], mask[..., 2, :] = -1e9, -1e9, -torch.inf
    for impl in ("reference", "compiled"):
        out = softmax_attention(0 * q, k, v, mask=mask, impl=impl)
        torch.testing.assert_close(out[:, :, 0], v.float().mean(dim=2).to(dtype))
        torch.testing.assert_close(out[:, :, 1], v[:, :, 0])
        assert (out[:, :, 2] == 0).all()


@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
@pytest.mark.parametrize("size", [(1, 1, 5, 1), (2, 1, 1, 1), (1, 4, 1, 6)])
def test_masks_are_broadcast(kind, size):
    q, k, v = qkv(2, 4, 2, 5, 6, 3, 3)
    mask = torch.randn(size, generator=torch.Generator().manual_seed(3)) > 0
    mask = mask if kind == torch.bool else torch.zeros(size).double().masked_fill(~mask, -torch.inf)
    made = [softmax_attention(q, k, v, mask=mask, impl=i) for i in ("reference", "compiled")]
    torch.testing.assert_close(*made)


def test_auto_takes_the_fast_path():
    q, k, v = qkv(1, 2, 2, 4, 4, 3, 3)
    with count_calls() as calls:
        softmax_attention(q, k, v)
        softmax_attention(q, k, v, impl="reference")
    assert dict(calls) == {
        ("softmax_attention", "compiled"): 1, ("softmax_attention", "reference"): 1
    }  # fmt: skip


def test_errors():
    q, k, v = qkv(1, 3, 2, 4, 4, 3, 3)
    with pytest.raises(ShapeError, match="multiple of key heads"):
        softmax_attention(q, k, v)
    with pytest.raises(ShapeError, match="batch, heads, tokens, channels"):
        softmax_attention(q[0], k, v)
    with pytest.raises(ShapeError, match="one floating-point type"):
        softmax_attention(q, k.float(), v)
    q, k, v = qkv(1, 2, 2, 4, 4, 3, 3)
    for mask, message in (
        (torch.ones(4, 4, dtype=torch.bool), "mask must have 4 axes"),
        (torch.ones(1, 1, 4, 3, dtype=torch.bool), "broadcastable to"),
        (torch.ones(1, 1, 4, 4, dtype=torch.int64), "boolean or floating point"),
    ):
        with pytest.raises(ShapeError, match=message):
            softmax_attention(q, k, v, mask=mask)
    with pytest.raises(UnsupportedError, match="no implementation 'triton'"):
        softmax_attention(q, k, v, impl="triton")
    with pytest.raises(UnsupportedError, match="expected one of"):
        softmax_attention(q, k, v, impl="fast")


def test_compile_and_export():
    q, k, v = (x.detach() for x in qkv(1, 2, 2, 4, 4, 3, 3))
    compiled = torch.compile(lambda *x: softmax_attention(*x), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), softmax_attention(q, k, v))

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return softmax_attention(q, k, v)

    exported = torch.export.export(Model(), (q, k, v)).module()
    torch.testing.assert_close(exported(q, k, v), softmax_attention(q, k, v))
