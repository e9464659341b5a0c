"""The inner loops of Go, compiled by numba: rules over a batch of boards, and (below) the search tree.

One file, because numba's cache on disk knows a kernel is stale by the date of the file it stands in: a kernel that
calls another file's kernel would go on running the old one. The rules here are those of `prairie.games.go.Position`,
the plain form; `tests/games/test_go.py` holds the two together.

Legend: B boards; P points of a board (size x size, row by row from the top); M = P + 1 moves, the last one is the pass.
A board is P + 1 int8: 0 empty, 1 black, 2 white, and 3 (the wall) in the last place, where every neighbour outside the
board points. `past` holds the Zobrist keys of all positions so far. Not here: what a move is worth, files, networks.
"""

from __future__ import annotations

import numpy as np
from numba import njit

WALL = 3


@njit(cache=True)
def find_chains(stones, neighbours, zobrist, chain, liberties, only, keys, stack):  # type: ignore[no-untyped-def]
    """Fills, for each stone, its chain; for each chain its liberties (up to 3), one of them, and its key."""
    points = len(stones) - 1
    chain[:] = -1
    count = 0
    for start in range(points):
        color = stones[start]
        if color == 0 or chain[start] >= 0:
            continue
        first = second = -1
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
                elif stones[near] == 0 and free < 3 and near != first and near != second:
                    free += 1
                    if free == 1:
                        first = near
                    else:
                        second = near
        liberties[count] = free
        only[count] = first
        keys[count] = key
        count += 1
    return count


@njit(cache=True)
def is_past(key, past, length):  # type: ignore[no-untyped-def]
    for i in range(length - 1, -1, -1):  # noqa: SIM110 - numba compiles loops, not generators
        if past[i] == key:
            return True
    return False


@njit(cache=True)
def find_legal(stones, color, key, past, length, captured, neighbours, zobrist, chain, liberties, only, keys, legal):  # type: ignore[no-untyped-def]
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
def place(stones, move, color, key, neighbours, zobrist, mark, stack):  # type: ignore[no-untyped-def]
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
def area(stones, neighbours, owner, stack):  # type: ignore[no-untyped-def]
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


@njit(cache=True)
def legal_of_boards(stones, to_move, key, past, length, captured, neighbours, zobrist, legal):  # type: ignore[no-untyped-def]
    """`find_legal` of B boards: legal (B, M) uint8."""
    points = stones.shape[1] - 1
    chain, stack = np.empty(points + 1, np.int16), np.empty(points + 1, np.int16)
    liberties, only = np.empty(points + 1, np.int16), np.empty(points + 1, np.int16)
    keys = np.empty(points + 1, np.uint64)
    for b in range(len(stones)):
        find_chains(stones[b], neighbours, zobrist, chain, liberties, only, keys, stack)
        find_legal(
            stones[b], to_move[b], key[b], past[b], length[b], captured[b], neighbours, zobrist, chain, liberties, only,
            keys, legal[b],
        )  # fmt: skip


@njit(cache=True)
def play_on_boards(which, moves, stones, to_move, key, past, length, captured, passes, recent, neighbours, zobrist):  # type: ignore[no-untyped-def]
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


@njit(cache=True)
def area_of_boards(stones, neighbours, owner):  # type: ignore[no-untyped-def]
    """`area` of B boards: scores (B,) int32, owner (B, P+1) int8."""
    stack = np.empty(stones.shape[1], np.int16)
    scores = np.empty(len(stones), np.int32)
    for b in range(len(stones)):
        scores[b] = area(stones[b], neighbours, owner[b], stack)
    return scores


@njit(cache=True)
def count_legal_positions(points, neighbours):  # type: ignore[no-untyped-def]
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
