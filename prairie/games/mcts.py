"""Tree search for many games at once: each step walks every tree to one leaf and judges all leaves in one batch.

PUCT (arXiv 1712.01815) with root noise, forced playouts and pruning of the policy target (arXiv 1902.10565), reuse of
the subtree that was played into; or, for few visits, sequential halving with Gumbel noise at the root (Danihelka et
al., ICLR 2022; below the root PUCT). The walk itself is compiled (`kernels`); `tests/games/plain_search.py` is the same
search written plainly, and the tests hold the visit counts of both together.

Legend: G games, M moves (the last is the pass), R leaves of a step. Not here: the net (`judge`), records, clients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prairie.errors import RequestError
from prairie.games.go import Boards, neighbours, zobrist
from prairie.games.kernels import (
    FIGURES,
    PLANES,
    Games,
    Rates,
    Trees,
    descend_all,
    expand_all,
    keep_subtree,
)

Floats = npt.NDArray[np.float32]
NO_MOVE = -1


class Opinion(NamedTuple):
    """What a judge says of R boards, for the player to move."""

    logits_RM: Floats
    value_R: Floats
    """Probability of a win minus that of a loss."""
    lead_R: Floats
    """Expected points ahead, komi counted."""


Judge = Callable[[Floats, Floats], Opinion]
"""(planes (R, PLANES, size, size), figures (R, FIGURES)) -> Opinion"""


@dataclass(frozen=True)
class SearchSettings:
    """How a tree grows. The defaults are KataGo's where it has them."""

    c_puct: float = 1.1
    first_play: float = 0.2
    root_first_play: float = 0.1
    score_weight: float = 0.1
    """How much of a value is points instead of winning."""
    score_reach: float = 1.0
    """The lead, in widths of the board, from which more points begin to count less."""
    noise_share: float = 0.25
    noise_alpha: float = 10.83
    """Dirichlet noise at the root: the sum of all alphas."""
    forced: float = 2.0
    """Forced playouts of searches with noise: at least sqrt(forced * policy * visits) for a move that was tried."""
    gumbel: int = 0
    """Moves that the root considers by sequential halving; 0 = PUCT."""
    c_visit: float = 50.0
    c_scale: float = 1.0
    leaves: int = 1
    """Leaves of one game in a step: more make better batches of few games, and a slightly other search."""

    def rates(self) -> Rates:
        return Rates(
            self.c_puct, self.first_play, self.root_first_play, self.score_weight, self.score_reach, self.c_visit,
            self.c_scale,
        )  # fmt: skip


@cache
def halving(considered: int, visits: int) -> tuple[int, ...]:
    """Sequential halving as a list: the k-th visit goes to a move that was visited so often before."""
    if considered <= 1:
        return tuple(range(visits))
    rounds, left = math.ceil(math.log2(considered)), considered
    counts, sequence = [0] * considered, list[int]()
    while len(sequence) < visits:
        for _ in range(max(1, visits // (rounds * left))):
            sequence += counts[:left]
            counts[:left] = [count + 1 for count in counts[:left]]
        left = max(2, left // 2)
    return tuple(sequence[:visits])


class Forest:
    """One tree for each game of `boards`. `begin` says how many visits a game's next move gets, `step` or `run` make
    them, `play` plays a move on board and tree. `capacity`: positions that a tree can hold."""

    def __init__(
        self, boards: Boards, komi: npt.ArrayLike, judge: Judge, settings: SearchSettings, *, capacity: int,
        seed: int = 0, pass_from: int = 0, play_out: bool = False,
    ) -> None:  # fmt: skip
        count, points, size = len(boards), boards.pass_move, boards.size
        self.boards, self.judge, self.settings = boards, judge, settings
        self.random = np.random.default_rng(seed)
        self.komi = np.full(count, komi, np.float64)
        self.pass_from, self.play_out = np.full(count, pass_from, np.int64), np.full(count, play_out)
        shape = (count, capacity)
        self.trees = Trees(
            used=np.zeros(count, np.int32), stones=np.zeros((*shape, points + 1), np.int8),
            key=np.zeros(shape, np.uint64), color=np.zeros(shape, np.int8), passes=np.zeros(shape, np.int8),
            captured=np.zeros(shape, np.bool_), parent=np.full(shape, -1, np.int32), move=np.zeros(shape, np.int16),
            visits=np.zeros(shape, np.int32), waiting=np.zeros(shape, np.int32), total=np.zeros(shape, np.float64),
            prior=np.zeros((*shape, points + 1), np.float32), child=np.full((*shape, points + 1), -1, np.int32),
            root_prior=np.zeros((count, points + 1), np.float32), gumbel=np.zeros((count, points + 1), np.float64),
        )  # fmt: skip
        self.target = np.zeros(count, np.int64)
        self.noisy = np.zeros(count, np.bool_)
        self.forbidden = np.full(count, NO_MOVE, np.int64)
        """A move that no search looks at from its root, unless there is no other; set before `begin`."""
        self._unprepared = np.ones(count, np.bool_)
        """Games whose root has no noise yet."""
        self._begun = np.zeros(count, np.int64)
        """Visits of the root when its search began."""
        self._sequences: list[tuple[int, ...]] = [()] * count
        rows = count * settings.leaves
        self._planes, self._figures = (
            np.empty((rows, PLANES, points), np.float32),
            np.empty((rows, FIGURES), np.float32),
        )
        self._legal = np.empty((rows, points + 1), np.uint8)
        self._game, self._node = np.empty(rows, np.int32), np.empty(rows, np.int32)
        self._kept = np.empty(capacity, np.int32)
        self._tables = neighbours(size), zobrist(size), size
        for g in range(count):
            self.forget(g)

    def forget(self, g: int) -> None:
        """A tree of nothing but the root, as the board stands."""
        trees, boards = self.trees, self.boards
        trees.used[g], trees.stones[g, 0] = 1, boards.stones[g]
        trees.key[g, 0], trees.color[g, 0] = boards.key[g], boards.to_move[g]
        trees.passes[g, 0], trees.captured[g, 0] = boards.passes[g], boards.captured[g]
        trees.parent[g, 0], trees.visits[g, 0], trees.waiting[g, 0], trees.total[g, 0] = -1, 0, 0, 0.0
        trees.child[g, 0] = -1
        self._unprepared[g] = True

    def begin(self, g: int, visits: int, *, noisy: bool = False) -> None:
        """The next move of game g gets a tree of `visits` visits (the root's own one is among them).

        Raises RequestError when the tree cannot hold so many.
        """
        room = self.trees.stones.shape[1]
        if visits + self.settings.leaves > room:
            raise RequestError("a search is larger than its tree", got=f"{visits} visits", wanted=f"fewer than {room}")
        if self.settings.gumbel:
            self.forget(g)  # sequential halving counts visits of the root's moves from zero
        self.target[g], self.noisy[g] = visits, noisy
        self._unprepared[g] = True
        if self.trees.visits[g, 0] > 0:
            self._prepare(g)

    def step(self) -> npt.NDArray[np.int64]:
        """One step of every game that still wants visits; returns the games whose search is over."""
        trees, settings = self.trees, self.settings
        missing = self.target - trees.visits[:, 0]
        active = missing > 0
        if not active.any():
            return np.flatnonzero(self.target > 0)
        considered = np.full(len(active), -1, np.int64)
        if settings.gumbel:
            for g in np.flatnonzero(active & ~self._unprepared):
                considered[g] = self._sequences[g][trees.visits[g, 0] - self._begun[g]]
        forced = np.where(self.noisy, settings.forced, 0.0) if not settings.gumbel else np.zeros(len(active))
        boards = self.boards
        games = Games(boards.past, boards.length, boards.recent, self.komi, self.pass_from, self.play_out)
        rows = descend_all(
            trees, games, active, np.minimum(missing, settings.leaves), settings.rates(), forced, considered,
            *self._tables, self._planes, self._figures, self._legal, self._game, self._node,
        )  # fmt: skip
        if rows:
            size = self.boards.size
            opinion = self.judge(self._planes[:rows].reshape(rows, PLANES, size, size), self._figures[:rows])
            weight, reach = settings.score_weight, settings.score_reach * size
            values = (1 - weight) * opinion.value_R + weight * np.tanh(opinion.lead_R / reach)
            expand_all(trees, self._game[:rows], self._node[:rows], self._legal[:rows], opinion.logits_RM, values)
        for g in np.flatnonzero(active & self._unprepared & (trees.visits[:, 0] > 0)):
            self._prepare(int(g))
        return np.flatnonzero((self.target > 0) & (trees.visits[:, 0] >= self.target))

    def run(self, deadline_s: float = math.inf) -> None:
        """Steps until every search is over, or until `time.monotonic()` reaches the deadline (each root is judged)."""
        while True:
            done = self.step()
            if len(done) == np.count_nonzero(self.target) or time.monotonic() >= deadline_s:
                return

    def play(self, g: int, move: int) -> None:
        """The move on the board; the tree keeps what stands below it."""
        self.boards.play([move], [g])
        self.target[g] = 0
        if self.settings.gumbel or not keep_subtree(self.trees, g, move, self._kept):
            self.forget(g)

    # --- what a finished search says ---

    def visits(self, g: int) -> npt.NDArray[np.int64]:
        """(M,): visits of each move of the root."""
        children = self.trees.child[g, 0]
        return np.where(children >= 0, self.trees.visits[g, children], 0).astype(np.int64)

    def values(self, g: int) -> npt.NDArray[np.float64]:
        """(M,): mean value of each visited move for the player to move, NaN for the others."""
        children, visits = self.trees.child[g, 0], self.visits(g)
        return np.where(visits > 0, -self.trees.total[g, children] / np.maximum(visits, 1), np.nan)

    def value(self, g: int) -> float:
        """Of the root, for the player to move."""
        return float(self.trees.total[g, 0] / max(1, self.trees.visits[g, 0]))

    def policy(self, g: int) -> npt.NDArray[np.float64]:
        """(M,): what a net shall learn from the search: visits without those that were only forced, or, with Gumbel,
        the policy improved by the values."""
        if self.settings.gumbel:
            return self._improved(g)
        target = self._unforced(g) if self.noisy[g] else self.visits(g).astype(np.float64)
        if target.sum() == 0:  # one visit: the net's own policy
            target = np.maximum(self.trees.prior[g, 0], 0).astype(np.float64)
        return target / target.sum()

    def best(self, g: int) -> int:
        """The move to play without chance (with Gumbel: with its noise)."""
        visits = self.visits(g)
        if not visits.any():
            return int(np.argmax(self.trees.root_prior[g]))
        if not self.settings.gumbel:
            return int(np.argmax(visits))
        score = self.trees.gumbel[g] + self._sigma(g, np.nan_to_num(self.values(g), nan=-1.0))
        return int(np.argmax(np.where(visits == visits.max(), score, -np.inf)))

    def draw(self, g: int, temperature: float) -> int:
        """A move with a chance of visits^(1/temperature); the best one near zero."""
        visits = self.visits(g).astype(np.float64)
        if temperature < 0.01 or not visits.any() or self.settings.gumbel:
            return self.best(g)
        chance = (visits / visits.max()) ** (1 / temperature)
        return int(self.random.choice(len(chance), p=chance / chance.sum()))

    def line(self, g: int, move: int, longest: int = 12) -> list[int]:
        """The moves that the search expects, beginning with `move` of the root."""
        found, node = [move], int(self.trees.child[g, 0, move])
        while node >= 0 and len(found) < longest:
            children = self.trees.child[g, node]
            counts = np.where(children >= 0, self.trees.visits[g, children], 0)
            if not counts.any():
                break
            found.append(int(np.argmax(counts)))
            node = int(children[found[-1]])
        return found

    # --- inside ---

    def _prepare(self, g: int) -> None:
        """Noise for a root that has its policy; what is forbidden there is taken away."""
        trees, settings = self.trees, self.settings
        prior, forbidden = trees.prior[g, 0], self.forbidden[g]
        if forbidden != NO_MOVE and (prior >= 0).sum() > 1:
            prior[forbidden], trees.child[g, 0, forbidden] = -1, -1
        allowed = np.flatnonzero(prior >= 0)
        trees.root_prior[g] = prior
        self._unprepared[g] = False
        self._begun[g] = trees.visits[g, 0]
        if settings.gumbel:
            noise = self.random.gumbel(size=len(allowed)) if self.noisy[g] else np.zeros(len(allowed))
            trees.gumbel[g] = -np.inf
            trees.gumbel[g, allowed] = noise + np.log(np.maximum(prior[allowed], 1e-30))
            left = max(1, int(self.target[g] - trees.visits[g, 0]))
            self._sequences[g] = halving(min(settings.gumbel, len(allowed)), left)
        elif self.noisy[g]:
            noise = self.random.dirichlet(np.full(len(allowed), settings.noise_alpha / len(allowed)))
            share = settings.noise_share
            trees.root_prior[g, allowed] = (1 - share) * prior[allowed] + share * noise

    def _unforced(self, g: int) -> npt.NDArray[np.float64]:
        """Visits, less those forced ones without which a move would still look worse than the best one."""
        settings, visits = self.settings, self.visits(g).astype(np.float64)
        if not visits.any():
            return visits
        values, prior = np.nan_to_num(self.values(g)), np.maximum(self.trees.root_prior[g], 0).astype(np.float64)
        total, best = visits.sum(), int(np.argmax(visits))
        spread = settings.c_puct * np.sqrt(total + 0.01)
        gap = values[best] + spread * prior[best] / (1 + visits[best]) - values
        enough = np.where(gap > 0, np.ceil(spread * prior / np.maximum(gap, 1e-9) - 1), visits)
        least = visits - np.sqrt(settings.forced * prior * total)
        kept = np.minimum(visits, np.maximum(np.maximum(enough, least), 0))
        kept[kept <= 1] = 0
        kept[best] = visits[best]
        return kept

    def _sigma(self, g: int, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return (self.settings.c_visit + self.visits(g).max()) * self.settings.c_scale * (1 + values) / 2

    def _improved(self, g: int) -> npt.NDArray[np.float64]:
        """softmax(log policy + sigma(completed values)); an unvisited move has the mixed value of the root."""
        prior, visits, values = np.maximum(self.trees.prior[g, 0], 0).astype(np.float64), self.visits(g), self.values(g)
        seen = visits > 0
        own = self.trees.total[g, 0] / self.trees.visits[g, 0]
        if seen.any():
            mean = (prior[seen] * values[seen]).sum() / max(prior[seen].sum(), 1e-9)
            own = (own + visits.sum() * mean) / (1 + visits.sum())
        score = np.log(np.maximum(prior, 1e-30)) + self._sigma(g, np.where(seen, values, own))
        score[prior <= 0] = -np.inf
        score = np.exp(score - score.max())
        return score / score.sum()
