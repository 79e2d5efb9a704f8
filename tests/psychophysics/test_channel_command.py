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
    for wrong in ("0,9,0", "0,1", "0,0.5,1,2", "0,nan,0", "=-1,0,2"):
        word = [f"--thresholds{wrong}"] if wrong[0] == "=" else ["--thresholds", wrong]
        status, said = run(capsys, *word)
        assert status == 2 and "whole numbers in 0..4" in said, wrong
    status, said = run(capsys, "--thresholds", "0,2,0", "--lowest", "0")
    assert status == 2 and "above 0" in said
    with pytest.raises(SystemExit):
        main(["channel", "--thresholds", "0,,2"])
    assert "parted by commas" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("indices", "bandwidth", "centre", "sensitivity"),
    [
        ("0,0,2,2,3,4,2", 3.99, 39.4, 0.71),
        ("0,0,1,2,2,3,1", 3.51, 34.4, 0.39),
        ("0,0,0,2,3,3,0", 2.29, 32.2, 0.70),
    ],
)
def test_thresholds_of_networks(capsys, indices, bandwidth, centre, sensitivity):
    _, found = run(capsys, "--thresholds", indices)
    assert found["flags"] == []
    assert found["bandwidth"] == pytest.approx(bandwidth, abs=0.01)
    assert found["centre"] == pytest.approx(centre, abs=0.05)
    assert found["sensitivity"] == pytest.approx(sensitivity, abs=0.01)


@pytest.mark.parametrize(
    "indices", ["0,0,4", "1,1,1,1,1,1,2", "3,3,3,0,3,3,3", "2,2,2", "4,3,2,1,0"]
)
def test_what_is_no_channel_is_still_json(capsys, indices):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    assert main(["channel", "--thresholds", indices]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert bool(found["flags"]) and set(found) == {"bandwidth", "centre", "sensitivity", "flags"}


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
    assert found["resampled"]["over"] == ["stimulus_id"]
    for name, true in (("bandwidth", 2.0), ("centre", 30.0), ("sensitivity", 0.8)):
        low, high = found["intervals"][name]
        assert low < true < high and low < found[name] < high
    assert [b["frequency"] for b in found["thresholds"]] == [1.75 * 2**f for f in range(7)]
    middle = found["thresholds"][4]
    assert middle["low"] < 0.01 / (0.8 * 2 ** -(np.log2(28 / 30) ** 2)) < middle["high"]
    # A trial without noise has no band, however that is told.
    for blank in ("", 0.0):
        table.assign(frequency=table["frequency"].where(table["noise_sd"] > 0, blank)).to_csv(
            file, index=False
        )
        _, again = run(capsys, "--trials", str(file), "--bootstraps", "2")
        assert again["published_rule"] == found["published_rule"]
        assert again["bandwidth"] == pytest.approx(found["bandwidth"], rel=1e-6)


def test_trials_that_tell_no_channel(capsys, tmp_path):
    rng = np.random.default_rng(0)
    design = masking_design([f"i{i}" for i in range(8)], ["cat", "dog"] * 4)
    table = design.to_dataframe().assign(response=rng.choice(["cat", "dog"], design.sizes["trial"]))
    file = tmp_path / "trials.csv"

    def refused(changed, *words):
        changed.to_csv(file, index=False)
        status, said = run(capsys, "--trials", str(file), "--bootstraps", "2", *words)
        assert status == 2, said
        return said

    noisy = table["noise_sd"] > 0
    assert "'frequency' is missing" in refused(table.drop(columns="frequency"))
    assert "3 bands or more" in refused(table[~noisy])
    assert "above 0 where there is noise" in refused(
        table.assign(frequency=table["frequency"].where(~noisy, np.inf))
    )
    assert "noise_sd must be" in refused(table.assign(noise_sd=table["noise_sd"].where(noisy, -1)))
    assert "always 'cat'" in refused(table.assign(category="cat"))
    assert "between 0 and 1; got 95" in refused(table, "--level", "95")
    assert "1 draw or more" in refused(table, "--bootstraps", "0")
    for content in (b"", bytes(range(256))):
        file.write_bytes(content)
        status, said = run(capsys, "--trials", str(file))
        assert status == 2 and "no table of trials" in said
    table.assign(response=table["category"]).rename(columns=lambda c: f" {c}").to_csv(
        file, index=False
    )
    status, found = run(capsys, "--trials", str(file), "--bootstraps", "2")
    assert status == 0 and "flat" in found["flags"] and found["resampled"] is None
