"""Ridge from disk to disk: equal to the estimator, within its memory, going on where it stopped."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import zarr

from brainalign.data.store import read
from brainalign.errors import ConfigError
from brainalign.linear import Ridge, ridge_to_store, streaming

torch.set_num_threads(1)
ALPHAS = np.logspace(0, 4, 9)


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((90, 20)).astype(np.float32)
    W = rng.standard_normal((20, 300)) * np.logspace(-1.5, 0, 300)
    Y = (X @ W + rng.standard_normal((90, 300)) + 5).astype(np.float32)
    return X, Y


def on_disk(kind, Y, tmp_path):
    if kind == "ndarray":
        return Y
    if kind == "memmap":
        made = np.memmap(tmp_path / "Y.dat", dtype=Y.dtype, mode="w+", shape=Y.shape)
        made[:] = Y
        made.flush()
        return np.memmap(tmp_path / "Y.dat", dtype=Y.dtype, mode="r", shape=Y.shape)
    made = zarr.create_array(tmp_path / "Y.zarr", shape=Y.shape, chunks=(len(Y), 64), dtype="f4")
    made[:] = Y
    return made


@pytest.mark.parametrize("kind", ["ndarray", "memmap", "zarr"])
@pytest.mark.parametrize("cv", [3, "gcv", "loo"])
def test_equals_the_estimator(problem, kind, cv, tmp_path, monkeypatch):
    X, Y = problem
    monkeypatch.setattr(streaming, "UNCHUNKED", 64)
    monkeypatch.setattr(streaming, "MOST_TARGETS", 128)
    test = np.arange(5, 90, 9)
    train = np.setdiff1d(np.arange(90), test)
    out = ridge_to_store(
        X, on_disk(kind, Y, tmp_path), tmp_path / "fit.zarr", alphas=ALPHAS, cv=cv, test_rows=test
    )
    made = read(out)
    ours = Ridge(ALPHAS, cv=cv).fit(X[train], Y[train])
    np.testing.assert_allclose(made["weights"], ours.coef_, atol=1e-5)
    np.testing.assert_allclose(made["intercept"], ours.intercept_, atol=1e-5)
    np.testing.assert_allclose(made["alpha"], ours.alpha_)
    np.testing.assert_allclose(made["score"], ours.best_score_, atol=1e-5)
    predicted = ours.predict(X[test])
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(Y[test].T, predicted.T, strict=True)]
    np.testing.assert_allclose(made["r"], r, atol=1e-4)
    assert not (tmp_path / "fit.zarr.partial").exists()
    with pytest.raises(FileExistsError):
        ridge_to_store(X, Y, out, alphas=ALPHAS)


class Counting:
    """A zarr array that notes which columns are read, and stops the run at one of them."""

    def __init__(self, array, stop_at=None):
        self.array, self.read, self.stop_at = array, [], stop_at
        self.shape, self.dtype, self.chunks = array.shape, array.dtype, array.chunks

    def __getitem__(self, key):
        if self.stop_at is not None and key[1].start >= self.stop_at:
            raise OSError("the disk went away")
        self.read.append((key[1].start, key[1].stop))
        return self.array[key]


def test_each_column_is_read_once_and_a_stopped_run_goes_on(problem, tmp_path, monkeypatch):
    X, Y = problem
    monkeypatch.setattr(streaming, "MOST_TARGETS", 64)
    array = on_disk("zarr", Y, tmp_path)
    out = tmp_path / "fit.zarr"
    broken = Counting(array, stop_at=192)
    with pytest.raises(OSError, match="went away"):
        ridge_to_store(X, broken, out, alphas=ALPHAS, cv="gcv")
    assert not out.exists()
    done = len(list((tmp_path / "fit.zarr.partial" / "done").iterdir()))
    assert 1 <= done <= 3
    with pytest.raises(ConfigError, match="other data or settings"):
        ridge_to_store(X, array, out, alphas=ALPHAS[:4], cv="gcv")
    whole = Counting(array)
    ridge_to_store(X, whole, out, alphas=ALPHAS, cv="gcv")
    starts = [a for a, _ in whole.read]
    assert starts == [0, *range(64 * done, 300, 64)]  # the first to compare
    assert all(a % 64 == 0 for a in starts)
    ours = Ridge(ALPHAS, cv="gcv").fit(X, Y)
    np.testing.assert_allclose(read(out)["weights"], ours.coef_, atol=1e-5)


def test_targets_without_a_fit_are_nan_and_counted(problem, tmp_path, caplog):
    X, Y = problem
    Y[3, 7], Y[:, 9] = np.nan, 2.0
    with caplog.at_level("WARNING"):
        made = read(ridge_to_store(X, Y, tmp_path / "fit.zarr", alphas=ALPHAS, cv=3))
    assert "2 of 300 targets" in caplog.text
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(made["alpha"])), [7, 9])
    assert made.attrs["targets_without_fit"] == 2
    good = np.setdiff1d(np.arange(300), [7, 9])
    ours = Ridge(ALPHAS, cv=3).fit(X, Y[:, good])
    np.testing.assert_allclose(made["weights"][good], ours.coef_, atol=1e-5)


def test_errors_come_before_the_work(problem, tmp_path):
    X, Y = problem
    out = tmp_path / "fit.zarr"
    with pytest.raises(ConfigError, match="need about"):
        ridge_to_store(X, Y, out, alphas=ALPHAS, memory_gib=0.01)
    with pytest.raises(ConfigError, match="same samples"):
        ridge_to_store(X[:-1], Y, out, alphas=ALPHAS)
    with pytest.raises(ConfigError, match="NaN"):
        ridge_to_store(np.where(X > 2, np.nan, X), Y, out, alphas=ALPHAS)
    with pytest.raises(ConfigError, match="too few for cv=60"):
        ridge_to_store(X, Y, out, alphas=ALPHAS, cv=60)
    assert list(tmp_path.iterdir()) == []


def test_memory_limit_is_kept(tmp_path):
    """600 MB of targets pass through a process that may hold 1.1 GiB, its libraries included."""
    script = textwrap.dedent(
        """
        import sys
        import numpy as np, torch, zarr
        torch.set_num_threads(1)
        from brainalign.linear import ridge_to_store
        from brainalign.memory import peak_bytes
        n, t, w = 1500, 100_000, 2000
        Y = zarr.create_array(sys.argv[1] + "/Y.zarr", shape=(n, t), chunks=(n, w), dtype="f4",
                              compressors=None)
        rng = np.random.default_rng(0)
        block = rng.standard_normal((n, w), dtype=np.float32)
        for start in range(0, t, w):
            Y[:, start : start + w] = block
        X = rng.standard_normal((n, 40), dtype=np.float32)
        ridge_to_store(X, Y, sys.argv[1] + "/fit.zarr", alphas=[1.0, 100.0], cv="gcv",
                       memory_gib=float(sys.argv[2]))
        print(peak_bytes())
        """
    )
    limit = 1126 * 2**20
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path), str(limit / 2**30)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < limit


def test_rows_left_out_by_mask(problem, tmp_path):
    X, Y = problem
    rows = np.arange(len(X)) >= len(X) - 20
    made = [
        read(ridge_to_store(X, Y, tmp_path / name, alphas=ALPHAS, cv=3, test_rows=given))
        for name, given in (("a.zarr", rows), ("b.zarr", np.flatnonzero(rows)))
    ]
    np.testing.assert_array_equal(made[0]["r"], made[1]["r"])
    with pytest.raises(ConfigError, match="expected row numbers, or a mask"):
        ridge_to_store(X, Y, tmp_path / "c.zarr", alphas=ALPHAS, test_rows=rows[:-1])
    with pytest.raises(ConfigError, match="cannot be kept whole"):
        ridge_to_store(X, Y, tmp_path / "c.zarr", alphas=ALPHAS, cv="gcv", groups=rows)


def test_a_stopped_run_does_not_go_on_with_other_targets(problem, tmp_path, monkeypatch):
    X, Y = problem
    monkeypatch.setattr(streaming, "UNCHUNKED", 32)
    monkeypatch.setattr(streaming, "MOST_TARGETS", 32)
    out, compute = tmp_path / "fit.zarr", streaming._compute
    begun = []

    def stopped(*args):
        begun.append(1)
        if len(begun) > 2:
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(streaming, "_compute", stopped)
    with pytest.raises(KeyboardInterrupt):
        ridge_to_store(X, Y, out, alphas=ALPHAS, cv=3, device="cpu")
    monkeypatch.setattr(streaming, "_compute", compute)
    with pytest.raises(ConfigError, match="begun with other targets"):
        ridge_to_store(X, -Y, out, alphas=ALPHAS, cv=3, device="cpu")
    made = read(ridge_to_store(X, Y, out, alphas=ALPHAS, cv=3, device="cpu"))
    np.testing.assert_allclose(made["weights"], Ridge(ALPHAS, cv=3).fit(X, Y).coef_, atol=1e-5)


def test_two_devices_share_the_targets(problem, tmp_path, monkeypatch):
    X, Y = problem
    monkeypatch.setattr(streaming, "UNCHUNKED", 32)
    monkeypatch.setattr(streaming, "MOST_TARGETS", 32)
    made = read(
        ridge_to_store(X, Y, tmp_path / "fit.zarr", alphas=ALPHAS, cv=3, device=["cpu", "cpu"])
    )
    ours = Ridge(ALPHAS, cv=3).fit(X, Y)
    np.testing.assert_allclose(made["weights"], ours.coef_, atol=1e-5)
    np.testing.assert_allclose(made["alpha"], ours.alpha_)


def test_chunks_wider_than_the_memory_are_read_in_parts(problem, tmp_path, monkeypatch, caplog):
    X, Y = problem
    stored = zarr.create_array(tmp_path / "Y.zarr", shape=Y.shape, chunks=(len(Y), 256), dtype="f8")
    stored[:] = Y
    # A target takes as much as a hundredth of what is left.
    limit = 4.0
    room = limit * 2**30 - streaming.resident_bytes() - streaming.RESERVE
    monkeypatch.setattr(streaming, "_slice_bytes", lambda *a: a[3] * room / 100)
    with caplog.at_level("WARNING"):
        out = ridge_to_store(X, stored, tmp_path / "fit.zarr", alphas=ALPHAS, cv=3,
                             memory_gib=limit, device=["cpu", "cpu"])  # fmt: skip
    assert "stored 256 at a time, but only" in caplog.text and "more than once" in caplog.text
    ours = Ridge(ALPHAS, cv=3).fit(X, Y)
    made = read(out)
    np.testing.assert_allclose(made["weights"], ours.coef_, atol=1e-5)
    assert made["weights"].encoding["chunks"][0] < 60


def test_the_memory_of_folds_is_counted(monkeypatch):
    monkeypatch.setattr(streaming, "resident_bytes", lambda: 0)
    shape, grid = (4000, 3000), np.ones(5)

    def least(n_folds, devices=1):
        lo, hi = 0.0, 64.0
        for _ in range(40):
            mid = (lo + hi) / 2
            try:
                streaming._require_memory(shape, 4000, grid, n_folds, mid, 4, devices)
                hi = mid
            except ConfigError:
                lo = mid
        return hi

    # Eigenvectors and test rows of ten more folds.
    assert least(11) - least(1) == pytest.approx(10 * 2 * 3000**2 * 4 / 2**30, rel=0.01)
    assert least(5, devices=2) > 1.5 * least(5)
    with pytest.raises(ConfigError, match=r"The program holds 0\.0 MiB.*10 folds on 1 device"):
        streaming._require_memory(shape, 4000, grid, 10, 0.5, 4, 1)
