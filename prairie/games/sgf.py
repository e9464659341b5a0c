"""Game records in and out: SGF, FF[1] to FF[4] (https://www.red-bean.com/sgf). The main line; variations are left out.

What cannot be understood or played is refused with one sentence that names the property or the move. Not here: the
rules (`go`), many games at once (`selfplay`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from prairie.errors import DataError, RequestError
from prairie.games.go import BLACK, EMPTY, WHITE, Position, vertex

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[A-Za-z]+")
_VALUE = re.compile(r"\[((?:\\.|[^\]\\])*)\]", re.DOTALL)
_Node = dict[str, list[str]]


@dataclass(frozen=True)
class GameRecord:
    """One game: how it began, what was played, how it ended."""

    size: int
    moves: tuple[tuple[int, int], ...] = ()
    """(colour, move)"""
    komi: float = 0.0
    black: tuple[int, ...] = ()
    """Stones that stood there before the first move."""
    white: tuple[int, ...] = ()
    to_move: int | None = None
    """Who begins, where the record says so."""
    handicap: int = 0
    result: str = ""
    """As SGF writes it: B+3.5, W+R, 0, Void; empty when unknown."""
    names: tuple[str, str] = ("", "")
    """Black's and white's."""
    comments: dict[int, str] = field(default_factory=dict)
    """By number of moves played before it; 0 is the beginning."""

    @property
    def start(self) -> Position:
        """The board before the first move. Raises DataError if it cannot stand."""
        stones = [EMPTY] * self.size**2
        for color, points in ((BLACK, self.black), (WHITE, self.white)):
            for point in points:
                stones[point] = color
        first = self.moves[0][0] if self.moves else self.to_move or BLACK
        try:
            return Position.of(self.size, stones, first)
        except RequestError as error:
            raise DataError("the record begins with a board that cannot stand", got=error.got) from None

    def positions(self) -> Iterator[Position]:
        """The board before each move and at the end; the player of the next move is to move. DataError if illegal."""
        position = self.start
        for number, (color, move) in enumerate(self.moves, 1):
            position = position.by(color)
            yield position
            why = position.why_illegal(move)
            if why is not None:
                raise DataError(
                    f"move {number} of the record, {'black' if color == BLACK else 'white'} {vertex(move, self.size)}, "
                    "cannot be played", got=why, wanted="a legal move",
                )  # fmt: skip
            position = position.after(move)
        yield position

    def winner(self) -> int | None:
        """BLACK, WHITE, EMPTY for a draw, None if the record does not say."""
        if self.result[:2] in ("B+", "W+"):
            return BLACK if self.result[0] == "B" else WHITE
        return EMPTY if self.result in ("0", "Draw") else None


def read_sgf(source: bytes | str) -> list[GameRecord]:
    """Every game of a file. Raises DataError for what is not SGF, not Go or not on a square board of 2 to 19 lines."""
    games = [_record(nodes) for nodes in _games(_text(source))]
    if not games:
        raise DataError("this is no SGF", got=repr(source[:20]), wanted="a game in round brackets: (;GM[1]SZ[9] ...)")
    return games


def write_sgf(record: GameRecord) -> str:
    """A record as FF[4]; `read_sgf` and other programs read it back."""
    root = f"GM[1]FF[4]CA[UTF-8]AP[Prairie]RU[Chinese]SZ[{record.size}]KM[{record.komi:g}]"
    for name, value in (("PB", record.names[0]), ("PW", record.names[1]), ("RE", record.result)):
        root += f"{name}[{_escaped(value)}]" if value else ""
    root += f"HA[{record.handicap}]" if record.handicap else ""
    for name, points in (("AB", record.black), ("AW", record.white)):
        root += name + "".join(f"[{_letters(point, record.size)}]" for point in points) if points else ""
    root += f"PL[{' BW'[record.to_move]}]" if record.to_move else ""
    nodes = [root + _comment(record, 0)]
    for number, (color, move) in enumerate(record.moves, 1):
        nodes.append(f"{' BW'[color]}[{_letters(move, record.size)}]" + _comment(record, number))
    return "(;" + "\n;".join(nodes) + ")\n"


def result_text(score: float) -> str:
    """Black's points minus white's, komi in it, as SGF writes it."""
    return "0" if score == 0 else f"{'B' if score > 0 else 'W'}+{abs(score):g}"


def _text(source: bytes | str) -> str:
    if isinstance(source, str):
        return source
    named = re.search(rb"CA\[([\w-]+)\]", source[:2000])
    for encoding in ([named[1].decode()] if named else []) + ["utf-8", "latin-1"]:
        try:
            return source.decode(encoding)
        except (UnicodeDecodeError, LookupError):
            continue
    raise AssertionError("latin-1 decodes everything")


def _games(text: str) -> Iterator[list[_Node]]:
    """The main line of each game of a collection, as nodes."""
    at = text.find("(")
    while at >= 0:
        nodes: list[_Node] = []
        depth, taken = 0, [False]
        """Of each open bracket: has its first variation been read to its end?"""
        while at < len(text):
            at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
            sign = text[at : at + 1]
            at += 1
            if sign == "(":
                depth += 1
                taken.append(taken[-1])
            elif sign == ")":
                depth -= 1
                taken.pop()
                taken[-1] = True
                if depth == 0:
                    break
            elif sign == ";":
                node, at = _node(text, at)
                if not taken[-1]:
                    nodes.append(node)
            elif sign:
                raise DataError("this is no SGF", got=f"{sign!r} at character {at}", wanted="( ; or )")
        if depth:
            raise DataError("an SGF ends in the middle of a game", got=f"{depth} open brackets")
        yield nodes
        at = text.find("(", at)


def _node(text: str, at: int) -> tuple[_Node, int]:
    node: _Node = {}
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        name = _NAME.match(text, at)
        if name is None:
            return node, at
        values: list[str] = []
        at = _SPACE.match(text, name.end()).end()  # type: ignore[union-attr]
        while (value := _VALUE.match(text, at)) is not None:
            values.append(value[1])
            at = _SPACE.match(text, value.end()).end()  # type: ignore[union-attr]
        if not values:
            raise DataError(f"the property {name[0]} of an SGF has no value", wanted="one in square brackets")
        short = re.sub("[a-z]", "", name[0])  # old files write SiZe
        node[short] = node.get(short, []) + values


def _record(nodes: Sequence[_Node]) -> GameRecord:
    root = nodes[0] if nodes else {}
    game = _first(root, "GM", "1")
    if game != "1":
        raise DataError("the record is not of a game of Go", got=f"GM[{game}]", wanted="GM[1]")
    size = _size(_first(root, "SZ", "19"))
    moves: list[tuple[int, int]] = []
    comments: dict[int, str] = {}
    setup: dict[int, int] = {}
    to_move = None
    for node in nodes:
        for name, color in (("AB", BLACK), ("AW", WHITE), ("AE", EMPTY)):
            if name in node and moves:
                raise DataError(
                    f"stones are set up in the middle of the record, after move {len(moves)}", got=name,
                    wanted="stones that are played",
                )  # fmt: skip
            for point in (point for value in node.get(name, []) for point in _points(value, size)):
                setup[point] = color
        if "PL" in node and not moves:
            to_move = BLACK if node["PL"][0].upper().startswith("B") else WHITE
        for name, color in (("B", BLACK), ("W", WHITE)):
            moves += [(color, _move(value, size)) for value in node.get(name, [])]
        if "C" in node:
            comments[len(moves)] = re.sub(r"\\(.)", r"\1", node["C"][0], flags=re.DOTALL)
    return GameRecord(
        size, tuple(moves), _number(root, "KM"),
        tuple(point for point, color in setup.items() if color == BLACK),
        tuple(point for point, color in setup.items() if color == WHITE),
        to_move, int(_number(root, "HA")), _first(root, "RE", ""), (_first(root, "PB", ""), _first(root, "PW", "")),
        comments,
    )  # fmt: skip


def _first(node: _Node, name: str, default: str) -> str:
    return re.sub(r"\\(.)", r"\1", node.get(name, [default])[0]).strip()


def _size(text: str) -> int:
    width, _, height = text.partition(":")
    if not width.isdigit() or (height and height != width) or not 2 <= int(width) <= 19:
        raise DataError("the record's board cannot be used", got=f"SZ[{text}]", wanted="a square one of 2 to 19 lines")
    return int(width)


def _number(root: _Node, name: str) -> float:
    text = _first(root, name, "0") or "0"
    try:
        return float(text.replace(",", "."))
    except ValueError:
        raise DataError(f"the property {name} of a record is no number", got=text) from None


def _move(value: str, size: int) -> int:
    value = value.strip()
    return size * size if value in ("", "tt") else _point(value, size)


def _points(value: str, size: int) -> list[int]:
    """A point, or all of a rectangle: aa:cc."""
    first, _, last = value.strip().partition(":")
    one, two = _point(first, size), _point(last or first, size)
    rows, columns = zip(*(divmod(point, size) for point in (one, two)), strict=True)
    return [
        row * size + column
        for row in range(min(rows), max(rows) + 1)
        for column in range(min(columns), max(columns) + 1)
    ]


def _point(value: str, size: int) -> int:
    column, row = (ord(letter) - ord("a") for letter in value) if len(value) == 2 else (-1, -1)
    if not (0 <= row < size and 0 <= column < size):
        raise DataError(
            "a point of the record is not on its board",
            got=f"[{value}]",
            wanted=f"aa to {_letters(size * size - 1, size)}",
        )
    return row * size + column


def _letters(move: int, size: int) -> str:
    return "" if move == size * size else chr(97 + move % size) + chr(97 + move // size)


def _escaped(text: str) -> str:
    return re.sub(r"([\]\\])", r"\\\1", text)


def _comment(record: GameRecord, number: int) -> str:
    return f"C[{_escaped(record.comments[number])}]" if number in record.comments else ""
