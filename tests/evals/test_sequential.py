"""The test that may be looked at all the time: its error rates whatever the stopping, its power, its exactness."""

import json

import numpy as np
import pytest

from prairie.errors import DataError
from prairie.evals.sequential import (
    SequentialTest,
    lower_bound,
    paired_games,
    required_units,
    sequential_test,
    wealth,
)


def people(rng, trials, count, win_rate, each=8, spread=0.1, ties=0.3):
    """(trials, people) means of each person's votes."""
    own = win_rate + spread * rng.choice([-1.0, 1.0], (trials, count))
    tied = rng.binomial(each, ties, (trials, count))
    return (rng.binomial(each - tied, (own - ties / 2) / (1 - ties)) + tied / 2) / each


@pytest.mark.parametrize(
    "settings",
    [{"each": 1, "spread": 0.0, "ties": 0.0}, {"each": 1, "ties": 0.5}, {"spread": 0.2}, {"ties": 0.0}],
)
def test_noise_is_found_better_in_at_most_five_percent_whenever_one_stops(settings):
    """Looked at after EVERY person, stopped at the first moment that looks good: 600 trials of 300 people."""
    values = people(np.random.default_rng(1), 600, 300, 0.5, **settings)
    assert (wealth(values, 0.5).max(axis=1) >= 20).mean() <= 0.05


def test_one_look_after_another_with_an_interval_is_what_this_replaces():
    """The same noise and the same looks with a 95% interval for one look: that is wrong in a third of all trials."""
    values = people(np.random.default_rng(1), 300, 300, 0.5, ties=0.0)
    counts = np.arange(1, 301)
    means = values.cumsum(axis=1) / counts
    deviation = np.sqrt(np.maximum((values**2).cumsum(axis=1) / counts - means**2, 1e-12))
    looks = (means - 1.97 * deviation / np.sqrt(counts) > 0.5)[:, 9:]
    assert looks.any(axis=1).mean() > 0.15


def test_a_crowd_of_lovers_and_haters_is_not_better():
    """One in five hates the candidate, the others like it a little: a mean of one half, far from symmetric."""
    rng = np.random.default_rng(2)
    values = rng.binomial(8, np.where(rng.random((600, 300)) < 0.2, 0.1, 0.6)) / 8
    assert (wealth(values, 0.5).max(axis=1) >= 20).mean() <= 0.05


def test_a_true_winner_is_given_up_in_at_most_five_percent():
    values = people(np.random.default_rng(3), 600, 300, 0.55)
    assert (wealth(1 - values, 0.45).max(axis=1) >= 20).mean() <= 0.05


def test_a_true_55_percent_is_found_within_the_stated_size():
    size = required_units(lambda rng, trials, count: people(rng, trials, count, 0.55))
    found = [sequential_test(list(row)).decision for row in people(np.random.default_rng(4), 200, size, 0.55)]
    assert 100 < size < 250 and found.count("better") / 200 >= 0.8 > 0.05 >= found.count("not better") / 200


def test_both_directions_stop_early():
    rng = np.random.default_rng(5)
    good, bad = (sequential_test(list(people(rng, 1, 300, rate)[0])) for rate in (0.7, 0.4))
    assert good.decision == "better" and good.decided_after < 60 and good.low > 0.5
    assert bad.decision == "not better" and bad.decided_after < 120 and bad.high < 0.55
    equal = [sequential_test(list(row)).decided_after for row in people(rng, 20, 1000, 0.5)]
    assert sum(after is not None for after in equal) >= 16, "no difference is also found out, in the end"


def test_the_bounds_hold_at_any_time_and_agree_with_the_decision():
    rng = np.random.default_rng(6)
    for row in people(rng, 10, 120, 0.6):
        found = [sequential_test(list(row[:n])) for n in (1, 20, 60, 120)]
        lows, highs = [f.low for f in found], [f.high for f in found]
        assert lows == sorted(lows) and highs == sorted(highs, reverse=True), "what was refuted stays refuted"
        for f in found:
            assert (f.low > 0.5) == (f.decision == "better") == (f.evidence >= f.needed)
    wrong = np.mean([lower_bound(row, 0.05) > 0.6 for row in people(rng, 150, 80, 0.6)])
    assert wrong <= 0.05


def test_wealth_is_a_fair_game():
    """Over all 2**8 outcomes of a fair coin the mean wealth is exactly 1 at every moment."""
    outcomes = ((np.arange(256)[:, None] >> np.arange(8)) & 1).astype(float)
    assert wealth(outcomes, 0.5).mean(axis=0) == pytest.approx(np.ones(8))
    assert wealth(np.ones(3), 0.5)[0] == pytest.approx(1.4875, abs=0.2)


def test_few_units_decide_nothing():
    assert [sequential_test([1.0] * n).decision for n in (0, 5, 6, 7)] == ["undecided"] * 3 + ["better"]
    assert sequential_test([1.0] * 8, least=9).low == 0.0
    found = sequential_test([])
    assert SequentialTest.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))).low == 0.0


def test_a_match_is_made_of_pairs():
    assert paired_games([1, 0, 1, 0.5]) == [0.5, 0.75]
    # Who always wins as black and never as white is no stronger than the other.
    assert sequential_test(paired_games([1, 0] * 200)).decision == "not better"
    assert sequential_test(paired_games([1, 1, 1, 0] * 20)).decision == "better"
    for bad in ([1.0], [0.7, 1.0]):
        with pytest.raises(DataError, match="pairs of games"):
            paired_games(bad)


def test_nonsense_is_refused():
    with pytest.raises(DataError, match="between 0 and 1"):
        sequential_test([0.5, 1.5])
    with pytest.raises(DataError, match="no such test"):
        sequential_test([0.5], wanted=0.5)
    with pytest.raises(DataError, match="no sample is large enough: got 128 units"):
        required_units(lambda rng, trials, count: np.full((trials, count), 0.5), most=100, trials=10)
