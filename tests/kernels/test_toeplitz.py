"""Toeplitz position encoding."""

from __future__ import annotations

import pytest
import torch

from brainalign_kernels import MDTPE, TPE, ShapeError, count_calls, md_tpe, tpe

PATHS = ("reference", "compiled")


def random(*shape, seed=0):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.requires_grad_()


def parameters(h, d, seed=1):
    return random(h, d, seed=seed), random(h, d, seed=seed + 1), random(h, seed=seed + 2)


@pytest.mark.parametrize("impl", PATHS)
def test_is_the_recurrence(impl):
    x, (q, k, decay) = random(2, 3, 30, 4), parameters(3, 4)
    out, last = tpe(x, q, k, decay, return_state=True, chunk_size=4, impl=impl)
    state = torch.zeros(2, 3, 4, dtype=torch.float64)
    for t in range(30):
        state = decay.sigmoid()[:, None] * state + x[:, :, t]
        torch.testing.assert_close(out[:, :, t], (q * k).sum(-1)[:, None] * state)
    torch.testing.assert_close(last, state)


@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 16, 37, 70])
@pytest.mark.parametrize("chunk", [1, 2, 4, 64])
def test_paths_agree(tokens, chunk):
    x, (q, k, decay), start = random(2, 2, tokens, 3), parameters(2, 3), random(2, 2, 3, seed=9)
    made = {}
    for impl in PATHS:
        out, last = tpe(x, q, k, decay, state=start, return_state=True, chunk_size=chunk, impl=impl)
        total = (out * random(*out.shape, seed=5)).sum() + last.square().sum()
        found = torch.autograd.grad(total, (x, q, k, decay, start), materialize_grads=True)
        made[impl] = (out, last, *found)
    for got, expected in zip(made["compiled"], made["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("decay", [-60.0, 60.0])
def test_extreme_decays(decay):
    x, (q, k, _) = random(1, 2, 50, 3).detach().float(), parameters(2, 3)
    a = torch.full((2,), decay, requires_grad=True)
    for impl in PATHS:
        out = tpe(x, q.float(), k.float(), a, chunk_size=8, impl=impl)
        weight = (q * k).sum(-1)[:, None, None].float()
        expected = weight * (x if decay < 0 else x.cumsum(2))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert torch.isfinite(torch.autograd.grad(out.sum(), a)[0]).all()


@pytest.mark.parametrize("impl", PATHS)
def test_token_by_token_and_the_future(impl):
    x, (q, k, decay) = random(1, 2, 9, 3), parameters(2, 3)
    whole, last = tpe(x, q, k, decay, return_state=True, impl=impl)
    parts, state = tpe(x[:, :, :4], q, k, decay, return_state=True, impl=impl)
    for t in range(4, 9):
        now, state = tpe(x[:, :, t : t + 1], q, k, decay, state=state, return_state=True, impl=impl)
        parts = torch.cat([parts, now], dim=2)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(state, last)


def test_axes_add_up():
    x = random(2, 3, 4, 2, 3)
    first, second = parameters(2, 3), parameters(2, 3, seed=5)
    dims = (1, -3)
    out = md_tpe(x, *zip(first, second, strict=True), dims)
    rows = x.permute(0, 2, 3, 1, 4).flatten(0, 1)
    along = tpe(rows, *first).unflatten(0, (2, 4)).permute(0, 3, 1, 2, 4)
    columns = x.permute(0, 1, 3, 2, 4).flatten(0, 1)
    across = tpe(columns, *second).unflatten(0, (2, 3)).permute(0, 1, 3, 2, 4)
    torch.testing.assert_close(out, along + across)


def test_gradcheck():
    x, (q, k, decay) = random(1, 2, 5, 2), parameters(2, 2)
    for impl in PATHS:
        assert torch.autograd.gradcheck(
            lambda *a, i=impl: tpe(*a, chunk_size=2, impl=i), (x, q, k, decay)
        )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_half_precision(dtype, bound):
    half = [t.detach().to(dtype) for t in (random(1, 2, 90, 4), *parameters(2, 4))]
    expected = tpe(*[t.double() for t in half], impl="reference")
    for impl in PATHS:
        out = tpe(*half, impl=impl)
        assert out.dtype == dtype
        assert float((out.double() - expected).abs().max() / expected.abs().max()) < bound


@pytest.mark.parametrize("norm", ["rmsnorm", "grouprmsnorm"])
def test_layer(norm):
    torch.manual_seed(0)
    layer = TPE(8, 2, norm=norm, bias=True, norm_eps=1e-3).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    mask = torch.ones(2, 7)
    mask[0, :2] = 0
    out, state = layer(x, mask=mask, return_state=True)
    core, last = layer.core(x * mask[..., None])
    torch.testing.assert_close(state, last)
    y = core.unflatten(-1, (2, 4)) if norm == "grouprmsnorm" else core[:, :, None]
    y = y * (y.shape[-1] / (y.square().sum(-1, keepdim=True) + 1e-3)).sqrt()
    torch.testing.assert_close(out, layer.o_proj(layer.norm.weight * y.flatten(2)))
    assert torch.isfinite(out).all()


def test_layer_over_axes():
    torch.manual_seed(0)
    layer = MDTPE(6, 3, dims=(-2, -3)).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    along = layer.tpes[0](x.flatten(0, 1)).unflatten(0, (2, 4))
    across = layer.tpes[1](x.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 5)).transpose(1, 2)
    torch.testing.assert_close(layer(x), along + across)


def test_counts_compile_and_export():
    x, (q, k, decay) = random(1, 2, 9, 3).detach(), parameters(2, 3)
    with count_calls() as calls:
        expected = tpe(x, q, k, decay, chunk_size=4)
        tpe(x, q, k, decay, impl="reference")
    assert dict(calls) == {("tpe", "compiled"): 1, ("tpe", "reference"): 1}
    compiled = torch.compile(lambda *a: tpe(*a, chunk_size=4), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, q, k, decay), expected)
    layer = MDTPE(6, 3, dims=(-2, -3))
    grid = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(torch.export.export(layer, (grid,)).module()(grid), layer(grid))


def test_errors():
    x, (q, k, decay) = random(1, 2, 6, 4), parameters(2, 4)
    for run, message in (
        (lambda: tpe(x[0], q, k, decay), "batch, heads, tokens, channels"),
        (lambda: tpe(x, q[:1], k, decay), "q and k must have shape"),
        (lambda: tpe(x, q, k, decay, state=x), "state must have shape"),
        (lambda: tpe(x, q, k, decay, chunk_size=0), "chunk_size"),
        (lambda: md_tpe(x, [q], [k], [decay], [0]), "no axis of the grid"),
        (lambda: md_tpe(x, [q], [k], [decay], [1, 2]), "one entry per axis"),
        (lambda: TPE(8, 3), "multiple of num_heads"),
        (lambda: TPE(8, 2, norm="batch"), "norm must be"),
        (lambda: MDTPE(8, 2, dims=(-1,))(torch.zeros(1, 3, 8)), "no axis of the grid"),
    ):
        with pytest.raises(ShapeError, match=message):
            run()
