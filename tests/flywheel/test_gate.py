"""The gate: noise does not pass, a better candidate does, a fall or a failing probe stops it."""

import json

import numpy as np
import pytest

from prairie.errors import DataError
from prairie.evals.harness import TaskScore
from prairie.flywheel.gate import (
    Comparison,
    judge,
    length_probe,
    power_of,
    repeats_itself,
    repetition_probe,
    required_sample_size,
)


def votes(rng, users, each, win_rate=0.5, ties=0.3, spread=0.0, uneven=False):
    """Simulated comparisons: each user has a win rate of their own, `spread` above or below `win_rate`."""
    comparisons = []
    for user in range(users):
        own = win_rate + spread * rng.choice([-1.0, 1.0])
        for prompt in range(rng.integers(1, 2 * each + 1) if uneven else each):
            tied = rng.random() < ties
            won = rng.random() < (own - ties / 2) / (1 - ties)
            comparisons.append(Comparison(f"u{user}", f"p{prompt}", 0.5 if tied else float(won)))
    return comparisons


def promotions(trials, seed, **settings):
    rng = np.random.default_rng(seed)
    return sum(judge(votes(rng, **settings)).passed for _ in range(trials)) / trials


def score(right, n=200, task="numbers"):
    return TaskScore(task, {f"{task}-{i}": i < right for i in range(n)}, {})


BETTER = [Comparison(f"u{u}", f"p{p}", 1.0 if (u + p) % 4 else 0.0) for u in range(20) for p in range(8)]


# --- votes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"users": 7, "each": 1, "ties": 0.0},  # where Student's t alone errs in 6% of cases
        {"users": 10, "each": 8, "spread": 0.15},
        {"users": 24, "each": 6, "ties": 0.6, "uneven": True},
    ],
)
def test_noise_is_seldom_promoted(settings):
    assert promotions(120, seed=1, **settings) <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize("users", [6, 7, 10, 13, 16, 24, 40])
@pytest.mark.parametrize(
    "settings",
    [
        {"each": 1, "ties": 0.0},
        {"each": 1, "ties": 0.5},
        {"each": 4, "ties": 0.3, "spread": 0.2, "uneven": True},
        {"each": 8, "ties": 0.5, "spread": 0.15},
    ],
)
def test_noise_is_promoted_in_at_most_five_percent(users, settings):
    """Nominal is 2.5%; 600 trials put the upper bound of a true 2.5% at about 4.4%."""
    assert promotions(600, seed=users, users=users, **settings) <= 0.045


@pytest.mark.slow
def test_a_group_that_loves_and_a_group_that_hates_is_no_better():
    """Asymmetric people with a mean of one half: neither part of the interval is exact here, both together hold."""
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(500):
        comparisons = []
        for user in range(24):
            own = 0.9 if rng.random() < 0.2 else 0.4
            comparisons += [Comparison(f"u{user}", f"p{p}", float(rng.random() < own)) for p in range(8)]
        hits += judge(comparisons).passed
    assert hits / 500 <= 0.05


@pytest.mark.parametrize(
    ("settings", "trials"),
    [({"users": 24, "each": 8, "win_rate": 0.62, "spread": 0.1}, 150)],
)
def test_power_is_what_was_planned(settings, trials):
    planned = power_of(settings["users"], settings["win_rate"], settings["each"], 0.3, settings["spread"])
    assert promotions(trials, seed=2, **settings) == pytest.approx(planned, abs=0.11)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"users": 10, "each": 10, "win_rate": 0.65, "ties": 0.5, "spread": 0.1},
        {"users": 12, "each": 8, "win_rate": 0.65, "spread": 0.15},
        {"users": 24, "each": 8, "win_rate": 0.57, "spread": 0.1},
        {"users": 24, "each": 8, "win_rate": 0.6, "spread": 0.1},
        {"users": 40, "each": 4, "win_rate": 0.58, "ties": 0.0, "spread": 0.1},
    ],
)
def test_power_agrees_with_simulation(settings):
    planned = power_of(
        settings["users"], settings["win_rate"], settings["each"], settings.get("ties", 0.3), settings["spread"]
    )
    assert promotions(700, seed=3, **settings) == pytest.approx(planned, abs=0.06)


def test_required_sample_size_reaches_its_power():
    users = required_sample_size(0.6, votes_per_user=8, tie_share=0.3)
    assert power_of(users, 0.6, 8, 0.3) >= 0.8 > power_of(users - 2, 0.6, 8, 0.3)
    assert required_sample_size(0.52) > required_sample_size(0.55) > required_sample_size(0.7)
    assert required_sample_size(0.6, votes_per_user=2) > required_sample_size(0.6, votes_per_user=20)
    for nonsense in (0.5, 0.4, 1.0):
        with pytest.raises(DataError, match="no sample"):
            required_sample_size(nonsense)


def test_a_clear_winner_is_promoted_and_a_loser_named():
    verdict = judge(BETTER)
    assert verdict.passed and verdict.win_rate == 0.75 and verdict.low > 0.5 and verdict.reasons == ()
    assert (verdict.users, verdict.n, verdict.wins, verdict.ties, verdict.losses) == (20, 160, 120, 0, 40)
    loser = judge([Comparison(c.user, c.prompt_id, 1 - c.outcome) for c in BETTER])
    assert not loser.passed and "prefer the champion" in loser.reasons[0]


def test_one_busy_user_is_one_user():
    fan = [Comparison("fan", f"p{i}", 1.0) for i in range(500)]
    others = [Comparison(f"u{u}", "p0", float(u % 2)) for u in range(10)]
    verdict = judge(fan + others)
    assert not verdict.passed and verdict.users == 11 and verdict.win_rate < 0.6


def test_too_few_users_prove_nothing():
    for users in (0, 1, 5):
        verdict = judge([Comparison(f"u{u}", f"p{p}", 1.0) for u in range(users) for p in range(50)])
        assert not verdict.passed and f"only {users} users" in verdict.reasons[0]
        json.dumps(verdict.to_json(), allow_nan=False)
        assert "KEEP" in verdict.text()


def test_ties_alone_promote_nobody():
    assert not judge([Comparison(f"u{u}", "p", 0.5) for u in range(40)]).passed


def test_miscounted_votes_are_refused():
    with pytest.raises(DataError, match="twice"):
        judge([Comparison("u", "p", 1.0), Comparison("u", "p", 1.0)])
    with pytest.raises(DataError, match=r"outcome 0\.7"):
        judge([Comparison("u", "p", 0.7)])


# --- suite ----------------------------------------------------------------------------------------


def test_a_fall_beyond_the_margin_stops_a_popular_candidate():
    verdict = judge(BETTER, suite_before={"numbers": score(180)}, suite_after={"numbers": score(160)})
    assert not verdict.passed and "numbers falls by 10.0%" in verdict.reasons[0]
    assert "BAD numbers" in verdict.text()
    tolerant = judge(
        BETTER, suite_before={"numbers": score(180)}, suite_after={"numbers": score(160)}, margins={"numbers": 0.15}
    )
    assert tolerant.passed


def test_small_changes_and_gains_pass():
    before = {"numbers": score(180), "dates": score(100, task="dates")}
    after = {"numbers": score(174), "dates": score(190, task="dates")}
    verdict = judge(BETTER, suite_before=before, suite_after=after)
    assert verdict.passed and verdict.suite["dates"].change.value == pytest.approx(0.45)


def test_the_same_model_seldom_fails_the_suite_by_noise():
    rng = np.random.default_rng(0)
    failed = 0
    for _ in range(200):
        before = rng.random(150) < 0.85
        after = np.where(rng.random(150) < 0.08, rng.random(150) < 0.85, before)  # as right as before, on other items
        scores = [TaskScore("t", {str(i): bool(r) for i, r in enumerate(run)}, {}) for run in (before, after)]
        failed += not judge(BETTER, suite_before={"t": scores[0]}, suite_after={"t": scores[1]}).passed
    assert failed / 200 <= 0.05


def test_a_suite_too_small_to_show_a_fall_does_not_pass():
    verdict = judge(BETTER, suite_before={"numbers": score(5, 5)}, suite_after={"numbers": score(5, 5)})
    assert not verdict.passed and "5 items are too few" in verdict.reasons[0]


def test_a_task_that_was_not_measured_stops():
    verdict = judge(BETTER, suite_before={"numbers": score(180)}, suite_after={})
    assert not verdict.passed and "not measured on numbers" in verdict.reasons[0]
    with pytest.raises(DataError, match="names no task"):
        judge(BETTER, suite_before={"numbers": score(1)}, suite_after={"numbers": score(1)}, margins={"number": 0.1})


def test_other_items_are_compared_as_two_samples():
    other = TaskScore("numbers", {f"other-{i}": i < 120 for i in range(200)}, {})
    verdict = judge(BETTER, suite_before={"numbers": score(180)}, suite_after={"numbers": other})
    assert not verdict.passed and verdict.suite["numbers"].change.value == pytest.approx(-0.3)


# --- probes ---------------------------------------------------------------------------------------


def test_probes_stop_longer_and_looping_answers():
    short, long = ["seven"] * 20, ["seven, and let me explain at length"] * 20
    verdict = judge(BETTER, probes=[length_probe(short, long)])
    assert not verdict.passed and "length ratio" in verdict.reasons[0]
    assert judge(BETTER, probes=[length_probe(short, short), repetition_probe(short, short)]).passed
    looping = short[:18] + ["I am what I am what I am what I am what I am"] * 2
    verdict = judge(BETTER, probes=[repetition_probe(short, looping)])
    assert not verdict.passed and verdict.probes[0].value == pytest.approx(0.1)
    with pytest.raises(DataError):
        length_probe([], short)


@pytest.mark.parametrize(
    ("text", "loops"),
    [("9000000 m", False), ("ha ha ha ha ha ha ha", True), ("好的好的好的好的好的好的好的好的好的", True), ("", False),
     ("The answer is four thousand four hundred forty-four.", False), ("a" * 40, True)],
)  # fmt: skip
def test_repetition(text, loops):
    assert repeats_itself(text) is loops


def test_the_verdict_fits_a_screen_and_json():
    before = {name: score(180, task=name) for name in ("numbers", "dates", "units", "docs", "arithmetic")}
    after = {**before, "units": score(150, task="units")}
    verdict = judge(BETTER, suite_before=before, suite_after=after, probes=[length_probe(["a"], ["b"])])
    lines = verdict.text().splitlines()
    assert len(lines) < 24 and max(map(len, lines)) <= 140
    body = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert body["passed"] is False and body["suite"]["units"]["holds"] is False and body["users"] == 20
