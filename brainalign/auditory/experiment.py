"""Experiments on attention from end to end: recordings made ready, decoders compared, results kept.

What is ready are two artefacts of one subject, in the same samples: ``responses`` (time, neuroid)
with the coordinates ``run`` (a trial) and ``attended`` (the talker's number) on time, and
``features`` (time, feature) with ``talker`` and ``space`` on feature.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from sklearn.base import clone

from brainalign.auditory import decoders
from brainalign.auditory.evaluation import accuracy_curve, mesd, switch_curve
from brainalign.auditory.listener import SimulatedListener, switching, talker_streams
from brainalign.auditory.preprocessing import ResponsiveChannels, preprocess
from brainalign.auditory.sound import resample, talker_features
from brainalign.auditory.trials import ListeningTrial, content_groups, listening_trials
from brainalign.data.schema import validate
from brainalign.data.sounds import read_sound
from brainalign.data.splits import Split, by_group
from brainalign.data.studies import Study
from brainalign.errors import ConfigError, SchemaError, UnknownNameError, near
from brainalign.linear import AlphaEdgeWarning

__all__ = [
    "DECODERS",
    "ResponsiveDecoder",
    "decode",
    "make_decoder",
    "prepare",
    "simulate_listening",
]

#: Decoders by the name that a configuration gives them.
DECODERS: Mapping[str, type[decoders.AttentionDecoder]] = {
    "reconstruction": decoders.StimulusReconstruction,
    "forward": decoders.ForwardResponse,
    "cca": decoders.CanonicalCorrelation,
    "cluster": decoders.TalkerCluster,
    "oracle": decoders.Oracle,
}

#: Seconds from window to window, at most, where attention switches.
_HOP = 0.5
#: Where simulated electrodes lie (mm, MNI): those that hear, and those that do not.
_HEARING, _DEAF, _SPREAD = (-62.0, -22.0, 6.0), (-48.0, 22.0, 24.0), 12.0


class ResponsiveDecoder(decoders.AttentionDecoder):
    """A decoder that sees only channels which follow the attended talker in the trials of its fit.

    Parameters
    ----------
    decoder : AttentionDecoder
        A clone is fitted to the channels that are kept.
    space : str
        Feature space that channels must follow; the mean of its features.
    max_lag : float
        Longest delay, s.
    rate : float
        False discovery rate.
    at_least : int
        Channels that are kept if fewer pass.

    Attributes
    ----------
    selector_ : ResponsiveChannels
    decoder_ : AttentionDecoder
    """

    def __init__(
        self,
        decoder: decoders.AttentionDecoder | None = None,
        *,
        space: str = "envelope",
        max_lag: float = 0.5,
        rate: float = 0.05,
        at_least: int = 1,
    ) -> None:
        self.decoder = decoder
        self.space = space
        self.max_lag = max_lag
        self.rate = rate
        self.at_least = at_least

    def _fit(self, trials: list[ListeningTrial]) -> None:
        self.selector_ = ResponsiveChannels(
            self.sampling_rate_, max_lag=self.max_lag, rate=self.rate, at_least=self.at_least
        ).fit(
            [t.neural for t in trials],
            [t.attended_features(self.space).mean(axis=1) for t in trials],
        )
        inner = decoders.StimulusReconstruction() if self.decoder is None else clone(self.decoder)
        self.decoder_ = inner.fit([self._kept(t) for t in trials])

    def _kept(self, trial: ListeningTrial) -> ListeningTrial:
        return replace(trial, neural=self.selector_.transform(trial.neural))

    @property
    def reach(self) -> tuple[int, int]:
        """Samples before and after a sample that its projection needs."""
        return self.decoder_.reach

    def project(self, trial: ListeningTrial) -> decoders.Projection:
        """Return what the decoder makes of the kept channels."""
        return self.decoder_.project(self._kept(trial))

    def score(
        self, neural: NDArray[np.floating], talkers: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """Score windows; see `AttentionDecoder.score`."""
        return self.decoder_.score(neural, talkers)


def make_decoder(kind: str, settings: Mapping[str, Any] | None = None) -> decoders.AttentionDecoder:
    """Return a decoder by name.

    Parameters
    ----------
    kind : str
        A key of `DECODERS`.
    settings : mapping, optional
        Its parameters.

    Raises
    ------
    UnknownNameError, ConfigError
        There is no such decoder, or it takes no such parameter.
    """
    if kind not in DECODERS:
        raise UnknownNameError(
            f"There is no decoder {kind!r}.{near(kind, DECODERS)}", f"Known: {', '.join(DECODERS)}."
        )
    made = DECODERS[kind]()
    known = made.get_params()
    wrong = [name for name in settings or {} if name not in known]
    if wrong:
        raise ConfigError(
            f"The decoder {kind!r} takes no parameter {wrong[0]!r}.{near(wrong[0], known)}",
            f"It takes {', '.join(known) or 'none'}.",
        )
    return made.set_params(**dict(settings or {}))


def prepare(
    study: Study,
    subject: str,
    *,
    spaces: Sequence[str] = ("envelope",),
    rate: float = 64.0,
    preprocessing: Mapping[str, Any] | None = None,
    sound_rate: float | None = None,
) -> tuple[xr.Dataset, xr.Dataset]:
    """Make a subject's recording and the features of its talkers ready for decoders.

    Parameters
    ----------
    study : Study
        One of listening: ``extras`` hold ``features``, or the ``talkers``' sounds, by subject.
    subject : str
        A key of its responses.
    spaces : sequence of str
        Feature spaces of the sounds; see `brainalign.auditory.sound.SPACES`. A study that gives
        features instead of sounds has the spaces that it has.
    rate : float
        Hz.
    preprocessing : mapping, optional
        Parameters of `brainalign.auditory.preprocessing.preprocess`, without `rate_out`. Default:
        the recording as it is, which must then have that rate.
    sound_rate : float, optional
        Hz that sounds are brought to before features are made of them, which saves time: 8 kHz hold
        all bands of the envelope. Default: as they are.

    Returns
    -------
    responses, features : Dataset

    Raises
    ------
    UnknownNameError
        If there is no such subject, or no such space.
    SchemaError
        If the study says nothing of its talkers, or rates differ.
    """
    if subject not in study.responses:
        raise UnknownNameError(
            f"{study.name} has no subject {subject!r}.{near(subject, study.responses)}",
            f"Subjects: {', '.join(study.responses)}.",
        )
    responses = study.responses[subject]
    if "attended" not in responses.coords:
        raise SchemaError(f"{study.name} does not say who is attended.")
    if preprocessing is not None:
        responses = preprocess(responses, rate_out=rate, **preprocessing)
    made = float(responses.attrs["sampling_rate"])
    if made != rate:
        raise SchemaError(
            f"The recording is at {made} Hz and the features are wanted at {rate} Hz.",
            "Give preprocessing, which brings the recording to that rate.",
        )
    run = responses["run"].values
    lengths = [int((run == r).sum()) for r in dict.fromkeys(run.tolist())]
    if "features" in study.extras:
        features = study.extras["features"][subject]
        missing = [s for s in spaces if s not in features["space"].values]
        if missing:
            raise UnknownNameError(
                f"{study.name} gives no features {missing[0]!r}, and no sounds to make them from.",
                f"It gives {', '.join(np.unique(features['space'].values))}.",
            )
        keep = np.isin(features["space"].values, spaces)
        return responses, features.isel(feature=np.flatnonzero(keep))
    if "talkers" not in study.extras:
        raise SchemaError(f"{study.name} has neither sounds nor features of its talkers.")
    talkers = study.extras["talkers"][subject]
    if sound_rate is not None:
        talkers = [[(resample(x, r, sound_rate), sound_rate) for x, r in t] for t in talkers]
    features = talker_features(talkers, spaces, rate, n_times=lengths)
    # Trials are numbered as in the recording.
    return responses, features.assign_coords(run=("time", run))


def simulate_listening(
    sounds: Mapping[str, str | Path],
    *,
    subject: str = "sim1",
    trials: int = 20,
    seconds: float = 60.0,
    spaces: Sequence[str] = ("envelope",),
    rate: float = 64.0,
    electrodes: int = 24,
    deaf: int = 8,
    sound_rate: float = 8000.0,
    switch_every: float | None = None,
    seed: int = 0,
    **listener: Any,
) -> tuple[xr.Dataset, xr.Dataset]:
    """Let a simulated subject listen to two talkers at once.

    In each trial two of the talkers speak, and one of them is attended, in turn the first and the
    second, or by turns within the trial.

    Parameters
    ----------
    sounds : mapping of str to path
        A clip of each talker, at least two.
    subject : str
        Name; another subject has other response functions and other noise.
    trials : int
        Number of trials.
    seconds : float
        Length of a trial.
    spaces : sequence of str
        Feature spaces; the listener responds to its own `space`, one of them.
    rate : float
        Hz.
    electrodes, deaf : int
        Electrodes that respond (around the left superior temporal gyrus), and that hold noise only
        (frontal).
    sound_rate : float
        Hz of the sounds that features are made from; speech is below 4 kHz.
    switch_every : float, optional
        Seconds between switches of attention.
    seed : int
        Of everything random.
    **listener
        Parameters of `brainalign.auditory.listener.SimulatedListener`.

    Returns
    -------
    responses, features : Dataset
        As from `prepare`; ``hears`` (neuroid) tells which electrodes respond.

    Raises
    ------
    ConfigError
        With fewer than two talkers or two trials.
    """
    if len(sounds) < 2 or trials < 2:
        raise ConfigError(
            f"{len(sounds)} talkers and {trials} trials; expected at least 2 of each."
        )
    names = list(sounds)
    clips = {name: resample(*read_sound(path), sound_rate) for name, path in sounds.items()}
    own = int.from_bytes(subject.encode(), "big") % 2**32
    rng = np.random.default_rng([seed, own])
    n_samples = round(seconds * sound_rate)
    heard, pairs = [], []
    for _ in range(trials):
        pair = rng.choice(len(names), 2, replace=False)
        streams = talker_streams(
            [[clips[names[i]]] for i in pair], n_samples, seed=int(rng.integers(2**31))
        )
        heard.append([(s, sound_rate) for s in streams])
        pairs.append([names[i] for i in pair])
    features = talker_features(heard, spaces, rate)
    run = features["run"].values
    settings = {"sampling_rate": rate, "seed": int(rng.integers(2**31)), **listener}
    hearing = SimulatedListener(electrodes, **settings)
    silent = SimulatedListener(max(1, deaf), **{**settings, "snr_db": -300.0})
    space, talker = features["space"].values, features["talker"].values
    neural, attended = [], []
    for k in range(trials):
        rows = run == k
        values = features["features"].values[rows]
        spoken = {
            s: np.stack([values[:, (space == s) & (talker == t)] for t in (0, 1)]) for s in spaces
        }
        who: NDArray[np.int64] | int = k % 2
        if switch_every is not None:
            who = switching(int(rows.sum()), rate, switch_every, first=k % 2)
        listened = [
            x.listen(spoken, who, name=f"{k}", subject=f"{subject}{label}")
            for x, label in ((hearing, ""), (silent, " deaf"))
        ]
        neural.append(np.concatenate([listened[0].neural, listened[1].neural[:, :deaf]], axis=1))
        attended.append(listened[0].attended)
    n = electrodes + deaf
    xyz = np.concatenate(
        [
            _HEARING + _SPREAD * rng.normal(size=(electrodes, 3)) * [0.2, 1, 0.6],
            _DEAF + _SPREAD * rng.normal(size=(deaf, 3)) * [0.2, 1, 0.6],
        ]
    )
    stimulus = np.array(["+".join(p) for p in pairs])
    responses = xr.Dataset(
        {"responses": (("time", "neuroid"), np.concatenate(neural).astype(np.float32))},
        coords={
            "run": ("time", run),
            "session": ("time", np.zeros_like(run)),
            "attended": ("time", np.concatenate(attended)),
            "talkers": ("time", stimulus[run]),
            "subject": subject,
            "neuroid_id": ("neuroid", [f"E{i + 1:03d}" for i in range(n)]),
            "electrode": ("neuroid", [f"E{i + 1:03d}" for i in range(n)]),
            "roi": ("neuroid", ["STG"] * electrodes + [""] * deaf),
            "hemisphere": ("neuroid", ["L"] * n),
            "hears": ("neuroid", np.arange(n) < electrodes),
            **{a: ("neuroid", xyz[:, i], {"units": "mm"}) for i, a in enumerate("xyz")},
        },
        attrs={
            "sampling_rate": float(rate),
            "units": "arbitrary",
            "subject": subject,
            "space": "MNI152 (simulated)",
        },
    )
    return validate(responses, "responses"), features


def decode(
    responses: xr.Dataset,
    features: xr.Dataset,
    kind: str = "reconstruction",
    settings: Mapping[str, Any] | None = None,
    *,
    responsive: Mapping[str, Any] | None = None,
    others: Sequence[tuple[xr.Dataset, xr.Dataset]] = (),
    lengths: Sequence[float] = (1, 2, 5, 10, 20, 40),
    split: str = "trial",
    n_folds: int | None = None,
    repeated: bool = False,
    seed: int = 0,
) -> xr.Dataset:
    """Decode attention of one subject, from trials or a subject that the decoder has not seen.

    Parameters
    ----------
    responses, features : Dataset
        From `prepare` or `simulate_listening`. Samples marked ``bad`` take no part: trials are cut
        there into pieces, which stay on one side of every split. Pieces shorter than the shortest
        window are left out.
    kind, settings
        The decoder; see `make_decoder`. For "cluster", a voice is the mean of the ``mel`` features
        of its talker over the trial.
    responsive : mapping, optional
        Choose responsive channels within the training trials of each split: parameters of
        `ResponsiveDecoder`, may be empty. Default: all channels.
    others : sequence of (responses, features)
        Other subjects, whom the decoder is fitted to if `split` is "subject".
    lengths : sequence of float
        Lengths of windows, s; those longer than every trial are left out.
    split : {"trial", "stimulus", "subject"}
        Leave out one trial at a time; all trials of one stimulus (`stimulus_id` of the responses,
        else shared content); or the whole subject, by a decoder fitted to `others`.
    n_folds : int, optional
        Folds of about as many trials or stimuli, in place of single ones.
    repeated : bool
        Accept that training and test trials share sound; it is logged.
    seed : int
        Of folds and intervals.

    Returns
    -------
    Dataset
        ``accuracy``, ``low``, ``high``, ``chance_low``, ``chance_high``, ``n_windows``,
        ``n_trials`` over length (s); ``score`` (window, talker) with ``window_length``, ``start``,
        ``trial``, ``attended``; ``attrs``: ``mesd`` (s), ``decoder``, its ``settings`` with
        those that were left as they are and what chose the ``responsive`` channels (both JSON),
        ``subject``, ``split``, ``seconds`` that took part and ``seconds_left_out`` for their marks.
        Where attention switches within trials, windows overlap, and there is what
        `brainalign.auditory.evaluation.switch_curve` gives over ``switch_length`` (s) and
        ``since``. Of a forward model fitted to all trials of the subject also ``trf`` (neuroid,
        feature, lag), with ``lag`` in s, and ``channel_r`` (neuroid), its cross-validated
        correlation, ``space`` (feature), and the places of the neuroids. Both are NaN for channels
        that were not chosen, and ``channel_r`` is if a single penalty was given.

    Raises
    ------
    LeakError
        If a stimulus is on both sides of a split and `repeated` is not set.
    ConfigError
        For a `split` that is not known or lacks other subjects, or windows that no trial can hold.
    SchemaError
        If there is one talker, all samples are marked, subjects have not the same channels, or
        voices are needed and there is no ``mel``.
    """
    if "talker" in features.coords and len(np.unique(features["talker"].values)) < 2:
        raise SchemaError(
            "The features are of one talker, who is attended whatever is decoded; expected at "
            "least two.",
            "For temporal response functions of one talker there is `brainalign trf`.",
        )
    decoder = make_decoder(kind, settings)
    parameters = decoder.get_params()
    if responsive is not None:
        decoder = ResponsiveDecoder(decoder, **responsive)
    own = _good(responses, features, kind, lengths)
    trials, rate = own.trials, own.trials[0].sampling_rate
    longest = max(len(t.neural) for t in own.pieces) / rate
    usable = [x for x in lengths if x <= longest]
    if not usable:
        raise ConfigError(
            f"The longest trial has {longest:.1f} s, shorter than all windows: {list(lengths)} s."
        )
    if others and split != "subject":
        raise ConfigError(f"Other subjects are of no use to the split {split!r}.")
    splits: list[Split] = []
    pieces, owner = own.pieces, own.owner
    if split == "trial":
        splits = decoders.make_splits(trials, n_folds=n_folds, seed=seed)
    elif split == "stimulus":
        group = content_groups(trials)
        if "stimulus_id" in responses.coords:
            run = responses["run"].values.astype(str)
            first = [int(np.flatnonzero(run == t.name)[0]) for t in trials]
            group = responses["stimulus_id"].values[first].astype(str)
        splits = by_group(group, n_folds or len(np.unique(group)), seed)
    elif split == "subject":
        good = [_good(*other, kind, lengths) for other in others]
        _check_others(trials, [t for g in good for t in g.trials])
        splits = [(np.arange(len(trials), len(trials) + len(good)), np.arange(len(trials)))]
        for k, g in enumerate(good):
            pieces = pieces + g.pieces
            owner = np.append(owner, np.full(len(g.pieces), len(trials) + k))
    else:
        raise ConfigError(f"split is {split!r}; expected 'trial', 'stimulus' or 'subject'.")
    splits = [
        (np.flatnonzero(np.isin(owner, train)), np.flatnonzero(np.isin(owner, test)))
        for train, test in splits
    ]
    switches = any((t.attended != t.attended[0]).any() for t in trials)
    scores = decoders.cross_validate(
        decoder, pieces, usable, splits=splits, allow_leak=repeated,
        hop=min(_HOP, min(usable) / 2) if switches else None,
    )  # fmt: skip
    curve = accuracy_curve(scores, seed=seed)
    subject = trials[0].subject
    names = {"length": "window_length"}
    found = xr.merge(
        [curve, scores.rename(names).drop_vars("subject")], combine_attrs="drop", compat="equals"
    )
    found["trial"] = found["trial"].astype(str)
    found.attrs = {
        "decoder": kind,
        "settings": json.dumps(parameters, default=str),
        "responsive": json.dumps(None if responsive is None else dict(responsive)),
        "subject": subject,
        "level": float(curve.attrs["level"]),
        "mesd": float(mesd(curve["length"].values, curve["accuracy"].values).duration),
        "sampling_rate": float(rate),
        "seconds": sum(len(t.neural) for t in own.pieces) / rate,
        "seconds_left_out": own.left_out / rate,
        "n_channels": int(trials[0].neural.shape[1]),
        "space": str(responses.attrs.get("space", "")),
        "split": split,
    }
    if switches:
        followed = switch_curve(scores, trials, seed=seed).rename(length="switch_length")
        found = found.merge(followed, combine_attrs="override")
    if kind == "forward":
        with warnings.catch_warnings():
            # The cross-validated fits have told.
            warnings.simplefilter("ignore", AlphaEdgeWarning)
            decoder.fit(own.pieces)
        found = found.merge(_response_functions(decoder, responses, trials[0]))
    return found


class _Good(NamedTuple):
    """The good samples of a recording: pieces of trials, and the number of the trial of each."""

    trials: list[ListeningTrial]
    pieces: list[ListeningTrial]
    owner: NDArray[np.intp]
    left_out: int


def _good(
    responses: xr.Dataset, features: xr.Dataset, kind: str, lengths: Sequence[float]
) -> _Good:
    """Cut a recording into trials, and these where samples are marked as bad.

    Pieces that hold no window are left out, and trials without a piece.
    """
    trials = listening_trials(responses, features)
    if kind == "cluster":
        if "mel" not in trials[0].features:
            raise SchemaError(
                "The decoder 'cluster' tells voices apart by their long-term mel spectrum, and "
                f"the talkers' features are {', '.join(trials[0].features)}.",
                "Prepare the recording with mel among the spaces.",
            )
        trials = [replace(t, voices=t.space("mel").mean(axis=1)) for t in trials]
    if "bad" not in responses.coords:
        return _Good(trials, trials, np.arange(len(trials)), 0)
    run, bad = responses["run"].values.astype(str), responses["bad"].values.astype(bool)
    shortest = min(lengths) * trials[0].sampling_rate
    kept: list[ListeningTrial] = []
    pieces: list[ListeningTrial] = []
    owner: list[int] = []
    for trial in trials:
        marks = bad[run == trial.name]
        good = [
            trial.cut(start, stop)
            for start, stop in _stretches(~marks)
            if stop - start >= round(shortest) or not marks.any()
        ]
        if good:
            pieces += good
            owner += [len(kept)] * len(good)
            kept.append(trial)
    if not kept:
        raise SchemaError(
            f"No trial has {min(lengths):g} s, the shortest window, without a sample that is "
            f"marked as bad; {bad.mean():.0%} of the samples are.",
            "Give shorter windows, or mark less: a higher threshold of the preprocessing.",
        )
    left_out = sum(len(t.neural) for t in trials) - sum(len(t.neural) for t in pieces)
    return _Good(kept, pieces, np.array(owner), left_out)


def _check_others(own: Sequence[ListeningTrial], others: Sequence[ListeningTrial]) -> None:
    """Refuse to leave out a subject if there is no other, or others have other channels."""
    if not others:
        raise ConfigError(
            "To leave out a subject there must be others.", "Give other subjects' recordings."
        )
    subject = own[0].subject
    if any(t.subject == subject for t in others):
        raise ConfigError(f"The subject {subject!r} is among the others.")
    channels = {t.subject: t.neural.shape[1] for t in [*own, *others]}
    if len(set(channels.values())) > 1:
        raise SchemaError(
            f"Subjects have different channels: {channels}.",
            "A decoder for other subjects needs the same channels in all, as with EEG; leave out "
            "trials or stimuli instead.",
        )


def _response_functions(
    fitted: decoders.AttentionDecoder, responses: xr.Dataset, trial: ListeningTrial
) -> xr.Dataset:
    """Give the weights of a forward model their places; channels that it does not see have NaN."""
    seen = np.ones(fitted.n_channels_, dtype=bool)
    if isinstance(fitted, ResponsiveDecoder):
        seen, fitted = fitted.selector_.get_support(), fitted.decoder_
    assert isinstance(fitted, decoders.ForwardResponse)
    model, sizes = fitted.model_, [trial.space(s).shape[2] for s in fitted.spaces]
    trf = np.full((len(seen), *model.coef_.shape[1:]), np.nan)
    trf[seen] = model.coef_
    r = np.full(len(seen), np.nan)
    r[seen] = getattr(model, "best_score_", np.nan)
    keep = ["neuroid_id", "roi", "hemisphere", "x", "y", "z", "band", "hears"]
    return xr.Dataset(
        {"trf": (("neuroid", "feature", "lag"), trf), "channel_r": ("neuroid", r)},
        coords={
            "lag": ("lag", np.asarray(model.times_), {"units": "s"}),
            "space": ("feature", np.repeat(list(fitted.spaces), sizes)),
            **{c: responses[c].variable for c in keep if c in responses.coords},
        },
    )


def _stretches(good: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return start and stop of each run of good samples."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], good, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
