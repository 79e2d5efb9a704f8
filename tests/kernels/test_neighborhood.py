"""Neighborhood attention: its paths against each other, its windows, its gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from builds import EVERY, run_builds
from torch.nn.functional import scaled_dot_product_attention

from brainalign_kernels import (
    NeighborhoodAttention,
    ShapeError,
    UnsupportedError,
    count_calls,
    neighborhood_attention,
    neighborhood_mask,
    neighborhood_mask_mod,
    softmax_attention,
)
from brainalign_kernels.neighborhood import blocks

#: shape, and options: borders, even kernels, ragged dilation groups, strides, mixed causality.
CASES = [
    ((11,), {"kernel_size": 4}),
    ((23,), {"kernel_size": 5, "dilation": 3, "stride": 2}),
    ((19,), {"kernel_size": 6, "dilation": 2, "stride": 5, "is_causal": True}),
    ((130,), {"kernel_size": 3}),
    ((7, 9), {"kernel_size": (3, 4)}),
    ((13, 8), {"kernel_size": (4, 2), "dilation": (3, 2), "is_causal": (False, True)}),
    ((9, 10), {"kernel_size": (4, 6), "stride": (2, 3), "is_causal": (True, False)}),
    ((17, 16), {"kernel_size": 3, "stride": 3, "dilation": (2, 1)}),
    ((4, 5, 6), {"kernel_size": 3}),
    ((5, 6, 4), {"kernel_size": (2, 3, 2), "dilation": (2, 1, 2), "is_causal": (True, False, 0)}),
    ((5, 4, 6), {"kernel_size": (4, 1, 3), "stride": (3, 1, 2)}),
]


def qkv(b, h, g, n, d, e, dtype=torch.float64, seed=0):
    make = torch.Generator().manual_seed(seed)
    shapes = (b, h, n, d), (b, g, n, d), (b, g, n, e)
    return [
        torch.randn(x, generator=make, dtype=torch.float64).to(dtype).requires_grad_()
        for x in shapes
    ]


def table(heads, shape, kernel_size, seed=1, **_):
    sizes = kernel_size if isinstance(kernel_size, tuple) else (kernel_size,) * len(shape)
    make = torch.Generator().manual_seed(seed)
    made = torch.randn(
        heads, math.prod(2 * k - 1 for k in sizes), generator=make, dtype=torch.float64
    )
    return made.requires_grad_()


def both(impl, inputs, bias, **options):
    out = neighborhood_attention(*inputs, bias=bias, impl=impl, **options)
    make = torch.Generator().manual_seed(2)
    cotangent = torch.randn(out.shape, generator=make, dtype=torch.float64).to(out.dtype)
    leaves = [*inputs, *([] if bias is None else [bias])]
    return out, *torch.autograd.grad((out * cotangent).sum(), leaves)


def slow_mask(shape, kernel_size, dilation=1, stride=1, is_causal=False):
    """The definition, one query and one axis at a time."""

    def per_axis(value):
        return value if isinstance(value, tuple) else (value,) * len(shape)

    per = [per_axis(x) for x in (kernel_size, dilation, stride, is_causal)]
    tokens = list(itertools.product(*[range(length) for length in shape]))
    rows = []
    for query in tokens:
        windows = []
        for i, length, size, d, st, causal in zip(query, shape, *per, strict=True):
            group = list(range(i % d, length, d))
            place = group.index(i)
            if causal:
                leader = min(place // st * st + st - 1, len(group) - 1)
                seen = group[max(0, leader - size + 1) : place + 1]
            else:
                leader = min(place // st * st + st // 2, len(group) - 1)
                first = min(max(leader - size // 2, 0), len(group) - size)
                seen = group[first : first + size]
            windows.append(seen)
        seen_tokens = set(itertools.product(*windows))
        rows.append([key in seen_tokens for key in tokens])
    return torch.tensor(rows)


@pytest.mark.parametrize(("shape", "options"), [c for c in CASES if math.prod(c[0]) <= 130])
def test_mask_is_the_definition(shape, options):
    expected = slow_mask(shape, **options)
    assert torch.equal(neighborhood_mask(shape, **options), expected)
    index = torch.arange(len(expected))
    mod = neighborhood_mask_mod(shape, **options)
    assert torch.equal(mod(index, index, index[:, None], index[None]), expected)


@pytest.mark.parametrize(("shape", "options"), CASES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_compiled_is_the_reference(shape, options, biased, heads):
    inputs = qkv(2, *heads, math.prod(shape), 5, 3)
    bias = table(heads[0], shape, **options) if biased else None
    expected = both("reference", inputs, bias, shape=shape, scale=0.7, **options)
    got = both("compiled", inputs, bias, shape=shape, scale=0.7, **options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def test_random_configurations():
    make = torch.Generator().manual_seed(5)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=make))

    for trial in range(25):
        axes = draw(1, 3)
        kernel = tuple(draw(1, (9, 5, 3)[axes - 1]) for _ in range(axes))
        dilation = tuple(draw(1, 3) for _ in range(axes))
        shape = tuple(k * d + draw(0, 5) for k, d in zip(kernel, dilation, strict=True))
        options = {
            "shape": shape,
            "kernel_size": kernel,
            "dilation": dilation,
            "stride": tuple(draw(1, k) for k in kernel),
            "is_causal": tuple(bool(draw(0, 1)) for _ in range(axes)),
        }
        inputs = qkv(1, 2, 1, math.prod(shape), 4, 4, seed=trial)
        bias = table(2, shape, kernel)
        expected = both("reference", inputs, bias, **options)
        for a, b in zip(both("compiled", inputs, bias, **options), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=0, msg=str(options))


def test_chunks_change_nothing(monkeypatch):
    inputs, options = qkv(2, 4, 2, 17 * 16, 5, 3), {"shape": (17, 16), "kernel_size": 3}
    bias = table(4, **options)
    whole = both("compiled", inputs, bias, **options)
    monkeypatch.setattr(blocks, "_CHUNK", 1)
    for a, b in zip(both("compiled", inputs, bias, **options), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("impl", ["reference", "compiled"])
@pytest.mark.parametrize("shape", [(9,), (4, 5), (2, 3, 4)])
def test_window_of_the_whole_grid_is_softmax_attention(impl, shape):
    q, k, v = qkv(2, 2, 2, math.prod(shape), 4, 4)
    out = neighborhood_attention(q, k, v, shape=shape, kernel_size=shape, impl=impl)
    torch.testing.assert_close(out, softmax_attention(q, k, v, impl="reference"))


@pytest.mark.parametrize("impl", ["reference", "compiled"])
def test_causal_with_the_whole_axis_is_causal_attention(impl):
    q, k, v = qkv(2, 2, 2, 33, 4, 4)
    out = neighborhood_attention(q, k, v, shape=(33,), kernel_size=33, is_causal=True, impl=impl)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("impl", ["reference", "compiled"])
@pytest.mark.parametrize("stride", [1, 3])
def test_causal_never_looks_ahead(impl, stride):
    shape = (10, 6)
    options = {"kernel_size": (4, 3), "dilation": (2, 1), "stride": (stride, 1)}
    q, k, v = (x.detach() for x in qkv(1, 1, 1, 60, 4, 4))
    before = neighborhood_attention(
        q, k, v, shape=shape, is_causal=(True, False), impl=impl, **options
    )
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 24:] += 1.0
    v2[:, :, 24:] += 1.0
    after = neighborhood_attention(
        q, k2, v2, shape=shape, is_causal=(True, False), impl=impl, **options
    )
    assert torch.equal(after[:, :, :24], before[:, :, :24])
    assert bool((after[:, :, 24:] != before[:, :, 24:]).any(dim=-1).all())


@pytest.mark.parametrize("impl", ["reference", "compiled"])
def test_gradcheck(impl):
    inputs = qkv(1, 2, 1, 20, 2, 2)
    options = {"shape": (5, 4), "kernel_size": (3, 2), "stride": (2, 1), "is_causal": (False, True)}
    bias = table(2, (5, 4), (3, 2))
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: neighborhood_attention(q, k, v, bias=b, impl=impl, **options),
        (*inputs, bias),
    )


def test_bias_layout():
    """A bias at one offset moves the weight to the key at that offset, whatever the query."""
    shape, kernel = (6, 7), (3, 3)
    q, k = torch.zeros(2, 1, 1, 42, 2, dtype=torch.float64)
    v = torch.arange(42, dtype=torch.float64).view(1, 1, 42, 1)
    bias = torch.zeros(1, 5, 5, dtype=torch.float64)
    bias[0, 2 + 1, 2 - 1] = 100.0
    for impl in ("reference", "compiled"):
        out = neighborhood_attention(
            q, k, v, shape=shape, kernel_size=kernel, bias=bias, impl=impl
        ).view(shape)
        y, x = torch.meshgrid(torch.arange(6), torch.arange(7), indexing="ij")
        inside = (y < 5) & (x > 0)
        target = ((y + 1) * 7 + x - 1).double()
        torch.testing.assert_close(out[inside], target[inside])


@pytest.mark.parametrize("impl", ["reference", "compiled"])
def test_small_and_empty(impl):
    q, k, v = qkv(2, 2, 2, 1, 4, 3)
    out = neighborhood_attention(q, k, v, shape=(1, 1), kernel_size=1, impl=impl)
    torch.testing.assert_close(out, v)
    inputs = qkv(0, 2, 2, 12, 4, 3)
    bias = table(2, (3, 4), 3)
    out, *grads = both(impl, inputs, bias, shape=(3, 4), kernel_size=3)
    assert out.shape == (0, 2, 12, 3)
    assert [g.shape for g in grads] == [x.shape for x in (*inputs, bias)]
    assert bool((grads[3] == 0).all())
    q, k, v = qkv(1, 1, 1, 12, 0, 3)
    out = neighborhood_attention(q, k, v, shape=(3, 4), kernel_size=(3, 4))
    torch.testing.assert_close(out, v.mean(dim=2, keepdim=True).expand_as(out))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("impl", ["reference", "compiled"])
def test_half_precision(dtype, bound, impl):
    options = {"shape": (12, 11), "kernel_size": 5}
    half = [x.detach().to(dtype).requires_grad_() for x in qkv(2, 4, 2, 132, 16, 16)]
    wide = [x.detach().double().requires_grad_() for x in half]
    expected = both("reference", wide, None, **options)
    got = both(impl, half, None, **options)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        # The cotangents are rounded too: the same numbers relative to the largest entry.
        assert float((a.double() - b).detach().abs().max() / b.detach().abs().max()) < bound


def test_auto_takes_the_fast_path():
    q, k, v = qkv(1, 2, 2, 12, 4, 4)
    with count_calls() as calls:
        neighborhood_attention(q, k, v, shape=(12,), kernel_size=3)
        neighborhood_attention(q, k, v, shape=(3, 4), kernel_size=3, bias=table(2, (3, 4), 3))
        neighborhood_attention(q, k, v, shape=(3, 4), kernel_size=3, impl="reference")
    assert dict(calls) == {
        ("neighborhood_attention", "compiled"): 2, ("neighborhood_attention", "reference"): 1
    }  # fmt: skip


def test_inference_mode_leaves_nothing_behind():
    options = {"shape": (6, 14), "kernel_size": 5}
    inputs = qkv(1, 1, 1, 84, 4, 4)
    with torch.inference_mode():
        neighborhood_attention(*inputs, **options)
    expected = both("reference", inputs, None, **options)
    for a, b in zip(both("compiled", inputs, None, **options), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (3, 5), "kernel_size": 3}, "15 tokens; q has 12"),
        ({"shape": (3, 4), "kernel_size": 4}, "must not exceed the axis: 4 \\* 1 > 3"),
        ({"shape": (12,), "kernel_size": 5, "dilation": 3}, "5 \\* 3 > 12"),
        ({"shape": (12,), "kernel_size": 3, "stride": 4}, "stride must not exceed"),
        ({"shape": (12,), "kernel_size": 0}, "kernel_size must be 1 or more"),
        ({"shape": (12,), "kernel_size": (3, 3)}, "one value or one per axis"),
        ({"shape": (1, 1, 1, 12), "kernel_size": 1}, "1, 2 or 3 axes"),
        ({"shape": (3, 4), "kernel_size": 3, "bias": torch.zeros(2, 24)}, "bias must have shape"),
    ],
)
def test_errors(options, message):
    q, k, v = qkv(1, 2, 2, 12, 4, 4)
    with pytest.raises(ShapeError, match=message):
        neighborhood_attention(q, k, v, **options)


def test_error_of_a_path():
    q, k, v = qkv(1, 1, 1, 12, 0, 4)
    with pytest.raises(UnsupportedError, match="no channels"):
        neighborhood_attention(q, k, v, shape=(12,), kernel_size=3, impl="compiled")


def test_compile_export_and_opcheck():
    q, k, v = qkv(2, 2, 1, 30, 4, 4, dtype=torch.float32)
    bias = table(2, (5, 6), 3).detach().float().requires_grad_()
    options = {"shape": (5, 6), "kernel_size": 3}

    def attend(q, k, v, bias):
        return neighborhood_attention(q, k, v, bias=bias, **options)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    expected, got = attend(q, k, v, bias), compiled(q, k, v, bias)
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        torch.autograd.grad(got.sum(), (q, k, v, bias)),
        torch.autograd.grad(expected.sum(), (q, k, v, bias)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)

    model = NeighborhoodAttention(8, 2, 3)
    x = torch.randn(2, 5, 6, 8, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(x[:1].repeat(3, 1, 1, 1)), model(x[:1].repeat(3, 1, 1, 1)))

    numbers = [5, 3, 1, 1, 0, 6, 3, 1, 1, 1]
    for b in (None, bias):
        torch.library.opcheck(
            torch.ops.brainalign_kernels.neighborhood_blocks.default, (q, k, v, b, numbers, 0.5)
        )


@pytest.mark.parametrize(
    ("shape", "options"),
    [((9,), {"axes": 1}), ((5, 6), {"key_heads": 2}), ((3, 4, 5), {"axes": 3, "is_causal": True})],
)
def test_module(shape, options):
    torch.manual_seed(0)
    model = NeighborhoodAttention(16, 4, 3, **options).double()
    x = torch.randn(2, *shape, 16, dtype=torch.float64)
    out = model(x)
    assert out.shape == x.shape
    flat = model(x.flatten(1, -2), shape=shape)
    torch.testing.assert_close(flat, out.flatten(1, -2))
    out.square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.parameters())
    again = NeighborhoodAttention(16, 4, 3, impl="reference", **options).double()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), out)


def test_module_errors():
    with pytest.raises(ShapeError, match="must divide dim"):
        NeighborhoodAttention(10, 4, 3)
    with pytest.raises(ShapeError, match="kernel size for each"):
        NeighborhoodAttention(8, 4, (3, 3), axes=3)
    model = NeighborhoodAttention(8, 2, 3, rel_pos_bias=False)
    assert model.bias is None
    with pytest.raises(ShapeError, match="with its grid as shape"):
        model(torch.zeros(2, 12, 8))
    with pytest.raises(ShapeError, match="shape says"):
        model(torch.zeros(2, 12, 8), shape=(3, 5))


#: Shape, options, (H, G), channels: boxes that are ragged, alone and many; odd channels; groups.
KERNEL_CASES = [
    ((40,), {"kernel_size": 7}, (1, 1), (16, 16)),
    ((37,), {"kernel_size": 6, "dilation": 3, "stride": 4, "is_causal": True}, (1, 1), (5, 3)),
    ((9, 10), {"kernel_size": (4, 6), "stride": (2, 3)}, (2, 1), (8, 8)),
    ((13, 8), {"kernel_size": (4, 3), "dilation": (3, 2), "is_causal": (1, 0)}, (1, 1), (8, 20)),
    ((11, 10), {"kernel_size": (3, 10), "is_causal": (False, True)}, (1, 1), (17, 16)),
    ((4, 5, 6), {"kernel_size": (3, 2, 4), "stride": (2, 1, 3), "is_causal": (1, 0, 0)},
     (1, 1), (16, 16)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "dtype", "bound"),
    [
        *[(case, torch.float32, 2e-5) for case in KERNEL_CASES],
        (KERNEL_CASES[2], torch.float16, 4e-3),
        (KERNEL_CASES[5], torch.float16, 4e-3),
        (KERNEL_CASES[2], torch.bfloat16, 3e-2),
    ],
)
def test_triton_is_the_reference(device, case, dtype, bound):
    pytest.importorskip("triton")
    shape, options, heads, channels = case
    inputs = qkv(1, *heads, math.prod(shape), *channels, dtype=dtype)
    inputs = [x.detach().to(device).requires_grad_() for x in inputs]
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    expected = both("reference", exact, None, shape=shape, scale=0.4, **options)
    got = both("triton", inputs, None, shape=shape, scale=0.4, **options)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        error = (a.detach().double().cpu() - b.detach()).abs().max() / b.detach().abs().max()
        assert float(error) < bound


def test_triton_limits_and_edges(device):
    pytest.importorskip("triton")
    inputs = [x.detach().to(device) for x in qkv(1, 1, 1, 12, 4, 4, dtype=torch.float32)]
    options = {"shape": (3, 4), "kernel_size": 3, "impl": "triton"}
    with pytest.raises(UnsupportedError, match="no position bias"):
        neighborhood_attention(*inputs, bias=torch.zeros(1, 25, device=device), **options)
    with pytest.raises(UnsupportedError, match="not torch.float64"):
        neighborhood_attention(*[x.double() for x in inputs], **options)
    wide = [torch.zeros(1, 1, 12, 129, device=device)] * 3
    with pytest.raises(UnsupportedError, match="1 to 128 channels"):
        neighborhood_attention(*wide, **options)
    empty = [torch.zeros(0, 2, 12, 4, device=device)] * 3
    assert neighborhood_attention(*empty, **options).shape == (0, 2, 12, 4)
    one = [torch.randn(1, 1, 1, 4, device=device) for _ in range(3)]
    out = neighborhood_attention(*one, shape=(1, 1), kernel_size=1, impl="triton")
    torch.testing.assert_close(out, one[2])


def test_triton_opcheck_compile_and_export(device):
    pytest.importorskip("triton")
    inputs = qkv(1, 2, 1, 20, 4, 4, dtype=torch.float32)
    inputs = [x.detach().to(device).requires_grad_() for x in inputs]
    options = {"shape": (4, 5), "kernel_size": 3, "impl": "triton"}
    expected = both("triton", inputs, None, shape=(4, 5), kernel_size=3)
    torch.library.opcheck(
        torch.ops.brainalign_kernels.neighborhood_triton.default,
        (*inputs, [4, 3, 1, 1, 0, 5, 3, 1, 1, 1], 0.5),
    )
    compiled = torch.compile(
        lambda *x: neighborhood_attention(*x, **options), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*inputs), expected[0])

    class Model(torch.nn.Module):
        def forward(self, *x):
            return neighborhood_attention(*x, **options)

    plain = tuple(x.detach() for x in inputs)
    torch.testing.assert_close(torch.export.export(Model(), plain).module()(*plain), expected[0])


@pytest.mark.slow
def test_kernels_build_for_cards_that_are_not_there(tmp_path):
    pytest.importorskip("triton")
    made = [len(lines) for lines in run_builds("neighborhood_builds.py", tmp_path)]
    # Three kernels: 36 launches on each card, or four and one of the largest.
    assert made == ([108, 108] if EVERY else [12, 3])
