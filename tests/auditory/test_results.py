"""Result files: published accuracies to the last bit, and what a file must hold."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy.io import savemat

from brainalign.auditory.results import accuracy_records, read_accuracies, read_results
from brainalign.cli import main
from brainalign.errors import SchemaError

PATIENTS = {"CU-204": 28, "LIJ-174": 27}


@pytest.fixture(scope="module")
def folder(mirror):
    folder = mirror / "naplab_ieeg_aad"
    if not folder.is_dir():
        pytest.skip("the mirror has no naplab_ieeg_aad")
    return folder


@pytest.mark.parametrize("patient", PATIENTS)
def test_every_stored_accuracy(folder, patient):
    records = accuracy_records(sorted((folder / patient).glob("*Struct*.mat")), n_bootstrap=0)
    assert len(records) == 640  # 80 lengths, 3 + 3 + 2 metrics
    assert all(r["accuracy"] == r["stored"] and r["reproduced"] for r in records)
    assert {r["n_trials"] for r in records if r["window"] <= 20} == {PATIENTS[patient]}
    table = {
        (r["feature"], r["metric"], r["window"]): r["accuracy"]
        for r in accuracy_records(sorted((folder / patient).glob("*.csv")))
    }
    assert len(table) == 640
    for r in records:
        published = table[r["feature"], r["metric"], r["window"]]
        assert r["accuracy"] == pytest.approx(published, abs=1e-12)


def test_the_command(folder, capsys):
    files = [str(p) for p in sorted((folder / "CU-204").glob("Step_15_Spec_*.mat"))]
    assert main(["aad-accuracy", *files, "--bootstraps", "200"]) == 0
    found = json.loads(capsys.readouterr().out)
    at = {(r["metric"], r["window"]): r for r in found["results"]}
    assert found["unit"] == "percent" and len(at) == 240
    assert [round(at[m, 4.0]["accuracy"], 2) for m in (1, 2, 4)] == [81.90, 80.22, 83.96]
    one = at[1, 4.0]
    assert (one["n_windows"], one["n_trials"], one["subject"]) == (536, 28, "CU-204")
    low, high = one["interval"]
    # Trials differ, so the interval is wider than that of as many independent windows.
    assert low < one["accuracy"] < high and high - low > 2 * 1.96 * np.sqrt(81.9 * 18.1 / 536)
    assert 43 < one["chance"][0] < 50 < one["chance"][1] < 57
    wrong = str(folder / "CU-204" / "ResponsiveElectrodes.mat")
    assert main(["aad-accuracy", wrong]) == 2
    assert "'structResults'" in capsys.readouterr().err


def made(tmp_path, **fields):
    values = {
        "thisWindowSize": 2.0,
        "corrAttEst_Att": np.array([[0.3, 0.1, 0.0], [0.1, 0.2, 0.3], [0.2, 0.0, 0.0]]),
        "corrAttEst_UnAtt": np.array([[0.1, 0.2, 0.1], [0.2, 0.1, 0.1], [0.2, 0.0, 0.0]]),
        "corrUnAttEst_Att": np.array([[0.3, 0, 0], [-0.2, 0, 0], [0.1, 0, 0]]),
        "corrUnAttEst_UnAtt": np.array([[0.0, 0, 0], [0.1, 0, 0], [0.2, 0, 0]]),
    }
    values = {k: v for k, v in (values | fields).items() if v is not None}
    path = tmp_path / "Step_15_Spec_CCA.mat"
    savemat(path, {"structResults": {"WinSizeCTR_1": values}})
    return path


def test_metrics_by_hand(tmp_path):
    (window,) = read_results(made(tmp_path, metric1Accu=50.0))
    assert window.correct(1).tolist() == [True, False, False]
    assert window.correct(2).tolist() == [False, True, True]
    assert window.correct(4).tolist() == [False, True, False]
    assert window.trial is None
    one, *_ = accuracy_records([made(tmp_path, metric1Accu=50.0)])
    assert one["accuracy"] == pytest.approx(100 / 3) and not one["reproduced"]
    assert "interval" not in one
    with pytest.raises(SchemaError, match="no metric 3"):
        window.correct(3)


def test_one_component_has_no_vote(tmp_path):
    one = {k: np.array([[0.1], [0.2]]) for k in ("corrAttEst_Att", "corrAttEst_UnAtt")}
    one |= {k: np.array([[0.1], [0.2]]) for k in ("corrUnAttEst_Att", "corrUnAttEst_UnAtt")}
    assert [r["metric"] for r in accuracy_records([made(tmp_path, **one)])] == [1, 2]


def test_files_at_fault(tmp_path):
    with pytest.raises(SchemaError, match="no field 'corrAttEst_UnAtt'"):
        read_results(made(tmp_path, corrAttEst_UnAtt=None))
    with pytest.raises(SchemaError, match="correlations of"):
        read_results(made(tmp_path, corrAttEst_UnAtt=np.zeros((2, 3))))
    text = tmp_path / "a.mat"
    text.write_text("no mat file, but long enough for a header" * 10)
    with pytest.raises(SchemaError, match="no MATLAB file"):
        read_results(text)
    table = tmp_path / "a.csv"
    pd.DataFrame({"windowSize": [1.0], "accuracy": [60.0]}).to_csv(table)
    with pytest.raises(SchemaError, match="windowSize and one per metric"):
        read_accuracies(table)
    table.write_text("")
    with pytest.raises(SchemaError, match="is no table"):
        read_accuracies(table)
    table.write_text("windowSize,Metric1\n1,high\n")
    with pytest.raises(SchemaError, match="'Metric1' holds what is no number"):
        read_accuracies(table)
    cut = tmp_path / "cut.mat"
    cut.write_bytes(made(tmp_path).read_bytes()[:400])
    with pytest.raises(SchemaError, match="no MATLAB file"):
        read_results(cut)
    for wrong, says in (
        ({"thisWindowSize": 0.0}, "thisWindowSize is 0"),
        ({"thisWindowSize": np.zeros((0, 0))}, "'thisWindowSize' has 0 values"),
        ({"corrAttEst_Att": "none"}, "expected numbers"),
    ):
        with pytest.raises(SchemaError, match=says):
            read_results(made(tmp_path, **wrong))
    savemat(cut, {"structResults": np.eye(3)})
    with pytest.raises(SchemaError, match="expected one struct"):
        read_results(cut)


def test_what_is_missing_is_told(tmp_path, capsys):
    """A window without correlations is wrong; JSON holds null and no NaN."""
    lost = np.array([[0.3, 0.1, 0.0], [np.nan] * 3, [0.2, 0.0, 0.0]])
    path = made(tmp_path, corrAttEst_Att=lost, metric1Accu=np.nan)
    table = tmp_path / "a_Traj.csv"
    table.write_text("windowSize,testMetric1\n0.5,60\n7,\n")
    assert main(["aad-accuracy", str(path), str(table)]) == 0
    text = capsys.readouterr().out
    assert "NaN" not in text
    records = json.loads(text)["results"]
    assert [r["metric"] for r in records] == [1, 2, 4, 1, 1]
    assert records[0]["n_not_finite"] == 1 and records[0]["accuracy"] == pytest.approx(100 / 3)
    assert records[0]["stored"] is None and not records[0]["reproduced"]
    assert "stored" not in records[1]
    assert [r["accuracy"] for r in records[3:]] == [60, None]
    assert records[4]["feature"] == "Traj" and records[4]["window"] == 7
