"""Conditions compared over training runs: planted differences are found, equal ones are not."""

from __future__ import annotations

import numpy as np
import pytest

from brainalign.errors import SchemaError, UnknownNameError
from brainalign.evaluation import compare_trainings

CONDITIONS, SEEDS = ["softmax", "local", "linear"], [0, 1, 2]


def drawn_scores(rng, n_subjects, *, effect=0.0, seed_sd=0.02, stimulus_sd=0.1, n_stimuli=60):
    """Draw scores that are means over stimuli, with and without bootstrap weights.

    Stimuli, seeds and, where there are several, subjects have an effect on every condition: one
    subject is taken as it is.
    """
    shape = (n_subjects, len(CONDITIONS), len(SEEDS))
    by_stimulus = rng.normal(0, stimulus_sd, (n_stimuli, 1, len(CONDITIONS), 1))
    noise = rng.normal(0, stimulus_sd / 2, (n_stimuli, *shape))
    by_seed = rng.normal(0, seed_sd, (1, 1, len(CONDITIONS), len(SEEDS)))
    by_subject = rng.normal(0, 0.02, (1, n_subjects, len(CONDITIONS), 1)) * (n_subjects > 1)
    score = 0.3 + by_stimulus + noise + by_seed + by_subject
    score[:, :, 1] += effect
    weights = rng.multinomial(n_stimuli, np.full(n_stimuli, 1 / n_stimuli), size=200) / n_stimuli
    return score.mean(axis=0), np.einsum("bs,sucd->bucd", weights, score), n_stimuli


def compared(values, samples, n_stimuli):
    return compare_trainings(
        values,
        samples,
        conditions=CONDITIONS,
        seeds=SEEDS,
        reference="softmax",
        n_stimuli=n_stimuli,
    )


@pytest.mark.parametrize("n_subjects", [1, 5])
def test_equal_conditions_differ_no_more_often_than_five_percent_says(n_subjects):
    rng = np.random.default_rng(n_subjects)
    p, held = [], []
    for _ in range(250):
        ds = compared(*drawn_scores(rng, n_subjects))
        p.append(ds["p"].values[1:])
        held.append((ds["low"].values < 0.3) & (0.3 < ds["high"].values))
    false = np.mean(np.array(p) < 0.05)
    # 500 p-values: 0.075 is 2.5 standard errors above 0.05. Wide intervals make fewer.
    assert 0.005 < false < 0.075
    assert np.mean(held) > 0.93


@pytest.mark.parametrize("n_subjects", [1, 5])
def test_a_planted_difference_is_found_and_only_that_one(n_subjects):
    rng = np.random.default_rng(10 + n_subjects)
    found = np.array(
        [
            compared(*drawn_scores(rng, n_subjects, effect=0.2))["p_holm"].values < 0.05
            for _ in range(40)
        ]
    )
    assert found[:, 1].mean() > 0.9
    assert found[:, 2].mean() < 0.15
    ds = compared(*drawn_scores(rng, n_subjects, effect=0.2))
    assert ds["difference_low"][1] < 0.2 < ds["difference_high"][1]


def test_seeds_that_differ_more_give_wider_intervals():
    one, two = (
        compared(*drawn_scores(np.random.default_rng(3), 1, seed_sd=sd)) for sd in (0.001, 0.1)
    )
    assert (two["difference_se"][1:] > 2 * one["difference_se"][1:]).all()
    # The seeds' part is that of a mean of three, from the variance within all conditions.
    expected = np.sqrt(two["per_seed"].var("seed", ddof=1).mean() / 3)
    np.testing.assert_allclose(two["se_seeds"], expected)


def test_values_and_differences_are_means_paired_by_seed():
    values, samples, n = drawn_scores(np.random.default_rng(4), 5, effect=0.1)
    ds = compared(values, samples, n)
    np.testing.assert_allclose(ds["value"], values.mean(axis=(0, 2)))
    by_hand = (values[:, 1] - values[:, 0]).mean(axis=0)
    np.testing.assert_allclose(ds["difference_per_seed"].sel(condition="local"), by_hand)
    assert np.isnan(ds["p"].values[0]) and ds["difference"].values[0] == 0
    p, holm = ds["p"].values[1:], ds["p_holm"].values[1:]
    first = int(np.argmin(p))
    assert holm[first] == pytest.approx(min(1, 2 * p[first]))
    assert holm[1 - first] == pytest.approx(max(p[1 - first], holm[first]))


def test_one_seed_has_no_variance_of_seeds():
    values, samples, n = drawn_scores(np.random.default_rng(5), 1)
    ds = compare_trainings(
        values[..., :1],
        samples[..., :1],
        conditions=CONDITIONS,
        seeds=[0],
        reference="softmax",
        n_stimuli=n,
    )
    assert np.isnan(ds["se_seeds"]).all() and np.isfinite(ds["high"]).all()


def test_what_does_not_fit_is_refused():
    values, samples, n = drawn_scores(np.random.default_rng(6), 1)
    with pytest.raises(UnknownNameError, match="Did you mean 'softmax'"):
        compare_trainings(
            values, samples, conditions=CONDITIONS, seeds=SEEDS, reference="sofmax", n_stimuli=n
        )
    with pytest.raises(SchemaError, match="3 conditions, 2 seeds"):
        compare_trainings(
            values, samples, conditions=CONDITIONS, seeds=[0, 1], reference="softmax", n_stimuli=n
        )
