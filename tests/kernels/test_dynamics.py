"""Layers as dynamical systems: the recurrence and the direct form are one function."""

from __future__ import annotations

import pytest
import torch

from brainalign_kernels import (
    DSFAttention,
    DynamicalSystem,
    ShapeError,
    count_calls,
    dsf_attention,
    linear_system,
    normalised_system,
    qlstm,
    qlstm_system,
    run_system,
    s6_layer,
    s6_system,
    softmax_system,
)

IMPLS = ("reference", "compiled")
LAYERS = ("softmax", "softmax, in the state", "linear", "linear, in the output", "norm",
          "norm, in the output", "qlstm", "qlstm, reversed", "s6")  # fmt: skip


def randn(*shape, seed=0, dtype=torch.float64):
    make = torch.Generator().manual_seed(seed + 7 * len(shape))
    return torch.randn(shape, generator=make, dtype=torch.float64).to(dtype).requires_grad_()


def layer(name, tokens, b=2, h=2, d=4, e=3, dtype=torch.float64):
    """Return the inputs, the direct form and the system of a layer, both functions of them."""
    options = {"dtype": dtype}
    if name.startswith(("softmax", "linear", "norm")):
        kind = name.split(",")[0]
        where = {"in the state": "state", "in the output": "output"}.get(name.split(", ")[-1])
        where = {"normalise": where} if where else {}
        q, k = randn(b, h, tokens, d, **options), randn(b, h, tokens, d, seed=1, **options)
        v, n = randn(b, h, tokens, e, seed=2, **options), randn(b, h, tokens, **options)
        system = {
            "softmax": lambda q, k, n: softmax_system(q, k, **where),
            "linear": lambda q, k, n: linear_system(q, k, **where),
            "norm": lambda q, k, n: normalised_system(q, k, n, **where),
        }[kind]

        def direct(impl, q, k, v, n=None):
            return dsf_attention(q, k, v, kind=kind, log_normaliser=n, chunk_size=5, impl=impl)

        inputs = (q, k, v, n) if kind == "norm" else (q, k, v)
        return inputs, direct, lambda q, k, v, n=None: (system(q, k, n), v)
    x, *gates = (randn(b, h, tokens, e, seed=i, **options) for i in range(4))
    if name.startswith("qlstm"):
        alpha = (randn(h, 1, e, seed=9, **options)[None],) if "reversed" in name else ()

        def direct(impl, x, f, i, o, a=None):
            return qlstm(x, f, i, o, exponent=a, impl=impl)

        return (
            (x, *gates, *alpha), direct,
            lambda x, f, i, o, a=None: (qlstm_system(f, i, o, exponent=a), x),
        )  # fmt: skip
    decay, bias = randn(1, h, 1, d, e, **options), randn(1, h, 1, e, **options)
    into, out = randn(b, h, tokens, d, seed=5, **options), randn(b, h, tokens, d, seed=6, **options)

    def direct(impl, x, step, decay, b, c, d):
        return s6_layer(x, step, decay, b, c, d, impl=impl)

    return (
        (x, gates[0], decay, into, out, bias), direct,
        lambda x, step, decay, b, c, d: (s6_system(step, decay, b, c, d), x),
    )  # fmt: skip


def gradients(out, inputs):
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * cotangent).sum(), inputs, allow_unused=True)


@pytest.mark.parametrize("tokens", [1, 2, 13])
@pytest.mark.parametrize("name", LAYERS)
def test_recurrence_and_direct_form_agree(name, tokens):
    inputs, direct, system = layer(name, tokens)
    expected = direct("reference", *inputs)
    slopes = gradients(expected, inputs)
    made = [direct("compiled", *inputs)]
    made += [run_system(*system(*inputs), impl=impl)[0] for impl in IMPLS]
    for out in made:
        torch.testing.assert_close(out, expected, atol=1e-11, rtol=1e-10)
        for got, slope in zip(gradients(out, inputs), slopes, strict=True):
            torch.testing.assert_close(got, slope, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("name", ["linear", "norm", "qlstm, reversed", "s6"])
def test_state_continues_a_sequence(name):
    inputs, _, system = layer(name, 9)
    made, u = system(*inputs)
    whole, last = run_system(made, u)

    def cut(x, part):
        return x if x is None or x.shape[2] == 1 else x[:, :, part]

    for impl in IMPLS:
        state, parts = None, []
        for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
            fields = made.transition, made.input, made.output, made.feedthrough
            piece = DynamicalSystem(*(cut(x, part) for x in fields))
            y, state = run_system(piece, u[:, :, part], initial_state=state, impl=impl)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, dim=2), whole)
        torch.testing.assert_close(state, last)


def test_a_transition_of_zero_forgets():
    transition = torch.ones(1, 1, 6, 1, 1, dtype=torch.float64)
    transition[:, :, 3] = 0.0
    ones = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    u = torch.arange(1.0, 7.0, dtype=torch.float64).view(1, 1, 6, 1)
    for impl in IMPLS:
        y, _ = run_system(DynamicalSystem(transition, ones, ones), u, impl=impl)
        assert y.flatten().tolist() == [1.0, 3.0, 6.0, 4.0, 9.0, 15.0]


def test_s6_is_the_discretised_state_space_model():
    (x, step, decay, b, c, d), direct, _ = layer("s6", 7)
    size, rate = torch.log1p(step.exp()), decay.relu()
    state, out = torch.zeros(2, 2, 4, 3, dtype=torch.float64), []
    for t in range(7):
        delta = size[:, :, t, None, :]
        state = torch.exp(-delta * rate[:, :, 0]) * state
        state = state + delta * b[:, :, t, :, None] * x[:, :, t, None, :]
        out.append((c[:, :, t, :, None] * state).sum(2) + d[:, :, 0] * x[:, :, t])
    torch.testing.assert_close(direct("auto", x, step, decay, b, c, d), torch.stack(out, dim=2))


@pytest.mark.parametrize("name", ["softmax", "linear", "norm", "qlstm, reversed", "s6"])
def test_gradcheck_and_causality(name):
    inputs, direct, system = layer(name, 4, b=1, h=1, d=2, e=2)
    assert torch.autograd.gradcheck(lambda *x: direct("reference", *x), inputs)
    assert torch.autograd.gradcheck(lambda *x: run_system(*system(*x))[0], inputs)
    before = direct("compiled", *inputs)
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        if x.shape[2] == 4:
            x[:, :, 2:] = 1.5
    for impl in IMPLS:
        after = direct(impl, *changed)
        torch.testing.assert_close(after[:, :, :2], before[:, :, :2])
        assert (after[:, :, 2:] - before[:, :, 2:]).abs().min() > 0


@pytest.mark.parametrize("name", ["softmax", "linear", "norm", "qlstm", "s6"])
def test_empty_and_bfloat16(name):
    for impl in IMPLS:
        inputs, direct, _ = layer(name, 0)
        assert direct(impl, *inputs).shape == (2, 2, 0, 3)
        inputs, direct, _ = layer(name, 33, dtype=torch.bfloat16)
        expected = direct("reference", *(x.detach().double() for x in inputs))
        out = direct(impl, *inputs)
        assert out.dtype == torch.bfloat16
        assert float((out.double() - expected).abs().max() / expected.abs().max()) < 1e-2


def test_auto_takes_the_fast_path():
    q, k, v = (randn(1, 2, 5, 3, seed=i) for i in range(3))
    with count_calls() as calls:
        dsf_attention(q, k, v, kind="linear")
        qlstm(q, k, v, v)
        s6_layer(q, k, randn(1, 1, 1, 2, 1), q[..., :2], k[..., :2])
    assert {c for c in calls if c[0] != "run_system"} == {
        ("dsf_attention", "compiled"), ("qlstm", "compiled"), ("s6_layer", "compiled")
    }  # fmt: skip


def test_grouped_queries():
    q, k, v = randn(1, 4, 6, 3), randn(1, 2, 6, 3), randn(1, 2, 6, 5)
    wide = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    for impl in IMPLS:
        torch.testing.assert_close(
            dsf_attention(q, k, v, kind="linear", impl=impl),
            dsf_attention(q, *wide, kind="linear", impl="reference"),
        )


def test_errors():
    q, k, v = (randn(1, 2, 5, 3, seed=i) for i in range(3))
    with pytest.raises(ShapeError, match="expected 'softmax', 'linear' or 'norm'"):
        dsf_attention(q, k, v, kind="cosine")
    with pytest.raises(ShapeError, match="needs log_normaliser"):
        dsf_attention(q, k, v, kind="norm")
    with pytest.raises(ShapeError, match="log_normaliser must have shape"):
        dsf_attention(q, k, v, kind="norm", log_normaliser=q)
    with pytest.raises(ShapeError, match="has a scale"):
        dsf_attention(q, k, v, kind="linear", scale=2.0)
    with pytest.raises(ShapeError, match="three gates"):
        qlstm(q, k, v, v[..., :1])
    with pytest.raises(ShapeError, match="b and c must"):
        s6_layer(q, k, q, q, k)
    with pytest.raises(ShapeError, match="must broadcast"):
        run_system(linear_system(q, k), v[:, :, :4])
    with pytest.raises(ShapeError, match="initial_state must have shape"):
        run_system(linear_system(q, k), v, initial_state=q)
    with pytest.raises(ShapeError, match="expected 'state' or 'output'"):
        linear_system(q, k, normalise="input")


@pytest.mark.parametrize("kind", ["softmax", "linear", "norm"])
def test_module_compile_and_export(kind):
    torch.manual_seed(0)
    module = DSFAttention(6, 2, kind, d_qk=8, d_v=4)
    x = torch.randn(2, 7, 6)
    out = module(x)
    assert out.shape == x.shape
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x), out)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), out)
