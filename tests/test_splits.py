"""Splits keep groups whole, cover every row once, and refuse leaks."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainalign.data import splits
from brainalign.errors import ConfigError, LeakError, SchemaError, UnknownNameError


def assert_folds(folds, labels):
    labels = np.asarray(labels)
    tested = np.concatenate([test for _, test in folds])
    assert sorted(tested) == list(range(len(labels)))
    for train, test in folds:
        assert len(train) and len(test)
        assert not np.intersect1d(train, test).size
        assert len(train) + len(test) == len(labels)
        assert not set(labels[train]) & set(labels[test])


@given(st.lists(st.integers(0, 30), min_size=2, max_size=120), st.integers(2, 6), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_group_folds_are_disjoint_and_complete(groups, n_splits, seed):
    if len(set(groups)) < n_splits:
        with pytest.raises(ConfigError, match="different groups"):
            splits.by_group(groups, n_splits, seed)
        return
    assert_folds(splits.by_group(groups, n_splits, seed), groups)


def test_stimulus_folds_keep_repeats_together_and_follow_the_seed():
    ids = np.repeat([f"img{i:03d}" for i in range(50)], 3)
    folds = splits.by_stimulus(ids, 5, seed=1)
    assert_folds(folds, ids)
    assert [len(test) for _, test in folds] == [30] * 5
    again = splits.by_stimulus(ids, 5, seed=1)
    other = splits.by_stimulus(ids, 5, seed=2)
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(folds, again, strict=True))
    assert any(not np.array_equal(a[1], b[1]) for a, b in zip(folds, other, strict=True))
    assert splits.check_leak(folds, ids) == 0


def test_unequal_groups_give_about_equal_folds():
    groups = np.repeat(np.arange(20), np.arange(1, 21))
    sizes = [len(test) for _, test in splits.by_group(groups, 4)]
    assert max(sizes) - min(sizes) <= 5


def test_too_few_stimuli():
    with pytest.raises(
        ConfigError, match=r"5 folds need at least 5 different stimuli; there are 3"
    ):
        splits.by_stimulus(["a", "b", "c", "a"], 5)
    with pytest.raises(ConfigError, match="at least 2"):
        splits.by_stimulus(["a", "b"], 1)
    with pytest.raises(SchemaError, match="empty entries"):
        splits.by_stimulus(["a", "", "c"], 2)


def test_leave_one_run_out():
    run = np.repeat([3, 1, 2], 4)
    folds = splits.by_run(run)
    assert_folds(folds, run)
    assert [set(run[test].tolist()) for _, test in folds] == [{1}, {2}, {3}]
    assert len(splits.by_run(np.arange(12), 4)) == 4
    with pytest.raises(ConfigError, match="at least 2 runs"):
        splits.by_run([1, 1, 1])


def test_shared_set():
    ids = np.array(["a", "b", "c", "a", "d"])
    [(train, test)] = splits.by_shared(ids, ["a", "d"])
    assert test.tolist() == [0, 3, 4] and train.tolist() == [1, 2]
    with pytest.raises(UnknownNameError, match=r"shared0001.*Did you mean 'shared001'"):
        splits.by_shared(["shared001", "other"], ["shared0001"])
    with pytest.raises(ConfigError, match="none is left"):
        splits.by_shared(ids, ["a", "b", "c", "d"])
    with pytest.raises(ConfigError, match="No shared"):
        splits.by_shared(ids, [])


def test_a_flag_makes_one_split_of_what_was_presented():
    flags = {"a": True, "b": False, "c": False, "never shown": True}
    assert splits.by_flag(["c", "a", "b", "a"], flags) == [(["c", "b"], ["a"])]
    with pytest.raises(UnknownNameError, match="1 of 2 presented stimuli are not in the index"):
        splits.by_flag(["a", "x"], flags)
    with pytest.raises(ConfigError, match="shared is true for 0 of 2 presented stimuli: no test"):
        splits.by_flag(["b", "c"], flags, name="shared")
    with pytest.raises(ConfigError, match="true for 1 of 1 presented stimuli: no training"):
        splits.by_flag(["a"], flags)


def test_halves_follow_the_content_alone():
    keys = np.array([f"{i:064x}" for i in range(4000)])
    half = splits.halves(keys)
    assert set(half.tolist()) == {1, 2}
    # 3 standard deviations of a fair coin.
    assert abs((half == 1).sum() - 2000) < 3 * np.sqrt(1000)
    order = np.random.default_rng(0).permutation(len(keys))[:99]
    np.testing.assert_array_equal(splits.halves(keys[order]), half[order])
    np.testing.assert_array_equal(splits.halves(np.repeat(keys, 2)), np.repeat(half, 2))
    other = splits.halves(keys, seed=1)
    assert abs((half == other).mean() - 0.5) < 0.05


def test_clusters_do_not_cross_folds():
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(8, 5)) * 20
    kind = np.repeat(np.arange(8), 10)
    x = centre[kind] + rng.normal(size=(80, 5))
    assert_folds(splits.by_cluster(x, 8, 4, seed=0), kind)
    ids = np.arange(80) // 2
    assert_folds(splits.by_cluster(x, 12, 3, seed=0, stimulus_id=ids), ids)
    with pytest.raises(ConfigError, match="n_splits <= n_clusters"):
        splits.by_cluster(x, 3, 4)
    x[7, 2] = np.nan
    with pytest.raises(SchemaError, match="first row 7"):
        splits.by_cluster(x, 8, 4)


def test_nested_folds_never_see_the_outer_test_set():
    ids = np.repeat(np.arange(30), 2)
    for outer in splits.by_stimulus(ids, 3):
        for train, test in splits.nested(outer, ids, 4):
            rows = np.concatenate([train, test])
            assert np.array_equal(np.sort(rows), outer[0])
            assert not set(ids[train]) & set(ids[test])
        relative = splits.nested(outer, ids, 4, relative=True)
        assert np.array_equal(outer[0][relative[0][1]], splits.nested(outer, ids, 4)[0][1])


def test_leak_is_found_by_content_under_two_names():
    names = np.array(["a", "b", "c", "d"])
    content = np.array(["x1", "x2", "x3", "x1"])
    folds = [(np.array([0, 1]), np.array([2, 3]))]
    assert splits.check_leak(folds, names) == 0
    with pytest.raises(LeakError, match=r"1 stimuli .* fold 0: 1 of 2 test stimuli \('x1'\)"):
        splits.check_leak(folds, content)


def test_allowed_leak_is_logged_but_a_shared_row_is_refused(caplog):
    ids = np.tile(["face", "house"], 3)
    folds = splits.by_run(np.repeat([1, 2, 3], 2))
    with pytest.raises(LeakError, match="2 stimuli"):
        splits.check_leak(folds, ids)
    with caplog.at_level(logging.WARNING):
        assert splits.check_leak(folds, ids, allow=True) == 2
    assert "Leak allowed" in caplog.text
    with pytest.raises(LeakError, match="both trained and tested"):
        splits.check_leak([([0, 1], [1, 2])], ids, allow=True)


def test_check_leak_refuses_nonsense_indices():
    with pytest.raises(ConfigError, match="no split"):
        splits.check_leak([], ["a"])
    with pytest.raises(ConfigError, match="there are 2 rows"):
        splits.check_leak([([0], [2])], ["a", "b"])
    with pytest.raises(ConfigError, match="non-empty"):
        splits.check_leak([([0], [])], ["a", "b"])
    with pytest.raises(ConfigError, match="expected int"):
        splits.check_leak([([0.0], [1.0])], ["a", "b"])
    assert splits.check_leak([([True, False], [False, True])], ["a", "b"]) == 0
