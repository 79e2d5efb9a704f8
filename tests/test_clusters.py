"""Spherical k-means: planted groups, its objective, its errors."""

import itertools

import numpy as np
import pytest

from brainalign.encoding.clusters import spherical_kmeans
from brainalign.errors import ConfigError, SchemaError


def planted(rng, sizes=(40, 25, 10), d=12, noise=0.08):
    centres = np.linalg.qr(rng.standard_normal((d, len(sizes))))[0].T
    truth = np.repeat(np.arange(len(sizes)), sizes)
    w = centres[truth] + noise * rng.standard_normal((len(truth), d))
    return w * rng.uniform(0.01, 100, (len(truth), 1)), truth, centres


def test_planted_groups_are_found_whatever_the_norm():
    w, truth, centres = planted(np.random.default_rng(0))
    order = np.random.default_rng(1).permutation(len(w))
    labels, found = spherical_kmeans(w[order], 3, seed=0)
    assert np.array_equal(labels, truth[order])
    assert np.allclose(np.linalg.norm(found, axis=1), 1)
    assert (found * centres).sum(axis=1).min() > 0.98


def test_the_objective_is_that_of_the_best_division():
    rng = np.random.default_rng(3)
    w = rng.standard_normal((9, 3))
    unit = w / np.linalg.norm(w, axis=1, keepdims=True)

    def objective(labels):
        return sum(np.linalg.norm(unit[np.array(labels) == k].sum(axis=0)) for k in set(labels))

    best = max(objective(labels) for labels in itertools.product(range(2), repeat=9))
    labels, centres = spherical_kmeans(w, 2, seed=0, n_init=20)
    assert objective(labels.tolist()) == pytest.approx(best, rel=1e-12)
    assert (unit * centres[labels]).sum() == pytest.approx(best, rel=1e-12)


def test_one_seed_gives_one_answer_and_every_cluster_has_a_member():
    w = np.random.default_rng(5).standard_normal((30, 4))
    first, second = spherical_kmeans(w, 12, seed=7), spherical_kmeans(w, 12, seed=7)
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    counts = np.bincount(first[0], minlength=12)
    assert counts.min() >= 1 and (np.diff(counts) <= 0).all()
    labels, _ = spherical_kmeans(w, 30, seed=0)
    assert sorted(labels.tolist()) == list(range(30))


def test_clusters_of_one_size_are_numbered_by_their_first_member():
    rng = np.random.default_rng(8)
    w, _, _ = planted(rng, (6, 6, 6), noise=0.02)
    w = w[np.arange(18).reshape(3, 6).T.ravel()]
    for seed in range(6):
        assert spherical_kmeans(w, 3, seed=seed)[0].tolist() == [0, 1, 2] * 6


def test_what_has_no_direction_is_refused():
    w = np.ones((4, 3))
    w[2] = 0
    with pytest.raises(SchemaError, match="Neuroid 2 has no weight"):
        spherical_kmeans(w, 2)
    w[2, 1] = np.nan
    with pytest.raises(SchemaError, match="Neuroid 2 has weights that are not finite"):
        spherical_kmeans(w, 2)
    with pytest.raises(ConfigError, match="2 clusters were asked of 4 neuroids"):
        spherical_kmeans(np.ones((4, 3)), 2)
    with pytest.raises(ConfigError, match="at least 1"):
        spherical_kmeans(np.eye(3), 0)
