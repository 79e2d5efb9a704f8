"""Efficient local attention: published form, timm's form, and both paths."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from brainalign_kernels import (
    EfficientLocalAttention,
    ShapeError,
    count_calls,
    efficient_local_attention,
)
from brainalign_kernels.efficient_local import ELA_PRESETS, Strip

PATHS = ("reference", "compiled")


def strips(channels, taps, groups, seed=0, norm=True, bias=True):
    make = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=make, dtype=torch.float64).requires_grad_()

    made = []
    for _ in range(2):
        weight = draw(channels, channels // groups, taps)
        made.append(
            Strip(
                weight,
                draw(channels) if bias else None,
                *((draw(channels), draw(channels)) if norm else (None, None)),
            )
        )
    x = draw(2, channels, 5, 7)
    leaves = [x, *(t for s in made for t in s if t is not None)]
    return x, *made, leaves


@pytest.mark.parametrize("groups", [8, 2, 1])
@pytest.mark.parametrize("taps", [1, 3, 9])
@pytest.mark.parametrize("norm", [True, False])
def test_paths_agree(groups, taps, norm):
    x, rows, columns, leaves = strips(8, taps, groups, norm=norm, bias=taps != 3)
    options = {"norm_groups": 4, "activation": "gelu", "has_skip": taps == 1}
    made = [efficient_local_attention(x, rows, columns, impl=i, **options) for i in PATHS]
    torch.testing.assert_close(made[1], made[0], atol=1e-12, rtol=0)
    cotangent = torch.randn_like(x)
    expected, got = (torch.autograd.grad((m * cotangent).sum(), leaves) for m in made)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid"])
@pytest.mark.parametrize(("bias", "norm", "has_skip"), [(False, True, False), (True, False, True)])
def test_is_timm(impl, bias, norm, has_skip, gate):
    coord_attn = pytest.importorskip("timm.layers.coord_attn")
    torch.manual_seed(0)
    options = {"bias": bias, "has_skip": has_skip}
    peer = coord_attn.EfficientLocalAttn(
        6, 5, gate_layer=gate, **options, **({} if norm else {"norm_layer": None})
    )
    own = EfficientLocalAttention.timm(6, 5, norm=norm, gate=gate, impl=impl, **options)
    with torch.no_grad():
        for p in peer.parameters():
            p.normal_()
    pairs = [(own.conv_rows, peer.conv_h), (own.conv_columns, peer.conv_w)]
    if norm:
        pairs += [(own.norm_rows, peer.norm_h), (own.norm_columns, peer.norm_w)]
    for mine, theirs in pairs:
        mine.load_state_dict(
            {
                name: value.reshape(getattr(mine, name).shape)
                for name, value in theirs.state_dict().items()
            }
        )
    own, peer = own.double(), peer.double()
    x = torch.randn(2, 6, 4, 9, dtype=torch.float64, requires_grad=True)
    expected = peer(x)
    torch.testing.assert_close(own(x), expected, atol=1e-12, rtol=0)
    cotangent = torch.randn_like(expected)
    (a,), (b,) = (torch.autograd.grad((m(x) * cotangent).sum(), x) for m in (own, peer))
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("name", sorted(ELA_PRESETS))
def test_published_presets(name, impl):
    channels, taps = 64, {"T": 5, "B": 7, "S": 5, "L": 7}[name]
    groups = channels if name in "TB" else channels // 8
    norm_groups = 32 if name == "T" else 16
    module = EfficientLocalAttention.from_preset(name, channels, impl=impl).double()
    assert module.conv_rows.weight.shape == (channels, channels // groups, taps)
    assert module.conv_rows.bias is None and module.norm_rows.num_groups == norm_groups
    assert module.conv_columns is None
    x = torch.randn(2, channels, 6, 9, dtype=torch.float64)
    norm = nn.GroupNorm(norm_groups, channels).double()
    along = [
        torch.nn.functional.conv1d(
            x.mean(axis), module.conv_rows.weight, padding=taps // 2, groups=groups
        )
        for axis in (3, 2)
    ]
    rows, columns = (norm(a).sigmoid() for a in along)
    expected = x * rows[:, :, :, None] * columns[:, :, None, :]
    torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=0)


def test_turning_the_map_turns_the_output():
    # Rows and columns share their parameters in the published form.
    module = EfficientLocalAttention(8, 3, norm_groups=2)
    x = torch.randn(2, 8, 5, 7)
    torch.testing.assert_close(module(x.transpose(2, 3)), module(x).transpose(2, 3))


@pytest.mark.parametrize("impl", PATHS)
def test_gradcheck(impl):
    x, rows, columns, leaves = strips(4, 3, 2)

    def run(x, *flat):
        return efficient_local_attention(
            x, Strip(*flat[:4]), Strip(*flat[4:]), norm_groups=2, activation="silu", impl=impl
        )

    assert torch.autograd.gradcheck(run, [x[:1, :, :2, :3].detach().requires_grad_(), *leaves[1:]])
    assert torch.equal(run(*leaves), efficient_local_attention(
        x, rows, columns, norm_groups=2, activation="silu", impl=impl
    ))  # fmt: skip


def test_single_position_and_empty():
    rows = strips(4, 3, 4)[1]
    for impl in PATHS:
        out = efficient_local_attention(torch.ones(1, 4, 1, 1).double(), rows, impl=impl)
        assert bool(torch.isfinite(out).all())
    for shape in ((0, 4, 5, 5), (2, 4, 0, 5), (2, 4, 5, 0)):
        for impl in PATHS:
            empty = torch.zeros(shape, dtype=torch.float64)
            assert efficient_local_attention(empty, rows, impl=impl).shape == shape


def test_one_value_to_a_norm_group():
    x, rows = torch.randn(1, 4, 1, 5, dtype=torch.float64), strips(4, 3, 4)[1]
    expected = efficient_local_attention(x, rows, norm_groups=4, impl="reference")
    got = efficient_local_attention(x, rows, norm_groups=4, impl="compiled")
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision(dtype, bound):
    x, rows, _, _ = strips(8, 5, 8)
    x, rows = x.detach().to(dtype), Strip(*(t.detach().to(dtype) for t in rows))
    exact = efficient_local_attention(
        x.double(), Strip(*(t.double() for t in rows)), norm_groups=4, impl="reference"
    )
    for impl in PATHS:
        out = efficient_local_attention(x, rows, norm_groups=4, impl=impl)
        assert out.dtype == dtype
        assert float((out.double() - exact).abs().max()) < bound


def test_auto_takes_the_fast_path():
    x, rows, _, _ = strips(4, 3, 4)
    with count_calls() as calls:
        efficient_local_attention(x, rows)
    assert dict(calls) == {("efficient_local_attention", "compiled"): 1}


def test_refuses():
    x, rows, _, _ = strips(4, 3, 4)
    with pytest.raises(ShapeError, match=r"x \(B, C, H, W\)"):
        efficient_local_attention(x[0], rows)
    with pytest.raises(ShapeError, match="K must be odd"):
        efficient_local_attention(x, rows._replace(weight=rows.weight[..., :2]))
    with pytest.raises(ShapeError, match="weight of columns"):
        efficient_local_attention(x, rows, rows._replace(weight=rows.weight[:2]))
    with pytest.raises(ShapeError, match="belong together"):
        efficient_local_attention(x, rows._replace(norm_bias=None))
    with pytest.raises(ShapeError, match="must divide the 4 channels"):
        efficient_local_attention(x, rows, norm_groups=3)
    with pytest.raises(ShapeError, match="expected one of"):
        efficient_local_attention(x, rows, activation="tanh")
    with pytest.raises(ShapeError, match="must divide the 6 channels"):
        EfficientLocalAttention(6, 3, norm_groups=4)
    with pytest.raises(ShapeError, match="odd number"):
        EfficientLocalAttention(16, 4)
    with pytest.raises(ShapeError, match="groups of 8 channels"):
        EfficientLocalAttention.from_preset("S", 12)
    with pytest.raises(ShapeError, match="expected one of T, B, S, L"):
        EfficientLocalAttention.from_preset("M", 64)


def test_compile_and_export():
    module = EfficientLocalAttention.from_preset("S", 32)
    x = torch.randn(2, 32, 5, 6)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x))
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))
