"""The gate: may a candidate take the champion's place? Decided by people's blind votes, with their noise counted.

A candidate passes when all of these hold:
  1. the WHOLE 95% interval of its win rate lies above 50%. Users are the independent units: each user's votes become
     one mean, and the interval is over users (`prairie.evals.statistics.clustered_interval`). Under pure noise a
     candidate passes in about 2.5% of such comparisons (one end of the interval is wrong), as the tests measure;
  2. no task of the suite falls, compared item by item: a fall counts when it is larger than the task's margin AND its
     95% interval lies below zero. Few items prove nothing: a suite too small to rule out a fall of three margins does
     not pass either;
  3. the probes hold: answers did not become much longer or shorter, and do not repeat themselves.

This is a test of ONE comparison planned beforehand: look once. Voting on until the interval happens to clear 50% is
another experiment with more false promotions; `required_sample_size` says beforehand how many users are needed.
Not here: collecting votes (`users`, the server), promoting (`prairie.store.registry`), running the loop (`loop`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Any

from prairie.errors import DataError
from prairie.evals.harness import TaskScore
from prairie.evals.statistics import (
    Interval,
    clustered_interval,
    paired_difference,
    student_quantile,
    unpaired_difference,
)

LEAST_USERS = 6
"""Below six, even a unanimous vote happens by chance more often than 2.5% of the time: 1/2 to the fifth is 3.1%."""

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
class Probe:
    """A figure of the candidate's answers that votes may miss, and the range that it must stay in."""

    name: str
    value: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        return self.low <= self.value <= self.high

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "low": self.low, "high": self.high, "holds": self.holds}


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
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Verdict:
        """The verdict that `to_json` wrote."""
        return cls(**{
            **row,
            "win_rate": math.nan if row["win_rate"] is None else row["win_rate"],
            "suite": {name: TaskChange.from_json(change) for name, change in row["suite"].items()},
            "probes": tuple(Probe(p["name"], p["value"], p["low"], p["high"]) for p in row["probes"]),
            "reasons": tuple(row["reasons"]),
        })  # fmt: skip

    def text(self) -> str:
        """The verdict on one screen."""
        lines = [
            f"{'PROMOTE' if self.passed else 'KEEP the champion'}: the candidate wins {self.win_rate:.1%} of the votes,"
            f" {self.confidence:.0%} interval [{self.low:.1%}, {self.high:.1%}] over {self.users} users",
            f"  votes   {self.n}: {self.wins} won, {self.ties} tied, {self.losses} lost",
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
) -> Verdict:
    """Weighs the votes, the suite (champion before, candidate after) and the probes by the rules at the top.

    `margins` overrides `margin` for single tasks. Raises DataError for an outcome that is not 1, 1/2 or 0, or when one
    user voted twice on one prompt (a repeat must not count as new evidence).
    """
    _check(comparisons)
    outcomes = [comparison.outcome for comparison in comparisons]
    votes = clustered_interval(outcomes, [comparison.user for comparison in comparisons], confidence)
    changes = _suite_changes(suite_before or {}, suite_after or {}, margin, margins or {})
    reasons = [
        *_about_votes(votes, len(outcomes), least_users),
        *_about_suite(suite_before or {}, suite_after or {}, changes),
        *(
            f"the probe `{probe.name}` is {probe.value:.2f}, outside {probe.low:.2f} to {probe.high:.2f}"
            for probe in probes
            if not probe.holds
        ),
    ]
    return Verdict(
        passed=not reasons,
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
        reasons=tuple(reasons),
    )


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


def _about_votes(votes: Interval, n: int, least_users: int) -> list[str]:
    if votes.n < least_users:
        return [
            f"only {votes.n} users voted ({n} votes); at least {least_users} are needed before an interval means much"
        ]
    if votes.low > 0.5:
        return []
    if votes.high < 0.5:
        return [f"users prefer the champion: the whole interval [{votes.low:.1%}, {votes.high:.1%}] lies below 50%"]
    return [f"the interval [{votes.low:.1%}, {votes.high:.1%}] reaches down to 50%: this may be noise"]


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
) -> list[str]:
    reasons = [f"the candidate was not measured on {name}" for name in before if name not in after]
    for change in changes.values():
        found, interval = change.change, f"[{change.change.low:+.1%}, {change.change.high:+.1%}]"
        if change.fell:
            reasons.append(f"{change.task} falls by {-found.value:.1%} {interval}, more than {change.margin:.1%}")
        elif change.unclear:
            reasons.append(
                f"{change.task} changes by {found.value:+.1%} {interval}: {found.n} items are too few to rule out a"
                f" fall of {3 * change.margin:.1%}"
            )
    return reasons


# --- probes -----------------------------------------------------------------------------------------------------------


def length_probe(before: Sequence[str], after: Sequence[str], low: float = 0.3, high: float = 2.0) -> Probe:
    """Mean answer length of the candidate over the champion's, in characters: optimising for votes tends to drift in
    length (arXiv 2310.03716). Raises DataError without answers."""
    if not before or not after:
        raise DataError("a length ratio needs answers of both models", got=f"{len(before)} and {len(after)}")
    return Probe("length ratio", fmean(map(len, after)) / max(1.0, fmean(map(len, before))), low, high)


def repetition_probe(before: Sequence[str], after: Sequence[str], worse_by: float = 0.02) -> Probe:
    """The share of the candidate's answers that repeat themselves; at most the champion's plus `worse_by`."""
    if not before or not after:
        raise DataError("a repetition share needs answers of both models", got=f"{len(before)} and {len(after)}")
    shares = [fmean(map(repeats_itself, answers)) for answers in (before, after)]
    return Probe("share of answers that repeat themselves", shares[1], 0.0, shares[0] + worse_by)


def repeats_itself(text: str) -> bool:
    """Does some piece follow on itself at least three more times, over 16 characters or more in all? A million's zeros
    do not; "I am I am I am I am I am" does."""
    return any(len(match[0]) >= 16 for match in re.finditer(r"(.{1,60}?)\1{3,}", text[:4000], re.DOTALL))


# --- planning ---------------------------------------------------------------------------------------------------------


def required_sample_size(
    win_rate: float,
    *,
    votes_per_user: int = 10,
    tie_share: float = 0.0,
    spread: float = 0.1,
    power: float = 0.8,
    confidence: float = 0.95,
) -> int:
    """Users needed for the interval to lie above 50% with probability `power`, if the truth is `win_rate`.

    spread: standard deviation of users' own true win rates (people differ); tie_share: part of the votes that are ties.
    Raises DataError for a win rate that no number of users can show to be above 50%.
    """
    if not 0.5 < win_rate < 1 or votes_per_user < 1 or not 0 < power < 1 or not 0 <= tie_share < 1:
        raise DataError(
            "no sample is large enough",
            got=f"win rate {win_rate}, {votes_per_user} votes a user, power {power}, ties {tie_share}",
            wanted="a win rate between 0.5 and 1, at least one vote, power and ties below 1",
        )
    users = LEAST_USERS
    while power_of(users, win_rate, votes_per_user, tie_share, spread, confidence) < power:
        users += max(1, users // 50)
    return users


def power_of(
    users: int,
    win_rate: float,
    votes_per_user: int,
    tie_share: float = 0.0,
    spread: float = 0.1,
    confidence: float = 0.95,
) -> float:
    """How often the interval of `users` users lies above 50% if the truth is `win_rate`.

    Student's t with a shifted centre (Johnson and Welch 1940) for nine tenths of the users: the exact half of the
    interval costs about a tenth of them. Within five points of simulation from 10 to 40 users (see the tests).
    """
    in_votes = max(
        0.0, win_rate * (1 - win_rate) - spread**2 - tie_share / 4
    )  # of one vote, around its user's own rate
    deviation = math.sqrt(spread**2 + in_votes / votes_per_user)
    if deviation == 0:
        return 1.0
    effective = 0.9 * users
    shift = (win_rate - 0.5) / deviation * math.sqrt(effective)
    critical = student_quantile(0.5 + confidence / 2, max(1, round(effective) - 1))
    noise_of_deviation = 1 + critical**2 / (2 * (effective - 1))
    z = (shift - critical * (1 - 1 / (4 * (effective - 1)))) / math.sqrt(noise_of_deviation)
    return NormalDist().cdf(z)


def _mark(holds: bool) -> str:
    return "ok " if holds else "BAD"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
