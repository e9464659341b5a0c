"""The Go Text Protocol, version 2, as an engine (https://www.lysator.liu.se/~gunnar/gtp).

Errors are answered with the words that GNU Go uses, since clients know those. `lz-analyze` and `kata-analyze` stream
what the search thinks until the next line comes. All stones on the board count as alive (Tromp and Taylor): the engine
plays until what is dead has been taken. Not here: the search (`player`), the other end of a pipe (`match`).
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from prairie.errors import PrairieError
from prairie.games.go import BLACK, WHITE, Position, handicap_points, move_of, other, vertex
from prairie.games.player import Player, Thought
from prairie.games.sgf import GameRecord, read_sgf, write_sgf

COLORS = {"b": BLACK, "black": BLACK, "w": WHITE, "white": WHITE}
SAFETY = 0.9
"""Share of the clock's allowance that is used."""


class Refused(Exception):
    """A command that is answered with `?`."""


@dataclass
class Clock:
    """What `time_settings` and `time_left` said; seconds."""

    main_s: float = 0.0
    period_s: float = 0.0
    stones: int = 0
    left: dict[int, tuple[float, int]] = field(default_factory=dict)
    """Colour -> (seconds, stones to play in them; 0 = main time)."""
    given: bool = False

    def allowance_s(self, color: int, moves_left: float) -> float:
        """How long the next move may take; infinite without a limit."""
        if not self.given:
            return float("inf")
        start = (self.main_s, 0) if self.main_s > 0 else (self.period_s, self.stones)
        left_s, stones = self.left.get(color, start)
        if stones > 0:
            return SAFETY * left_s / stones
        share_s = left_s / max(10.0, moves_left)
        per_stone_s = self.period_s / self.stones if self.stones else 0.0
        return SAFETY * max(share_s, min(per_stone_s, left_s + per_stone_s))


class Engine:
    """Answers one line at a time. `name` and `version` are what the engine says of itself."""

    def __init__(self, player: Player, *, size: int = 19, komi: float = 7.5, name: str = "Prairie", version: str = ""):
        self.player, self.name, self.version = player, name, version
        self.komi, self.clock, self.running = komi, Clock(), True
        self.positions = [Position.empty(size)]
        self.handicap = 0

    @property
    def position(self) -> Position:
        return self.positions[-1]

    def answer(
        self, line: str, emit: Callable[[str], None] | None = None, interrupted: Callable[[], bool] = lambda: True
    ) -> str:
        """The whole answer to one line, with its blank line; empty for a line without a command. An analysis writes to
        `emit` while it thinks and ends when `interrupted`."""
        words = re.sub(r"[\x00-\x08\x0a-\x1f\x7f]", "", line.split("#")[0]).split()
        number = words.pop(0) if words and words[0].isascii() and words[0].isdigit() else ""
        if not words:
            return ""
        command, arguments = words[0], words[1:]
        handler = getattr(self, "do_" + command.replace("-", "_"), None) if command in COMMANDS else None
        if handler is None:
            return f"?{number} unknown command\n\n"
        try:
            if command in ANALYSES:
                return str(handler(arguments, number, emit or (lambda text: None), interrupted))
            text = handler(arguments)
        except Refused as error:
            return f"?{number} {error}\n\n"
        except PrairieError as error:
            return f"?{number} {error}\n\n"
        return f"={number} {text or ''}\n\n"

    # --- what it is ---

    def do_protocol_version(self, _: list[str]) -> str:
        return "2"

    def do_name(self, _: list[str]) -> str:
        return self.name

    def do_version(self, _: list[str]) -> str:
        return self.version

    def do_known_command(self, arguments: list[str]) -> str:
        return "true" if arguments and arguments[0] in COMMANDS else "false"

    def do_list_commands(self, _: list[str]) -> str:
        return "\n".join(COMMANDS)

    def do_quit(self, _: list[str]) -> str:
        self.running = False
        return ""

    # --- the board ---

    def do_boardsize(self, arguments: list[str]) -> None:
        size = _integer(arguments, "boardsize not an integer")
        if not 2 <= size <= 19:
            raise Refused("unacceptable size")
        try:
            self.player.judge.check(size)
        except PrairieError:
            raise Refused("unacceptable size") from None
        self._begin(Position.empty(size))

    def do_clear_board(self, _: list[str]) -> None:
        self._begin(Position.empty(self.position.size))

    def do_komi(self, arguments: list[str]) -> None:
        self.komi = _real(arguments[:1], "komi not a float")

    def do_get_komi(self, _: list[str]) -> str:
        return f"{self.komi:.1f}"

    def do_play(self, arguments: list[str]) -> None:
        color, move = self._color_and_move(arguments)
        position = self.position.by(color)
        if position.why_illegal(move) is not None:
            raise Refused("illegal move")
        self.positions.append(position.after(move))

    def do_is_legal(self, arguments: list[str]) -> str:
        color, move = self._color_and_move(arguments)
        return "0" if self.position.by(color).why_illegal(move) else "1"

    def do_undo(self, _: list[str]) -> None:
        if len(self.positions) < 2:
            raise Refused("cannot undo")
        self.positions.pop()

    def do_fixed_handicap(self, arguments: list[str]) -> str:
        self._only_on_an_empty_board()
        count = _integer(arguments, "handicap not an integer")
        try:
            points = handicap_points(self.position.size, count)
        except PrairieError:
            raise Refused("invalid handicap") from None
        return self._set_handicap(points)

    def do_place_free_handicap(self, arguments: list[str]) -> str:
        """The engine chooses: the fixed points, as many as the board has."""
        self._only_on_an_empty_board()
        count = _integer(arguments, "handicap not an integer")
        for fewer in range(count, 1, -1):
            try:
                return self._set_handicap(handicap_points(self.position.size, fewer))
            except PrairieError:
                continue
        raise Refused("invalid handicap")

    def do_set_free_handicap(self, arguments: list[str]) -> None:
        self._only_on_an_empty_board()
        try:
            points = [move_of(word, self.position.size) for word in arguments]
        except PrairieError:
            raise Refused("invalid coordinate") from None
        if len(set(points)) < len(points):
            raise Refused("repeated vertex")
        if not 2 <= len(points) < self.position.pass_move or self.position.pass_move in points:
            raise Refused("invalid handicap")
        self._set_handicap(points)

    def do_loadsgf(self, arguments: list[str]) -> str:
        if not arguments:
            raise Refused("missing filename")
        try:
            record = read_sgf(Path(arguments[0]).read_bytes())[0]
            positions = list(record.positions())
        except (PrairieError, OSError):
            raise Refused(f"cannot open or parse '{arguments[0]}'") from None
        self.player.judge.check(record.size)
        if len(arguments) > 1:
            until = _integer(arguments[1:], "move number not an integer")
            positions = positions[: max(1, until)]
        self.positions, self.komi, self.handicap = positions, record.komi, record.handicap
        return "black" if self.position.to_move == BLACK else "white"

    def do_printsgf(self, _: list[str]) -> str:
        return write_sgf(self.record()).replace("\n", "")

    def do_showboard(self, _: list[str]) -> str:
        return "\n" + self.position.text()

    def do_last_move(self, _: list[str]) -> str:
        if not self.position.moves:
            raise Refused("no previous move known")
        color = "black" if other(self.position.to_move) == BLACK else "white"
        return f"{color} {vertex(self.position.moves[-1], self.position.size)}"

    def do_final_score(self, _: list[str]) -> str:
        score = self.position.score(self.komi)
        return "0" if score == 0 else f"{'B' if score > 0 else 'W'}+{abs(score):.1f}"

    def do_final_status_list(self, arguments: list[str]) -> str:
        if arguments not in (["dead"], ["alive"], ["seki"]):
            raise Refused("invalid status")
        if arguments != ["alive"]:
            return ""
        size = self.position.size
        return "\n".join(vertex(point, size) for point, color in enumerate(self.position.stones) if color)

    # --- time and thought ---

    def do_time_settings(self, arguments: list[str]) -> None:
        try:
            main, period, stones = (int(word) for word in arguments[:3])
        except ValueError:
            raise Refused("not three integers") from None
        limited = main > 0 or (period > 0 and stones > 0)
        self.clock = Clock(main, period, stones, given=limited and not (period > 0 and stones == 0))

    def do_time_left(self, arguments: list[str]) -> None:
        if not arguments or arguments[0].lower() not in COLORS:
            raise Refused("invalid color")
        try:
            left, stones = (int(word) for word in arguments[1:3])
        except ValueError:
            raise Refused("time and stones not two integers") from None
        self.clock.left[COLORS[arguments[0].lower()]] = (left, stones)
        self.clock.given = True

    def do_genmove(self, arguments: list[str]) -> str:
        move = self._think(self._color(arguments))
        self.positions.append(self.position.by(self._color(arguments)).after(move))
        return vertex(move, self.position.size).replace("pass", "PASS")

    def do_reg_genmove(self, arguments: list[str]) -> str:
        return vertex(self._think(self._color(arguments)), self.position.size).replace("pass", "PASS")

    def do_lz_analyze(
        self, arguments: list[str], number: str, emit: Callable[[str], None], interrupted: Callable[[], bool]
    ) -> str:
        """`[color] [interval in 1/100 s] [key value]..`; keys: interval, maxmoves, ownership."""
        return self._analyse(arguments, number, emit, interrupted, _lz_line)

    def do_kata_analyze(
        self, arguments: list[str], number: str, emit: Callable[[str], None], interrupted: Callable[[], bool]
    ) -> str:
        return self._analyse(arguments, number, emit, interrupted, _kata_line)

    def _analyse(
        self, arguments: list[str], number: str, emit: Callable[[str], None], interrupted: Callable[[], bool],
        text: Callable[[Thought, int, int], str],
    ) -> str:  # fmt: skip
        words, keys = list(arguments), {"interval": "100", "maxmoves": "999", "ownership": "false"}
        color = COLORS[words.pop(0).lower()] if words and words[0].lower() in COLORS else self.position.to_move
        if words and words[0].isdigit():
            keys["interval"] = words.pop(0)
        if len(words) % 2 or set(words[::2]) - keys.keys():
            raise Refused("unknown analysis option")
        keys |= dict(zip(words[::2], words[1::2], strict=True))
        every, most = (
            _integer([keys["interval"]], "interval not an integer"),
            _integer([keys["maxmoves"]], "not an integer"),
        )
        position = self.position.by(color)
        emit(f"={number}\n")

        def show(thought: Thought) -> bool:
            line = text(thought, position.size, most)
            if keys["ownership"] == "true":
                own = self.player.owners(position, self.komi) * (1 if color == BLACK else -1)
                line += " ownership " + " ".join(f"{value:.3f}" for value in own)
            emit(line + "\n")
            return not interrupted()

        self.player.think(position, self.komi, watch=show, every_s=max(every, 5) / 100)
        return "\n"

    # --- inside ---

    def record(self) -> GameRecord:
        """The game so far."""
        first, last = self.positions[0], self.position
        color = first.to_move if not self.handicap else WHITE
        moves = []
        for before, after in zip(self.positions, self.positions[1:], strict=False):
            color = other(after.to_move)
            moves.append((color, after.moves[len(before.moves)]))
        stones = first.stones
        return GameRecord(
            last.size, tuple(moves), self.komi, tuple(p for p, c in enumerate(stones) if c == BLACK),
            tuple(p for p, c in enumerate(stones) if c == WHITE), first.to_move, self.handicap,
        )  # fmt: skip

    def _begin(self, position: Position) -> None:
        self.positions, self.handicap = [position], 0

    def _only_on_an_empty_board(self) -> None:
        if any(self.position.stones):
            raise Refused("board not empty")

    def _set_handicap(self, points: list[int]) -> str:
        size = self.position.size
        stones = [BLACK if point in points else 0 for point in range(size * size)]
        self._begin(Position.of(size, stones, WHITE))
        self.handicap = len(points)
        return " ".join(vertex(point, size) for point in sorted(points))

    def _color(self, arguments: list[str]) -> int:
        if not arguments or arguments[0].lower() not in COLORS:
            raise Refused("invalid color")
        return COLORS[arguments[0].lower()]

    def _color_and_move(self, arguments: list[str]) -> tuple[int, int]:
        if len(arguments) < 2 or arguments[0].lower() not in COLORS:
            raise Refused("invalid color or coordinate")
        try:
            return COLORS[arguments[0].lower()], move_of(arguments[1], self.position.size)
        except PrairieError:
            raise Refused("invalid color or coordinate") from None

    def _think(self, color: int) -> int:
        position = self.position.by(color)
        moves_left = max(10.0, (0.8 * position.pass_move - len(position.moves)) / 2)
        return self.player.think(position, self.komi, seconds=self.clock.allowance_s(color, moves_left)).move


COMMANDS = """
    boardsize clear_board final_score final_status_list fixed_handicap genmove get_komi is_legal kata-analyze
    known_command komi last_move list_commands loadsgf lz-analyze name place_free_handicap play printsgf
    protocol_version quit reg_genmove set_free_handicap showboard time_left time_settings undo version
""".split()  # noqa: SIM905 - as a list it is thirty lines
ANALYSES = {"lz-analyze", "kata-analyze"}


def serve(engine: Engine, lines: TextIO, out: TextIO) -> None:
    """Answers until `quit` or the end of the input. A thread reads ahead, so that the next line ends an analysis."""
    waiting: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in lines:
            waiting.put(line)
        waiting.put(None)

    def emit(text: str) -> None:
        out.write(text)
        out.flush()

    threading.Thread(target=read, daemon=True).start()
    for line in iter(waiting.get, None):
        emit(engine.answer(line, emit, lambda: not waiting.empty()))
        if not engine.running:
            return


def _lz_line(thought: Thought, size: int, most: int) -> str:
    return " ".join(
        f"info move {vertex(c.move, size)} visits {c.visits} winrate {c.winrate * 10000:.0f} "
        f"prior {c.prior * 10000:.0f} order {order} pv {_vertices(c.line, size)}"
        for order, c in enumerate(thought.candidates[:most])
    )


def _kata_line(thought: Thought, size: int, most: int) -> str:
    return " ".join(
        f"info move {vertex(c.move, size)} visits {c.visits} winrate {c.winrate:.6f} prior {c.prior:.6f} "
        f"order {order} pv {_vertices(c.line, size)}"
        for order, c in enumerate(thought.candidates[:most])
    )


def _vertices(line: tuple[int, ...], size: int) -> str:
    return " ".join(vertex(move, size) for move in line)


def _integer(words: list[str], otherwise: str) -> int:
    try:
        return int(words[0])
    except (IndexError, ValueError):
        raise Refused(otherwise) from None


def _real(words: list[str], otherwise: str) -> float:
    try:
        return float(words[0])
    except (IndexError, ValueError):
        raise Refused(otherwise) from None
