"""A net plays itself: many games at once, each finished search a row to learn from.

Playout-cap randomisation (arXiv 1902.10565): a share of the moves is searched well, with noise, and becomes a row; the
rest is searched little and only brings the game forward. Komi is drawn around the running mean of the score, so that
games stay undecided, and nobody passes in the first 70% of the points: with a fixed komi and free passing a net soon
learns to end the game at once, while its loss looks fine. Games that are played out end with no dead stones on the
board: what is left of each player is what the net should think alive. A game that is decided is ended with little
thought (the same paper lowers its visits). `Health` says whether the games are games.

Not here: training, the loop (`prairie.flywheel.go`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from prairie.data.positions import PositionDataset
from prairie.errors import DataError
from prairie.games.features import encode
from prairie.games.go import BLACK, WHITE, Boards
from prairie.games.mcts import Forest, Judge, SearchSettings
from prairie.games.sgf import GameRecord, result_text

ALL_POINTS = 0.7
"""Share of the points that must be played before anybody may pass."""
DECIDED_MOVES, DECIDED_VISITS, DECIDED_ROWS = 4, 4, 0.1
"""A game is decided once so many searches in a row were surer than that; then so many visits make a move, and of the
moves that became rows so many still do: the net must see ends too."""


@dataclass(frozen=True)
class SelfPlay:
    """How a net plays itself."""

    size: int
    visits: int = 64
    fast_visits: int = 12
    full_share: float = 0.3
    """Share of the moves that are searched with `visits`."""
    slots: int = 64
    """Games at the same time: the batch of the net."""
    komi_spread: float = 3.0
    """Standard deviation of komi around the mean score."""
    temperature: float = 1.0
    """Of the first moves; it halves every `size` moves, down to 0.2."""
    opening_moves: int = 0
    """Each game begins with 0 to so many random moves."""
    play_out: bool = False
    """Nobody passes while there is anything to play but own eyes."""
    decided: float = 1.0
    """From this sureness of one winner on, -1 to 1 in the search's value, a game only has to be ended (1: never)."""
    longest: float = 3.0
    """Moves for each point after which a game is counted as it stands."""
    search: SearchSettings = field(default_factory=SearchSettings)


@dataclass
class Game:
    """A game under way."""

    komi: float
    moves: list[int] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    full: bool = False
    sure: int = 0
    """Searches in a row that were sure of one winner: above 0 of Black, below of White."""

    def judged(self, value: float, decided: float) -> None:
        """One more search; `value` is Black's."""
        side = int(np.sign(value)) if abs(value) > decided else 0
        self.sure = self.sure + side if side * self.sure > 0 else side

    @property
    def decided(self) -> bool:
        return abs(self.sure) >= DECIDED_MOVES


@dataclass(frozen=True)
class Played:
    """What some games left: rows to learn from, the games, the scores (black's area minus white's)."""

    rows: PositionDataset | None
    games: list[GameRecord]
    scores: npt.NDArray[np.int64]
    entropies: npt.NDArray[np.float64]
    """Of the searches' policies, nats."""
    simulations: int


def play(
    judge: Judge, settings: SelfPlay, *, games: int, mean_score: float, seed: int,
    on_game: Callable[[int], None] = lambda count: None,
) -> Played:  # fmt: skip
    """`games` games of a net against itself. The same judge, settings and seed give the same games."""
    size, points = settings.size, settings.size**2
    slots = min(settings.slots, games)
    longest = int(settings.longest * points)
    chance = np.random.default_rng(seed)
    boards = Boards.empty(size, slots, longest + 1)
    room = max(settings.visits, settings.fast_visits) + settings.search.leaves + 1
    forest = Forest(
        boards, np.zeros(slots), judge, settings.search, capacity=room,
        seed=int(chance.integers(2**31)), pass_from=math.ceil(ALL_POINTS * points), play_out=settings.play_out,
    )  # fmt: skip
    under_way: list[Game | None] = [None] * slots
    done: list[tuple[Game, int, npt.NDArray[np.int8]]] = []
    begun = simulations = 0

    def begin_game(g: int) -> None:
        nonlocal begun
        boards.reset([g])
        komi = round(chance.normal(mean_score, settings.komi_spread)) + 0.5
        forest.komi[g] = np.clip(komi, 0.5 - points, points - 0.5)
        under_way[g] = Game(float(forest.komi[g]), random_opening(g))
        forest.forget(g)
        begun += 1
        begin_search(g)

    def random_opening(g: int) -> list[int]:
        moves: list[int] = []
        for _ in range(int(chance.integers(settings.opening_moves + 1)) if settings.opening_moves else 0):
            moves.append(int(chance.choice(np.flatnonzero(_one(boards, g).legal()[0, :points] == 1))))
            boards.play(moves[-1:], [g])
        return moves

    def begin_search(g: int) -> None:
        game = under_way[g]
        assert game is not None
        share, fast = settings.full_share, settings.fast_visits
        if game.decided:
            share, fast = share * DECIDED_ROWS, min(fast, DECIDED_VISITS)
        game.full = bool(chance.random() < share)
        forest.begin(g, settings.visits if game.full else fast, noisy=game.full)

    def move(g: int) -> None:
        game = under_way[g]
        assert game is not None
        if game.full:
            planes, figures = encode(_one(boards, g), forest.komi[g : g + 1])
            game.rows.append({
                "planes": planes[0], "figures": figures[0], "policy": forest.policy(g),
                "color": int(boards.to_move[g]),
            })  # fmt: skip
        game.judged(forest.value(g) * (1 if boards.to_move[g] == BLACK else -1), settings.decided)
        temperature = max(0.2, settings.temperature * 0.5 ** (len(game.moves) / size))
        chosen = forest.draw(g, temperature)
        game.moves.append(chosen)
        forest.play(g, chosen)

    for g in range(slots):
        begin_game(g)
    while any(game is not None for game in under_way):
        before = int(forest.trees.visits[:, 0].sum())
        ready = forest.step()
        simulations += int(forest.trees.visits[:, 0].sum()) - before
        for g in ready.tolist():
            move(g)
            game = under_way[g]
            assert game is not None
            if boards.passes[g] >= 2 or len(game.moves) >= longest:
                score, owner = _one(boards, g).areas()
                done.append((game, int(score[0]), owner[0].copy()))
                under_way[g] = None
                on_game(1)
                if begun < games:
                    begin_game(g)
            else:
                begin_search(g)
    return _played(done, size, simulations)


def joined(parts: list[Played]) -> Played:
    """Several plays as one."""
    rows = [part.rows for part in parts if part.rows is not None]
    arrays = {name: np.concatenate([r.arrays[name] for r in rows]) for name in rows[0].arrays} if rows else None
    return Played(
        PositionDataset(arrays) if arrays else None,
        [game for part in parts for game in part.games],
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.entropies for part in parts]),
        sum(part.simulations for part in parts),
    )


@dataclass(frozen=True)
class Health:
    """Are the games games? Figures that a collapse shows in before the loss does."""

    games: int
    mean_length: float
    shortest: int
    entropy: float
    """Mean of the searches' policies, nats."""
    score_mean: float
    score_std: float
    pass_share: float
    """Of all moves, the two that end each game not counted."""
    black_wins: float
    distinct: float
    """Share of the games that differ from all others."""

    @classmethod
    def of(cls, played: Played) -> Health:
        lengths = np.array([len(game.moves) for game in played.games])
        passes = sum(move == game.size**2 for game in played.games for _, move in game.moves)
        inner = max(1, int(lengths.sum()) - 2 * len(lengths))
        entropies = played.entropies
        return cls(
            len(lengths), float(lengths.mean()), int(lengths.min()),
            float(entropies.mean()) if len(entropies) else 0.0, float(played.scores.mean()),
            float(played.scores.std()), max(0.0, (passes - 2 * len(lengths)) / inner),
            float(np.mean([game.winner() == BLACK for game in played.games])),
            len({game.moves for game in played.games}) / len(lengths),
        )  # fmt: skip

    def faults(self, size: int) -> list[str]:
        """What says that the games have collapsed; empty when they have not."""
        points = size * size
        found = [
            (self.mean_length < 0.3 * points, f"games last {self.mean_length:.1f} moves on {points} points"),
            (self.entropy < 0.01, f"the searches' policies have an entropy of {self.entropy:.3f} nats"),
            (self.pass_share > 0.3, f"{self.pass_share:.0%} of the moves are passes"),
            (
                self.games >= 50 and not 0.02 <= self.black_wins <= 0.98,
                f"Black wins {self.black_wins:.0%} of the games",
            ),
            (self.games >= 20 and self.distinct < 0.1, f"{self.distinct:.0%} of the games are different ones"),
        ]
        return [text for bad, text in found if bad]

    def check(self, size: int) -> None:
        """Raises DataError when nothing good can be learnt from the games."""
        faults = self.faults(size)
        if faults:
            raise DataError(
                "self-play has collapsed, its games are not learnt from", got="; ".join(faults),
                mend="raise komi_spread or temperature, or go on from an earlier version",
            )  # fmt: skip


def _one(boards: Boards, g: int) -> Boards:
    """Board g alone, the same arrays."""
    return Boards(
        boards.size, boards.stones[g : g + 1], boards.to_move[g : g + 1], boards.key[g : g + 1],
        boards.past[g : g + 1], boards.length[g : g + 1], boards.captured[g : g + 1], boards.passes[g : g + 1],
        boards.recent[g : g + 1], boards.longest,
    )  # fmt: skip


def _played(done: list[tuple[Game, int, npt.NDArray[np.int8]]], size: int, simulations: int) -> Played:
    """Rows for the player to move in each, from games that are over."""
    columns: dict[str, list[Any]] = {"planes": [], "figures": [], "policy": [], "outcome": [], "lead": [], "owner": []}
    records = []
    for game, score, owner in done:
        for row in game.rows:
            sign = 1 if row["color"] == BLACK else -1
            for name in ("planes", "figures", "policy"):
                columns[name].append(row[name])
            lead = sign * (score - game.komi)
            columns["outcome"].append(np.sign(lead))
            columns["lead"].append(lead)
            columns["owner"].append(sign * owner.reshape(size, size))
        moves = tuple((BLACK if k % 2 == 0 else WHITE, move) for k, move in enumerate(game.moves))
        records.append(GameRecord(size, moves, game.komi, result=result_text(score - game.komi)))
    policies = np.array(columns["policy"]).reshape(-1, size * size + 1)
    entropies = -(policies * np.log(np.maximum(policies, 1e-12))).sum(axis=1)
    rows = PositionDataset({name: np.stack(values) for name, values in columns.items()}) if len(policies) else None
    return Played(rows, records, np.array([score for _, score, _ in done]), entropies, simulations)
