"""Computations that a device repeats."""

import os

import pytest
import torch

from brainalign.device import repeatable


def settings():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
    )


def test_deterministic_algorithms_last_as_long_as_the_computation(monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = settings()
    assert repeatable(settings) == (True, False, False)
    assert settings() == before and not caplog.records
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    repeatable(settings)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"

    def fails():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        repeatable(fails)
    assert settings() == before


def test_what_has_no_fixed_order_is_told_and_computed(caplog):
    calls = []

    def put():
        calls.append(settings()[1])
        # Without a deterministic algorithm on any device.
        return torch.zeros(3).put_(torch.tensor([1]), torch.tensor([2.0]))

    with pytest.warns(UserWarning, match="deterministic"):
        found = repeatable(put)
    assert found.tolist() == [0, 2, 0] and calls == [False, True]
    assert "put_" in caplog.text and "may differ from run to run" in caplog.text
    assert settings()[0] is False
