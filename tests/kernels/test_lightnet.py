"""LightNet: its paths against each other, and against what its definition promises."""

from __future__ import annotations

import pytest
import torch
from builds import EVERY, run_builds

from brainalign_kernels import (
    LightNetAttention,
    ShapeError,
    UnsupportedError,
    count_calls,
    lightnet_attention,
    lightnet_recurrence,
)
from brainalign_kernels.lightnet.attention import running_log_sum

PATHS = ("reference", "compiled")


def qkv(b, h, g, n, d, e, *, size=1.0, dtype=torch.float64, seed=0):
    make = torch.Generator().manual_seed(seed)
    shapes = (b, h, n, d), (b, g, n, d), (b, g, n, e)
    q, k, v = (torch.randn(x, generator=make, dtype=torch.float64) for x in shapes)
    return [x.to(dtype).requires_grad_() for x in (q, k * size, v)]


def state_of(b, g, d, e, seed=7):
    make = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(x, generator=make, dtype=torch.float64).requires_grad_()
        for x in ((b, g, d, e), (b, g, d))
    )


def gradients(outputs, inputs, seed=1):
    make = torch.Generator().manual_seed(seed)
    total = sum(
        (x.nan_to_num(neginf=0.0) * torch.randn(x.shape, generator=make, dtype=torch.float64)).sum()
        for x in outputs
    )
    return torch.autograd.grad(total, inputs, retain_graph=True)


def error(got, expected):
    """Largest difference over largest value, or over 1: the terms of gradients are that large."""
    got, expected = got.detach().double(), expected.detach().double()
    if expected.numel() == 0:
        return 0.0
    assert torch.isfinite(got).all()
    return float((got - expected).abs().max()) / max(float(expected.abs().max()), 1.0)


@pytest.mark.parametrize("impl", PATHS)
def test_is_a_softmax_over_the_prefix(impl):
    q, k, v = qkv(1, 2, 2, 9, 3, 4)
    out, (memory, total) = lightnet_attention(q, k, v, return_state=True, impl=impl)
    for t in range(9):
        weights = k[:, :, : t + 1].softmax(dim=2)
        expected = torch.einsum("bhd,bhsd,bhse->bhe", q[:, :, t], weights, v[:, :, : t + 1])
        torch.testing.assert_close(out[:, :, t], expected)
    torch.testing.assert_close(memory, k.softmax(dim=2).transpose(2, 3) @ v)
    torch.testing.assert_close(total, k.logsumexp(dim=2))


@pytest.mark.parametrize("impl", PATHS)
def test_is_the_published_recurrence(impl):
    q, k, v = (x.detach() for x in qkv(2, 2, 2, 11, 3, 4))
    for zero_start in (False, True):
        out = lightnet_attention(
            q, k, v, zero_start=zero_start, activation="silu", scale=0.5, impl=impl
        )
        z = torch.zeros_like(k[:, :, 0]) if zero_start else torch.full_like(k[:, :, 0], -torch.inf)
        memory = torch.zeros(2, 2, 3, 4, dtype=torch.float64)
        for t in range(11):
            before, z = z, torch.logaddexp(z, k[:, :, t])
            added = (k[:, :, t] - z).exp()[..., None] * v[:, :, t, None]
            memory = (before - z).exp()[..., None] * memory + added
            query = 0.5 * torch.nn.functional.silu(q[:, :, t])
            torch.testing.assert_close(out[:, :, t], (query[:, :, None] @ memory)[:, :, 0])


@pytest.mark.parametrize(
    "shape",
    [(2, 3, 3, 13, 5, 6), (1, 4, 2, 40, 4, 3), (1, 2, 1, 1, 3, 2), (2, 2, 2, 0, 3, 4)],
)
@pytest.mark.parametrize("size", [1.0, 40.0, 3000.0])
def test_paths_agree(shape, size):
    b, _, g, n, d, e = shape
    q, k, v = qkv(*shape, size=size)
    modulation = qkv(b, g, g, n, d, e, seed=3)[0]
    start = state_of(b, g, d, e)
    mask = torch.rand(b, n, generator=torch.Generator().manual_seed(5)) > 0.3
    mask[:1, :3] = False
    for options in (
        {"chunk_size": 8},
        {"chunk_size": 3, "state": start, "modulation": modulation},
        {"chunk_size": 64, "mask": mask, "zero_start": True},
        {"chunk_size": 16, "mask": mask, "scale": 0.3, "activation": "silu"},
    ):
        inputs = [q, k, v]
        inputs += [modulation, *start] if "state" in options else []
        made = {}
        for impl in PATHS:
            out, state = lightnet_attention(q, k, v, return_state=True, impl=impl, **options)
            found = gradients([out, *state], inputs)
            made[impl] = [out, *(s.nan_to_num(neginf=-1.0) for s in state), *found]
        for got, expected in zip(made["compiled"], made["reference"], strict=True):
            assert error(got, expected) < 1e-11


@pytest.mark.parametrize("size", [0.0, 30.0, 500.0])
def test_large_logits_in_single_precision(size):
    inputs = qkv(1, 2, 2, 130, 8, 8, size=size)
    exact = lightnet_attention(*inputs, impl="reference")
    expected = [exact, *gradients([exact], inputs)]
    single = [x.detach().float().requires_grad_() for x in inputs]
    for impl in PATHS:
        out = lightnet_attention(*single, impl=impl)
        for got, right in zip([out, *gradients([out], single)], expected, strict=True):
            assert error(got, right) < 5e-6 + 1e-6 * size
            # z itself has float32's relative precision: 1e-7 of a logit is an error of a weight.


def test_rising_logits_beyond_the_range_of_exp():
    q, _, v = (x.detach().float() for x in qkv(1, 1, 1, 64, 2, 3))
    k = torch.arange(64.0)[:, None].mul(torch.tensor([20.0, -20.0])).expand(1, 1, 64, 2)
    out = lightnet_attention(q, k, v, impl="compiled", chunk_size=64)
    expected = q[..., :1] * v + q[..., 1:] * v[:, :, :1]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_chunk_size_changes_nothing():
    q, k, v = qkv(1, 2, 2, 37, 4, 5, size=5)
    expected = lightnet_attention(q, k, v, impl="reference")
    for chunk in (1, 2, 5, 16, 37, 64):
        out = lightnet_attention(q, k, v, impl="compiled", chunk_size=chunk)
        assert error(out, expected) < 1e-12


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("zero_start", [False, True])
def test_token_by_token(impl, zero_start):
    q, k, v = (x.detach() for x in qkv(2, 4, 2, 12, 3, 5, size=3))
    whole, last = lightnet_attention(q, k, v, zero_start=zero_start, return_state=True, impl=impl)
    out, state = lightnet_attention(
        q[:, :, :5], k[:, :, :5], v[:, :, :5], zero_start=zero_start, return_state=True, impl=impl
    )
    parts = [out]
    for t in range(5, 12):
        now = slice(t, t + 1)
        out, state = lightnet_attention(
            q[:, :, now], k[:, :, now], v[:, :, now], state=state, return_state=True, impl=impl
        )
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("impl", PATHS)
def test_the_future_does_not_matter(impl):
    q, k, v = (x.detach() for x in qkv(1, 2, 2, 20, 3, 4))
    before = lightnet_attention(q, k, v, chunk_size=8, impl=impl)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, 11:] = 50.0
    after = lightnet_attention(*changed, chunk_size=8, impl=impl)
    torch.testing.assert_close(after[:, :, :11], before[:, :, :11], rtol=0, atol=1e-13)
    assert not torch.allclose(after[:, :, 11:], before[:, :, 11:])


def test_bidirectional():
    q, k, v = qkv(2, 4, 2, 9, 3, 5)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 4:], mask[1] = False, False
    out = lightnet_attention(q, k, v, is_causal=False, mask=mask)
    key, value = (x.repeat_interleave(2, dim=1)[:1, :, :4] for x in (k, v))
    expected = q[:1] @ (key.softmax(dim=2).transpose(2, 3) @ value)
    torch.testing.assert_close(out[:1], expected)
    assert (out[1] == 0).all()
    for found in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.isfinite(found).all() and (found[1] == 0).all()
    out = lightnet_attention(q, k, v, is_causal=False, zero_start=True)
    weights = (k.exp() / (1 + k.exp().sum(dim=2, keepdim=True))).repeat_interleave(2, dim=1)
    torch.testing.assert_close(out, q @ (weights.transpose(2, 3) @ v.repeat_interleave(2, dim=1)))
    last = lightnet_attention(q, k, v)[:, :, -1]
    whole = lightnet_attention(q, k, v, is_causal=False)[:, :, -1]
    torch.testing.assert_close(last, whole)


def test_gradcheck():
    q, k, v = qkv(1, 2, 1, 5, 2, 3)
    start = state_of(1, 1, 2, 3)

    def run(q, k, v, memory, total, impl, causal=True):
        if not causal:
            return lightnet_attention(q, k, v, is_causal=False, zero_start=True)
        out, state = lightnet_attention(
            q, k, v, state=(memory, total), return_state=True, chunk_size=2, impl=impl
        )
        return out, *state

    for impl in PATHS:
        assert torch.autograd.gradcheck(lambda *x, i=impl: run(*x, impl=i), (q, k, v, *start))
    assert torch.autograd.gradcheck(lambda *x: run(*x, *start, None, causal=False), (q, k, v))
    assert torch.autograd.gradgradcheck(
        lambda *x: lightnet_attention(*x, impl="reference"), (q, k, v)
    )


@pytest.mark.parametrize("channels", [3, 1])
def test_recurrence(channels):
    q, kappa, v = qkv(2, 2, 2, 17, 3, 4)
    k = qkv(2, 2, 2, 17, channels, 4, seed=9)[1]
    start = state_of(2, 2, 3, 4)
    made = {}
    for impl in PATHS:
        z, share = running_log_sum(k, start[1][..., :channels], impl=impl)
        out, state = lightnet_recurrence(
            q, kappa, v, z, state=start, return_state=True, chunk_size=4, impl=impl
        )
        found = gradients([out, *state, share], (q, kappa, v, k, *start))
        made[impl] = [out, *state, share, *found]
    for got, expected in zip(made["compiled"], made["reference"], strict=True):
        assert error(got, expected) < 1e-12
    memory, before = start
    for t in range(17):
        now = z[:, :, t].expand(2, 2, 3)
        keep = (before - now).exp()[..., None]
        memory, before = keep * memory + kappa[:, :, t, :, None] * v[:, :, t, None], now
        torch.testing.assert_close(out[:, :, t], (q[:, :, t, None] @ memory)[:, :, 0])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_half_precision(dtype, bound):
    half = [x.detach().to(dtype).requires_grad_() for x in qkv(1, 2, 2, 70, 16, 16)]
    exact = [x.detach().double().requires_grad_() for x in half]
    expected = lightnet_attention(*exact, impl="reference")
    for impl in PATHS:
        out, state = lightnet_attention(*half, return_state=True, impl=impl)
        assert out.dtype == dtype and state[0].dtype == torch.float32
        assert error(out, expected) < bound
        found = gradients([out.double()], half)
        for got, right in zip(found, gradients([expected], exact), strict=True):
            assert got.dtype == dtype and error(got, right) < bound


@pytest.mark.parametrize("impl", PATHS)
def test_nothing_seen_gives_zeros(impl):
    q, k, v = qkv(2, 2, 2, 6, 3, 4)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 3:] = True
    out, (_, total) = lightnet_attention(q, k, v, mask=mask, return_state=True, impl=impl)
    assert (out[0] == 0).all() and (out[1, :, :3] == 0).all() and (out[1, :, 3:] != 0).any()
    assert (total[0] == -torch.inf).all() and torch.isfinite(total[1]).all()
    for found in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.isfinite(found).all() and (found[0] == 0).all()


def test_auto_takes_the_fast_path():
    q, k, v = qkv(1, 2, 2, 4, 3, 3)
    layer = LightNetAttention(6, 2, lrpe="cosine").double()
    with count_calls() as calls:
        lightnet_attention(q, k, v)
        lightnet_attention(q, k, v, impl="reference")
        layer(torch.randn(1, 4, 6, dtype=torch.float64))
    assert dict(calls) == {
        ("lightnet_attention", "compiled"): 1,
        ("lightnet_attention", "reference"): 1,
        ("lightnet_log_sum", "compiled"): 1,
        ("lightnet_recurrence", "compiled"): 1,
    }


def test_errors():
    q, k, v = qkv(1, 2, 2, 4, 3, 5)
    for options, message in (
        ({"modulation": v}, "modulation must be as k"),
        ({"activation": "telepathy"}, "'none' or 'silu'"),
        ({"is_causal": False, "return_state": True}, "Only causal"),
        ({"state": state_of(1, 2, 5, 3)}, "state must be two tensors"),
        ({"mask": torch.ones(1, 4)}, "mask must be bool"),
        ({"chunk_size": 0}, "chunk_size must be"),
    ):
        with pytest.raises(ShapeError, match=message):
            lightnet_attention(q, k, v, **options)
    with pytest.raises(ShapeError, match="the same tokens"):
        lightnet_attention(q[:, :, 1:], k, v)
    with pytest.raises(ShapeError, match="z the same or one channel"):
        lightnet_recurrence(q, k, v, k[..., :2])
    with pytest.raises(UnsupportedError, match="no implementation 'triton'"):
        lightnet_attention(q, k, v, is_causal=False, impl="triton")
    with pytest.raises(UnsupportedError, match="input_gate needs"):
        LightNetAttention(8, 2, input_gate=True)
    with pytest.raises(UnsupportedError, match="only by a recurrence"):
        LightNetAttention(8, 2, scalar_decay=True, is_causal=False)
    with pytest.raises(ShapeError, match="needs the shape of the grid"):
        LightNetAttention(8, 2, lrpe="md")(torch.zeros(1, 4, 8))


def test_compile_export_and_operator_checks():
    q, k, v = (x.detach() for x in qkv(1, 2, 2, 9, 3, 3))

    def run(q, k, v):
        return lightnet_attention(q, k, v, chunk_size=4)

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return run(q, k, v)

    expected = run(q, k, v)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), expected)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    got = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(run(*inputs).sum(), inputs))
    torch.testing.assert_close(torch.export.export(Model(), (q, k, v)).module()(q, k, v), expected)
    check = torch.library.opcheck
    start = [x.detach() for x in state_of(1, 2, 3, 3)]
    z, kappa = running_log_sum(k, start[1])
    ops = torch.ops.brainalign
    check(ops.lightnet_chunked_gates.default, (inputs[1], start[1].requires_grad_()))
    sample = [x.detach().requires_grad_() for x in (q, kappa, v, z, start[1], start[0])]
    check(ops.lightnet_chunked.default, (*sample, 4))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zero_start": True, "gate": "sigmoid", "gate_pos": "pre", "norm": "grouprmsnorm"},
        {"lrpe": "rotate", "key_dim": 8, "gate": None},
        {"lrpe": "cosine", "shared_angles": True, "bias": True},
        {"scalar_decay": True, "lrpe": "rotate", "key_dim": 8},
        {"scalar_decay": True, "input_gate": True, "lrpe": "cosine", "scale": 0.5},
    ],
)
def test_layer(options):
    torch.manual_seed(0)
    x = torch.randn(2, 11, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 11)
    mask[0, :3] = 0
    made = {}
    for impl in PATHS:
        torch.manual_seed(1)
        layer = LightNetAttention(12, 2, chunk_size=4, impl=impl, **options).double()
        out = layer(x, mask=mask)
        found = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
        made[impl] = [out, *found]
        whole, last = layer(x, return_state=True)
        part, state = layer(x[:, :6], return_state=True)
        for t in range(6, 11):
            now, state = layer(x[:, t : t + 1], state=state, offset=t, return_state=True)
            part = torch.cat([part, now], dim=1)
        torch.testing.assert_close(part, whole)
        torch.testing.assert_close(state, last)
    for got, expected in zip(made["compiled"], made["reference"], strict=True):
        assert error(got, expected) < 1e-11


def test_layer_sees_an_image_in_one_pass():
    torch.manual_seed(0)
    layer = LightNetAttention(12, 3, lrpe="md", axes=2, is_causal=False).double()
    x = torch.randn(2, 2 + 12, 12, dtype=torch.float64)
    core = layer.core(x, shape=(3, 4), text_tokens=2)
    assert core.q.shape == (2, 3, 14, 8)
    torch.testing.assert_close(core.out, core.q @ (core.kappa.transpose(2, 3) @ core.v))
    share = core.kappa.unflatten(-1, (2, 4)).square().sum(dim=3).sqrt()
    torch.testing.assert_close(share.sum(dim=2), torch.ones_like(share[:, :, 0]))
    assert layer(x, shape=(3, 4), text_tokens=2).shape == x.shape


def triton_inputs(n, d, e, dtype, device, *, size=1.0):
    """Rounded to the type; as leaves in it, and in float64 for the reference."""
    tensors = [*qkv(1, 2, 2, n, d, e, size=size), qkv(1, 2, 2, n, d, e, seed=3)[0]]
    rounded = [x.detach().to(dtype) for x in tensors]
    rounded += [x.detach().float() for x in state_of(1, 2, d, e)]
    leaves = [x.clone().to(device).requires_grad_() for x in rounded]
    return leaves, [x.double().requires_grad_() for x in rounded]


@pytest.mark.parametrize(
    ("n", "d", "e", "dtype", "size", "bound"),
    [
        (1, 3, 5, torch.float32, 1.0, 2e-6),
        (70, 5, 34, torch.float32, 1.0, 5e-6),
        (66, 4, 3, torch.float32, 60.0, 1e-4),
        (67, 34, 4, torch.float16, 1.0, 2e-3),
        (18, 4, 4, torch.bfloat16, 1.0, 1.6e-2),
    ],
)
def test_kernel(device, n, d, e, dtype, size, bound):
    leaves, exact = triton_inputs(n, d, e, dtype, device, size=size)
    mask = torch.ones(1, n, dtype=torch.bool)
    mask[:, 1 : n // 3] = False
    made = []
    for impl, x in (("triton", leaves), ("reference", exact)):
        out, state = lightnet_attention(
            *x[:3],
            modulation=x[3],
            mask=mask.to(x[0].device),
            state=(x[4], x[5]),
            return_state=True,
            impl=impl,
        )
        outputs = [y.double().cpu() for y in (out, *state)]
        made.append([*outputs, *gradients(outputs, x)])
    assert out.dtype == torch.float64 and made[0][3].dtype == dtype
    for got, expected in zip(*made, strict=True):
        assert error(got.cpu(), expected) < bound


def test_kernel_without_tokens_or_state(device):
    leaves, exact = triton_inputs(20, 3, 3, torch.float32, device)
    mask = torch.ones(1, 20, dtype=torch.bool)
    mask[:, :18] = False
    options = {"mask": mask.to(device), "zero_start": False}
    out = lightnet_attention(*leaves[:3], impl="triton", **options)
    assert (out[:, :, :18] == 0).all()
    expected = lightnet_attention(*exact[:3], mask=mask, impl="reference")
    assert error(out.cpu(), expected) < 2e-6
    for found in torch.autograd.grad(out.sum(), leaves[:3]):
        assert torch.isfinite(found).all()
    empty = [x[:, :, :0] for x in leaves[:3]]
    out, state = lightnet_attention(*empty, state=leaves[4:], return_state=True, impl="triton")
    assert out.shape == (1, 2, 0, 3)
    torch.testing.assert_close(state, tuple(leaves[4:]))


def test_kernel_errors_and_operator_checks(device):
    q, k, v = qkv(1, 1, 1, 17, 2, 2)
    with pytest.raises(UnsupportedError, match="float64"):
        lightnet_attention(q, k, v, impl="triton")
    from brainalign_kernels.lightnet import kernel  # noqa: F401

    ops = torch.ops.brainalign
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    leaves = triton_inputs(17, 2, 2, torch.float16, device)[0]
    q, k, v, _, memory, before = leaves
    torch.library.opcheck(ops.lightnet_triton_gates.default, (k, before), test_utils=tests)
    z, kappa = ops.lightnet_triton_gates(k, before)
    sample = [x.detach().requires_grad_() for x in (q, kappa, v, z, before, memory)]
    torch.library.opcheck(ops.lightnet_triton.default, (*sample, 64), test_utils=tests)


def test_kernels_build_for_both_cards(tmp_path):
    # float16 differs from bfloat16 in nothing but the conversion of what is read and written.
    types = ("float32", "bfloat16", *(["float16"] if EVERY else []))
    for lines in run_builds("lightnet_builds.py", tmp_path, *types):
        assert len(lines) == 10 + 8 * (len(types) - 1), lines
