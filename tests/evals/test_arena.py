"""Ratings: known strengths are found again, with honest errors."""

import math

import numpy as np
import pytest

from prairie.errors import DataError
from prairie.evals.arena import bradley_terry, expected_score, win_rate


def test_win_rate_counts_ties_half():
    rate = win_rate([1, 1, 0.5, 0])
    assert (rate.value, rate.wins, rate.ties, rate.losses, rate.n) == (0.625, 2, 1, 1, 4)
    assert rate.stderr == pytest.approx(np.std([1, 1, 0.5, 0], ddof=1) / 2)
    assert win_rate([1, 0]).elo == pytest.approx(0) and win_rate([1, 1]).elo == math.inf
    assert win_rate([1] * 10 + [0]).elo == pytest.approx(400)
    for bad in ([], [0.3]):
        with pytest.raises(DataError):
            win_rate(bad)


def test_known_strengths_are_recovered_within_their_error():
    rng = np.random.default_rng(0)
    truth = {"a": 1200.0, "b": 1050.0, "c": 950.0, "d": 800.0}
    names = list(truth)
    games = []
    for _ in range(3000):
        one, other = rng.choice(names, 2, replace=False)
        games.append((str(one), str(other), float(rng.random() < expected_score(truth, one, other))))
    ratings = bradley_terry(games)
    assert [rating.player for rating in ratings] == names
    for rating in ratings:
        assert abs(rating.elo - truth[rating.player]) < 3.5 * rating.stderr and rating.stderr < 20
    assert sum(rating.games for rating in ratings) == 6000


def test_two_players_agree_with_the_closed_form():
    games = [("a", "b", 1.0)] * 300 + [("a", "b", 0.0)] * 100
    first, second = bradley_terry(games)
    assert first.elo - second.elo == pytest.approx(400 * math.log10(3), abs=3)
    assert first.elo + second.elo == pytest.approx(2000)
    assert bradley_terry([("a", "b", 1.0)] * 5)[0].elo < 2000  # never lost, still finite


def test_only_comparable_players_are_rated():
    with pytest.raises(DataError, match="no chain of games"):
        bradley_terry([("a", "b", 1.0), ("c", "d", 0.0)])
    with pytest.raises(DataError, match="a against a"):
        bradley_terry([("a", "a", 1.0)])
    with pytest.raises(DataError, match="at least one game"):
        bradley_terry([])
