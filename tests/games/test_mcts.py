"""The search: the compiled forest against the plain one, golden trees, what the economies promise."""

import math
import time

import numpy as np
import pytest
from plain_search import PlainSearch

from prairie.errors import RequestError
from prairie.games.go import BLACK, Boards, Position, move_of
from prairie.games.kernels import FIGURES, PLANES
from prairie.games.mcts import Forest, Opinion, SearchSettings, halving

WEIGHTS = np.random.default_rng(0).normal(size=(4000, 40)).astype(np.float32)


def judge(planes, figures):
    """A fixed little net: logits and value from sums over planes, each row by itself, so that batches do not matter."""
    rows, _, size, _ = planes.shape
    flat = np.concatenate([planes.reshape(rows, -1), figures], axis=1)
    moves = size * size + 1
    out = np.stack([np.tanh((row[:, None] * WEIGHTS[: len(row)]).sum(0)) for row in flat])
    return Opinion(2 * out[:, :moves], 0.9 * out[:, -1], 3 * out[:, -2])


def judge_position(position, komi):
    """The same of a plain position."""
    planes, figures = encoded(position, komi)
    opinion = judge(planes, figures)
    return opinion.logits_RM[0], float(opinion.value_R[0]), float(opinion.lead_R[0])


def encoded(position, komi):
    """The planes, written plainly from their description."""
    size, points = position.size, position.pass_move
    planes, figures = np.zeros((PLANES, points), np.float32), np.zeros((1, FIGURES), np.float32)
    planes[0] = 1
    for point, color in enumerate(position.stones):
        if color:
            planes[1 if color == position.to_move else 2, point] = 1
            free = liberties(position, point)
            if free <= 3:
                planes[2 + free, point] = 1
        elif position.why_illegal(point) == "superko":
            planes[6, point] = 1
    for j, move in enumerate(reversed(position.moves[-5:])):
        if move == points:
            figures[0, j] = 1
        else:
            planes[7 + j, move] = 1
    own = -komi if position.to_move == BLACK else komi
    figures[0, 5] = own / 20
    even = points % 2 == 0
    delta = own - (math.floor(own / 2) * 2 if even else math.floor((own - 1) / 2) * 2 + 1)
    figures[0, 6] = delta if delta < 0.5 else 1 - delta if delta < 1.5 else delta - 2
    return planes.reshape(1, PLANES, size, size), figures


def liberties(position, start):
    size, color, seen, free, waiting = position.size, position.stones[start], {start}, set(), [start]
    while waiting:
        row, column = divmod(waiting.pop(), size)
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            point = r * size + c
            if 0 <= r < size and 0 <= c < size and point not in seen:
                if position.stones[point] == color:
                    seen.add(point)
                    waiting.append(point)
                elif not position.stones[point]:
                    free.add(point)
    return len(free)


def some_position(size, plies, seed):
    chance, position = np.random.default_rng(seed), Position.empty(size)
    for _ in range(plies):
        moves = position.legal_moves()
        position = position.after(int(chance.choice(moves[:-1] or moves)))
    return position


def both(position, komi, settings, visits, *, noisy=False, pass_from=0, play_out=False):
    """Visits of the root's moves after the same search, fast and plain."""
    boards = Boards.at([position], 400)
    boards.length[0] = boards.length[0]
    forest = Forest(boards, komi, judge, settings, capacity=visits + 10, seed=5, pass_from=pass_from, play_out=play_out)
    forest.begin(0, visits, noisy=noisy)
    forest.run()
    plain = PlainSearch(position, komi, lambda p: judge_position(p, komi), settings, pass_from, play_out)
    plain.step()
    if noisy and not settings.gumbel:
        plain.root_prior = {m: float(forest.trees.root_prior[0, m]) for m in plain.root_prior}
        plain.forced = settings.forced
    if settings.gumbel:
        plain.gumbel = forest.trees.gumbel[0]
    plain.search(visits, settings.leaves)
    return forest, plain


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("settings", "noisy"),
    [
        (SearchSettings(), False),
        (SearchSettings(), True),
        (SearchSettings(leaves=6, score_weight=0.3, score_reach=2.0), False),
        (SearchSettings(gumbel=8), True),
    ],
)
def test_visits_are_those_of_the_plain_search(seed, settings, noisy):
    size = 3 + seed % 3
    position = some_position(size, plies=5 * seed, seed=seed)
    forest, plain = both(position, 0.5 + seed, settings, 90, noisy=noisy)
    assert forest.visits(0).tolist() == plain.visits().tolist()
    assert forest.trees.visits[0, 0] == 90 == plain.root.count
    assert forest.value(0) == pytest.approx(plain.root.total / plain.root.count, abs=1e-6)


def test_a_game_that_is_played_out_goes_on_to_the_eyes():
    for seed in range(8):
        position = some_position(3 + seed % 3, plies=12 + 6 * seed, seed=seed)
        forest, plain = both(position, 0.5, SearchSettings(), 60, play_out=True)
        assert forest.visits(0).tolist() == plain.visits().tolist()
        more = [move for move in position.legal_moves()[:-1] if not position.own_eye(move)]
        assert set(np.flatnonzero(forest.visits(0))) <= set(more or [position.pass_move])


def test_planes_are_what_they_are_said_to_be():
    from prairie.games.features import encode

    for seed in range(6):
        position = some_position(4, 4 + 6 * seed, seed)
        planes, figures = encode(Boards.at([position]), np.array([2.5]))
        wanted_planes, wanted_figures = encoded(position, 2.5)
        assert (planes == wanted_planes).all() and np.allclose(figures, wanted_figures)


def test_golden_tree():
    """Fixed net, fixed board, fixed seed: any change of the search shows here."""
    forest, _ = both(Position.empty(3), 0.5, SearchSettings(), 60)
    assert forest.visits(0).tolist() == GOLDEN
    assert forest.line(0, forest.best(0), 4) == GOLDEN_LINE


GOLDEN = [19, 1, 0, 0, 1, 0, 1, 34, 1, 2]
GOLDEN_LINE = [7, 6, 2, 3]


def test_reused_subtree_goes_on_as_if_searched():
    """After a move the tree below it is whole: its counts, values and structure are those from before."""
    boards = Boards.empty(4, 1)
    forest = Forest(boards, 0.5, judge, SearchSettings(), capacity=300, seed=0)
    forest.begin(0, 200)
    forest.run()
    move = forest.best(0)
    child = int(forest.trees.child[0, 0, move])
    counts = [int(forest.trees.visits[0, c]) if c >= 0 else 0 for c in forest.trees.child[0, child]]
    total = float(forest.trees.total[0, child])
    forest.play(0, move)
    assert forest.visits(0).tolist() == counts and float(forest.trees.total[0, 0]) == total
    assert (forest.trees.stones[0, 0] == boards.stones[0]).all() and forest.trees.key[0, 0] == boards.key[0]
    forest.begin(0, 250)
    forest.run()
    assert forest.trees.visits[0, 0] == 250 and forest.visits(0).sum() == 249


def test_games_do_not_disturb_each_other():
    alone = [both(some_position(4, 3 * k, k), 0.5, SearchSettings(), 50)[0].visits(0).tolist() for k in range(3)]
    boards = Boards.at([some_position(4, 3 * k, k) for k in range(3)], 200)
    forest = Forest(boards, 0.5, judge, SearchSettings(), capacity=100, seed=1)
    for g in range(3):
        forest.begin(g, 50)
    forest.run()
    assert [forest.visits(g).tolist() for g in range(3)] == alone


def test_a_won_game_is_found():
    """Black wins at once by passing: the search, with a net that knows nothing, passes too."""
    position = Position.of(3, [1, 1, 1, 1, 0, 1, 1, 0, 1], 1).by(2).after(9)
    forest, _ = both(position, 0.5, SearchSettings(), 100)
    assert forest.best(0) == 9 and forest.value(0) > 0.5


def test_nobody_passes_before_it_is_time():
    forest, _ = both(Position.empty(3), 0.5, SearchSettings(), 80, pass_from=9)
    assert forest.visits(0)[9] == 0
    full = Position.of(2, [1, 1, 1, 0], BLACK)
    forest, _ = both(full, 0.5, SearchSettings(), 10, pass_from=99)
    assert forest.best(0) == 4, "a pass is allowed when nothing else is"


def test_forced_visits_do_not_become_the_target():
    forest, _ = both(Position.empty(4), 0.5, SearchSettings(), 120, noisy=True)
    visits, target = forest.visits(0), forest.policy(0)
    assert target.sum() == pytest.approx(1) and (target[visits == 0] == 0).all()
    assert np.argmax(target) == np.argmax(visits) and np.count_nonzero(target) < np.count_nonzero(visits)


def test_halving_is_mctx_s():
    assert halving(4, 10) == (0, 0, 0, 0, 1, 1, 2, 2, 3, 3)
    assert halving(1, 3) == (0, 1, 2) and len(halving(16, 7)) == 7


def test_gumbel_improves_a_policy_with_few_visits():
    """The expected value of the improved policy is not below that of the policy (the theorem of the paper)."""
    better = 0.0
    for seed in range(8):
        forest, _ = both(some_position(4, 4, seed), 0.5, SearchSettings(gumbel=8), 24, noisy=True)
        children = forest.trees.child[0, 0]
        prior, improved = np.maximum(forest.trees.prior[0, 0], 0), forest.policy(0)
        seen = children >= 0
        values = forest.values(0)[seen]
        assert improved[seen].sum() > 0
        better += (improved[seen] / improved[seen].sum() * values).sum() - (
            prior[seen] / prior[seen].sum() * values
        ).sum()
    assert better > 0


def test_time_and_room_are_limits():
    forest = Forest(Boards.empty(5, 1), 0.5, judge, SearchSettings(), capacity=100_000, seed=0)
    forest.begin(0, 90_000)
    began = time.monotonic()
    forest.run(began + 0.2)
    assert time.monotonic() - began < 20 and 1 <= forest.trees.visits[0, 0] < 90_000
    assert forest.best(0) >= 0
    with pytest.raises(RequestError, match="larger than its tree"):
        forest.begin(0, 100_000)


assert move_of("A1", 3) == 6
