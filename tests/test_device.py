"""Computations that a device repeats."""

import os

import pytest
import torch

from brainalign.device import Repeatable


def settings():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
    )


def test_deterministic_algorithms_last_as_long_as_the_computation(monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    Repeatable()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    repeatable = Repeatable()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    before = settings()
    assert repeatable(settings) == (True, False, False)
    assert settings() == before and not caplog.records
    calls = []

    def fails():
        calls.append(settings())
        raise RuntimeError("a deterministic world")

    with pytest.raises(RuntimeError, match="world"):
        repeatable(fails)
    assert settings() == before and len(calls) == 1 and repeatable.strict


def test_what_has_no_fixed_order_is_told_once_and_computed(caplog):
    calls, repeatable = [], Repeatable()

    def put():
        calls.append(settings()[1])
        # Without a deterministic algorithm on any device.
        return torch.zeros(3).put_(torch.tensor([1]), torch.tensor([2.0]))

    with pytest.warns(UserWarning, match="deterministic"):
        found = [repeatable(put), repeatable(put)]
    assert [x.tolist() for x in found] == 2 * [[0, 2, 0]] and calls == [False, True, True]
    assert len(caplog.records) == 1 and "put_" in caplog.text
    assert settings()[0] is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_repeats_gradients():
    from torch import nn

    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Upsample(scale_factor=2), nn.Conv2d(16, 4, 3)
    ).cuda()
    repeatable, x = Repeatable(), torch.rand(8, 3, 64, 64, device="cuda")

    def gradient():
        shown = x.clone().requires_grad_()
        q = net(shown).flatten(2)
        nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        return shown.grad

    assert torch.equal(repeatable(gradient), repeatable(gradient)) and repeatable.strict
