"""Go: area scoring by Tromp and Taylor, positional superko, no suicide, boards of 2 to 19 lines.

Two forms of the same rules. `Position` is the plain one: immutable, readable, the judge of records and of what clients
play. `Boards` is the fast one: many games at once in arrays, stepped by compiled kernels (`kernels`). The tests play
both, move by move, and count the legal positions (https://tromp.github.io/go/legal.html).

A move is a point's index, row by row from the top left as in SGF, or size x size for the pass. Not here: search, files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt

from prairie.errors import RequestError

EMPTY, BLACK, WHITE = 0, 1, 2
COLUMNS = "ABCDEFGHJKLMNOPQRST"
RECENT = 5
"""Moves that a position remembers for the net."""


def other(color: int) -> int:
    return BLACK + WHITE - color


def check_size(size: int) -> int:
    """Raises RequestError unless a board can have so many lines."""
    if not 2 <= size <= 19:
        raise RequestError("no board has so many lines", got=size, wanted="2 to 19")
    return size


@cache
def neighbours(size: int) -> npt.NDArray[np.int16]:
    """(P, 4): the points beside each point; P stands for what lies outside. Cached: do not write into it."""
    points = size * size
    table = np.full((points, 4), points, np.int16)
    for point in range(points):
        row, column = divmod(point, size)
        for k, (down, right) in enumerate(((-1, 0), (1, 0), (0, -1), (0, 1))):
            if 0 <= row + down < size and 0 <= column + right < size:
                table[point, k] = (row + down) * size + column + right
    table.flags.writeable = False
    return table


@cache
def zobrist(size: int) -> npt.NDArray[np.uint64]:
    """(2, P): a key for each colour and point, always the same ones. Cached: do not write into it."""
    keys = np.random.default_rng(size).integers(1, 2**64, (2, size * size), np.uint64)
    keys.flags.writeable = False
    return keys


@cache
def symmetries(size: int) -> npt.NDArray[np.int64]:
    """(8, P + 1): the turns and reflections of a board; moved = board[symmetries(size)[k]]. The pass stays itself."""
    grid = np.arange(size * size).reshape(size, size)
    turns = [np.rot90(board, k).reshape(-1) for board in (grid, grid.T) for k in range(4)]
    table = np.concatenate([np.stack(turns), np.full((8, 1), size * size)], axis=1)
    table.flags.writeable = False
    return table


def vertex(move: int, size: int) -> str:
    """A move as people write it: D4, or pass."""
    if move == size * size:
        return "pass"
    row, column = divmod(move, size)
    return f"{COLUMNS[column]}{size - row}"


def move_of(text: str, size: int) -> int:
    """The move that people write as `text`. Raises RequestError if there is no such point."""
    word = text.upper()
    if word == "PASS":
        return size * size
    if word[:1] in COLUMNS[:size] and word[:1] and word[1:].isascii() and word[1:].isdigit():
        row = size - int(word[1:])
        if 0 <= row < size:
            return row * size + COLUMNS.index(word[0])
    raise RequestError("there is no such point", got=text, wanted=f"A1 to {COLUMNS[size - 1]}{size}, or pass")


def handicap_points(size: int, count: int) -> list[int]:
    """Where fixed handicap stones stand (GTP 2). Raises RequestError if a board does not have so many."""
    edge = 2 if size < 13 else 3
    low, middle, high = edge, size // 2, size - 1 - edge
    most = 0 if size < 7 else 9 if size % 2 and size > 7 else 4
    if not 2 <= count <= most:
        raise RequestError(
            f"a board of {size} lines cannot have so many handicap stones", got=count,
            wanted=f"2 to {most}" if most else "no handicap",
        )  # fmt: skip
    corners = [(high, low), (low, high), (low, low), (high, high)]
    sides = [(middle, low), (middle, high), (low, middle), (high, middle)]
    places = corners[:count] if count < 5 else corners + sides[: (count - 4) // 2 * 2]
    if count in (5, 7, 9):
        places = [*places, (middle, middle)]
    return [row * size + column for row, column in places]


@dataclass(frozen=True)
class Position:
    """A board, who is to move, and all that came before. `after` makes the next one; nothing changes in place."""

    size: int
    stones: tuple[int, ...]
    """P of EMPTY, BLACK, WHITE."""
    to_move: int = BLACK
    past: frozenset[tuple[int, ...]] = frozenset()
    """Every board so far, this one included: none may come back."""
    moves: tuple[int, ...] = ()
    passes: int = 0

    @classmethod
    def empty(cls, size: int) -> Position:
        return cls.of(size, (EMPTY,) * check_size(size) ** 2)

    @classmethod
    def of(cls, size: int, stones: Sequence[int], to_move: int = BLACK) -> Position:
        """A board that is set up; its past begins here. Raises RequestError when a chain has no liberty."""
        board = tuple(stones)
        for point, color in enumerate(board):
            if color and not _chain(board, size, point)[1]:
                raise RequestError("a chain without a liberty cannot stand", got=f"the one at {vertex(point, size)}")
        return cls(size, board, to_move, frozenset([board]))

    @property
    def pass_move(self) -> int:
        return self.size * self.size

    @property
    def over(self) -> bool:
        """Both passed."""
        return self.passes >= 2

    def why_illegal(self, move: int) -> str | None:
        """Occupied, suicide, superko; None if the move may be played."""
        if move == self.pass_move:
            return None
        if self.stones[move] != EMPTY:
            return "occupied"
        board = self._with(move)
        if board[move] == EMPTY:
            return "suicide"
        return "superko" if board in self.past else None

    def own_eye(self, move: int) -> bool:
        """Would it fill an eye of the player to move: nothing but own stones beside it, and of the points across its
        corners fewer than two the opponent's (none where the board ends)?"""
        if any(self.stones[near] != self.to_move for near in _beside(self.size, move)):
            return False
        row, column = divmod(move, self.size)
        across = [
            self.stones[(row + down) * self.size + column + right]
            for down in (-1, 1) for right in (-1, 1)
            if 0 <= row + down < self.size and 0 <= column + right < self.size
        ]  # fmt: skip
        return across.count(other(self.to_move)) + (len(across) < 4) < 2

    def legal_moves(self) -> list[int]:
        """All of them, the pass last."""
        return [move for move in range(self.pass_move + 1) if self.why_illegal(move) is None]

    def after(self, move: int) -> Position:
        """The position after `move` of the player to move. Raises RequestError if it is illegal."""
        why = self.why_illegal(move)
        if why is not None:
            raise RequestError(f"{vertex(move, self.size)} cannot be played", got=why, wanted="a legal move")
        passed = move == self.pass_move
        board = self.stones if passed else self._with(move)
        return Position(
            self.size, board, other(self.to_move), self.past | {board}, (*self.moves, move),
            self.passes + 1 if passed else 0,
        )  # fmt: skip

    def by(self, color: int) -> Position:
        """The same with `color` to move."""
        return Position(self.size, self.stones, color, self.past, self.moves, self.passes)

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """+1 black's, -1 white's, 0 nobody's, of each point: stones, and empty regions that touch one colour."""
        found = [{EMPTY: 2, BLACK: 1, WHITE: -1}[color] for color in self.stones]
        for point in range(len(found)):
            if found[point] == 2:
                region, beside = _region(self.stones, self.size, point)
                for inside in region:
                    found[inside] = 1 if beside == {BLACK} else -1 if beside == {WHITE} else 0
        return tuple(found)

    def score(self, komi: float) -> float:
        """Black's area minus white's minus komi; all stones on the board are taken to be alive."""
        return sum(self.owners) - komi

    def text(self) -> str:
        """The board, for people."""
        letters = "   " + " ".join(COLUMNS[: self.size])
        rows = [
            f"{self.size - row:2} "
            + " ".join(".XO"[self.stones[row * self.size + column]] for column in range(self.size))
            for row in range(self.size)
        ]
        return "\n".join([letters, *rows, letters])

    def _with(self, move: int) -> tuple[int, ...]:
        """The board after a stone of the player to move on an empty point; that point is empty again after suicide."""
        board = list(self.stones)
        board[move] = self.to_move
        for near in _beside(self.size, move):
            if board[near] == other(self.to_move):
                chain, breath = _chain(board, self.size, near)
                if not breath:
                    for point in chain:
                        board[point] = EMPTY
        chain, breath = _chain(board, self.size, move)
        if not breath:
            for point in chain:
                board[point] = EMPTY
        return tuple(board)


def _beside(size: int, point: int) -> Iterator[int]:
    return (int(near) for near in neighbours(size)[point] if near < size * size)


def _region(stones: Sequence[int], size: int, start: int) -> tuple[set[int], set[int]]:
    """The connected points of one colour around `start`, and the colours beside them."""
    color, region, beside, waiting = stones[start], {start}, set(), [start]
    while waiting:
        for near in _beside(size, waiting.pop()):
            if stones[near] != color:
                beside.add(stones[near])
            elif near not in region:
                region.add(near)
                waiting.append(near)
    return region, beside


def _chain(stones: Sequence[int], size: int, start: int) -> tuple[set[int], bool]:
    """The stones connected to the one at `start`, and whether they have a liberty."""
    region, beside = _region(stones, size, start)
    return region, EMPTY in beside


@dataclass
class Boards:
    """B games on boards of one size, in arrays. Moves are trusted to be legal: ask `legal` first."""

    size: int
    stones: npt.NDArray[np.int8]
    """(B, P + 1), the last one the wall."""
    to_move: npt.NDArray[np.int8]
    key: npt.NDArray[np.uint64]
    past: npt.NDArray[np.uint64]
    """(B, H): Zobrist keys of the positions so far, `length` of them."""
    length: npt.NDArray[np.int32]
    captured: npt.NDArray[np.bool_]
    """Has anything been captured yet?"""
    passes: npt.NDArray[np.int8]
    recent: npt.NDArray[np.int16]
    """(B, RECENT): the last moves, newest first; -1 before the first."""
    longest: int = field(default=0)

    @classmethod
    def empty(cls, size: int, count: int, longest: int | None = None) -> Boards:
        """`count` empty boards for games of at most `longest` moves (default: 4 for each point)."""
        points = check_size(size) ** 2
        longest = 4 * points if longest is None else longest
        stones = np.zeros((count, points + 1), np.int8)
        stones[:, points] = 3
        return cls(
            size, stones, np.full(count, BLACK, np.int8), np.zeros(count, np.uint64),
            np.zeros((count, longest + 1), np.uint64), np.ones(count, np.int32), np.zeros(count, np.bool_),
            np.zeros(count, np.int8), np.full((count, RECENT), -1, np.int16), longest,
        )  # fmt: skip

    @classmethod
    def at(cls, positions: Sequence[Position], longest: int | None = None) -> Boards:
        """Boards that stand where `positions` stand, their pasts included."""
        boards = cls.empty(positions[0].size, len(positions), longest)
        room = max(len(position.past) for position in positions) + boards.longest
        boards.past = np.zeros((len(positions), room + 1), np.uint64)
        for b, position in enumerate(positions):
            keys = [_key(stones, position.size) for stones in position.past if stones != position.stones]
            keys.append(_key(position.stones, position.size))
            boards.stones[b, :-1] = position.stones
            boards.to_move[b], boards.key[b] = position.to_move, keys[-1]
            boards.past[b, : len(keys)], boards.length[b] = keys, len(keys)
            boards.captured[b], boards.passes[b] = True, position.passes
            for j, move in enumerate(reversed(position.moves[-RECENT:])):
                boards.recent[b, j] = move
        return boards

    def __len__(self) -> int:
        return len(self.stones)

    @property
    def pass_move(self) -> int:
        return self.size * self.size

    def legal(self) -> npt.NDArray[np.uint8]:
        """(B, M): 1 allowed, 0 not, 2 banned by superko alone."""
        from prairie.games.kernels import legal_of_boards

        legal = np.empty((len(self), self.pass_move + 1), np.uint8)
        legal_of_boards(
            self.stones, self.to_move, self.key, self.past, self.length, self.captured, neighbours(self.size),
            zobrist(self.size), legal,
        )  # fmt: skip
        return legal

    def play(self, moves: npt.ArrayLike, which: npt.ArrayLike | None = None) -> None:
        """One move on each board, or on the boards `which`. Raises RequestError when a game has become too long."""
        from prairie.games.kernels import play_on_boards

        chosen = np.arange(len(self)) if which is None else np.asarray(which, np.int64)
        if len(chosen) and self.length[chosen].max() >= self.past.shape[1]:
            raise RequestError("a game has become too long", got=f"{self.past.shape[1]} moves", wanted="fewer")
        play_on_boards(
            chosen, np.asarray(moves, np.int64), self.stones, self.to_move, self.key, self.past, self.length,
            self.captured, self.passes, self.recent, neighbours(self.size), zobrist(self.size),
        )  # fmt: skip

    def areas(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int8]]:
        """Black's area minus white's (B,), and who owns each point (B, P): +1 black, -1 white, 0 nobody."""
        from prairie.games.kernels import area_of_boards

        owner = np.empty(self.stones.shape, np.int8)
        return area_of_boards(self.stones, neighbours(self.size), owner), owner[:, :-1]

    def reset(self, which: npt.ArrayLike) -> None:
        """Empties the boards `which` for new games."""
        chosen = np.asarray(which, np.int64)
        self.stones[chosen, :-1] = EMPTY
        self.to_move[chosen], self.key[chosen], self.length[chosen] = BLACK, 0, 1
        self.past[chosen, 0] = 0
        self.captured[chosen], self.passes[chosen], self.recent[chosen] = False, 0, -1


def legal_positions(size: int) -> int:
    """How many boards of `size` lines have a liberty for each chain: counted by trying all 3^(size x size)."""
    from prairie.games.kernels import count_legal_positions

    return int(count_legal_positions(check_size(size) ** 2, neighbours(size)))


def _key(stones: Sequence[int], size: int) -> np.uint64:
    table, key = zobrist(size), np.uint64(0)
    for point, color in enumerate(stones):
        if color:
            key ^= table[color - 1, point]
    return key
