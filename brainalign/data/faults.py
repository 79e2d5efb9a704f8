"""Faults of recordings counted run by run, in words that errors and warnings quote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["constant_by_run", "constant_runs", "marked_by_run", "non_finite_by_run", "rows_by_run"]

#: Fewer equal values than this are no sign of a dead recording: integers repeat by chance.
_LEAST_ROWS = 3


def rows_by_run(session: ArrayLike, run: ArrayLike) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """Yield the name ("run 3 of session 2") and the rows of each run, in order of appearance.

    Parameters
    ----------
    session, run : array-like of int, shape (n_rows,)
        Of each presentation or volume.
    """
    numbers = np.column_stack([np.asarray(session), np.asarray(run)])
    unique, first, index = np.unique(numbers, axis=0, return_index=True, return_inverse=True)
    index = np.ravel(index)
    for i in np.argsort(first):
        yield f"run {unique[i, 1]} of session {unique[i, 0]}", np.flatnonzero(index == i)


def non_finite_by_run(values: NDArray[Any], session: ArrayLike, run: ArrayLike) -> str:
    """Say which runs hold values that are not finite, and how many in how many neuroids.

    Parameters
    ----------
    values : ndarray, shape (n_rows, n_neuroids)
        Responses.
    session, run : array-like of int, shape (n_rows,)
        Of each row.

    Returns
    -------
    str
        For example "run 3 of session 2: 120 NaN in 4 neuroids"; empty where all are finite.
    """

    def count(rows: NDArray[np.intp]) -> str:
        block = values[rows]
        parts = []
        for name, bad in (("NaN", np.isnan(block)), ("infinite", np.isinf(block))):
            if bad.any():
                parts.append(f"{int(bad.sum())} {name} in {_neuroids(bad.any(axis=0).sum())}")
        return ", ".join(parts)

    return _sentence(count, session, run)


def constant_by_run(values: NDArray[Any], session: ArrayLike, run: ArrayLike) -> str:
    """Say in which runs neuroids are constant that are not constant throughout.

    Runs with fewer than three rows are not judged.

    Parameters
    ----------
    values, session, run
        As in `non_finite_by_run`.

    Returns
    -------
    str
        For example "run 3 of session 2: 12 neuroids"; empty where there is none.
    """
    varied = ~(values == values[:1]).all(axis=0)

    def count(rows: NDArray[np.intp]) -> str:
        number = int((_constant(values, rows) & varied).sum())
        return _neuroids(number) if number else ""

    return _sentence(count, session, run)


def constant_runs(values: NDArray[Any], session: ArrayLike, run: ArrayLike) -> list[str]:
    """Return the names of runs of three rows or more in which all neuroids are constant."""
    return [
        name for name, rows in rows_by_run(session, run) if _constant(values, rows).all()
    ]  # fmt: skip


def marked_by_run(
    row: NDArray[np.intp], neuroid: NDArray[np.intp], session: ArrayLike, run: ArrayLike
) -> str:
    """Say which runs hold marked values, given as row and neuroid of each, as the others do."""

    def count(rows: NDArray[np.intp]) -> str:
        here = np.isin(row, rows)
        if not here.any():
            return ""
        return f"{int(here.sum())} values in {_neuroids(len(np.unique(neuroid[here])))}"

    return _sentence(count, session, run)


def _constant(values: NDArray[Any], rows: NDArray[np.intp]) -> NDArray[np.bool_]:
    if len(rows) < _LEAST_ROWS:
        return np.zeros(values.shape[1], dtype=bool)
    block = values[rows]
    return np.asarray((block == block[:1]).all(axis=0))


def _neuroids(number: int) -> str:
    return f"{int(number)} neuroid" + ("" if number == 1 else "s")


def _sentence(
    count: Callable[[NDArray[np.intp]], str], session: ArrayLike, run: ArrayLike, n: int = 5
) -> str:
    found = [f"{name}: {text}" for name, rows in rows_by_run(session, run) if (text := count(rows))]
    more = f"; and {len(found) - n} more runs" if len(found) > n else ""
    return "; ".join(found[:n]) + more
