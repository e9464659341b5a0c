"""The gate: may a candidate take the champion's place? Decided by people's blind votes, with their noise counted.

A candidate passes when all of these hold:
  1. people prefer it: an anytime-valid test over people (`prairie.evals.sequential`) says that its win rate is above
     50%. Each user's votes become one mean, and these are the units. A candidate that nobody prefers passes in at most
     5% of comparisons, however often one looks and whenever one stops; so a comparison that is undecided goes on with
     more people. It is given up as soon as the same test rules out a win rate of 55% (where a model judges that errs,
     the win rate that it would see then: `as_judged`);
  2. no task of the suite falls, compared item by item: a fall counts when it is larger than the task's margin AND its
     95% interval lies below zero. Few items prove nothing: a suite too small to rule out a fall of three margins does
     not pass either;
  3. the probes hold (`probes`): length, repetition, refusal, language of the answer, sycophancy;
  4. the judge is fair: of two answers of the champion itself, neither the one shown first nor the other is preferred.

`required_sample_size` says beforehand how many people find a true winner. The interval of the win rate that is reported
beside the test (`clustered_interval`) describes one look. A person counts once and whole: the test holds for more
people who come, not for the same people who vote on until they agree.
Not here: collecting votes (`users`, the server), the probes (`probes`), promoting (`prairie.store.registry`), running
the loop (`loop`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from prairie.errors import DataError
from prairie.evals.harness import TaskScore
from prairie.evals.sequential import (
    ERROR,
    POWER,
    WANTED,
    SequentialTest,
    paired_games,
    required_units,
    sequential_test,
)
from prairie.evals.statistics import (
    Interval,
    cluster_means,
    clustered_interval,
    paired_difference,
    unpaired_difference,
)
from prairie.flywheel.probes import Probe

LEAST_USERS = 6
"""Below six, even a unanimous vote happens by chance more often than 2.5% of the time: 1/2 to the fifth is 3.1%. The
test itself wants seven who agree."""

FAIR = 0.99
"""Confidence of the interval that must hold one half when the champion is compared with itself: a fair judge is called
unfair in one comparison in a hundred."""

MARGIN = 0.05
"""How far a task may fall, as a share of its items; with 150 items or more noise alone hardly ever looks like that."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One blind vote of one user between candidate and champion: 1 the candidate won, 1/2 a tie, 0 it lost."""

    user: str
    prompt_id: str
    outcome: float

    def to_json(self) -> dict[str, Any]:
        return {"user": self.user, "prompt_id": self.prompt_id, "outcome": self.outcome}


@dataclass(frozen=True, slots=True)
class TaskChange:
    """One task before and after. `change` is after minus before with its 95% interval."""

    task: str
    before: float
    after: float
    change: Interval
    margin: float

    @property
    def fell(self) -> bool:
        """By more than the margin, and not by noise."""
        return self.change.value < -self.margin and self.change.high < 0

    @property
    def unclear(self) -> bool:
        """The items cannot even rule out a fall of three margins."""
        return self.change.low < -3 * self.margin

    @property
    def holds(self) -> bool:
        return not self.fell and not self.unclear

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "before": self.before,
            "after": self.after,
            "change": self.change.to_json(),
            "margin": self.margin,
            "holds": self.holds,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> TaskChange:
        return cls(row["task"], row["before"], row["after"], Interval(**row["change"]), row["margin"])


@dataclass(frozen=True, slots=True)
class Reason:
    """What stood in the way of a candidate: the rule that spoke, and its figures as they are written. A page makes a
    sentence of them in its own language."""

    rule: str
    figures: Mapping[str, str | int]

    def __str__(self) -> str:
        return RULES[self.rule].format(**self.figures)

    def to_json(self) -> dict[str, Any]:
        return {"rule": self.rule, "figures": dict(self.figures)}


RULES = {
    "few_users": "only {n} users voted ({votes} votes); at least {least} are needed before an interval means much",
    "prefer_champion": "users prefer the champion: the win rate is at most {high}, at whatever moment one looks",
    "not_worth": "the win rate is at most {high}, below the {wanted} that would be worth finding",
    "undecided": "undecided: {n} people say {interval}; this may be noise, more people may vote",
    "undecided_planned": "undecided: {n} people say {interval} and {planned} were planned; this may be noise, more"
    " people may vote",
    "undecided_questions": "undecided: {n} questions say {interval} and {planned} were planned; this may be noise",
    "judge_prefers_champion": "the judge prefers the champion: the win rate is at most {high}, at whatever moment one"
    " looks",
    "undecided_games": "undecided after all {games} games: {interval}",
    "unfair_judge": "the judge is not fair: of two answers of the champion the one shown first wins {rate} {interval}",
    "not_measured": "the candidate was not measured on {task}",
    "falls": "{task} falls by {by} {interval}, more than {margin}",
    "unclear": "{task} changes by {by} {interval}: {items} items are too few to rule out a fall of {margin}",
    "probe": "the probe `{probe}` is {value}, outside {low} to {high}",
}
"""Every rule that can refuse a candidate; the studio page has them in other languages."""


@dataclass(frozen=True)
class Verdict:
    """What the gate decided and on what grounds; `reasons` name what stood in the way and are empty when it passed."""

    passed: bool
    win_rate: float
    low: float
    high: float
    n: int
    users: int
    wins: int
    ties: int
    losses: int
    confidence: float
    suite: Mapping[str, TaskChange]
    probes: Sequence[Probe]
    reasons: Sequence[str]
    test: SequentialTest | None = None
    """What the decision about the votes rests on; None in a verdict from before there was one."""
    planned: int | None = None
    """People who find a true winner of `test.wanted` in 80% of comparisons, stated beforehand."""
    judge_noise: Interval | None = None
    """How often the judges preferred the answer shown first when both were the champion's; its units are people."""
    judge_accuracy: Interval | None = None
    """Of a reward model that judged: how often it prefers what people did from whom it did not learn."""
    trials: str = "votes"
    """What is counted: votes, or games."""
    units: str = "people"
    """What is independent: people, or pairs of games."""
    rules: Mapping[str, Any] | None = None
    """What a match was played by."""
    because: Sequence[Reason] = ()
    """The `reasons` as rules and figures; empty in a verdict from before there were any."""

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "win_rate": _finite(self.win_rate),
            "low": self.low,
            "high": self.high,
            "confidence": self.confidence,
            "n": self.n,
            "users": self.users,
            "wins": self.wins,
            "ties": self.ties,
            "losses": self.losses,
            "suite": {name: change.to_json() for name, change in self.suite.items()},
            "probes": [probe.to_json() for probe in self.probes],
            "reasons": list(self.reasons),
            "test": self.test.to_json() if self.test else None,
            "planned": self.planned,
            "judge_noise": self.judge_noise.to_json() if self.judge_noise else None,
            "judge_accuracy": self.judge_accuracy.to_json() if self.judge_accuracy else None,
            "trials": self.trials,
            "units": self.units,
            "rules": dict(self.rules) if self.rules is not None else None,
            "because": [reason.to_json() for reason in self.because],
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Verdict:
        """The verdict that `to_json` wrote."""
        return cls(**{
            **row,
            "win_rate": math.nan if row["win_rate"] is None else row["win_rate"],
            "suite": {name: TaskChange.from_json(change) for name, change in row["suite"].items()},
            "probes": tuple(map(Probe.from_json, row["probes"])),
            "reasons": tuple(row["reasons"]),
            "because": tuple(Reason(found["rule"], found["figures"]) for found in row.get("because", ())),
            "test": SequentialTest.from_json(row["test"]) if row.get("test") else None,
            "judge_noise": Interval(**row["judge_noise"]) if row.get("judge_noise") else None,
            "judge_accuracy": Interval(**row["judge_accuracy"]) if row.get("judge_accuracy") else None,
        })  # fmt: skip

    def text(self) -> str:
        """The verdict on one screen."""
        lines = [
            f"{'PROMOTE' if self.passed else 'KEEP the champion'}: the candidate wins {self.win_rate:.1%} of the"
            f" {self.trials}, {self.confidence:.0%} interval [{self.low:.1%}, {self.high:.1%}] over"
            f" {self.users} {self.units}",
            f"  {self.trials:<7} {self.n}: {self.wins} won, {self.ties} tied, {self.losses} lost",
            *self._about_the_test(),
        ]
        for change in self.suite.values():
            found = change.change
            lines.append(
                f"  {_mark(change.holds)} {change.task:<12} {change.before:6.1%} -> {change.after:6.1%}   change"
                f" {found.value:+.1%} [{found.low:+.1%}, {found.high:+.1%}], margin {change.margin:.1%}, n={found.n}"
            )
        lines += [
            f"  {_mark(probe.holds)} {probe.name}: {probe.value:.2f}, wanted {probe.low:.2f} to {probe.high:.2f}"
            for probe in self.probes
        ]
        return "\n".join(lines + [f"  because {reason}" for reason in self.reasons])

    def _about_the_test(self) -> list[str]:
        lines = []
        if self.test is not None:
            found, when = self.test, self._moment()
            people = f"{found.n} {self.units}" + (f" of {self.planned} planned" if self.planned else "")
            lines.append(
                f"  test    {found.decision}{when}: at any time [{found.low:.1%}, {found.high:.1%}], each end wrong in"
                f" at most {found.error:.0%}; evidence {found.evidence:.3g} of {found.needed:.0f}, {people}"
            )
        if self.judge_noise is not None:
            noise = self.judge_noise
            lines.append(
                f"  judge   the champion against itself: shown first wins {noise.value:.1%}"
                f" [{noise.low:.1%}, {noise.high:.1%}], {noise.n} {self.units}"
            )
        if self.judge_accuracy is not None:
            right = self.judge_accuracy
            lines.append(
                f"  judge   a reward model: right on {right.value:.1%} [{right.low:.1%}, {right.high:.1%}] of the"
                f" preferences of {right.n} people it did not learn from, so {WANTED:.0%} of people's votes are"
                f" {as_judged(WANTED, right):.1%} of its"
            )
        return lines

    def _moment(self) -> str:
        after = self.test.decided_after if self.test else None
        return f" after {after} {self.units}" if after else ""


def judge(
    comparisons: Sequence[Comparison],
    *,
    suite_before: Mapping[str, TaskScore] | None = None,
    suite_after: Mapping[str, TaskScore] | None = None,
    probes: Sequence[Probe] = (),
    margin: float = MARGIN,
    margins: Mapping[str, float] | None = None,
    confidence: float = 0.95,
    least_users: int = LEAST_USERS,
    planned: int | None = None,
    against_itself: Sequence[Comparison] = (),
    units: str = "people",
    judge_accuracy: Interval | None = None,
) -> Verdict:
    """Weighs the votes, the suite (champion before, candidate after) and the probes by the rules at the top.

    `comparisons` stand in the order in which people came. `planned`: how many people the plan asked for, to be shown.
    `against_itself`: the same judges on two answers of the champion, outcome 1 when the one shown first won.
    `judge_accuracy`: of a judge that is a reward model, to be shown; what is worth finding is then told on its scale.
    `margins` overrides `margin` for single tasks. `units`: what `Comparison.user` names, when it is not people. Raises
    DataError for an outcome that is not 1, 1/2 or 0, or when one user voted twice on one prompt (a repeat must not
    count as new evidence).
    """
    _check(comparisons)
    outcomes = [comparison.outcome for comparison in comparisons]
    votes = clustered_interval(outcomes, [comparison.user for comparison in comparisons], confidence)
    test = vote_test(comparisons, least_users, as_judged(WANTED, judge_accuracy))
    noise = _judge_noise(against_itself)
    changes = _suite_changes(suite_before or {}, suite_after or {}, margin, margins or {})
    because = [
        *_about_votes(test, len(outcomes), least_users, planned, units),
        *_about_suite(suite_before or {}, suite_after or {}, changes),
        *_about_probes(probes),
        *_about_judge(noise),
    ]
    return Verdict(
        passed=not because,
        win_rate=votes.value,
        low=votes.low,
        high=votes.high,
        n=len(outcomes),
        users=votes.n,
        wins=outcomes.count(1),
        ties=outcomes.count(0.5),
        losses=outcomes.count(0),
        confidence=confidence,
        suite=changes,
        probes=tuple(probes),
        reasons=tuple(map(str, because)),
        because=tuple(because),
        test=test,
        planned=planned,
        judge_noise=noise,
        judge_accuracy=judge_accuracy,
        units=units,
    )


def vote_test(
    comparisons: Sequence[Comparison], least_users: int = LEAST_USERS, wanted: float = WANTED
) -> SequentialTest:
    """What people's votes say up to now, in the order in which the people came. It may be asked after every person, and
    voting may stop as soon as it has decided. `wanted`: the win rate that is worth finding."""
    means = cluster_means([c.outcome for c in comparisons], [c.user for c in comparisons])
    return sequential_test(means.tolist(), wanted=wanted, error=ERROR, least=least_users)


def as_judged(win_rate: float, accuracy: Interval | None) -> float:
    """A win rate among people, as a judge sees it who agrees with people's votes with this `accuracy` and errs at
    random elsewhere: nearer to one half, and the same without a judge."""
    return win_rate if accuracy is None else 0.5 + (win_rate - 0.5) * (2 * accuracy.value - 1)


def judge_games(
    outcomes: Sequence[float],
    *,
    probes: Sequence[Probe] = (),
    wanted: float = WANTED,
    confidence: float = 0.95,
    rules: Mapping[str, Any] | None = None,
) -> Verdict:
    """The same test of a match: its units are pairs of games from one opening with colours exchanged, in their order.

    `wanted`: the win rate that is worth finding; the match is given up when less is certain. `rules` are kept in the
    verdict. Raises DataError for a game without its partner.
    """
    pairs = paired_games(outcomes)
    test = sequential_test(pairs, wanted=wanted, error=ERROR, least=LEAST_USERS)
    games = clustered_interval(outcomes, [number // 2 for number in range(len(outcomes))], confidence)
    because = [*_about_games(test, len(outcomes)), *_about_probes(probes)]
    return Verdict(
        passed=not because, win_rate=games.value, low=games.low, high=games.high, n=len(outcomes), users=games.n,
        wins=list(outcomes).count(1), ties=list(outcomes).count(0.5), losses=list(outcomes).count(0),
        confidence=confidence, suite={}, probes=tuple(probes), reasons=tuple(map(str, because)), test=test,
        trials="games", units="pairs", rules=rules, because=tuple(because),
    )  # fmt: skip


def _about_games(test: SequentialTest, games: int) -> list[Reason]:
    if test.decision == "better":
        return []
    if test.decision == "not better":
        return [Reason("not_worth", {"high": f"{test.high:.1%}", "wanted": f"{test.wanted:.0%}"})]
    return [Reason("undecided_games", {"games": games, "interval": f"[{test.low:.1%}, {test.high:.1%}]"})]


def _about_probes(probes: Sequence[Probe]) -> list[Reason]:
    return [
        Reason("probe", {"probe": p.name, "value": f"{p.value:.2f}", "low": f"{p.low:.2f}", "high": f"{p.high:.2f}"})
        for p in probes
        if not p.holds
    ]


def _check(comparisons: Sequence[Comparison]) -> None:
    seen: set[tuple[str, str]] = set()
    for comparison in comparisons:
        if comparison.outcome not in (0, 0.5, 1):
            raise DataError("a comparison cannot be counted", got=f"outcome {comparison.outcome}", wanted="1, 0.5 or 0")
        key = (comparison.user, comparison.prompt_id)
        if key in seen:
            raise DataError(
                "a user's vote on a prompt stands there twice",
                got=f"user {comparison.user}, prompt {comparison.prompt_id}",
                mend="keep the last vote of each user on each prompt",
            )
        seen.add(key)


def _about_votes(test: SequentialTest, n: int, least_users: int, planned: int | None, units: str) -> list[Reason]:
    if test.n < least_users:
        return [Reason("few_users", {"n": test.n, "votes": n, "least": least_users})]
    if test.decision == "better":
        return []
    high = f"{test.high:.1%}"
    if test.high < 0.5:
        return [Reason("prefer_champion" if units == "people" else "judge_prefers_champion", {"high": high})]
    if test.decision == "not better":
        return [Reason("not_worth", {"high": high, "wanted": f"{test.wanted:.0%}"})]
    figures: dict[str, str | int] = {"n": test.n, "interval": f"[{test.low:.1%}, {high}]"}
    if not planned:
        return [Reason("undecided", figures)]
    return [
        Reason("undecided_planned" if units == "people" else "undecided_questions", {**figures, "planned": planned})
    ]


def _judge_noise(comparisons: Sequence[Comparison]) -> Interval | None:
    if not comparisons:
        return None
    return clustered_interval([c.outcome for c in comparisons], [c.user for c in comparisons], FAIR)


def _about_judge(noise: Interval | None) -> list[Reason]:
    if noise is None or noise.low <= 0.5 <= noise.high:
        return []
    interval = f"[{noise.low:.1%}, {noise.high:.1%}]"
    return [Reason("unfair_judge", {"rate": f"{noise.value:.1%}", "interval": interval})]


def _suite_changes(
    before: Mapping[str, TaskScore], after: Mapping[str, TaskScore], margin: float, margins: Mapping[str, float]
) -> dict[str, TaskChange]:
    if unknown := margins.keys() - before.keys():
        raise DataError("a margin names no task of the suite", got=", ".join(sorted(unknown)), wanted=", ".join(before))
    return {
        name: TaskChange(name, old.accuracy, after[name].accuracy, _change(old, after[name]), margins.get(name, margin))
        for name, old in before.items()
        if name in after
    }


def _change(before: TaskScore, after: TaskScore) -> Interval:
    """After minus before: item by item when both answered the same items, else as two samples."""
    if before.results.keys() == after.results.keys():
        ids = list(before.results)
        return paired_difference([before.results[i] for i in ids], [after.results[i] for i in ids])
    right = [(sum(score.results.values()), score.n) for score in (before, after)]
    return unpaired_difference(right[0], right[1])


def _about_suite(
    before: Mapping[str, TaskScore], after: Mapping[str, TaskScore], changes: Mapping[str, TaskChange]
) -> list[Reason]:
    reasons = [Reason("not_measured", {"task": name}) for name in before if name not in after]
    for change in changes.values():
        found = change.change
        about = {"task": change.task, "interval": f"[{found.low:+.1%}, {found.high:+.1%}]"}
        if change.fell:
            reasons.append(Reason("falls", {**about, "by": f"{-found.value:.1%}", "margin": f"{change.margin:.1%}"}))
        elif change.unclear:
            fall = f"{3 * change.margin:.1%}"
            reasons.append(Reason("unclear", {**about, "by": f"{found.value:+.1%}", "items": found.n, "margin": fall}))
    return reasons


# --- planning ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def required_sample_size(
    win_rate: float = WANTED,
    *,
    votes_per_user: int = 10,
    tie_share: float = 0.0,
    spread: float = 0.1,
    power: float = POWER,
) -> int:
    """People within whom the test calls the candidate better with probability `power`, if the truth is `win_rate`.
    Found by simulating the test itself; fewer are enough when the candidate is better than that.

    spread: half of the people prefer the candidate by so much more than `win_rate`, half by so much less; tie_share:
    part of the votes that are ties. Raises DataError for a win rate that no number of people can show to be above 50%.
    """
    if not 0.5 < win_rate < 1 or votes_per_user < 1 or not 0 < power < 1 or not 0 <= tie_share < 1:
        raise DataError(
            "no sample is large enough",
            got=f"win rate {win_rate}, {votes_per_user} votes a user, power {power}, ties {tie_share}",
            wanted="a win rate between 0.5 and 1, at least one vote, power and ties below 1",
        )

    def draw(rng: np.random.Generator, trials: int, users: int) -> np.ndarray:
        own = win_rate + spread * rng.choice([-1.0, 1.0], (trials, users))
        tied = rng.binomial(votes_per_user, tie_share, (trials, users))
        won = rng.binomial(votes_per_user - tied, np.clip((own - tie_share / 2) / (1 - tie_share), 0, 1))
        return np.asarray((won + tied / 2) / votes_per_user)

    return required_units(draw, power=power, least=LEAST_USERS)


def _mark(holds: bool) -> str:
    return "ok " if holds else "BAD"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
