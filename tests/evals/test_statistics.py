"""Intervals against published values and against simulation."""

import numpy as np
import pytest

from prairie.errors import DataError
from prairie.evals.statistics import (
    bootstrap_interval,
    clustered_interval,
    mean_interval,
    paired_difference,
    student_below,
    student_quantile,
    unpaired_difference,
    wilson,
)


@pytest.mark.parametrize(
    ("probability", "degrees", "value"),
    [(0.975, 1, 12.706204736), (0.975, 5, 2.570581836), (0.975, 30, 2.042272456), (0.95, 10, 1.812461123),
     (0.995, 3, 5.840909310), (0.025, 5, -2.570581836), (0.975, 100_000, 1.959987708)],
)  # fmt: skip
def test_student_against_tables(probability, degrees, value):
    assert student_quantile(probability, degrees) == pytest.approx(value, abs=2e-8)
    assert student_below(value, degrees) == pytest.approx(probability, abs=1e-9)


def test_wilson_against_newcombe_1998():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson(right, n)
        assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)
    assert wilson(5, 5).high == 1.0 and wilson(5, 5).low < 0.6


def test_differences():
    # Newcombe, Statistics in Medicine 17 (1998) 873, table II, method 10, example a: 56/70 against 48/80.
    found = unpaired_difference((48, 80), (56, 70))
    assert found.value == pytest.approx(0.2) and found.low == pytest.approx(0.0524, abs=5e-5)
    assert found.high == pytest.approx(0.3339, abs=5e-5)
    same = [True] * 5
    assert paired_difference(same, same).low < -0.1  # five items without a change prove little
    assert paired_difference(same * 40, same * 40).low > -0.015
    worse = paired_difference([True] * 100, [True] * 80 + [False] * 20)
    assert worse.value == pytest.approx(-0.2) and worse.high < -0.1
    with pytest.raises(DataError, match="5 and 4"):
        paired_difference(same, same[:4])


def test_paired_difference_covers():
    rng = np.random.default_rng(0)
    misses = 0
    for _ in range(600):
        before = rng.random(80) < 0.8
        after = np.where(rng.random(80) < 0.1, ~before, before)  # falls by 0.06 on average
        interval = paired_difference(before.tolist(), after.tolist())
        misses += not interval.low <= -0.06 <= interval.high
    assert misses / 600 < 0.08


def test_clusters_are_the_units():
    votes = [1.0] * 40 + [0.0] * 10 + [1.0, 0.0] * 5
    alone = mean_interval(votes)
    by_user = clustered_interval(votes, ["a"] * 40 + ["b"] * 10 + ["c", "d", "e", "f", "g"] * 2)
    assert alone.low > 0.5 > by_user.low  # one busy fan is not a majority
    assert by_user.n == 7
    assert clustered_interval(votes, range(60)).low == pytest.approx(alone.low, abs=0.02)


def test_small_and_unanimous_votes_prove_little():
    assert clustered_interval([1.0] * 5, range(5)).low < 0.6
    assert clustered_interval([1.0], ["a"]).low < 0.3
    assert clustered_interval([1, 1, 1, 1, 1, 1, 0], range(7)).low <= 0.5  # happens by chance in 6% of cases
    assert clustered_interval([], []).low == 0.0
    with pytest.raises(DataError, match="between 0 and 1"):
        clustered_interval([2.0, 1.0], [0, 1])
    with pytest.raises(DataError, match="do not match"):
        clustered_interval([1.0], [0, 1])


def test_clustered_interval_is_the_same_every_time():
    rng = np.random.default_rng(0)
    votes, users = rng.integers(0, 2, 200).tolist(), rng.integers(0, 25, 200).tolist()
    assert clustered_interval(votes, users) == clustered_interval(votes, users)


def test_clustered_interval_covers_when_people_differ():
    rng = np.random.default_rng(0)
    misses = 0
    for _ in range(400):
        own = np.clip(rng.normal(0.62, 0.15, 15), 0, 1)
        votes = [float(rng.random() < own[user]) for user in range(15) for _ in range(6)]
        interval = clustered_interval(votes, np.repeat(np.arange(15), 6).tolist(), rounds=2000)
        misses += not interval.low <= 0.62 <= interval.high
    assert misses / 400 < 0.075


def test_bootstrap_agrees_on_many_clusters():
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(200), 3)
    votes = (rng.random(600) < 0.6).astype(float)
    boot = bootstrap_interval(votes.tolist(), users.tolist(), seed=0)
    exact = clustered_interval(votes.tolist(), users.tolist())
    assert boot.value == pytest.approx(exact.value) and boot.low == pytest.approx(exact.low, abs=0.01)
    assert boot.high == pytest.approx(exact.high, abs=0.01)
