"""NiNformer: the gating unit in both paths, and what the block shares."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from brainalign_kernels import (
    MixerGatingUnit,
    NiNformer,
    NiNformerBlock,
    ShapeError,
    UnsupportedError,
    count_calls,
    mixer_gating_unit,
)
from brainalign_kernels.ninformer import MLP, Affine

PATHS = ("reference", "compiled")


def filled(made, seed=0):
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=make))
    return made.double()


@pytest.mark.parametrize("sizes", [(5, 8, 7), (1, 3, 4), (6, 1, 1)])
def test_paths_agree(sizes):
    channels, _, tokens = sizes
    first = filled(MixerGatingUnit(*sizes, impl="reference"))
    second = copy.deepcopy(first)
    second.impl = "compiled"
    x = torch.randn(3, tokens, channels, dtype=torch.float64, requires_grad=True)
    made = [m(x) for m in (first, second)]
    size = float(made[0].detach().abs().max())
    torch.testing.assert_close(made[1], made[0], atol=1e-13 * size, rtol=0)
    expected, got = (
        torch.autograd.grad(o.square().sum(), [x, *m.parameters()])
        for o, m in zip(made, (first, second), strict=True)
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10 * float(b.abs().max()) + 1e-9, rtol=0)


def test_is_a_mixer_of_torch_layers():
    unit = filled(MixerGatingUnit(6, 9, 5))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    layers = {name: dict(part.named_parameters()) for name, part in unit.named_children()}

    def linear(name, part, y):
        p = layers[name]
        return torch.nn.functional.linear(y, p[f"{part}weight"], p[f"{part}bias"])

    def mlp(name, y):
        return linear(name, "second.", nn.functional.gelu(linear(name, "first.", y)))

    mixed = x + mlp("token_mlp", unit.token_norm(x).mT).mT
    mixed = mixed + mlp("channel_mlp", unit.channel_norm(mixed))
    torch.testing.assert_close(unit(x), linear("projection", "", x) * mixed)


def test_block_uses_one_norm_twice():
    block = filled(NiNformerBlock(6, 9, 5))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    hidden = block.gating_unit(block.norm(x)) + x
    torch.testing.assert_close(block(x), block.ffn(block.norm(hidden)) + hidden)
    assert sum(isinstance(m, nn.LayerNorm) for m in block.children()) == 1
    stack = filled(NiNformer(6, 9, 5, 2))
    torch.testing.assert_close(stack(x), stack.blocks[1](stack.blocks[0](x)))
    assert torch.equal(NiNformer(6, 9, 5, 0)(x), x)


def test_tokens_mix_only_in_the_gate():
    # With a token MLP of zeros every token is on its own.
    unit = filled(MixerGatingUnit(6, 9, 5))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    other = x.clone()
    other[:, 3, 0] += 1.0
    assert ((unit(x) - unit(other))[:, :3].abs().amax((1, 2)) > 1e-3).all()
    with torch.no_grad():
        unit.token_mlp.second.weight.zero_()
    assert torch.equal(unit(x)[:, :3], unit(other)[:, :3])


@pytest.mark.parametrize("impl", PATHS)
def test_gradcheck(impl):
    unit = filled(MixerGatingUnit(3, 4, 2, impl=impl))
    names = [name for name, _ in unit.named_parameters()]
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(unit, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *unit.parameters()))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_half_precision(dtype, bound):
    torch.manual_seed(0)
    for impl in PATHS:
        unit = MixerGatingUnit(16, 32, 33, impl=impl).to(dtype)
        exact = copy.deepcopy(unit).double()
        exact.impl = "reference"
        x = torch.randn(2, 33, 16).to(dtype)
        out = unit(x)
        assert out.dtype == dtype
        expected = exact(x.double()).detach()
        assert float((out.detach().double() - expected).abs().max()) < bound * float(
            expected.abs().max()
        )


def test_auto_and_empty():
    unit = MixerGatingUnit(3, 4, 5)
    with count_calls() as calls:
        assert unit(torch.zeros(0, 5, 3)).shape == (0, 5, 3)
    assert dict(calls) == {("mixer_gating_unit", "compiled"): 1}


def test_refuses():
    unit = MixerGatingUnit(3, 4, 5)
    with pytest.raises(ShapeError, match=r"token_mlp.first must have shapes \(4, 6\)"):
        unit(torch.zeros(1, 6, 3))
    with pytest.raises(ShapeError, match="projection must have shapes"):
        unit(torch.zeros(1, 5, 2))
    with pytest.raises(ShapeError, match=r"x \(B, N, C\)"):
        unit(torch.zeros(5, 3))
    unit.impl = "triton"
    with pytest.raises(UnsupportedError, match="no implementation 'triton'"):
        unit(torch.zeros(1, 5, 3))
    pair = Affine(torch.zeros(3), torch.zeros(3))
    square = Affine(torch.zeros(3, 3), torch.zeros(3))
    with pytest.raises(ShapeError, match="channel_norm"):
        mixer_gating_unit(
            torch.zeros(1, 3, 3), square, pair, MLP(square, square), square, MLP(square, square)
        )


def test_compile_and_export():
    stack = NiNformer(6, 9, 5, 2)
    x = torch.randn(2, 5, 6)
    compiled = torch.compile(stack, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), stack(x))
    torch.testing.assert_close(torch.export.export(stack, (x,)).module()(x), stack(x))
