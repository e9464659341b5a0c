"""One player: a net and a search that thinks about one position at a time, within visits and seconds.

Between two moves of one game the tree is kept. A player does not trust its own rules alone with the end of a game: many
opponents take dead stones off before they count, so it passes only if it wins either way. Not here: protocols (`gtp`),
many games at once (`selfplay`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from prairie.games.features import TowerJudge, encode
from prairie.games.go import BLACK, Boards, Position, symmetries
from prairie.games.mcts import NO_MOVE, Forest, SearchSettings

MOST_VISITS = 20_000
"""What a search may grow to when only its time is limited."""
ROUND_S = 0.05
"""How often a search that is watched looks up."""


@dataclass(frozen=True)
class Candidate:
    """What a search thinks of one move."""

    move: int
    visits: int
    winrate: float
    """0 to 1, for the player to move."""
    prior: float
    line: tuple[int, ...]


@dataclass(frozen=True)
class Thought:
    """What a search came to; `candidates` best first."""

    move: int
    visits: int
    winrate: float
    candidates: tuple[Candidate, ...] = field(default=())


@dataclass(frozen=True)
class Look:
    """What the net itself says of a position, without any search."""

    policy_M: np.ndarray
    """Chance of each move that is legal, the pass last; sums to 1."""
    owner_P: np.ndarray
    """+1 black's .. -1 white's."""
    lead: float
    """Points ahead, for the player to move."""


class Player:
    """Raises ModelError at `think` for a board that the net was not made for."""

    def __init__(
        self, judge: TowerJudge, *, visits: int | None = None, seconds: float | None = None,
        settings: SearchSettings | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        """Without `visits` and `seconds`: 200 visits a move."""
        self.judge = judge
        self.visits = visits if visits is not None else MOST_VISITS if seconds is not None else 200
        self.seconds = math.inf if seconds is None else seconds
        self.settings = settings or replace(SearchSettings(), leaves=8)
        self.seed = seed
        self._forest: Forest | None = None
        self._moves: tuple[int, ...] = ()
        self._start: tuple[int, ...] = ()

    def think(
        self, position: Position, komi: float, *, seconds: float = math.inf,
        watch: Callable[[Thought], bool] | None = None, every_s: float = math.inf, visits: int | None = None,
    ) -> Thought:  # fmt: skip
        """The best move of `position`. `watch` is shown the thought every `every_s` seconds and ends it by False; until
        then, or for `visits` visits, a search that is watched goes on."""
        self.judge.check(position.size)
        if position.over:  # a client may ask on after two passes
            position = replace(position, passes=0)
        forest = self._forest_at(position, komi)
        forest.forbidden[0] = NO_MOVE if self.may_pass(position, komi) else position.pass_move
        visits = visits or (self.visits if watch is None else MOST_VISITS)
        forest.begin(0, max(visits, 2))
        deadline = time.monotonic() + min(self.seconds if watch is None else math.inf, seconds)
        shown = time.monotonic()
        while True:
            pause = time.monotonic() + ROUND_S if watch is not None else math.inf
            forest.run(min(deadline, pause))
            over = int(forest.trees.visits[0, 0]) >= max(visits, 2) or time.monotonic() >= deadline
            if watch is not None and (over or time.monotonic() - shown >= every_s):
                shown, thought = time.monotonic(), self._thought(forest, position)
                if thought.candidates:  # a slow machine may not have looked at a move yet
                    over = not watch(thought) or over
            if over:
                return self._thought(forest, position)

    def may_pass(self, position: Position, komi: float) -> bool:
        """False where a pass wins by the area on the board, and no longer once every point is the opponent's that the
        net gives to the opponent: stones of ours that it takes for dead, what they surround or keep from being so."""
        sign = 1 if position.to_move == BLACK else -1
        area_P, komi = sign * np.array(position.owners), sign * komi
        if area_P.sum() <= komi or len(position.legal_moves()) == 1:
            return True
        lost_P = sign * self.owners(position, sign * komi) < 0
        return bool(np.where(lost_P, -1, area_P).sum() > komi)

    def owners(self, position: Position, komi: float) -> np.ndarray:
        """(P,): the net's guess of who will own each point, +1 black's .. -1 white's; the mean of all 8 symmetries."""
        self.judge.check(position.size)
        planes, figures = encode(Boards.at([position]), np.array([komi]))
        orders = symmetries(position.size)[:, :-1]
        turned = planes.reshape(planes.shape[1], -1)[:, orders].transpose(1, 0, 2)
        judged = self.judge.judged(
            np.ascontiguousarray(turned).reshape(-1, *planes.shape[1:]), np.repeat(figures, len(orders), 0)
        )
        owner = np.empty(orders.shape, np.float32)
        np.put_along_axis(owner, orders, judged.owner_BHW.tanh().reshape(len(orders), -1).cpu().numpy(), 1)
        return owner.mean(0) * (1 if position.to_move == BLACK else -1)

    def look(self, position: Position, komi: float) -> Look:
        """The net alone. Raises ModelError for a board that it was not made for."""
        import torch

        self.judge.check(position.size)
        boards = Boards.at([position])
        judged = self.judge.judged(*encode(boards, np.array([komi])))
        owner = torch.tanh(judged.owner_BHW[0]).reshape(-1).cpu().numpy()
        legal = torch.from_numpy(boards.legal()[0] == 1)
        policy = judged.policy_BM[0].cpu().masked_fill(~legal, -torch.inf).softmax(-1).numpy()
        return Look(policy, owner if position.to_move == BLACK else -owner, float(judged.lead_B[0]))

    def _forest_at(self, position: Position, komi: float) -> Forest:
        """The tree of before, played on to this position, or a new one."""
        forest, old = self._forest, self._moves
        new = position.moves
        begun = position.moves and self._start
        same = forest is not None and forest.komi[0] == komi and forest.boards.size == position.size
        if forest is not None and same and begun and new[: len(old)] == old and 0 <= len(new) - len(old) <= 2:
            for move in new[len(old) :]:
                forest.play(0, move)
            now = (tuple(forest.boards.stones[0, :-1]), forest.boards.to_move[0], forest.boards.passes[0])
            if now == (position.stones, position.to_move, position.passes):  # not the tree of a game that is over
                self._moves = new
                return forest
        boards = Boards.at([position])
        self._forest = Forest(
            boards, komi, self.judge, self.settings, capacity=MOST_VISITS + self.settings.leaves + 1, seed=self.seed
        )
        self._moves, self._start = new, position.stones
        return self._forest

    @staticmethod
    def _thought(forest: Forest, position: Position) -> Thought:
        """Where a pass is forbidden, what fills own eyes is left out; if nothing else is left it is a pass."""
        visits, values = forest.visits(0), forest.values(0)
        order = [int(move) for move in np.argsort(-visits, kind="stable") if visits[move]]
        candidates = tuple(
            Candidate(
                move, int(visits[move]), float(1 + values[move]) / 2, float(forest.trees.prior[0, 0, move]),
                tuple(forest.line(0, move)),
            )
            for move in order
        )  # fmt: skip
        best = forest.best(0)
        if forest.forbidden[0] == position.pass_move:
            best = next((move for move in order if not position.own_eye(move)), position.pass_move)
        return Thought(best, int(visits.sum()), (1 + forest.value(0)) / 2, candidates)
