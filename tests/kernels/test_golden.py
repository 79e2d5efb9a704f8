"""The stored outputs and gradients of the original programs, and the command that checks them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from brainalign_kernels.golden import __main__ as command
from brainalign_kernels.golden.check import MECHANISMS, check_folder


@pytest.mark.parametrize("mechanism", sorted(MECHANISMS))
def test_golden_files(golden, mechanism):
    results = list(check_folder(golden / mechanism))
    assert all(good for good, _ in results), "\n".join(line for _, line in results)


def test_every_folder_is_known(golden):
    assert {f.name for f in golden.iterdir() if f.is_dir()} <= set(MECHANISMS)


def test_command_passes(golden, tmp_path, capsys):
    shutil.copytree(golden / "clear_mask", tmp_path / "clear_mask")
    assert command.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list((tmp_path / "clear_mask").iterdir()))
    assert all(line.startswith("ok") and "reference" in line for line in lines)


def test_command_fails_on_a_miss(golden, tmp_path, capsys):
    source = golden / "flow_attention" / "00.npz"
    with np.load(source, allow_pickle=False) as archive:
        arrays = dict(archive)
    arrays["grad_x"] = arrays["grad_x"] * (1 + 1e-5)
    (tmp_path / "flow_attention").mkdir()
    np.savez(tmp_path / "flow_attention" / "00.npz", **arrays)
    assert command.main([str(tmp_path)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_command_fails_on_unknown_and_empty(tmp_path, capsys):
    assert command.main([str(tmp_path)]) == 1
    assert "no golden files" in capsys.readouterr().out
    assert command.main([str(tmp_path / "absent")]) == 1
    assert "no such folder" in capsys.readouterr().out
    (tmp_path / "telepathy").mkdir()
    np.savez(tmp_path / "telepathy" / "00.npz", meta=json.dumps({}), out=np.zeros(2))
    assert command.main([str(tmp_path)]) == 1
    assert "unknown mechanism 'telepathy'" in capsys.readouterr().out
