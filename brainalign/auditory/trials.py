"""One trial of listening: what was recorded, what each talker said, who was attended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from brainalign.data.schema import validate
from brainalign.errors import SchemaError, UnknownNameError, near

__all__ = ["ListeningTrial", "content_groups", "listening_trials"]

#: Columns of an array that are compared: what repeats, repeats in all of them.
_COMPARED = 8


@dataclass(frozen=True)
class ListeningTrial:
    """A recording beside the features of every talker, in the same samples.

    Parameters
    ----------
    neural : ndarray, shape (n_samples, n_channels)
        In any unit.
    features : mapping of str to ndarray, shape (n_talkers, n_samples, n_features)
        Feature spaces of the talkers, by name ("envelope", "onsets", "mel" ...).
    attended : ndarray of int, shape (n_samples,), or int
        Number of the attended talker at each sample.
    sampling_rate : float
        Samples per second.
    name, subject : str
        Of the trial and of the listener.
    voices : ndarray, shape (n_talkers, n_dimensions), optional
        What tells the talkers' voices apart, such as x-vectors.
    offset : int
        Number of the first sample in the trial that this one was cut from.

    Raises
    ------
    SchemaError
        If the arrays do not go together, hold values that are not finite, or a talker is attended
        that is not there.
    """

    neural: NDArray[np.floating]
    features: Mapping[str, NDArray[np.floating]]
    attended: NDArray[np.int64]
    sampling_rate: float
    name: str = ""
    subject: str = ""
    voices: NDArray[np.floating] | None = field(default=None)
    offset: int = 0

    def __post_init__(self) -> None:
        where = f"Trial {self.name!r}"
        if np.ndim(self.neural) != 2 or not self.features:
            raise SchemaError(
                f"{where}: the recording has shape {np.shape(self.neural)} and there are "
                f"{len(self.features)} feature spaces; expected (samples, channels) and at least 1."
            )
        if not (np.isfinite(self.sampling_rate) and self.sampling_rate > 0):
            raise SchemaError(
                f"{where}: sampling_rate is {self.sampling_rate!r}; expected Hz, > 0."
            )
        n = len(self.neural)
        shapes = {name: np.shape(f) for name, f in self.features.items()}
        talkers = {s[0] for s in shapes.values() if len(s) == 3}
        if any(len(s) != 3 or s[1] != n for s in shapes.values()) or len(talkers) != 1:
            raise SchemaError(
                f"{where}: features have shapes {shapes}; expected (talkers, {n}, features), with "
                "the same talkers in all.",
                "Crop or resample the features to the samples of the recording.",
            )
        for name, values in (("the recording", self.neural), *self.features.items()):
            bad = int((~np.isfinite(values)).sum())
            if bad:
                raise SchemaError(f"{where}: {bad} values of {name} are not finite.")
        attended = np.asarray(self.attended)
        if attended.ndim == 0:
            attended = np.full(n, int(attended))
        if (
            attended.shape != (n,)
            or attended.dtype.kind not in "iu"
            or not (0 <= attended.min() and attended.max() < self.n_talkers)
        ):
            raise SchemaError(
                f"{where}: attended is {attended.dtype} of shape {attended.shape}; expected one "
                f"whole number for each of {n} samples, from 0 to {self.n_talkers - 1}."
            )
        object.__setattr__(self, "attended", attended.astype(np.int64))
        if self.voices is not None and (
            np.ndim(self.voices) != 2 or len(self.voices) != self.n_talkers
        ):
            raise SchemaError(
                f"{where}: voices have shape {np.shape(self.voices)}; expected one row for each of "
                f"{self.n_talkers} talkers."
            )

    @property
    def n_talkers(self) -> int:
        """Number of talkers."""
        return len(next(iter(self.features.values())))

    def space(self, name: str) -> NDArray[np.floating]:
        """Return the features of one space, (n_talkers, n_samples, n_features)."""
        if name not in self.features:
            raise UnknownNameError(
                f"Trial {self.name!r} has no features {name!r}.{near(name, self.features)}",
                f"It has {', '.join(self.features)}.",
            )
        return self.features[name]

    def attended_features(self, name: str) -> NDArray[np.floating]:
        """Return the features of whoever is attended at each sample, (n_samples, n_features)."""
        return self.space(name)[self.attended, np.arange(len(self.attended))]

    def cut(self, start: int, stop: int) -> ListeningTrial:
        """Return the samples start .. stop - 1 as a trial of the same name, with their `offset`."""
        return ListeningTrial(
            self.neural[start:stop],
            {name: f[:, start:stop] for name, f in self.features.items()},
            self.attended[start:stop],
            self.sampling_rate,
            self.name,
            self.subject,
            self.voices,
            self.offset + start,
        )


def listening_trials(
    responses: xr.Dataset,
    features: xr.Dataset,
    *,
    voices: Mapping[int, NDArray[np.floating]] | None = None,
) -> list[ListeningTrial]:
    """Cut a recording and the features of its talkers into trials.

    Parameters
    ----------
    responses : xarray.Dataset
        ``responses`` schema (time, neuroid) with the coordinates ``run`` (a trial each) and
        ``attended`` (the talker's number) on time.
    features : xarray.Dataset
        ``features`` schema (time, feature) of the same samples, with ``run`` on time, and
        ``talker`` (number) and ``space`` (name) on feature.
    voices : mapping of int to ndarray, shape (n_talkers, n_dimensions), optional
        By run.

    Returns
    -------
    list of ListeningTrial
        In order of the runs; the name is the run's number.

    Raises
    ------
    SchemaError
        If coordinates are missing, or runs, rates or talkers do not go together.
    """
    validate(responses, "responses")
    validate(features, "features")
    for dataset, name, needed in (
        (responses, "responses", ("run", "attended")),
        (features, "features", ("run", "talker", "space")),
    ):
        missing = [c for c in needed if c not in dataset.coords]
        if missing or "time" not in dataset.sizes:
            what = "time" if not missing else f"the coordinate {missing[0]!r}"
            raise SchemaError(f"The {name} lack {what}.")
    run = responses["run"].values
    rates = [float(d.attrs.get("sampling_rate", np.nan)) for d in (responses, features)]
    if not np.array_equal(run, features["run"].values) or rates[0] != rates[1]:
        raise SchemaError(
            f"Recording and features are not in the same samples: {len(run)} at {rates[0]} Hz and "
            f"{features.sizes['time']} at {rates[1]} Hz, or their runs differ.",
            "Make the features at the rate of the recording, as many samples in each run.",
        )
    talker, space = features["talker"].values, features["space"].values.astype(str)
    talkers = np.unique(talker).tolist()
    subject = responses.coords.get("subject")
    trials = []
    for number in dict.fromkeys(run.tolist()):
        rows = np.flatnonzero(run == number)
        if (np.diff(rows) != 1).any():
            raise SchemaError(f"The samples of run {number} do not stand together.")
        values = np.asarray(features["features"].values[rows[0] : rows[-1] + 1])
        columns = {
            s: [np.flatnonzero((space == s) & (talker == t)) for t in talkers]
            for s in dict.fromkeys(space.tolist())
        }
        if len({len(c) for group in columns.values() for c in group}) > len(columns):
            raise SchemaError("The talkers do not have the same features.")
        who = "" if subject is None else str(np.atleast_1d(subject.values)[0])
        if subject is not None and subject.dims == ("time",):
            who = str(subject.values[rows[0]])
        trials.append(
            ListeningTrial(
                np.asarray(responses["responses"][rows[0] : rows[-1] + 1].values),
                {s: np.stack([values[:, c] for c in cs]) for s, cs in columns.items()},
                responses["attended"].values[rows].astype(np.int64),
                rates[0],
                str(number),
                who,
                None if voices is None else voices[number],
            )
        )
    return trials


def content_groups(
    trials: Sequence[ListeningTrial], *, seconds: float = 1.0, whole: bool = False
) -> NDArray[np.str_]:
    """Name what must not be divided: trials that share a stretch of sound or of recording.

    Stretches are compared bit by bit at every offset, so that overlapping windows of one trial, and
    one stimulus under two names, in two trials or for two listeners are found. Stretches without
    change, such as silence, do not count.

    Parameters
    ----------
    trials : sequence of ListeningTrial
        Whole trials, or windows of them.
    seconds : float
        Shortest stretch that counts.
    whole : bool
        Whether pieces of one trial, by its name and listener, must not be divided either.

    Returns
    -------
    ndarray of str, shape (n_trials,)
        The first trial of each group, for `brainalign.data.splits.check_leak` and ``by_group``.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    keys, owners = [], []
    for i, trial in enumerate(trials):
        length = max(2, round(seconds * trial.sampling_rate))
        streams = [trial.neural, *(t for f in trial.features.values() for t in f)]
        found = [_stretches(np.asarray(s), min(length, len(s))) for s in streams]
        keys.append(np.unique(np.concatenate(found)))
        owners.append(np.full(len(keys[-1]), i))
    key, owner = np.concatenate(keys), np.concatenate(owners)
    order = np.argsort(key, kind="stable")
    key, owner = key[order], owner[order]
    same = np.flatnonzero(key[1:] == key[:-1])
    one, other = owner[same], owner[same + 1]
    if whole:
        _, first, place = np.unique(trial_labels(trials), return_index=True, return_inverse=True)
        one, other = np.append(one, np.arange(len(trials))), np.append(other, first[place])
    links = coo_array((np.ones(len(one)), (one, other)), shape=(len(trials), len(trials)))
    _, group = connected_components(links, directed=False)
    leader = [int(np.flatnonzero(group == g)[0]) for g in range(int(group.max()) + 1)]
    return np.array([f"{trials[leader[g]].name or 'trial'}#{leader[g]}" for g in group])


def trial_labels(trials: Sequence[ListeningTrial]) -> NDArray[np.str_]:
    """Return one label for all pieces of a trial of a listener; without a name each has its own."""
    return np.array([f"{t.subject}/{t.name}" if t.name else f"#{i}" for i, t in enumerate(trials)])


def _stretches(values: NDArray[np.floating], length: int) -> NDArray[np.uint64]:
    """Hash each run of `length` rows that holds a change."""
    from pandas.util import hash_array

    odd = np.uint64(0x9E3779B97F4A7C15)
    columns = np.unique(np.linspace(0, values.shape[1] - 1, _COMPARED).round().astype(int))
    row = np.zeros(len(values), dtype=np.uint64)
    for c in columns:
        row = row * odd + hash_array(np.ascontiguousarray(values[:, c]))
    n = len(row) - length + 1
    run = np.zeros(n, dtype=np.uint64)
    for k in range(length):
        run = run * odd + row[k : k + n]
    changes = np.concatenate([[0], np.cumsum(row[1:] != row[:-1])])
    return run[changes[length - 1 :] > changes[:n]]
