"""Time series as rows of an encoding model: samples of trials, their folds and their exchange.

Sample k of a clip (a film, a story, a run) becomes a row with the id ``clip@k``. What is known of
presentations then holds for samples too: repeated clips are averaged or kept, their ncsnr is
measured, and rows without a partner are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from brainalign.data.schema import validate
from brainalign.data.splits import Split, by_group, check_leak
from brainalign.errors import ConfigError, LeakError, SchemaError
from brainalign.linear.lagged import TEST, TRAIN, TimeBlocks

__all__ = ["Timing", "as_rows", "backward", "on_time"]

#: Seconds of the shortest stretch of time that is resampled as a whole.
BLOCK_SECONDS = 10.0
_AT = "@"
_RUNS = ("session", "run")


@dataclass(frozen=True)
class Timing:
    """What a model of time series knows of its rows.

    Parameters
    ----------
    sampling_rate : float
        Samples per second.
    lags : ndarray of int
        Delays in samples.
    group : dict of str to str
        What each clip must share its fold with: clips of one group show the same stimuli.
    shown : dict of str to set of str
        Stimuli of each clip.
    """

    sampling_rate: float
    lags: NDArray[np.int64]
    group: Mapping[str, str]
    shown: Mapping[str, frozenset[str]]

    @property
    def span(self) -> int:
        """Last delay minus first, in samples."""
        return int(self.lags[-1] - self.lags[0])

    def trials(self, row_id: NDArray[np.str_]) -> NDArray[np.intp]:
        """Return the trial of each row: a stretch of consecutive samples of one clip."""
        clip, sample = _split(row_id)
        new = (clip[1:] != clip[:-1]) | (sample[1:] != sample[:-1] + 1)
        return np.concatenate([[0], np.cumsum(new)]).astype(np.intp)

    def groups(self, row_id: NDArray[np.str_]) -> NDArray[np.str_]:
        """Return the group of each row."""
        return np.array([self.group[c] for c in _split(row_id)[0].tolist()])

    def blocks(self, row_id: NDArray[np.str_]) -> NDArray[np.str_]:
        """Name the stretch of time of each row, which is resampled as a whole."""
        clip, sample = _split(row_id)
        length = max(1, round(BLOCK_SECONDS * self.sampling_rate), self.span + 1)
        return np.array(
            [
                f"{c}{_AT}{k}"
                for c, k in zip(clip.tolist(), (sample // length).tolist(), strict=True)
            ]
        )

    def stimuli(self, row_id: NDArray[np.str_]) -> list[str]:
        """Return the stimuli that some rows belong to, in order of name."""
        clips = dict.fromkeys(_split(row_id)[0].tolist())
        return sorted(set().union(*(self.shown[c] for c in clips)))

    def exchange(
        self, row_id: NDArray[np.str_], rng: np.random.Generator, *, away: bool = True
    ) -> NDArray[np.intp]:
        """Return a row order in which every trial is shifted in a circle, those of a clip alike.

        Parameters
        ----------
        row_id : ndarray of str, shape (n_rows,)
            As `as_rows` names them.
        rng : numpy.random.Generator
            Of the shifts.
        away : bool
            Shift by more than the delays span, as a response that is shifted by less still follows
            its stimulus: for draws of other neuroids. For the exchanges of a neuroid's own test all
            shifts count, 0 among them, as with the observed order they form a group.
        """
        clip, _ = _split(row_id)
        trial = self.trials(row_id)
        order = np.empty(len(row_id), dtype=np.intp)
        share: dict[str, float] = {}
        for t in range(int(trial[-1]) + 1):
            rows = np.flatnonzero(trial == t)
            u = share.setdefault(str(clip[rows[0]]), float(rng.random()))
            least = min(self.span + 1, len(rows) // 2) if away else 0
            order[rows] = np.roll(rows, least + int(u * max(1, len(rows) - 2 * least)))
        return order

    def splits(
        self,
        row_id: NDArray[np.str_],
        splits: int | Sequence[tuple[ArrayLike, ArrayLike]],
        *,
        seed: int = 0,
        allow_leak: bool = False,
    ) -> list[Split]:
        """Return (train, test) rows: folds over groups of clips, or over blocks of time.

        Parameters
        ----------
        row_id : ndarray of str, shape (n_rows,)
            As `as_rows` names them.
        splits : int or sequence of (train, test)
            K folds: over clips if there are as many, else over K blocks of time in each clip, with
            a gap as long as the delays span. Or pairs of clip names, row numbers or masks.
        seed : int
            Seed of the folds over clips.
        allow_leak : bool
            Accept that clips of both sides show the same stimuli.

        Raises
        ------
        LeakError
            If they do, and it is not allowed.
        ConfigError
            If a split names no clip, or the clips are too short for blocks.
        """
        clip, _ = _split(row_id)
        key = self.groups(row_id) if not allow_leak else clip
        if not isinstance(splits, int | np.integer):
            given = [(_named(train, clip), _named(test, clip)) for train, test in splits]
            check_leak(given, key, allow=allow_leak)
            return given
        n_groups, n_clips = len(np.unique(key)), len(np.unique(clip))
        if n_groups >= splits:
            pairs = by_group(key, int(splits), seed)
            check_leak(pairs, key)
            return pairs
        if n_groups < n_clips:
            raise LeakError(
                f"{n_clips} clips show stimuli of only {n_groups} groups that share none, too few "
                f"for {splits} folds: a stimulus would stand on both sides.",
                "Use fewer folds, or allow the leak (allow_leak=True) if the design repeats "
                "stimuli over runs.",
            )
        trial = self.trials(row_id)
        lengths = np.bincount(trial).tolist()
        roles = TimeBlocks(int(splits)).roles(lengths, self.span, self.sampling_rate)
        flat = [np.concatenate(fold) for fold in roles]
        return [(np.flatnonzero(f == TRAIN), np.flatnonzero(f == TEST)) for f in flat]


def as_rows(
    features: Mapping[str, xr.Dataset] | xr.Dataset,
    responses: xr.Dataset,
    lags: NDArray[np.int64],
    stimulus_sha256: Mapping[str, str] | None = None,
) -> tuple[dict[str, xr.Dataset], xr.Dataset, Timing]:
    """Return time series as presentations of samples, for `align`.

    Parameters
    ----------
    features : dict of str to Dataset, or Dataset
        ``features`` schema: (time, feature) at the rate of the responses, whose clips are found by
        ``stimulus_id``, by session and run, or are one; or (stimulus, feature), put on time by the
        ``stimulus_id`` that the responses show (see `on_time`).
    responses : Dataset
        ``responses`` schema (time, neuroid). Trials are stretches of one session and run.
    lags : ndarray of int
        Delays in samples.
    stimulus_sha256 : mapping of str to str, optional
        Content hashes of clips or stimuli, by which one under two names is told.

    Returns
    -------
    features : dict of str to Dataset
        (stimulus, feature), a row a sample.
    responses : Dataset
        (presentation, neuroid), a row a sample; not read.
    timing : Timing

    Raises
    ------
    SchemaError
        If the features' rate or clips are not those of the responses.
    """
    validate(responses, "responses")
    if "time" not in responses["responses"].dims:
        raise SchemaError(
            "The responses are of presentations (presentation, neuroid); delays need time series "
            "(time, neuroid).",
            "Leave the delays out.",
        )
    named = (
        {str(features["layer"].values): features}
        if isinstance(features, xr.Dataset)
        else dict(features)
    )
    if not named:
        raise ConfigError("There are no features.")
    for ds in named.values():
        validate(ds, "features")
    rate = float(responses.attrs["sampling_rate"])
    n = responses.sizes["time"]
    over_time = {"time" in ds["features"].dims for ds in named.values()}
    if len(over_time) > 1:
        raise SchemaError("Some features are over time and others over stimuli.")
    first = next(iter(named.values()))
    timed = over_time.pop()
    by_clip = timed and "stimulus_id" in first.coords
    run = _runs(responses, n, _RUNS)
    common = [
        c for c in _RUNS if c in responses.coords and all(c in ds.coords for ds in named.values())
    ]
    shown = _text(responses, "stimulus_id", n)
    if by_clip:
        if shown is None:
            raise SchemaError(
                "The features name clips (stimulus_id over time), the responses do not.",
                "Give the responses a stimulus_id over time.",
            )
        clip = shown
        new = (run[1:] != run[:-1]) | (clip[1:] != clip[:-1])
    else:
        clip = _runs(responses, n, common) if common else run
        new = run[1:] != run[:-1]
    ids = _ids(clip, new)
    clips = dict.fromkeys(clip.tolist())
    if by_clip or shown is None:
        sets = {c: frozenset([c]) for c in clips}
    else:
        sets = {c: frozenset(shown[clip == c].tolist()) - {""} for c in clips}
    made = {}
    for name, ds in named.items():
        own = ds
        if not timed:
            if shown is None:
                raise SchemaError(
                    "The features are of stimuli, and the responses do not say which stimulus "
                    "stands where (stimulus_id over time)."
                )
            own = on_time(ds, shown).assign_attrs(sampling_rate=rate)
        theirs = own.attrs.get("sampling_rate")
        if theirs is None or abs(float(theirs) - rate) > 1e-6 * rate:
            raise SchemaError(
                f"The features of {name!r} have sampling_rate {theirs!r} Hz and the responses "
                f"{rate:g} Hz.",
                "Resample the features to the rate of the responses.",
            )
        m = own.sizes["time"]
        if by_clip:
            label = own["stimulus_id"].values.astype(str)
            breaks = label[1:] != label[:-1]
        elif common and timed:
            label = _runs(own, m, common)
            breaks = label[1:] != label[:-1]
        elif m == n:
            label, breaks = clip, new
        else:
            raise SchemaError(
                f"The features of {name!r} have {m} samples and the responses {n}.",
                "Name runs (session, run) or clips (stimulus_id) over time in both, or crop them.",
            )
        rows = own.rename_dims(time="stimulus").drop_vars("stimulus_id", errors="ignore")
        made[name] = rows.assign_coords(stimulus_id=("stimulus", _ids(label, breaks)))
    rows = responses.rename_dims(time="presentation").assign_coords(
        stimulus_id=("presentation", ids)
    )
    for name in ("repetition", "session", "run"):
        if name not in rows.coords:
            rows = rows.assign_coords({name: ("presentation", np.zeros(n, dtype=np.int64))})
    if "subject" not in rows.coords:
        rows = rows.assign_coords(subject=str(responses.attrs.get("subject", "")))
    if rows["subject"].ndim == 0:
        subject = np.full(n, str(rows["subject"].values))
        rows = rows.drop_vars("subject").assign_coords(subject=("presentation", subject))
    known = stimulus_sha256 or {}
    content = {c: frozenset(known.get(s, s) for s in own) for c, own in sets.items()}
    return made, rows, Timing(rate, lags, _components(content), sets)


def on_time(features: xr.Dataset, stimulus_id: ArrayLike) -> xr.Dataset:
    """Put features of stimuli on the samples at which these are shown.

    Parameters
    ----------
    features : Dataset
        ``features`` schema (stimulus, feature).
    stimulus_id : array-like of str, shape (n_samples,)
        Which stimulus is shown; empty text for none.

    Returns
    -------
    Dataset
        ``features`` schema (time, feature), with one feature more: 1 where a stimulus is shown.
        Elsewhere the others are at their mean over the samples with a stimulus.

    Raises
    ------
    SchemaError
        If a stimulus has no features, or none is shown.
    """
    names = np.asarray(stimulus_id).astype(str)
    place = {str(s): i for i, s in enumerate(features["stimulus_id"].values)}
    here = np.flatnonzero(names != "")
    missing = sorted({s for s in names[here].tolist() if s not in place})
    if missing or not len(here):
        raise SchemaError(
            f"{len(missing)} stimuli that are shown have no features: {missing[:3]}."
            if missing
            else "No sample shows a stimulus."
        )
    values = np.asarray(features["features"].values, dtype=np.float32)
    rows = values[[place[s] for s in names[here].tolist()]]
    out = np.empty((len(names), values.shape[1] + 1), dtype=np.float32)
    out[:, :-1] = rows.mean(axis=0, dtype=np.float64)
    out[here, :-1] = rows
    out[:, -1] = names != ""
    kept = {k: v for k, v in features.coords.items() if v.ndim == 0}
    return xr.Dataset({"features": (("time", "feature"), out)}, coords=kept, attrs=features.attrs)


def backward(
    features: Mapping[str, xr.Dataset] | xr.Dataset, responses: xr.Dataset
) -> tuple[dict[str, xr.Dataset], xr.Dataset]:
    """Exchange the roles of features over time and recordings, for a decoder of the features.

    Parameters
    ----------
    features : dict of str to Dataset, or Dataset
        ``features`` schema (time, feature), in the samples of the responses.
    responses : Dataset
        ``responses`` schema (time, neuroid).

    Returns
    -------
    features : dict of str to Dataset
        The recording, as one layer.
    responses : Dataset
        The features, a neuroid each, named ``layer/number``; its ``roi`` is the layer.

    Raises
    ------
    SchemaError
        If they are not samples of the same time.
    """
    named = {"": features} if isinstance(features, xr.Dataset) else dict(features)
    n = responses.sizes.get("time", 0)
    for name, ds in named.items():
        if ds["features"].dims != ("time", "feature") or ds.sizes["time"] != n:
            raise SchemaError(
                f"A decoder needs features over the {n} samples of the responses; those of "
                f"{name!r} are {dict(ds['features'].sizes)}."
            )
    values = [np.asarray(ds["features"].values, dtype=np.float32) for ds in named.values()]
    layer = np.repeat(list(named), [v.shape[1] for v in values])
    number = np.concatenate([np.arange(v.shape[1]) for v in values])
    along = {k: v for k, v in responses.coords.items() if v.dims in (("time",), ())}
    target = xr.Dataset(
        {"responses": (("time", "neuroid"), np.concatenate(values, axis=1))},
        coords={
            **along,
            "neuroid_id": ("neuroid", [f"{a}/{b}" for a, b in zip(layer, number, strict=True)]),
            "roi": ("neuroid", layer.astype(str)),
            "hemisphere": ("neuroid", np.full(len(layer), "")),
        },
        attrs={**responses.attrs, "units": "arbitrary"},
    )
    keep = {k: v for k, v in along.items() if k != "subject"}
    source = xr.Dataset(
        {"features": (("time", "feature"), np.asarray(responses["responses"].values))},
        coords={**keep, "model": "recording", "layer": "recording"},
        attrs={"sampling_rate": responses.attrs["sampling_rate"]},
    )
    return {"recording": source.drop_vars("stimulus_id", errors="ignore")}, target


def _split(row_id: NDArray[np.str_]) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
    parts = [r.rpartition(_AT) for r in row_id.tolist()]
    return np.array([p[0] for p in parts]), np.array([int(p[2]) for p in parts])


def _ids(clip: NDArray[np.str_], new: NDArray[np.bool_]) -> NDArray[np.str_]:
    """Name samples by their clip and their place in this showing of it."""
    starts = np.concatenate([[0], np.flatnonzero(new) + 1])
    length = np.diff([*starts, len(clip)])
    sample = np.arange(len(clip)) - np.repeat(starts, length)
    return np.array(
        [f"{c}{_AT}{k:06d}" for c, k in zip(clip.tolist(), sample.tolist(), strict=True)]
    )


def _runs(ds: xr.Dataset, n: int, names: Sequence[str]) -> NDArray[np.str_]:
    """Name the run of each sample by some coordinates."""
    parts = [ds[c].values for c in names if c in ds.coords and ds[c].dims == ("time",)]
    if not parts:
        return np.full(n, "recording")
    return np.array(["-".join(map(str, p)) for p in zip(*(v.tolist() for v in parts), strict=True)])


def _text(ds: xr.Dataset, name: str, n: int) -> NDArray[np.str_] | None:
    if name not in ds.coords or ds[name].shape != (n,):
        return None
    return ds[name].values.astype(str)


def _named(side: ArrayLike, clip: NDArray[np.str_]) -> NDArray[np.intp]:
    given = np.asarray(side)
    if given.dtype.kind in "UOT":
        unknown = sorted(set(given.astype(str).tolist()) - set(clip.tolist()))
        if unknown:
            raise ConfigError(f"A split names {len(unknown)} unknown clips: {unknown[:3]}.")
        return np.flatnonzero(np.isin(clip, given.astype(str)))
    return np.flatnonzero(given) if given.dtype == bool else given.astype(np.intp)


def _components(sets: Mapping[str, frozenset[str]]) -> dict[str, str]:
    """Name the group of each clip: clips that share a stimulus, directly or through others."""
    owner: dict[str, str] = {}
    parent = {c: c for c in sets}

    def root(c: str) -> str:
        while parent[c] != c:
            c = parent[c]
        return c

    for clip, stimuli in sets.items():
        for s in stimuli:
            parent[root(clip)] = root(owner.setdefault(s, clip))
    return {c: root(c) for c in sets}
