"""Ridge regression of more targets than memory holds, streamed from disk to disk.

What the targets share is factorised once. Then targets pass in slices: while one is computed the
next is read and the last is written, so that each byte of Y is read once.
"""

from __future__ import annotations

import logging
import mmap
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import BaseCrossValidator, check_cv
from tqdm.auto import tqdm

from brainalign.data.store import require_disk, sha256_of, swap_in
from brainalign.device import resolve_devices
from brainalign.errors import ConfigError
from brainalign.linear.ridge import (
    check_alphas,
    check_finite,
    check_folds,
    check_groups,
    warn_edges,
    warn_rank,
)
from brainalign.linear.search import RidgeSolver
from brainalign.memory import readable, resident_bytes

__all__ = ["ridge_to_store"]

logger = logging.getLogger(__name__)

#: Targets of a slice where Y has no chunks of its own.
UNCHUNKED = 1024
#: Most targets of a slice: what one interruption can lose.
MOST_TARGETS = 16_384
#: Targets of the first finished slice that are compared when a stopped run goes on.
NAMED = 8
#: Memory that libraries take for themselves while the work runs.
RESERVE = 300 * 2**20


@dataclass(frozen=True)
class _Plan:
    """What the slices have in common."""

    n_targets: int
    step: int
    train: NDArray[np.intp]
    test: NDArray[np.intp]
    dtype: Any


def ridge_to_store(
    X: Any,
    Y: Any,
    out: str | Path,
    *,
    alphas: float | Sequence[float],
    cv: int | str | BaseCrossValidator | Sequence[tuple[Any, Any]] = 5,
    groups: ArrayLike | None = None,
    test_rows: ArrayLike | None = None,
    fit_intercept: bool = True,
    memory_gib: float = 8.0,
    device: str | Sequence[str] = "auto",
    dtype: str = "float32",
    overwrite: bool = False,
) -> Path:
    r"""Fit ridge regression with one alpha per target to a Y that need not fit into memory.

    .. math:: \min_{w, b} \|y_t - X w_t - b_t\|^2 + \alpha_t \|w_t\|^2

    A run that was stopped goes on after its last finished slice when it is called again with the
    same X, Y, settings and `out`; a few targets are read again and compared. Until it is whole, the
    result stands at ``OUT.partial``. Targets that are constant or not finite get NaN, and are
    counted in a warning.

    Parameters
    ----------
    X : array-like, shape (n_samples, n_features)
        Features: an ndarray, memmap or zarr array. It is held in memory, with its factors.
    Y : array, shape (n_samples, n_targets)
        Targets: an ndarray, memmap, zarr array, or anything that has ``shape`` and ``dtype`` and is
        sliced by columns. A zarr array is read in whole chunks of targets, where these fit.
    out : path
        Zarr store that is made: ``weights`` (target, feature), ``intercept``, ``alpha``, ``score``
        (cross-validated R^2 at the chosen alpha, which took part in the choice) and, with
        `test_rows`, ``r`` and ``r2`` (target) on rows that took part in nothing.
    alphas : float or sequence of float
        The grid, all above 0.
    cv : int, splitter, list of (train, test), "loo" or "gcv"
        How alphas are scored in the training rows; see `Ridge`.
    groups : array-like, shape (n_training_rows,), optional
        Groups for a splitter that keeps them whole.
    test_rows : array-like of int, or mask, optional
        Rows left out of the fit, on which it is scored.
    fit_intercept : bool
        Fit ``b``.
    memory_gib : float
        Most memory (GiB) that the process may hold, the program itself included.
    device : str or sequence of str
        See `brainalign.device.resolve_devices`: several devices share the targets.
    dtype : {"float32", "float64"}
        Type of the computation and of the result.
    overwrite : bool
        Replace what stands at `out`.

    Returns
    -------
    Path
        `out`, to be opened with `brainalign.data.store.read`.

    Raises
    ------
    ConfigError
        If the memory does not suffice (with what would), rows do not match, X is not finite, or the
        partial result beside `out` comes from other data or settings.
    FileExistsError
        If `out` exists and `overwrite` is False.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists. Pass overwrite=True to replace it.")
    grid = check_alphas(alphas)
    if dtype not in ("float32", "float64"):
        raise ConfigError(f"dtype is {dtype!r}; expected float32 or float64.")
    shape = tuple(np.shape(X))
    if len(shape) != 2 or len(Y.shape) != 2 or shape[0] != Y.shape[0]:
        raise ConfigError(
            f"X has shape {shape} and Y {tuple(Y.shape)}; expected (n_samples, n_features) and "
            "(n_samples, n_targets) of the same samples."
        )
    train, test = _rows(shape[0], test_rows)
    width = _chunk(Y)
    devices = resolve_devices(device)
    n_folds = _n_folds(cv, groups, len(train)) if len(grid) > 1 else 0
    _require_memory(
        shape, len(train), grid, n_folds, memory_gib, np.dtype(dtype).itemsize, len(devices)
    )
    values = np.asarray(X, dtype=dtype)
    check_finite(values, "X", "features")
    folds = _folds(values[train], cv, groups) if len(grid) > 1 else "gcv"
    solvers = [
        RidgeSolver(
            torch.as_tensor(values[train], device=d),
            torch.as_tensor(grid),
            folds,
            fit_intercept=fit_intercept,
        )
        for d in devices
    ]
    warn_rank(solvers[0].factors)
    step = _targets_per_slice(
        shape, Y, grid, width, memory_gib, np.dtype(dtype).itemsize, len(devices)
    )
    described = folds if isinstance(folds, str) else [[s.tolist() for s in pair] for pair in folds]
    key = sha256_of(
        values, list(map(float, grid)), described, train, test, fit_intercept, dtype,
        list(Y.shape), str(Y.dtype),
    )  # fmt: skip
    partial = out.with_name(out.name + ".partial")
    plan = _Plan(Y.shape[1], _step_begun(partial, step), train, test, np.dtype(dtype))
    require_disk(out, plan.n_targets * shape[1] * plan.dtype.itemsize)
    store = _open(partial, plan, shape[1], min(width, plan.step), key)
    marks = partial / "done"
    todo = [t for t in _slices(plan) if not (marks / str(t.start)).exists()]
    if len(todo) < len(list(_slices(plan))):
        _require_same(Y, plan, marks, partial)
        logger.info("%s: %d slices of targets are left to do.", out, len(todo))
    _stream(solvers, values[test], Y, todo, store, marks, plan)
    _finish(store, partial, out, grid, folds, fit_intercept)
    return out


def _stream(
    solvers: list[RidgeSolver],
    X_test: NDArray[Any],
    Y: Any,
    todo: list[slice],
    store: Any,
    marks: Path,
    plan: _Plan,
) -> None:
    """Read, compute and write all slices, one of each at a time and device."""
    turn, waiting = threading.Lock(), iter(todo)
    progress = tqdm(total=plan.n_targets, desc="ridge", unit="target", disable=None)
    progress.update(plan.n_targets - sum(t.stop - t.start for t in todo))

    def following(
        reader: ThreadPoolExecutor, device: torch.device
    ) -> Future[tuple[slice, torch.Tensor]] | None:
        with turn:
            t = next(waiting, None)
        return None if t is None else reader.submit(_read, Y, t, plan.dtype, device)

    def save(t: slice, made: dict[str, NDArray[Any]], read_from: str) -> None:
        for name, values in made.items():
            store[name][t] = values
        (marks / str(t.start)).write_text(read_from)
        progress.update(t.stop - t.start)

    def work(solver: RidgeSolver) -> None:
        device = solver.factors.X.device
        X_new = torch.as_tensor(X_test, device=device)
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            written: Future[None] | None = None
            coming = following(reader, device)
            while coming is not None:
                t, y = coming.result()
                coming = following(reader, device)
                made = _compute(solver, X_new, y, plan)
                named = _name_of(y)
                if written is not None:
                    written.result()  # so that at most one slice waits for the disk
                written = writer.submit(save, t, made, named)
                del y, made
            if written is not None:
                written.result()

    with progress, ThreadPoolExecutor(len(solvers)) as devices:
        for running in [devices.submit(work, s) for s in solvers]:
            running.result()


def _read(Y: Any, t: slice, dtype: Any, device: torch.device) -> tuple[slice, torch.Tensor]:
    """Read a slice of the targets onto the device, beside what runs there."""
    y = torch.from_numpy(np.ascontiguousarray(Y[:, t], dtype=dtype))
    mapped = getattr(Y, "_mmap", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)  # pages that were read would count as held
    if device.type != "cuda":
        return t, y
    computing = torch.cuda.default_stream(device)
    copying = torch.cuda.Stream(device)
    with torch.cuda.stream(copying):
        moved = y.pin_memory().to(device, non_blocking=True)
    copying.synchronize()
    moved.record_stream(computing)
    return t, moved


def _name_of(y: torch.Tensor) -> str:
    """Hash of the first targets of a slice, by which other data are told."""
    return sha256_of(y[:, :NAMED].cpu().numpy())


def _require_same(Y: Any, plan: _Plan, marks: Path, partial: Path) -> None:
    """Refuse to go on with other targets than those that the first finished slice was made from."""
    done = next(t for t in _slices(plan) if (marks / str(t.start)).exists())
    begun = slice(done.start, min(done.start + NAMED, done.stop))
    y = torch.from_numpy(np.ascontiguousarray(Y[:, begun], dtype=plan.dtype))
    if (marks / str(done.start)).read_text() != _name_of(y):
        raise ConfigError(
            f"{partial} was begun with other targets: {begun.start} to {begun.stop - 1} differ.",
            "Remove it, or call with what it was begun with.",
        )


def _compute(
    solver: RidgeSolver, X_new: torch.Tensor, y: torch.Tensor, plan: _Plan
) -> dict[str, NDArray[Any]]:
    """Fit one slice of targets."""
    n_targets = y.shape[1]
    p = solver.factors.X.shape[1]
    made: dict[str, NDArray[Any]] = {"weights": np.empty((n_targets, p), dtype=plan.dtype)}
    names = ("intercept", "alpha", "score", *(("r", "r2") if len(plan.test) else ()))
    made |= {name: np.empty(n_targets) for name in names}
    projected = solver.factors.project(X_new) if len(plan.test) else None
    train, test = (torch.as_tensor(rows, device=y.device) for rows in (plan.train, plan.test))
    for t in solver.batches(n_targets):
        part = y[:, t] if projected is None else y[:, t][train]
        finite = torch.isfinite(part).all(dim=0)
        part = torch.where(finite, part, 0.0)
        solution = solver.solve(part)
        usable = (finite & (part != part[:1]).any(dim=0)).cpu().numpy()
        coef, intercept = solver.coefficients(solution)
        best = (
            solution.scores.gather(0, solution.index[None])[0]
            if len(solution.scores)
            else torch.full((coef.shape[0],), torch.nan)
        )
        found = {
            "weights": coef,
            "intercept": intercept,
            "alpha": solver.alphas[solution.index],
            "score": best,
        }
        if projected is not None:
            measured = y[:, t][test]
            predicted = projected @ solver.weights(solution) + solution.mean
            found["r"], found["r2"] = _held_out(measured, predicted)
        for name, value in found.items():
            made[name][t] = value.cpu().numpy()
            made[name][t][~usable] = np.nan
    return made


def _held_out(measured: torch.Tensor, predicted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pearson r and R^2 of each column; NaN where they are not defined."""
    y, f = measured.double(), predicted.double()
    error = (y - f).square().sum(dim=0)
    y, f = y - y.mean(dim=0), f - f.mean(dim=0)
    vy, vf = y.square().sum(dim=0), f.square().sum(dim=0)
    r = torch.where((vy > 0) & (vf > 0), (y * f).sum(dim=0) / (vy * vf).sqrt(), torch.nan)
    return r, torch.where(vy > 0, 1 - error / vy, torch.nan)


def _rows(n: int, test_rows: ArrayLike | None) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    given = np.asarray([] if test_rows is None else test_rows)
    if given.dtype == bool and given.shape == (n,):
        given = np.flatnonzero(given)
    if given.size and given.dtype.kind not in "iu":
        raise ConfigError(
            f"test_rows is {given.dtype} of shape {given.shape}; expected row numbers, or a "
            f"mask of shape ({n},)."
        )
    test = np.unique(given.astype(np.intp))
    if len(test) and (test[0] < 0 or test[-1] >= n):
        raise ConfigError(f"test_rows must lie between 0 and {n - 1}.")
    train = np.setdiff1d(np.arange(n), test)
    if len(train) < 3:
        raise ConfigError(f"{len(train)} rows are left to train on; at least 3 are needed.")
    return train, test


def _folds(X: NDArray[Any], cv: Any, groups: ArrayLike | None) -> str | list[tuple[Any, Any]]:
    if isinstance(cv, str):
        check_groups(cv, groups)
        return cv
    splitter = check_cv(cv)
    if isinstance(cv, int):
        check_folds(len(X), cv)
    return list(splitter.split(X, None, groups))


def _chunk(Y: Any) -> int:
    """Targets that are stored, and so are read, together."""
    chunks = getattr(Y, "chunks", None)
    return min(int(chunks[1]) if chunks else UNCHUNKED, Y.shape[1])


def _slice_bytes(n: int, p: int, n_alphas: int, targets: int, itemsize: int) -> int:
    """Memory of a slice in flight.

    Four times its responses (decoded from, read, waiting, computed) and its weights (computed,
    waiting, encoded, written).
    """
    return targets * (itemsize * (4 * n + 4 * p) + 16 * n_alphas)


def _n_folds(cv: Any, groups: ArrayLike | None, n: int) -> int:
    """Folds that are factorised, beside the whole."""
    return 0 if isinstance(cv, str) else check_cv(cv).get_n_splits(np.empty((n, 1)), None, groups)


def _require_memory(
    shape: tuple[int, ...],
    n_train: int,
    grid: NDArray[Any],
    n_folds: int,
    memory_gib: float,
    itemsize: int,
    n_devices: int,
) -> None:
    """Refuse, before any work, what cannot fit."""
    n, p = shape
    small = min(n_train, p)
    factors = itemsize * (4 * n * p + 4 * small**2) + 8 * 5 * small**2
    # Of every fold the eigenvectors, and the rows held out, of which there are n in all.
    folds = itemsize * (2 * n_folds * small**2 + (n * small if n_folds else 0))
    held = resident_bytes()
    one = _slice_bytes(n, p, len(grid), 1, itemsize)
    least = held + RESERVE + n_devices * (factors + folds + one)
    if least > memory_gib * 2**30:
        raise ConfigError(
            f"memory_gib is {memory_gib:g}. The program holds {readable(held)}; with X of {n} x "
            f"{p}, its factors for {n_folds} folds on {n_devices} device(s) and a single target "
            f"it would need about {readable(least)}.",
            "Raise it, reduce X, or use fewer folds.",
        )


def _targets_per_slice(
    shape: tuple[int, ...],
    Y: Any,
    grid: NDArray[Any],
    width: int,
    memory_gib: float,
    itemsize: int,
    n_devices: int,
) -> int:
    """Whole chunks of targets that fit beside the factors, which are in memory now."""
    limit = memory_gib * 2**30
    room = (limit - resident_bytes() - RESERVE) / n_devices
    one = _slice_bytes(shape[0], shape[1], len(grid), 1, itemsize)
    fit = int(room // one)
    if fit < 1:
        raise ConfigError(
            f"memory_gib is {memory_gib:g}, but after factorising X {readable(max(room, 0))} a "
            f"device are left, and one target needs {readable(one)}.",
            "Raise it, reduce X, or use fewer folds.",
        )
    if fit < width:
        warn_narrow(width, fit, limit)
        return fit
    chunks = min(fit // width, max(1, MOST_TARGETS // width), -(-Y.shape[1] // width))
    return chunks * width


def warn_narrow(chunk: int, room: int, limit: float) -> None:
    """Warn that fewer targets fit into a limit (bytes) than are stored together."""
    logger.warning(
        "Responses are stored %d at a time, but only %d fit into %s: they are read more than once.",
        chunk, room, readable(limit),
    )  # fmt: skip


def _slices(plan: _Plan) -> Iterator[slice]:
    for start in range(0, plan.n_targets, plan.step):
        yield slice(start, min(start + plan.step, plan.n_targets))


def _step_begun(partial: Path, step: int) -> int:
    """Targets of a slice of the run that goes on, if there is one."""
    import zarr

    if not partial.exists():
        return step
    attrs: Any = zarr.open_group(partial, mode="r").attrs
    begun = int(attrs["step"])
    if begun > step:
        raise ConfigError(
            f"{partial} was begun with more memory: {begun} targets a slice; now {step} fit.",
            "Give as much memory as then, or remove it.",
        )
    return begun


def _open(partial: Path, plan: _Plan, p: int, width: int, key: str) -> Any:
    """Open the partial result, or begin one."""
    import zarr
    from zarr.codecs import Crc32cCodec

    if partial.exists():
        store = zarr.open_group(partial, mode="r+")
        if store.attrs.get("key") == key:
            return store
        raise ConfigError(
            f"{partial} was begun with other data or settings.",
            "Remove it, or call with what it was begun with.",
        )
    partial.parent.mkdir(parents=True, exist_ok=True)
    making = partial.with_name(partial.name + ".new")
    shutil.rmtree(making, ignore_errors=True)
    store = zarr.create_group(making, zarr_format=3)
    names = ["intercept", "alpha", "score", *(["r", "r2"] if len(plan.test) else [])]
    options: dict[str, Any] = {"compressors": (Crc32cCodec(),), "fill_value": np.nan}
    store.create_array(
        "weights", shape=(plan.n_targets, p), chunks=(min(width, plan.n_targets), p),
        dtype=plan.dtype, dimension_names=("target", "feature"), **options,
    )  # fmt: skip
    for name in names:
        store.create_array(
            name, shape=(plan.n_targets,), chunks=(plan.step,), dtype="float64",
            dimension_names=("target",), **options,
        )  # fmt: skip
    store.attrs.update({"key": key, "step": plan.step})
    (making / "done").mkdir()
    making.rename(partial)
    return zarr.open_group(partial, mode="r+")


def _finish(
    store: Any,
    partial: Path,
    out: Path,
    grid: NDArray[Any],
    folds: str | list[tuple[Any, Any]],
    fit_intercept: bool,
) -> None:
    alpha, score = store["alpha"][:], store["score"][:]
    bad = int(np.isnan(alpha).sum())
    if bad:
        logger.warning("%d of %d targets are constant or not finite: NaN.", bad, len(alpha))
    good = np.isfinite(alpha)
    if len(grid) > 1 and good.any():
        order = np.argsort(grid)
        place = order[np.searchsorted(grid[order], alpha[good])]
        warn_edges(place, score[good], grid)
    del store.attrs["key"], store.attrs["step"]
    store.attrs.update(
        {
            "schema": "",
            "alphas": [float(a) for a in grid],
            "cv": folds if isinstance(folds, str) else f"{len(folds)} folds",
            "fit_intercept": fit_intercept,
            "targets_without_fit": bad,
        }
    )
    shutil.rmtree(partial / "done")
    swap_in(partial, out)
