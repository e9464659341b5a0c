"""Who is better, from pairwise results: a win rate with its error, and ratings of many players on Elo's scale.

An outcome is the first player's: 1 a win, 1/2 a tie, 0 a loss. Not here: who votes or judges, clustered votes of people
(`statistics.clustered_interval`), promotion (`prairie.flywheel.gate`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prairie.errors import DataError

ELO_PER_NAT = 400 / math.log(10)
"""A player 400 points stronger wins ten times as often as it loses."""


@dataclass(frozen=True, slots=True)
class WinRate:
    """Wins plus half the ties over all games. `stderr` takes games as independent."""

    value: float
    stderr: float
    wins: int
    ties: int
    losses: int

    @property
    def n(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def elo(self) -> float:
        """The difference of strength that gives this win rate; infinite for 0 and 1."""
        if self.value in (0.0, 1.0):
            return math.inf if self.value else -math.inf
        return ELO_PER_NAT * math.log(self.value / (1 - self.value))


def win_rate(outcomes: Sequence[float]) -> WinRate:
    """Raises DataError for no games or an outcome that is not 1, 1/2 or 0."""
    if not outcomes or any(outcome not in (0, 0.5, 1) for outcome in outcomes):
        raise DataError("a win rate needs outcomes of 1, 0.5 or 0", got=f"{len(outcomes)} outcomes")
    array = np.asarray(outcomes, dtype=np.float64)
    stderr = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else math.inf
    counts = [int((array == outcome).sum()) for outcome in (1.0, 0.5, 0.0)]
    return WinRate(float(array.mean()), stderr, *counts)


@dataclass(frozen=True, slots=True)
class Rating:
    """Strength on Elo's scale; `stderr` against the average of all players."""

    player: str
    elo: float
    stderr: float
    games: int

    def to_json(self) -> dict[str, Any]:
        return {"player": self.player, "elo": self.elo, "stderr": self.stderr, "games": self.games}


def bradley_terry(games: Sequence[tuple[str, str, float]], average: float = 1000.0) -> list[Rating]:
    """Ratings from (player, player, outcome), best first (Bradley and Terry 1952; a tie is half a win of each).

    The maximum of the likelihood with one virtual tie between each player and an average one, which keeps a player that
    never lost finite; found by Newton's method. Only players joined by a chain of games are comparable: raises
    DataError when there are two groups that never met, a player meets itself, or an outcome is outside [0, 1].
    """
    players = sorted({player for one, other, _ in games for player in (one, other)})
    place = {player: index for index, player in enumerate(players)}
    for one, other, outcome in games:
        if one == other or not 0 <= outcome <= 1:
            raise DataError("a game cannot be counted", got=f"{one} against {other}: {outcome}")
    if not players:
        raise DataError("ratings need at least one game")
    if strangers := _unreached(players, games):
        raise DataError(
            "players are not comparable", got=f"no chain of games from {players[0]} to {strangers[0]}",
            mend="let the groups play each other",
        )  # fmt: skip
    first = np.array([place[one] for one, _, _ in games])
    second = np.array([place[other] for _, other, _ in games])
    won = np.array([outcome for _, _, outcome in games], dtype=np.float64)
    strength = np.zeros(len(players))
    for _ in range(100):
        gradient, curvature = _slope(strength, first, second, won)
        step = np.linalg.solve(curvature, gradient)
        strength += np.clip(step, -1.0, 1.0)
        if float(np.abs(step).max()) < 1e-10:
            break
    strength -= strength.mean()
    centring = np.eye(len(players)) - 1 / len(players)
    variance = np.diag(centring @ np.linalg.inv(_slope(strength, first, second, won)[1]) @ centring)
    counts = np.bincount(np.concatenate([first, second]), minlength=len(players))
    ratings = [
        Rating(name, average + ELO_PER_NAT * float(strength[i]), ELO_PER_NAT * math.sqrt(variance[i]), int(counts[i]))
        for i, name in enumerate(players)
    ]
    return sorted(ratings, key=lambda rating: (-rating.elo, rating.player))


def _slope(
    strength: np.ndarray, first: np.ndarray, second: np.ndarray, won: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gradient (players,) and negative Hessian (players, players) of the log likelihood with the virtual ties."""
    expected = 1 / (1 + np.exp(strength[second] - strength[first]))
    against_average = 1 / (1 + np.exp(-strength))
    gradient = 0.5 - against_average
    np.add.at(gradient, first, won - expected)
    np.add.at(gradient, second, expected - won)
    curvature = np.diag(against_average * (1 - against_average))
    weight = expected * (1 - expected)
    for rows, columns, sign in ((first, first, 1), (second, second, 1), (first, second, -1), (second, first, -1)):
        np.add.at(curvature, (rows, columns), sign * weight)
    return gradient, curvature


def _unreached(players: Sequence[str], games: Sequence[tuple[str, str, float]]) -> list[str]:
    """Players that no chain of games joins to the first one."""
    met: dict[str, set[str]] = {player: set() for player in players}
    for one, other, _ in games:
        met[one].add(other)
        met[other].add(one)
    reached, waiting = {players[0]}, [players[0]]
    while waiting:
        fresh = met[waiting.pop()] - reached
        reached |= fresh
        waiting += fresh
    return [player for player in players if player not in reached]


def expected_score(ratings: Mapping[str, float], one: str, other: str) -> float:
    """How often `one` beats `other` at these Elo ratings."""
    return float(1 / (1 + 10 ** ((ratings[other] - ratings[one]) / 400)))
