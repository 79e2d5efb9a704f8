"""`brainalign channel`: the published numbers as JSON, and intervals from a file of trials."""

from __future__ import annotations

import json

import numpy as np
import pytest

from brainalign.cli import main
from brainalign.psychophysics import SimulatedObserver, masking_design, observe


def run(capsys, *words):
    status = main(["channel", *words])
    captured = capsys.readouterr()
    return status, json.loads(captured.out) if status == 0 else captured.err


def test_thresholds(capsys):
    status, human = run(capsys, "--thresholds", "0,0,0,0,2,2,0")
    assert status == 0 and human["flags"] == ["amplitude_at_bound"]
    assert human["bandwidth"] == pytest.approx(1.00, abs=0.005)
    assert human["centre"] == pytest.approx(39.6, abs=0.05)
    assert human["sensitivity"] == pytest.approx(1.00, abs=0.005)
    _, flat = run(capsys, "--thresholds", "0,0,0,0,0,0,0")
    assert flat == {"bandwidth": None, "centre": None, "sensitivity": None, "flags": ["flat"]}
    status, said = run(capsys, "--thresholds", "0,9,0")
    assert status == 2 and "whole numbers in 0..4" in said


def test_trials(capsys, tmp_path):
    classes = ("cat", "dog", "bird", "car")
    observer = SimulatedObserver(classes, bandwidth=2.0, centre=30.0, sensitivity=0.8, seed=0)
    design = masking_design([f"i{i}" for i in range(60)], [classes[i % 4] for i in range(60)])
    table = observe(observer, design, batch_size=999).to_dataframe()
    file = tmp_path / "trials.csv"
    table.to_csv(file, index=False)
    status, found = run(capsys, "--trials", str(file), "--bootstraps", "50")
    assert status == 0 and found["n_trials"] == 2100 and found["guess"] == 0.25
    assert found["flags"] == [] and found["published_rule"]["bandwidth"] > 2
    for name, true in (("bandwidth", 2.0), ("centre", 30.0), ("sensitivity", 0.8)):
        low, high = found["intervals"][name]
        assert low < true < high and low < found[name] < high
    assert [b["frequency"] for b in found["thresholds"]] == [1.75 * 2**f for f in range(7)]
    middle = found["thresholds"][4]
    assert middle["low"] < 0.01 / (0.8 * 2 ** -(np.log2(28 / 30) ** 2)) < middle["high"]
    table.drop(columns="frequency").to_csv(file, index=False)
    status, said = run(capsys, "--trials", str(file))
    assert status == 2 and "'frequency' is missing" in said
