"""Who is better, by a test that may be looked at after every unit and stopped at any moment.

A gambler bets on "the mean is above one half" with money that a fair game keeps from growing: if the mean is at most
one half, the wealth is a supermartingale that starts at 1, and by Ville's inequality (1939) it EVER reaches 1/error in
at most `error` of all experiments, whenever somebody looks and for whatever reason they stop (Waudby-Smith and Ramdas,
"Estimating means of bounded random variables by betting", arXiv 2010.09686). Nothing is assumed of the values but that
they lie in [0, 1] and come from independent units, so a crowd that is split into lovers and haters is covered as well.

A unit is whatever is independent: ONE PERSON with the mean of their votes, or ONE PAIR of games of Go from the same
opening with colours exchanged, with the mean of its two outcomes (a win 1, a draw 1/2, a loss 0; `paired_games`). A
unit enters once, whole, and is never changed afterwards: a person's later votes are not new people.
Not here: intervals for one planned look (`statistics`), what a verdict means for a release (`prairie.flywheel.gate`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from prairie.errors import DataError

WANTED = 0.55
"""The win rate that is worth finding: the sample size is planned for it, and "below it" is a reason to give up."""

ERROR = 0.05
POWER = 0.8

STAKES = np.concatenate([np.geomspace(0.03, 0.95, 16), (np.arange(16) + 0.5) / 16])
"""(stakes,) shares of the wealth that are bet side by side, each with an equal part of the first coin: small ones find
small differences, large ones find large differences soon. The mean of their wealths is again the wealth of a fair
game."""

MOST_EVIDENCE = 1e12
"""More than this is not told apart."""

Decision = Literal["better", "not better", "undecided"]


@dataclass(frozen=True, slots=True)
class SequentialTest:
    """What `n` units say up to now. `low` and `high` bound the mean at ANY time: each of them is wrong at any moment of
    the whole experiment in at most `error` of such experiments."""

    decision: Decision
    decided_after: int | None
    """Units after which the decision stood first."""
    n: int
    value: float
    low: float
    high: float
    evidence: float
    """The largest wealth that betting on "above one half" has had; 1/error of it decides."""
    evidence_against: float
    """Of betting on "below `wanted`"."""
    wanted: float
    error: float

    @property
    def needed(self) -> float:
        return 1 / self.error

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        return {**found, "value": self.value if math.isfinite(self.value) else None}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> SequentialTest:
        return cls(**{**row, "value": math.nan if row["value"] is None else row["value"]})


def sequential_test(
    values: Sequence[float], *, wanted: float = WANTED, error: float = ERROR, least: int = 1
) -> SequentialTest:
    """Tests values in [0, 1] in the order in which they came: may the mean be said to lie above one half?

    better: the lower bound has been above 1/2 at some moment. A mean of 1/2 or less gets there in at most `error` of
      all experiments, however often one looks.
    not better: the upper bound has been below `wanted`. A mean of `wanted` or more gets there in at most `error`.
    undecided: let more units come; it stays the same experiment.
    Nothing is decided before `least` units. Raises DataError for values outside [0, 1] or a `wanted` outside (1/2, 1).
    """
    if not 0.5 < wanted < 1 or not 0 < error < 1 or least < 1:
        raise DataError(
            "no such test", got=f"wanted {wanted}, error {error}, least {least}",
            wanted="a win rate between 0.5 and 1, an error between 0 and 1, at least one unit",
        )  # fmt: skip
    found = np.asarray(values, dtype=np.float64)
    if len(found) and not (found.min() >= 0 and found.max() <= 1):
        raise DataError("a sequential test needs values between 0 and 1", got=f"{found.min()} to {found.max()}")
    up, down = wealth(found, 0.5)[least - 1 :], wealth(1 - found, 1 - wanted)[least - 1 :]
    better, worse = np.flatnonzero(up >= 1 / error), np.flatnonzero(down >= 1 / error)
    decision: Decision = "better" if len(better) else "not better" if len(worse) else "undecided"
    moment = better if len(better) else worse
    return SequentialTest(
        decision,
        int(moment[0]) + least if len(moment) else None,
        len(found),
        float(found.mean()) if len(found) else math.nan,
        lower_bound(found, error, least),
        1 - lower_bound(1 - found, error, least),
        min(float(up.max(initial=1.0)), MOST_EVIDENCE),
        min(float(down.max(initial=1.0)), MOST_EVIDENCE),
        wanted,
        error,
    )


def wealth(values: np.ndarray, mean: float) -> np.ndarray:
    """(..., units) the wealth after each unit of betting that the mean of `values` (..., units) is above `mean`."""
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(np.cumprod(1 + (values / mean - 1)[..., None] * STAKES, axis=-2).mean(axis=-1))


def lower_bound(values: np.ndarray, error: float, least: int = 1) -> float:
    """The largest mean that the values have refuted at some moment; 0 when they refute none."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        refuted = wealth(values, middle)[least - 1 :].max(initial=0.0) >= 1 / error
        low, high = (middle, high) if refuted else (low, middle)
    return low


def paired_games(outcomes: Sequence[float]) -> list[float]:
    """Units of a match: the mean of games 1 and 2, of 3 and 4, ... where each two share an opening with colours
    exchanged. Raises DataError for an outcome that is not 1, 1/2 or 0, or for a game without its partner."""
    if len(outcomes) % 2 or any(outcome not in (0, 0.5, 1) for outcome in outcomes):
        raise DataError(
            "a match is made of pairs of games", got=f"{len(outcomes)} outcomes, {sorted(set(outcomes))}",
            wanted="an even number of 1, 0.5 or 0",
        )  # fmt: skip
    return [(first + second) / 2 for first, second in zip(outcomes[::2], outcomes[1::2], strict=True)]


def required_units(
    draw: Callable[[np.random.Generator, int, int], np.ndarray],
    *,
    power: float = POWER,
    error: float = ERROR,
    least: int = 1,
    most: int = 20_000,
    trials: int = 400,
) -> int:
    """How many units the test needs to call a true winner `better` with probability `power`, by simulating it.

    draw: (generator, trials, units) -> values of that shape from the world that is planned for. The seed is fixed, so
    the same plan always comes to the same number. Raises DataError when `most` units do not suffice.
    """
    rng, count = np.random.default_rng(0), 64
    values = draw(rng, trials, count)
    while True:
        # A few rows at a time: all stakes of all trials at once would take hundreds of megabytes.
        crossed = np.concatenate([wealth(rows, 0.5) >= 1 / error for rows in np.array_split(values, 10)])
        crossed[:, : least - 1] = False
        # One standard error of the simulation is added, so that the promise holds and is not just met on average.
        share = np.maximum.accumulate(crossed, axis=1).mean(axis=0) - math.sqrt(power * (1 - power) / trials)
        reached = np.flatnonzero(share >= power)
        if len(reached):
            return int(reached[0]) + 1
        if count >= most:
            raise DataError("no sample is large enough", got=f"{count} units", wanted=f"{power:.0%} power within them")
        values, count = np.concatenate([values, draw(rng, trials, count)], axis=1), count * 2
