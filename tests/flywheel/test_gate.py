"""The gate: noise does not pass, a better candidate does, a fall or a failing probe stops it."""

import json

import numpy as np
import pytest

from prairie.errors import DataError
from prairie.evals.harness import TaskScore
from prairie.flywheel.gate import Comparison, Verdict, judge, required_sample_size
from prairie.flywheel.probes import Probe, length_probe


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
    assert promotions(100, seed=1, **settings) <= 0.05


def test_noise_is_seldom_promoted_by_voting_on():
    """200 comparisons that are stopped whenever they look good; a verdict of all knows every moment before it."""
    rng, promoted = np.random.default_rng(7), 0
    for trial in range(200):
        stream = votes(rng, users=48, each=1)
        passed = judge(stream).passed
        if trial < 10 or (passed and promoted < 3):
            assert passed == any(judge(stream[:n]).passed for n in range(6, 49, 1))
        promoted += passed
    assert promoted / 200 <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("users", [7, 13, 24, 40])
@pytest.mark.parametrize(
    "settings",
    [
        {"each": 1, "ties": 0.0},
        {"each": 4, "ties": 0.3, "spread": 0.2, "uneven": True},
        {"each": 8, "ties": 0.5, "spread": 0.15},
    ],
)
def test_noise_is_promoted_in_at_most_five_percent(users, settings):
    assert promotions(400, seed=users, users=users, **settings) <= 0.05


def test_a_55_percent_winner_is_promoted_within_the_stated_number_of_people():
    users = required_sample_size(0.55, votes_per_user=8, tie_share=0.3)
    assert promotions(60, seed=2, users=users, each=8, win_rate=0.55, spread=0.1) >= 0.75  # 80% less its noise


def test_what_is_undecided_says_how_many_people_were_planned():
    verdict = judge(votes(np.random.default_rng(3), 12, 4), planned=147)
    assert verdict.test.decision == "undecided" and not verdict.passed
    assert "12 people say" in verdict.reasons[0] and "147 were planned" in verdict.reasons[0]
    assert "12 people of 147 planned" in verdict.text()
    asked = judge(votes(np.random.default_rng(3), 12, 4), planned=147, units="questions")
    assert "12 questions say" in asked.reasons[0] and asked.because[0].rule == "undecided_questions"


def test_required_sample_size():
    assert required_sample_size(0.55, votes_per_user=8) > required_sample_size(0.65, votes_per_user=8)
    assert required_sample_size(0.65, votes_per_user=2) > required_sample_size(0.65, votes_per_user=20)
    for nonsense in (0.5, 0.4, 1.0):
        with pytest.raises(DataError, match="no sample"):
            required_sample_size(nonsense)


def test_an_unfair_judge_is_refused_and_a_fair_one_shown():
    first = [Comparison(f"u{u}", f"p{p}", 1.0 if (u + p) % 4 else 0.5) for u in range(12) for p in range(4)]
    verdict = judge(BETTER, against_itself=first)
    assert not verdict.passed and "not fair" in verdict.reasons[0]
    coin = [Comparison(f"u{u}", f"p{p}", float((u + p) % 2)) for u in range(12) for p in range(5)]
    verdict = judge(BETTER, against_itself=coin)
    assert verdict.passed and verdict.judge_noise.low < 0.5 < verdict.judge_noise.high
    assert "the champion against itself" in verdict.text()


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


def test_a_probe_that_fails_stops_a_popular_candidate():
    short, long = ["seven"] * 20, ["seven, and let me explain at length"] * 20
    verdict = judge(BETTER, probes=[length_probe(short, long)])
    assert not verdict.passed and "length ratio" in verdict.reasons[0]
    assert judge(BETTER, probes=[length_probe(short, short)]).passed


def test_the_verdict_fits_a_screen_and_json():
    before = {name: score(180, task=name) for name in ("numbers", "dates", "units", "docs", "arithmetic")}
    after = {**before, "units": score(150, task="units")}
    verdict = judge(BETTER, suite_before=before, suite_after=after, probes=[length_probe(["a"], ["b"])])
    lines = verdict.text().splitlines()
    assert len(lines) < 24 and max(map(len, lines)) <= 140
    body = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert body["passed"] is False and body["suite"]["units"]["holds"] is False and body["users"] == 20


def test_reasons_are_rules_with_their_figures():
    votes = [Comparison(f"u{n}", f"q{m}", float(m % 2)) for n in range(8) for m in range(4)]
    few, many = judge(votes[:8]), judge(votes, probes=[Probe("length ratio", 3.0, 0.3, 2.0)], planned=90)
    assert [reason.rule for reason in few.because] == ["few_users"]
    assert [reason.rule for reason in many.because] == ["undecided_planned", "probe"]
    for verdict in (few, many):
        assert tuple(map(str, verdict.because)) == verdict.reasons and not verdict.passed
        assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict
    old = many.to_json()
    del old["because"]
    assert Verdict.from_json(old).because == () and Verdict.from_json(old).reasons == many.reasons
