"""Subspace attention: one group after the other against all at once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from brainalign_kernels import ULSAM, ShapeError, UnsupportedError, count_calls, subspace_attention

PATHS = ("reference", "compiled")


def module(channels, splits, impl="auto", seed=0):
    torch.manual_seed(seed)
    made = ULSAM(channels, splits, impl=impl).double()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_()
        for name, buffer in made.named_buffers():
            buffer.uniform_(0.5, 2.0) if "var" in name else buffer.normal_()
    return made


def pair(channels, splits):
    first = module(channels, splits, "reference")
    second = copy.deepcopy(first)
    second.impl = "compiled"
    return first, second


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("channels", "splits"), [(8, 4), (6, 1), (5, 5)])
@pytest.mark.parametrize("size", [(3, 5, 7), (2, 1, 1), (1, 2, 9)])
def test_paths_agree(channels, splits, size, training):
    models = pair(channels, splits)
    batch, height, width = size
    x = torch.randn((batch, channels, height, width), dtype=torch.float64, requires_grad=True)
    made = [m.train(training).attend(x) for m in models]
    for got, expected in zip(made[1], made[0], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    cotangent = torch.randn_like(x)
    expected, got = (
        torch.autograd.grad((o[0] * cotangent).sum(), [x, *m.parameters()])
        for o, m in zip(made, models, strict=True)
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-9)
    for (name, kept), other in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(other, kept, atol=1e-13, rtol=0, msg=name)


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("training", [False, True])
def test_is_a_stack_of_torch_layers(impl, training):
    own = module(6, 2, impl)
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    outs, statistics = [], []
    for split in range(2):
        part = slice(3 * split, 3 * split + 3)
        one = slice(split, split + 1)
        layers = nn.Sequential(
            nn.Conv2d(3, 3, 1, groups=3), nn.BatchNorm2d(3, momentum=0.9), nn.ReLU(),
            nn.MaxPool2d(3, 1, 1), nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1, momentum=0.9), nn.ReLU(),
        ).double().train(training)  # fmt: skip
        with torch.no_grad():
            for layer, kind, index in (
                (0, "depthwise", part), (4, "pointwise", one)
            ):  # fmt: skip
                weight = own.get_parameter(f"{kind}_weight")[part]
                layers[layer].weight.copy_(weight.reshape(layers[layer].weight.shape))
                layers[layer].bias.copy_(own.get_parameter(f"{kind}_bias")[index])
                norm = layers[layer + 1]
                norm.weight.copy_(own.get_parameter(f"{kind}_norm_weight")[index])
                norm.bias.copy_(own.get_parameter(f"{kind}_norm_bias")[index])
                norm.running_mean.copy_(own.get_buffer(f"running_mean_{kind}")[index])
                norm.running_var.copy_(own.get_buffer(f"running_var_{kind}")[index])
        logits = layers(x[:, part])
        attention = logits.flatten(1).softmax(1).reshape(logits.shape)
        outs.append(attention * x[:, part] + x[:, part])
        statistics.append((layers[1].running_mean, layers[5].running_var))
    out = own.train(training)(x)
    torch.testing.assert_close(out, torch.cat(outs, 1), atol=1e-12, rtol=0)
    torch.testing.assert_close(own.running_mean_depthwise, torch.cat([s[0] for s in statistics]))
    torch.testing.assert_close(own.running_var_pointwise, torch.cat([s[1] for s in statistics]))


def test_evaluation_keeps_the_statistics_and_attention_sums_to_one():
    own = module(8, 2).eval()
    before = copy.deepcopy(dict(own.named_buffers()))
    _, attention = own.attend(torch.randn(2, 8, 5, 6, dtype=torch.float64))
    assert all(torch.equal(before[name], kept) for name, kept in own.named_buffers())
    total = attention.sum((2, 3))
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("training", [False, True])
def test_gradcheck(impl, training):
    own = module(4, 2, impl, seed=1).train(training)
    names = [name for name, _ in own.named_parameters()]
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(own, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *own.parameters()))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("training", [False, True])
def test_half_precision(dtype, bound, training):
    for impl in PATHS:
        own = module(8, 2, impl).to(dtype).train(training)
        exact = copy.deepcopy(own).double()
        exact.impl = "reference"
        x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
        out, expected = own(x).detach(), exact(x.double()).detach()
        assert out.dtype == dtype
        assert float((out.double() - expected).abs().max()) < bound
        for got, kept in zip(own.buffers(), exact.buffers(), strict=True):
            assert float((got.double() - kept).abs().max()) < bound * float(kept.abs().max())


def test_auto_and_empty():
    own = module(4, 2).eval()
    with count_calls() as calls:
        own(torch.randn(1, 4, 2, 2, dtype=torch.float64))
        assert own(torch.zeros(0, 4, 2, 2, dtype=torch.float64)).shape == (0, 4, 2, 2)
    assert dict(calls) == {("subspace_attention", "compiled"): 2}


def test_refuses():
    own = module(4, 2)
    x = torch.randn(1, 4, 1, 1, dtype=torch.float64)
    with pytest.raises(ShapeError, match="more than one value"):
        own.train()(x)
    with pytest.raises(ShapeError, match=r"x \(B, C, H, W\)"):
        own(x[0])
    with pytest.raises(ShapeError, match="depthwise must have shape"):
        own(torch.zeros(1, 6, 2, 2, dtype=torch.float64))
    with pytest.raises(ShapeError, match="must divide the 4 channels"):
        ULSAM(4, 3)
    own.impl = "triton"
    with pytest.raises(UnsupportedError, match="no implementation 'triton'"):
        own.eval()(x)
    ones = torch.ones(4)
    with pytest.raises(ShapeError, match="pointwise biases"):
        subspace_attention(
            torch.zeros(1, 4, 2, 2), (ones, ones), (ones,) * 4, (ones, ones[:3]), (ones[:3],) * 4
        )


def test_compile_and_export():
    for training in (False, True):
        own = module(8, 2).train(training)
        expected_module = copy.deepcopy(own)
        x = torch.randn(2, 8, 4, 5, dtype=torch.float64)
        expected = expected_module(x)
        compiled = torch.compile(copy.deepcopy(own), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected)
        exported = torch.export.export(copy.deepcopy(own), (x,)).module()
        torch.testing.assert_close(exported(x), expected)
        torch.testing.assert_close(
            exported.running_var_pointwise, expected_module.running_var_pointwise
        )
