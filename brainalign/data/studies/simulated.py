"""Simulated subjects as a study: responses follow given features; the truth is an extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from brainalign.data.simulate import Simulation, TimeSeries, simulate, simulate_timeseries
from brainalign.data.studies import Study

if TYPE_CHECKING:
    import xarray as xr

    from brainalign.data.stimuli import StimulusSet

__all__ = ["load"]


def load(
    features: Mapping[str, xr.Dataset],
    stimuli: StimulusSet,
    *,
    subjects: Sequence[str] = ("sim01",),
    seed: int = 0,
    time_series: bool = False,
    **design: Any,
) -> Study:
    """Simulate subjects who saw a set of stimuli.

    Parameters
    ----------
    features : mapping of str to xarray.Dataset
        Features by layer of these stimuli.
    stimuli : StimulusSet
        The stimuli; their ``category``, if they have one, is what ROIs are selective for.
    subjects : sequence of str
        Their names; each has random weights, noise and ceilings of its own.
    seed : int
        Seed; subject k is simulated with the k-th seed that it spawns.
    time_series : bool
        BOLD time series (time, neuroid), which say what is shown at each sample.
    **design
        As for `brainalign.data.simulate.simulate`, or `simulate_timeseries`.

    Returns
    -------
    Study
        ``responses`` by subject; ``extras["truth_<subject>"]``.
    """
    category = stimuli.index["category"].values if "category" in stimuli.index else None
    responses, extras = {}, {}
    for subject, child in zip(
        subjects, np.random.SeedSequence(seed).generate_state(len(subjects)), strict=True
    ):
        options = {"category": category, "subject": subject, "seed": int(child), **design}
        made: Simulation | TimeSeries
        if time_series:
            made = simulate_timeseries(features, **options)
            responses[subject] = made.bold
        else:
            made = simulate(features, **options)
            responses[subject] = made.responses
        extras[f"truth_{subject}"] = made.truth
    return Study("simulated", responses=responses, stimuli=stimuli, extras=extras)
