"""Result files of attention decoders: correlations by window, with what they make of accuracy."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainalign.auditory.evaluation import chance_band, distinct_windows, trial_interval
from brainalign.errors import SchemaError

__all__ = ["METRICS", "WindowCorrelations", "accuracy_records", "read_accuracies", "read_results"]

#: What decides for the attended talker, by the number of the metric.
METRICS = {
    1: "attended decoder, first component: AA > AU",
    2: "attended minus unattended decoder, first component: AA - UA > AU - UU",
    4: "attended decoder, two of three components: AA > AU",
}
_FIELDS = {
    "AA": "corrAttEst_Att",
    "AU": "corrAttEst_UnAtt",
    "UA": "corrUnAttEst_Att",
    "UU": "corrUnAttEst_UnAtt",
}
_LABEL = re.compile(r"PTN_(\d+)_(\d+)(?=PTN|$)")


@dataclass(frozen=True)
class WindowCorrelations:
    """Correlations of one decoder's output with both talkers, in windows of one length.

    Parameters
    ----------
    window : float
        Length in seconds.
    correlations : dict of str to ndarray, shape (n_windows, n_components)
        By decoder (A trained on the attended, U on the unattended talker) and talker (A attended,
        U unattended): ``AA``, ``AU``, ``UA``, ``UU``.
    trial, number : ndarray of int, shape (n_windows,), or None
        Trial of each window and its place there, where the file tells.
    stored : dict of int to float
        Accuracies in the file, in percent, by metric.
    """

    window: float
    correlations: dict[str, NDArray[np.float64]]
    trial: NDArray[np.int64] | None
    number: NDArray[np.int64] | None
    stored: dict[int, float]

    def correct(self, metric: int) -> NDArray[np.bool_]:
        r"""Tell which windows the metric decides for the attended talker.

        .. math:: m_1: AA_1 > AU_1 \qquad m_2: AA_1 - UA_1 > AU_1 - UU_1 \qquad
                  m_4: \#\{c: AA_c > AU_c\} \ge 2

        Differences are taken in this order: where two of them tie, rounding decides.

        Parameters
        ----------
        metric : {1, 2, 4}

        Returns
        -------
        ndarray of bool, shape (n_windows,)

        Raises
        ------
        SchemaError
            For another metric, or 4 where there are fewer than three components.
        """
        if metric not in self.metrics:
            raise SchemaError(
                f"There is no metric {metric!r} here; it has {', '.join(map(str, self.metrics))}."
            )
        aa, au, ua, uu = (self.correlations[k] for k in _FIELDS)
        if metric == 1:
            return aa[:, 0] > au[:, 0]
        if metric == 2:
            return aa[:, 0] - ua[:, 0] > au[:, 0] - uu[:, 0]
        return (aa[:, :3] > au[:, :3]).sum(axis=1) >= 2

    @property
    def metrics(self) -> list[int]:
        """Metrics that the components allow."""
        return [1, 2, 4] if self.correlations["AA"].shape[1] >= 3 else [1, 2]


def read_results(path: Path | str) -> list[WindowCorrelations]:
    """Read a MATLAB file of correlations by window, ``structResults`` with a struct per length.

    Parameters
    ----------
    path : Path
        Version 5 ``.mat``.

    Returns
    -------
    list of WindowCorrelations
        By length.

    Raises
    ------
    SchemaError
        If the file is none of these, or a window has not every correlation.

    References
    ----------
    Choudhari et al. (2024), Advanced Science, 2401379.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    unreadable = (ValueError, NotImplementedError, TypeError, OSError, MatReadError, zlib.error)
    try:
        content = loadmat(path)
    except unreadable as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # no such file, say
        raise SchemaError(
            f"{path} is no MATLAB file of version 5: {error}.",
            "Save it anew with save(..., '-v7') if it is of version 7.3.",
        ) from error
    if "structResults" not in content:
        names = [n for n in content if not n.startswith("__")]
        raise SchemaError(
            f"{path} has no 'structResults' but {', '.join(names) or 'nothing'}.",
            "Give result files, whose names hold 'ResultsStruct'.",
        )
    whole = _struct(content["structResults"], f"{path}, structResults")
    labels = _labels(content.get("__function_workspace__"), len(whole.dtype.names))
    read = [
        _window(_struct(whole[name], f"{path}, {name}"), label, f"{path}, {name}")
        for name, label in zip(whole.dtype.names, labels, strict=True)
    ]
    return sorted(read, key=lambda w: w.window)


def _struct(value: Any, where: str) -> Any:
    array = np.asarray(value)
    if array.dtype.names is None or array.size != 1:
        raise SchemaError(
            f"{where} is {array.dtype} of shape {array.shape}; expected one struct with fields."
        )
    return array.ravel()[0]


def _window(struct: Any, label: list[tuple[int, int]] | None, where: str) -> WindowCorrelations:
    missing = [f for f in ("thisWindowSize", *_FIELDS.values()) if f not in struct.dtype.names]
    if missing:
        raise SchemaError(f"{where} has no field {missing[0]!r}.")
    try:
        correlations = {k: np.asarray(struct[f], dtype=np.float64) for k, f in _FIELDS.items()}
        window = _number(struct, "thisWindowSize")
        stored = {
            m: _number(struct, f"metric{m}Accu")
            for m in METRICS
            if f"metric{m}Accu" in struct.dtype.names
        }
    except (ValueError, TypeError) as error:
        raise SchemaError(f"{where}: {error}; expected numbers.") from error
    shapes = {c.shape for c in correlations.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or min(shape) == 0:
        raise SchemaError(
            f"{where}: correlations of {[c.shape for c in correlations.values()]}; expected "
            "(windows, components), the same in all."
        )
    if not (np.isfinite(window) and window > 0):
        raise SchemaError(f"{where}: thisWindowSize is {window}; expected seconds, above 0.")
    if label is not None and len(label) != len(correlations["AA"]):
        label = None
    trial, number = (None, None) if label is None else np.array(label, dtype=np.int64).T
    return WindowCorrelations(window, correlations, trial, number, stored)


def _number(struct: Any, field: str) -> float:
    values = np.ravel(struct[field])
    if len(values) != 1:
        raise ValueError(f"{field!r} has {len(values)} values")
    return float(values[0])


def _labels(workspace: Any, n: int) -> list[Any]:
    """Trial and number of the windows of each struct, from the text of MATLAB's string objects.

    They lie in the workspace as UTF-16, one run of labels a struct, in the order of the structs.
    """
    none: list[Any] = [None] * n
    if workspace is None:
        return none
    text = np.asarray(workspace, dtype=np.uint8).tobytes()
    runs = re.findall(rb"(?:P\0T\0N\0_\0(?:[0-9_PTN]\0)+)", text)
    if len(runs) != n:
        return none
    return [[(int(t), int(k)) for t, k in _LABEL.findall(r.decode("utf-16-le"))] for r in runs]


def read_accuracies(path: Path | str) -> list[tuple[float, int, float]]:
    """Read a table of accuracies: ``windowSize`` in seconds and a column per metric, in percent.

    Parameters
    ----------
    path : Path
        CSV whose columns name ``Metric1``, ``Metric2`` ...

    Returns
    -------
    list of (window, metric, accuracy)

    Raises
    ------
    SchemaError
        If a column is missing.
    """
    import pandas as pd

    try:
        table = pd.read_csv(path)
    except ValueError as error:  # an empty file, broken rows, other encodings
        raise SchemaError(f"{path} is no table: {error}.") from error
    columns = {c: int(m[1]) for c in table.columns if (m := re.search(r"[Mm]etric(\d+)", str(c)))}
    if "windowSize" not in table or not columns:
        raise SchemaError(
            f"{path} has the columns {', '.join(map(str, table.columns))}; expected windowSize and "
            "one per metric, such as testMuMetric1_gA_1CC."
        )
    for column in ("windowSize", *columns):
        if table[column].dtype.kind not in "iuf":
            raise SchemaError(f"{path}: the column {column!r} holds what is no number.")
    return [
        (float(size), metric, float(value))
        for column, metric in columns.items()
        for size, value in zip(table["windowSize"], table[column], strict=True)
    ]


def accuracy_records(
    paths: Sequence[Path | str], *, level: float = 0.95, n_bootstrap: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """Accuracy by file, metric and window length.

    Parameters
    ----------
    paths : sequence of Path
        Files that `read_results` reads, whose accuracies are computed from the correlations, and
        tables that `read_accuracies` reads, whose accuracies are as they stand.
    level : float
        Coverage of the intervals, from trials that are drawn again, and of the band of chance.
    n_bootstrap : int
        Draws; 0 for no intervals.
    seed : int
        Of the draws.

    Returns
    -------
    list of dict
        ``file``, ``subject`` (the folder), ``feature``, ``metric``, ``window`` (s) and ``accuracy``
        (percent; None where a table has none). From correlations also ``n_windows``,
        ``n_trials``, ``interval``, ``chance`` (the band of a decoder that guesses, for as many
        windows without overlap), ``stored`` and ``reproduced``: whether the stored accuracy is the
        computed one. A window whose correlations are not finite decides for nobody and counts as
        wrong; ``n_not_finite`` tells how many there are, if any.

    Raises
    ------
    SchemaError
        If a file is neither.
    """
    records: list[dict[str, Any]] = []
    for path in map(Path, paths):
        about = {"file": str(path), "subject": path.resolve().parent.name, "feature": _named(path)}
        if path.suffix.lower() == ".csv":
            rows = read_accuracies(path)
            records += [
                about | {"metric": m, "window": w, "accuracy": _known(a)} for w, m, a in rows
            ]
            continue
        results = [(r, _chance(r, level)) for r in read_results(path)]
        for metric in METRICS:
            for r, chance in results:
                if metric in r.metrics:
                    found = _record(r, metric, level, n_bootstrap, seed) | chance
                    records.append(about | {"metric": metric, "window": r.window} | found)
    return records


def _named(path: Path) -> str:
    found = re.search(r"(?:^|_)(Spec|Traj|Both)", path.stem)
    return found[1] if found else path.stem


def _record(
    r: WindowCorrelations, metric: int, level: float, n_bootstrap: int, seed: int
) -> dict[str, Any]:
    correct = r.correct(metric)
    accuracy = int(correct.sum()) / len(correct) * 100
    record: dict[str, Any] = {"accuracy": accuracy, "n_windows": len(correct)}
    lost = np.any([~np.isfinite(c).all(axis=1) for c in r.correlations.values()], axis=0)
    if lost.any():
        record["n_not_finite"] = int(lost.sum())
    if r.trial is not None and n_bootstrap:
        interval = trial_interval(correct, r.trial, level=level, n_bootstrap=n_bootstrap, seed=seed)
        # Of one trial there is none.
        record["interval"] = [_known(100 * v) for v in interval]
    stored = r.stored.get(metric)
    if stored is not None:
        record |= {"stored": _known(stored), "reproduced": stored == accuracy}
    return record


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _chance(r: WindowCorrelations, level: float) -> dict[str, Any]:
    if r.trial is None or r.number is None:
        return {}
    # Windows start every half window.
    n = distinct_windows(r.number * r.window / 2, r.trial, r.window)
    band = chance_band(n, level=level)
    return {"n_trials": len(np.unique(r.trial)), "chance": [100 * share for share in band]}
