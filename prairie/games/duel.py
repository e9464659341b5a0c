"""Two nets against each other: pairs of games from one opening with colours exchanged, all at once.

Not here: when to stop, what the outcomes mean (`prairie.flywheel.gate`), engines of others (`match`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from prairie.games.go import BLACK, Boards
from prairie.games.mcts import Forest, Judge, SearchSettings


@dataclass(frozen=True)
class Dueled:
    """What pairs of games came to, for the first net: games 0, 2, .. it was Black, games 1, 3, .. White."""

    outcomes: list[float]
    """1 won, 1/2 drawn, 0 lost."""
    lengths: list[int]
    black_wins: float


def duel(
    first: Judge, second: Judge, *, size: int, pairs: int, visits: int, komi: float, opening_moves: int, seed: int,
    search: SearchSettings | None = None, on_step: Callable[[], None] = lambda: None,
) -> Dueled:  # fmt: skip
    """`pairs` pairs of games without noise; the openings are random moves drawn from `seed`. `on_step` may end it by
    raising."""
    games, points = 2 * pairs, size * size
    longest = 3 * points
    search = search or SearchSettings()
    chance = np.random.default_rng(seed)
    forests = [
        Forest(
            Boards.empty(size, games, longest + 1), komi, judge, search, capacity=visits + search.leaves + 1, seed=seed
        )
        for judge in (first, second)
    ]
    boards = forests[0].boards
    for _ in range(opening_moves):
        legal = boards.legal()[::2, :points] == 1
        moves = np.repeat([chance.choice(np.flatnonzero(row)) if row.any() else points for row in legal], 2)
        for forest in forests:
            forest.boards.play(moves)
    for forest in forests:
        for g in range(games):
            forest.forget(g)
    mine = np.arange(games) % 2 == 0
    alive = np.ones(games, np.bool_)

    def owner(g: int) -> int:
        """Which net is to move in game g."""
        return 0 if (boards.to_move[g] == BLACK) == mine[g] else 1

    for g in range(games):
        forests[owner(g)].begin(g, visits)
    while alive.any():
        on_step()
        for forest in forests:
            if not (forest.target > 0).any():
                continue
            for g in forest.step().tolist():
                move = forest.best(g)
                for each in forests:
                    each.play(g, move)
                if boards.passes[g] >= 2 or boards.length[g] - 1 >= longest:
                    alive[g] = False
                else:
                    forests[owner(g)].begin(g, visits)
    scores = boards.areas()[0] - komi
    black = np.where(scores > 0, 1.0, np.where(scores < 0, 0.0, 0.5))
    outcomes = np.where(mine, black, 1 - black)
    return Dueled(outcomes.tolist(), (boards.length - 1).tolist(), float(black.mean()))
