"""The inner loops of Go, compiled by numba: rules over a batch of boards, and (below) the search tree.

One file, because numba's cache on disk knows a kernel is stale by the date of the file it stands in: a kernel that
calls another file's kernel would go on running the old one. The rules here are those of `prairie.games.go.Position`,
the plain form; `tests/games/test_go.py` holds the two together.

What is called from outside lets go of Python's lock: several threads play at once.

Legend: B boards; P points of a board (size x size, row by row from the top); M = P + 1 moves, the last one is the pass.
A board is P + 1 int8: 0 empty, 1 black, 2 white, and 3 (the wall) in the last place, where every neighbour outside the
board points. `past` holds the Zobrist keys of all positions so far. Not here: what a move is worth, files, networks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

WALL = 3
PLANES = 12
"""On the board; own stones, the other's; stones in chains of 1, 2, 3 liberties; points banned by superko; the last five
moves, newest first."""
FIGURES = 7
"""Was the last move, the one before, .. (5) a pass; own komi / 20; where komi stands between two draws."""
LEAF, END, PENDING = 0, 1, 2
"""What a descent found: a position to judge, a game that is over, or a position that is being judged already."""


@njit(cache=True)
def find_chains(stones, neighbours, zobrist, chain, liberties, only, keys, stack):
    """Fills, for each stone, its chain; for each chain its liberties (up to 4), one of them, and its key."""
    points = len(stones) - 1
    chain[:] = -1
    count = 0
    for start in range(points):
        color = stones[start]
        if color == 0 or chain[start] >= 0:
            continue
        first = second = third = -1
        free = 0
        key = np.uint64(0)
        chain[start] = count
        stack[0] = start
        top = 1
        while top:
            top -= 1
            point = stack[top]
            key ^= zobrist[color - 1, point]
            for k in range(4):
                near = neighbours[point, k]
                if stones[near] == color:
                    if chain[near] < 0:
                        chain[near] = count
                        stack[top] = near
                        top += 1
                elif stones[near] == 0 and free < 4 and near != first and near != second and near != third:
                    free += 1
                    if free == 1:
                        first = near
                    elif free == 2:
                        second = near
                    else:
                        third = near
        liberties[count] = free
        only[count] = first
        keys[count] = key
        count += 1
    return count


@njit(cache=True)
def is_eye(stones, point, color, neighbours):
    """A free point with only stones of `color` beside it; of the points across its corners the other colour holds fewer
    than two, and none where the board ends."""
    for k in range(4):
        there = stones[neighbours[point, k]]
        if there != color and there != WALL:
            return False
    others, at_end = 0, 0
    for upright in range(2):
        for sideways in range(2, 4):
            beside = neighbours[point, upright]
            across = stones[neighbours[beside, sideways]] if stones[beside] != WALL else WALL
            others += across == 3 - color
            at_end |= across == WALL
    return others + at_end < 2


@njit(cache=True)
def is_past(key, past, length):
    for i in range(length - 1, -1, -1):  # noqa: SIM110 - numba compiles loops, not generators
        if past[i] == key:
            return True
    return False


@njit(cache=True)
def find_legal(stones, color, key, past, length, captured, neighbours, zobrist, chain, liberties, only, keys, legal):
    """legal[move] = 1 allowed, 0 not, 2 banned by superko alone. Needs `find_chains` first. The pass is always allowed.

    Until something has been captured on the way (`captured`) no position can come back, so the past is not searched.
    """
    points = len(stones) - 1
    for point in range(points):
        legal[point] = 0
        if stones[point] != 0:
            continue
        breath = False
        after = key ^ zobrist[color - 1, point]
        for k in range(4):
            near = neighbours[point, k]
            there = stones[near]
            if there == 0:
                breath = True
            elif there == color:
                breath = breath or liberties[chain[near]] > 1
            elif there != WALL and liberties[chain[near]] == 1:
                breath = True
                seen = False
                for j in range(k):
                    other = neighbours[point, j]
                    seen = seen or (stones[other] == there and chain[other] == chain[near])
                if not seen:
                    after ^= keys[chain[near]]
        if breath:
            legal[point] = 2 if captured and is_past(after, past, length) else 1
    legal[points] = 1


@njit(cache=True)
def place(stones, move, color, key, neighbours, zobrist, mark, stack):
    """Plays a stone that is known to be legal, in place. Returns (the new Zobrist key, how many stones it captured)."""
    stones[move] = color
    key ^= zobrist[color - 1, move]
    enemy = 3 - color
    taken = 0
    for k in range(4):
        start = neighbours[move, k]
        if stones[start] != enemy:
            continue
        mark[:] = 0
        mark[start] = 1
        stack[0] = start
        top, size = 1, 1
        free = False
        done = 0
        while done < size and not free:  # the stack is kept whole: it is the list of what is captured
            point = stack[done]
            done += 1
            for j in range(4):
                near = neighbours[point, j]
                if stones[near] == 0:
                    free = True
                elif stones[near] == enemy and mark[near] == 0:
                    mark[near] = 1
                    stack[top] = near
                    top += 1
                    size += 1
        if not free:
            for i in range(size):
                stones[stack[i]] = 0
                key ^= zobrist[enemy - 1, stack[i]]
            taken += size
    return key, taken


@njit(cache=True)
def area(stones, neighbours, owner, stack):
    """Tromp-Taylor: black's points minus white's; `owner` becomes +1 black's, -1 white's, 0 nobody's."""
    points = len(stones) - 1
    owner[:] = 2
    total = 0
    for start in range(points):
        if stones[start] == 1:
            owner[start] = 1
            total += 1
        elif stones[start] == 2:
            owner[start] = -1
            total -= 1
        elif owner[start] == 2:
            owner[start] = 0
            stack[0] = start
            size, done, touched = 1, 0, 0
            while done < size:
                point = stack[done]
                done += 1
                for k in range(4):
                    near = neighbours[point, k]
                    there = stones[near]
                    if there == 0:
                        if owner[near] == 2:
                            owner[near] = 0
                            stack[size] = near
                            size += 1
                    elif there != WALL:
                        touched |= there
            whose = 1 if touched == 1 else -1 if touched == 2 else 0
            for i in range(size):
                owner[stack[i]] = whose
            total += whose * size
    return total


@njit(cache=True, nogil=True)
def legal_of_boards(stones, to_move, key, past, length, captured, neighbours, zobrist, legal):
    """`find_legal` of B boards: legal (B, M) uint8."""
    points = stones.shape[1] - 1
    chain, stack = np.empty(points + 1, np.int16), np.empty(points + 1, np.int16)
    liberties, only = np.empty(points + 1, np.int16), np.empty(points + 1, np.int16)
    keys = np.empty(points + 1, np.uint64)
    for b in range(len(stones)):
        find_chains(stones[b], neighbours, zobrist, chain, liberties, only, keys, stack)
        find_legal(
            stones[b], to_move[b], key[b], past[b], np.int64(length[b]), captured[b], neighbours, zobrist, chain,
            liberties, only,
            keys, legal[b],
        )  # fmt: skip


@njit(cache=True, nogil=True)
def play_on_boards(which, moves, stones, to_move, key, past, length, captured, passes, recent, neighbours, zobrist):
    """Plays moves that are known to be legal on the boards `which`, in place."""
    points = stones.shape[1] - 1
    mark, stack = np.empty(points + 1, np.uint8), np.empty(points + 1, np.int16)
    for i in range(len(which)):
        b, move = which[i], moves[i]
        if move == points:
            passes[b] += 1
        else:
            key[b], taken = place(stones[b], move, to_move[b], key[b], neighbours, zobrist, mark, stack)
            captured[b] |= taken > 0
            passes[b] = 0
        for j in range(recent.shape[1] - 1, 0, -1):
            recent[b, j] = recent[b, j - 1]
        recent[b, 0] = move
        past[b, length[b]] = key[b]
        length[b] += 1
        to_move[b] = 3 - to_move[b]


@njit(cache=True, nogil=True)
def area_of_boards(stones, neighbours, owner):
    """`area` of B boards: scores (B,) int32, owner (B, P+1) int8."""
    stack = np.empty(stones.shape[1], np.int16)
    scores = np.empty(len(stones), np.int32)
    for b in range(len(stones)):
        scores[b] = area(stones[b], neighbours, owner[b], stack)
    return scores


@njit(cache=True)
def count_legal_positions(points, neighbours):
    """Ways to fill a board so that each chain has a liberty, by trying all 3^P of them."""
    stones = np.zeros(points + 1, np.int8)
    stones[points] = WALL
    zobrist = np.zeros((2, points), np.uint64)
    chain, stack = np.empty(points + 1, np.int16), np.empty(points + 1, np.int16)
    liberties, only = np.empty(points + 1, np.int16), np.empty(points + 1, np.int16)
    keys = np.empty(points + 1, np.uint64)
    total = 0
    while True:
        count = find_chains(stones, neighbours, zobrist, chain, liberties, only, keys, stack)
        total += 1
        for i in range(count):
            if liberties[i] == 0:
                total -= 1
                break
        place_ = 0
        while place_ < points and stones[place_] == 2:  # counts up in base 3
            stones[place_] = 0
            place_ += 1
        if place_ == points:
            return total
        stones[place_] += 1


@njit(cache=True)
def encode(stones, color, recent, legal, chain, liberties, komi, size, planes, figures):
    """What a net sees of a board, for the player to move: planes (PLANES, P) and figures (FIGURES,), as KataGo's."""
    points = len(stones) - 1
    planes[:] = 0
    figures[:] = 0
    for point in range(points):
        planes[0, point] = 1
        there = stones[point]
        if there != 0:
            planes[1 if there == color else 2, point] = 1
            planes[2 + liberties[chain[point]], point] = liberties[chain[point]] < 4
        if legal[point] == 2:
            planes[6, point] = 1
    for j in range(5):
        if recent[j] == points:
            figures[j] = 1
        elif recent[j] >= 0:
            planes[7 + j, recent[j]] = 1
    own = min(max(komi if color == 2 else -komi, -points - 20.0), points + 20.0)
    figures[5] = own / 20.0
    even = points % 2 == 0  # komis of this parity can be drawn
    floor = np.floor(own / 2.0) * 2.0 if even else np.floor((own - 1.0) / 2.0) * 2.0 + 1.0
    delta = own - floor
    figures[6] = delta if delta < 0.5 else 1.0 - delta if delta < 1.5 else delta - 2.0


@njit(cache=True, nogil=True)
def encode_boards(
    stones, to_move, key, past, length, captured, recent, komi, size, neighbours, zobrist, planes, figures
):
    """`encode` of B boards: planes (B, PLANES, P), figures (B, FIGURES)."""
    points = stones.shape[1] - 1
    chain, stack = np.empty(points + 1, np.int16), np.empty(points + 1, np.int16)
    liberties, only = np.empty(points + 1, np.int16), np.empty(points + 1, np.int16)
    keys, legal = np.empty(points + 1, np.uint64), np.empty(points + 1, np.uint8)
    for b in range(len(stones)):
        find_chains(stones[b], neighbours, zobrist, chain, liberties, only, keys, stack)
        find_legal(
            stones[b], to_move[b], key[b], past[b], np.int64(length[b]), captured[b], neighbours, zobrist, chain,
            liberties, only,
            keys, legal,
        )  # fmt: skip
        encode(stones[b], to_move[b], recent[b], legal, chain, liberties, komi[b], size, planes[b], figures[b])


# --- the search tree --------------------------------------------------------------------------------------------------


class Trees(NamedTuple):
    """G trees of at most N positions in arrays; position 0 is the root. Values are for the player to move there."""

    used: np.ndarray
    """(G,): how many positions."""
    stones: np.ndarray
    """(G, N, P + 1)"""
    key: np.ndarray
    color: np.ndarray
    passes: np.ndarray
    captured: np.ndarray
    parent: np.ndarray
    move: np.ndarray
    """The move that led here."""
    visits: np.ndarray
    waiting: np.ndarray
    """Visits that are under way; each counts as a loss for whoever chose it."""
    total: np.ndarray
    """Sum of the values of all visits."""
    prior: np.ndarray
    """(G, N, M): the net's policy; -1 for a move that is not allowed."""
    child: np.ndarray
    """(G, N, M): where a move leads; -1 nowhere yet."""
    root_prior: np.ndarray
    """(G, M): the root's policy, with noise where it is wanted."""
    gumbel: np.ndarray
    """(G, M): the root's Gumbel noise plus log policy."""


class Games(NamedTuple):
    """What the G games behind the trees know."""

    past: np.ndarray
    length: np.ndarray
    recent: np.ndarray
    komi: np.ndarray
    pass_from: np.ndarray
    """(G,): before so many moves nobody passes, unless nothing else is left."""
    play_out: np.ndarray
    """(G,): nobody fills an eye, and nobody passes while anything else is left."""


class Rates(NamedTuple):
    """The numbers of a search."""

    c_puct: float
    first_play: float
    """How much worse than its parent an unvisited move is taken to be, times sqrt of the policy that was visited."""
    root_first_play: float
    score_weight: float
    score_reach: float
    """In widths of the board: a lead so large counts for three quarters of the most that a lead can count."""
    c_visit: float
    c_scale: float


@njit(cache=True)
def copy(source, target):
    """target[:] = source, which would have numba compile its strings, for an error message."""
    for k in range(len(source)):
        target[k] = source[k]


@njit(cache=True)
def mean_value(trees, g, node):
    """For the player to move at `node`, visits under way counted as won there (lost for the one who chose it)."""
    return (trees.total[g, node] + trees.waiting[g, node]) / (trees.visits[g, node] + trees.waiting[g, node])


@njit(cache=True)
def choose(trees, g, node, rates, forced):
    """PUCT (arXiv 1712.01815), KataGo's first-play value and, at the root, its forced playouts (arXiv 1902.10565)."""
    moves = trees.prior.shape[2]
    visits, explored = 0, 0.0
    for move in range(moves):
        child = trees.child[g, node, move]
        if child >= 0:
            visits += trees.visits[g, child] + trees.waiting[g, child]
            explored += trees.root_prior[g, move] if node == 0 else trees.prior[g, node, move]
    reduction = rates.root_first_play if node == 0 else rates.first_play
    first_play = trees.total[g, node] / trees.visits[g, node] - reduction * np.sqrt(explored)
    spread = rates.c_puct * np.sqrt(visits + 0.01)
    best, best_score = -1, -np.inf
    for move in range(moves):
        if trees.prior[g, node, move] < 0:
            continue
        prior = np.float64(trees.root_prior[g, move] if node == 0 else trees.prior[g, node, move])
        child = trees.child[g, node, move]
        count, value = 0, first_play
        if child >= 0:
            count = trees.visits[g, child] + trees.waiting[g, child]
            value = -mean_value(trees, g, child)
            if node == 0 and forced > 0 and count < np.sqrt(forced * prior * visits):
                return move
        score = value + spread * prior / (1 + count)
        if score > best_score:
            best, best_score = move, score
    return best


@njit(cache=True)
def gumbel_score(trees, g, move, rates, most):
    """Gumbel + log policy + sigma(value) of a move of the root that was visited (ICLR 2022, Danihelka et al.)."""
    child = trees.child[g, 0, move]
    value = (1.0 - mean_value(trees, g, child)) / 2 if child >= 0 else 0.0
    return trees.gumbel[g, move] + (rates.c_visit + most) * rates.c_scale * value


@njit(cache=True)
def choose_by_halving(trees, g, rates, considered):
    """The best move of the root among those that were visited `considered` times."""
    moves = trees.prior.shape[2]
    most = np.int64(0)
    for move in range(moves):
        child = trees.child[g, 0, move]
        if child >= 0:
            most = max(most, trees.visits[g, child])
    best, best_score = -1, -np.inf
    for move in range(moves):
        if trees.prior[g, 0, move] < 0:
            continue
        child = trees.child[g, 0, move]
        count = trees.visits[g, child] if child >= 0 else 0
        score = gumbel_score(trees, g, move, rates, most)
        if count == considered and score > best_score:
            best, best_score = move, score
    return best


@njit(cache=True)
def back_up(trees, g, node, value):
    while node >= 0:
        trees.visits[g, node] += 1
        trees.total[g, node] += value
        value = -value
        node = trees.parent[g, node]


@njit(cache=True)
def utility(outcome, score, size, weight, reach):
    """What a player wants: to win, and a little to win by much."""
    return (1 - weight) * outcome + weight * np.tanh(score / (reach * size))


@njit(cache=True)
def descend(trees, games, g, rates, forced, considered, neighbours, zobrist, size, mark, stack, owner):
    """One walk from the root to a position that nobody has judged, which is added. Returns (it, LEAF | END | PENDING).

    An END is valued by the rules and backed up here. Returns node -1 when the tree is full.
    """
    points = trees.stones.shape[2] - 1
    node = np.int64(0)
    while True:
        if trees.passes[g, node] >= 2:
            score = area(trees.stones[g, node], neighbours, owner, stack) - games.komi[g]
            if trees.color[g, node] == 2:
                score = -score
            back_up(trees, g, node, utility(np.sign(score), score, size, rates.score_weight, rates.score_reach))
            return node, END
        if trees.visits[g, node] == 0:
            if trees.waiting[g, node] > 0:
                return node, PENDING
            break
        if node == 0 and considered >= 0:
            move = choose_by_halving(trees, g, rates, considered)
        else:
            move = choose(trees, g, node, rates, forced)
        child = trees.child[g, node, move]
        if child < 0:
            child = trees.used[g]
            if child >= trees.stones.shape[1]:
                return -1, PENDING
            trees.used[g] = child + 1
            trees.child[g, node, move] = child
            copy(trees.stones[g, node], trees.stones[g, child])
            trees.captured[g, child] = trees.captured[g, node]
            if move == points:
                trees.key[g, child] = trees.key[g, node]
                trees.passes[g, child] = trees.passes[g, node] + 1
            else:
                key, taken = place(
                    trees.stones[g, child], move, trees.color[g, node], trees.key[g, node], neighbours, zobrist, mark,
                    stack,
                )  # fmt: skip
                trees.key[g, child] = key
                trees.captured[g, child] |= taken > 0
                trees.passes[g, child] = 0
            trees.color[g, child] = 3 - trees.color[g, node]
            trees.parent[g, child], trees.move[g, child] = node, move
            trees.visits[g, child], trees.total[g, child], trees.waiting[g, child] = 0, 0.0, 0
            trees.child[g, child] = -1
        node = child
    up = node
    while up >= 0:
        trees.waiting[g, up] += 1
        up = trees.parent[g, up]
    return node, LEAF


@njit(cache=True)
def leave_eyes(stones, color, neighbours, legal):
    """Takes the points that are the player's own eyes from `legal`. Returns 1 if nothing else but the pass is left."""
    left = 0
    for move in range(len(stones) - 1):
        if legal[move] == 1:
            legal[move] = not is_eye(stones, move, color, neighbours)
            left += legal[move]
    return left == 0


@njit(cache=True, nogil=True)
def descend_all(trees, games, active, leaves, rates, forced, considered, neighbours, zobrist, size,
                planes, figures, legal, leaf_game, leaf_node):  # fmt: skip
    """Up to `leaves` descents in each active game. Fills one row for each position to judge; returns how many."""
    points = trees.stones.shape[2] - 1
    chain, stack = np.empty(points + 1, np.int16), np.empty(points + 1, np.int16)
    liberties, only = np.empty(points + 1, np.int16), np.empty(points + 1, np.int16)
    keys, mark, owner = np.empty(points + 1, np.uint64), np.empty(points + 1, np.uint8), np.empty(points + 1, np.int8)
    recent = np.empty(games.recent.shape[1], np.int16)
    rows = 0
    for g in range(len(active)):
        past = np.empty(games.past.shape[1] + trees.stones.shape[1], np.uint64)
        copy(games.past[g, : games.length[g]], past)
        for _ in range(leaves[g] if active[g] else 0):
            node, found = descend(
                trees, games, g, rates, forced[g], considered[g], neighbours, zobrist, size, mark, stack, owner
            )
            if found == END:
                continue
            if found == PENDING:
                break
            length, depth, up = np.int64(games.length[g]), 0, node
            recent[:] = -1
            while up > 0:
                past[length] = trees.key[g, up]
                length += 1
                if depth < len(recent):
                    recent[depth] = trees.move[g, up]
                depth += 1
                up = trees.parent[g, up]
            for j in range(depth, len(recent)):
                recent[j] = games.recent[g, j - depth]
            stones, color = trees.stones[g, node], trees.color[g, node]
            find_chains(stones, neighbours, zobrist, chain, liberties, only, keys, stack)
            find_legal(
                stones, color, trees.key[g, node], past, length, trees.captured[g, node], neighbours, zobrist, chain,
                liberties, only, keys, legal[rows],
            )  # fmt: skip
            encode(
                stones, color, recent, legal[rows], chain, liberties, games.komi[g], size, planes[rows], figures[rows]
            )
            if games.play_out[g]:
                legal[rows, points] = leave_eyes(stones, color, neighbours, legal[rows])
            elif games.length[g] - 1 + depth < games.pass_from[g]:
                for move in range(points):
                    if legal[rows, move] == 1:
                        legal[rows, points] = 0
                        break
            leaf_game[rows], leaf_node[rows] = g, node
            rows += 1
    return rows


@njit(cache=True, nogil=True)
def expand_all(trees, leaf_game, leaf_node, legal, logits, values):
    """What the net said of each leaf goes into its tree: softmax over what is allowed, and the value up to the root."""
    moves = trees.prior.shape[2]
    for row in range(len(leaf_game)):
        g, node = np.int64(leaf_game[row]), np.int64(leaf_node[row])
        highest = -np.inf
        for move in range(moves):
            if legal[row, move] == 1:
                highest = max(highest, logits[row, move])
        total = 0.0
        for move in range(moves):
            if legal[row, move] == 1:
                total += np.exp(np.float64(logits[row, move] - highest))
        for move in range(moves):
            trees.prior[g, node, move] = (
                np.exp(np.float64(logits[row, move] - highest)) / total if legal[row, move] == 1 else -1.0
            )
        if node == 0:
            copy(trees.prior[g, 0], trees.root_prior[g])
        up = node
        while up >= 0:
            trees.waiting[g, up] -= 1
            up = trees.parent[g, up]
        back_up(trees, g, node, np.float64(values[row]))


@njit(cache=True, nogil=True)
def keep_subtree(trees, g, move, kept):
    """Makes the position after `move` the root and drops what does not stand below it. False if it is not in the tree.

    A position is always younger than its parent, so one pass from old to young packs the subtree in place.
    """
    root = trees.child[g, 0, move]
    if root < 0 or trees.visits[g, root] == 0:
        return False
    kept[: trees.used[g]] = -1
    kept[root] = 0
    used = 1
    for node in range(root + 1, trees.used[g]):
        if kept[trees.parent[g, node]] >= 0:
            kept[node] = used
            used += 1
    for node in range(root, trees.used[g]):
        new = kept[node]
        if new < 0:
            continue
        copy(trees.stones[g, node], trees.stones[g, new])
        trees.key[g, new], trees.color[g, new] = trees.key[g, node], trees.color[g, node]
        trees.passes[g, new], trees.captured[g, new] = trees.passes[g, node], trees.captured[g, node]
        trees.parent[g, new] = kept[trees.parent[g, node]] if new > 0 else -1
        trees.move[g, new], trees.visits[g, new] = trees.move[g, node], trees.visits[g, node]
        trees.total[g, new], trees.waiting[g, new] = trees.total[g, node], 0
        copy(trees.prior[g, node], trees.prior[g, new])
        for k in range(trees.child.shape[2]):
            child = trees.child[g, node, k]
            trees.child[g, new, k] = kept[child] if child >= 0 else -1
    trees.used[g] = used
    copy(trees.prior[g, 0], trees.root_prior[g])
    return True
