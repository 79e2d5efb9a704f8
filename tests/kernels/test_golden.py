"""The stored outputs and gradients of the original programs, and the command that checks them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from brainalign_kernels.golden import __main__ as command
from brainalign_kernels.golden.check import MECHANISMS, Comparison, check_folder


@pytest.mark.parametrize("mechanism", sorted(MECHANISMS))
def test_golden_files(golden, mechanism):
    results = list(check_folder(golden / mechanism))
    assert all(good for good, _ in results), "\n".join(line for _, line in results)


def test_every_folder_is_known(golden):
    assert {f.name for f in golden.iterdir() if f.is_dir()} <= set(MECHANISMS)


def put(folder, name="flow_attention/00.npz", **arrays):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **arrays)
    return file


@pytest.fixture
def flow(golden):
    """Return the arrays of a file, to be spoiled."""
    with np.load(golden / "flow_attention" / "00.npz", allow_pickle=False) as archive:
        return dict(archive)


def failures(folder, capsys):
    """Lines of a run that must fail."""
    assert command.main([str(folder)]) == 1
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]


def test_command_passes(golden, tmp_path, capsys, monkeypatch):
    shutil.copytree(golden / "clear_mask", tmp_path / "clear_mask")
    assert command.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list((tmp_path / "clear_mask").iterdir()))
    assert all(line.startswith("ok") and "reference 0.0e+00" in line for line in lines)
    monkeypatch.chdir(tmp_path / "clear_mask")
    assert command.main(["."]) == 0


@pytest.mark.parametrize("name", ["out", "core_out", "grad_x", "sink_allocation"])
@pytest.mark.parametrize("spoil", [lambda x: x * (1 + 1e-5), lambda x: x * np.nan, lambda x: x[:1]])
def test_command_fails_on_a_miss(flow, tmp_path, capsys, name, spoil):
    put(tmp_path, **flow | {name: spoil(flow[name])})
    (line,) = failures(tmp_path, capsys)
    assert "flow_attention/00.npz" in line
    assert name in line


def test_command_fails_on_what_is_not_a_number(flow, tmp_path, capsys):
    put(tmp_path, **flow | {"q": np.where(flow["q"] == flow["q"].max(), np.nan, flow["q"])})
    (line,) = failures(tmp_path, capsys)
    assert "inf of 1e-09" in line


def test_command_fails_on_damage_and_goes_on(flow, tmp_path, capsys):
    put(tmp_path, "flow_attention/00.npz", **flow)
    put(tmp_path, "flow_attention/01.npz", **{n: x for n, x in flow.items() if n != "grad_out"})
    put(tmp_path, "flow_attention/02.npz", **{n: x for n, x in flow.items() if n != "meta"})
    whole = put(tmp_path, "flow_attention/03.npz", **flow).read_bytes()
    (tmp_path / "flow_attention" / "03.npz").write_bytes(whole[: len(whole) // 2])
    put(tmp_path, "flow_attention/04.npz", **flow | {"x": np.array([{}], dtype=object)})
    lines = failures(tmp_path, capsys)
    assert [line.split(":")[0][-6:] for line in lines] == ["01.npz", "02.npz", "03.npz", "04.npz"]
    assert all("cannot be checked" in line for line in lines)
    assert "grad_out" in lines[0]


def test_command_fails_on_results_that_it_cannot_compare(flow, tmp_path, capsys):
    put(tmp_path, **flow | {"grad_temperature": np.ones(3)})
    (line,) = failures(tmp_path, capsys)
    assert "nothing was compared with grad_temperature" in line


def test_command_fails_on_unknown_and_empty(golden, tmp_path, capsys):
    assert "no golden files" in failures(tmp_path, capsys)[0]
    assert "no such folder" in failures(tmp_path / "absent", capsys)[0]
    shutil.copytree(golden / "clear_mask", tmp_path / "clear_mask")
    (tmp_path / "flow_attention").mkdir()
    (line,) = failures(tmp_path, capsys)
    assert "flow_attention: no golden files" in line
    put(tmp_path, "telepathy/00.npz", meta=json.dumps({}), out=np.zeros(2))
    assert "unknown mechanism 'telepathy'" in failures(tmp_path, capsys)[1]


def test_vanishing_values_are_compared_on_the_scale_of_their_kin():
    noise, zero = torch.full((2,), 3e-16, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    assert not Comparison("grad_b", noise, 2 * noise, 1e-7).holds
    assert Comparison("grad_b", noise, 2 * noise, 1e-7, scale=1.0).holds
    assert Comparison("grad_b", zero, noise, 1e-7, scale=1.0).holds
    assert not Comparison("grad_b", zero + 1e-6, noise, 1e-7, scale=1.0).holds
    assert not Comparison("grad_b", zero, zero + 1e-9, 1e-7, scale=1.0).holds
