"""A match: our player against an engine that speaks GTP over a pipe. Every game is an SGF on the disk before the next.

A match is a folder; the same command goes on where it stopped. An engine that is missing, dies, hangs or answers
nonsense ends the match with one sentence; the games that were played stay. Not here: Elo (`prairie.evals`).
"""

from __future__ import annotations

import json
import queue
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from prairie.errors import DataError, GameError, StorageFullError, StoreError
from prairie.games.go import BLACK, EMPTY, WHITE, Position, move_of, other, vertex
from prairie.games.player import Player
from prairie.games.sgf import GameRecord, read_sgf, result_text, write_sgf

PLACES = ("/usr/games", "/usr/local/games")
"""Where Debian puts games, often outside PATH."""


class Engine:
    """A program that speaks GTP. Raises GameError when it is missing, dies, hangs or answers what is no GTP."""

    def __init__(self, command: str, *, limit_s: float = 60.0) -> None:
        self.command, self.limit_s = command, limit_s
        words = shlex.split(command)
        program = shutil.which(words[0]) if words else None
        for place in PLACES if words else ():
            program = program or shutil.which(words[0], path=place)
        if program is None:
            raise GameError(
                "the engine of a match is not on this machine", got=words[0] if words else "an empty command",
                mend="install it (Debian: apt install gnugo) or give its whole path",
            )  # fmt: skip
        self.process = subprocess.Popen(
            [program, *words[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            errors="replace", bufsize=1,
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, command: str) -> str:
        """The answer to one command. Raises GameError for a failure of the engine, `Declined` for its `?`."""
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        except OSError:
            raise self._failed("has died", command) from None
        text: list[str] = []
        while True:
            try:
                line = self._lines.get(timeout=self.limit_s)
            except queue.Empty:
                raise self._failed(f"has not answered for {self.limit_s:g} s", command) from None
            if line is None:
                raise self._failed("has died", command)
            if not text and not line.strip():
                continue
            if not text and line[:1] not in "=?":
                raise self._failed(f"answers what is no GTP ({line.strip()[:40]!r})", command)
            if not line.strip():
                break
            text.append(line.rstrip("\r\n"))
        answer = "\n".join([text[0][1:].lstrip("0123456789").strip(), *text[1:]]).strip()
        if text[0].startswith("?"):
            raise Declined(answer)
        return answer

    def close(self) -> None:
        """Ends the program, kindly first."""
        try:
            if self.process.stdin is not None:
                self.process.stdin.write("quit\n")
                self.process.stdin.close()
            self.process.wait(2)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _failed(self, how: str, command: str) -> GameError:
        self.process.kill()
        return GameError(
            f"the engine `{self.command}` {how}", got=f"after the command `{command}`",
            mend="the games played so far are kept; the same command goes on with the match",
        )  # fmt: skip

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Declined(Exception):
    """The engine answered a command with `?`."""


@dataclass(frozen=True)
class Terms:
    """What a match is played under; two matches of the same terms are one match."""

    player: str
    """Which net, how many visits."""
    engine: str
    size: int
    komi: float
    games: int
    color: str
    """black, white or both: ours"""
    opening_moves: int = 0
    """Random moves that each pair of games begins with."""
    seed: int = 0

    def ours(self, game: int) -> int:
        """Our colour in game 0, 1, .."""
        return {"black": BLACK, "white": WHITE, "both": BLACK if game % 2 == 0 else WHITE}[self.color]


@dataclass(frozen=True)
class Played:
    """One finished game; `outcome` 1 we won, 1/2 a draw, 0 we lost."""

    number: int
    color: int
    outcome: float
    result: str
    moves: int


def play_match(terms: Terms, player: Player, engine: Engine, folder: Path) -> Iterator[Played]:
    """Yields every game of the match, those of earlier runs first.

    Raises GameError when the engine fails, DataError when the folder holds another match or a damaged game, ModelError
    for a board that the net was not made for, StorageFullError when a game cannot be written.
    """
    player.judge.check(terms.size)
    _claim(folder, terms)
    for number in range(terms.games):
        path = folder / f"game-{number + 1:04d}.sgf"
        if path.is_file():
            record = _kept(path, terms)
        else:
            record = play_game(terms, number, player, engine)
            _write(path, write_sgf(record))
        color, winner = terms.ours(number), record.winner()
        outcome = 0.5 if winner in (EMPTY, None) else float(winner == color)
        yield Played(number, color, outcome, record.result, len(record.moves))


def play_game(terms: Terms, number: int, player: Player, engine: Engine) -> GameRecord:
    """One game to two passes, a resignation, or 3 moves a point.

    The score is the engine's own `final_score` where it can count, since it knows which stones are dead; else the area
    on the board. Raises GameError.
    """
    for command in (f"boardsize {terms.size}", "clear_board", f"komi {terms.komi:g}"):
        _told(engine, command)
    position, ours = Position.empty(terms.size), terms.ours(number)
    chance = np.random.default_rng([terms.seed, number // 2 if terms.color == "both" else number])
    result = ""
    while not position.over and len(position.moves) < 3 * position.pass_move and not result:
        color = position.to_move
        name = "black" if color == BLACK else "white"
        if len(position.moves) < terms.opening_moves:
            move = int(chance.choice(position.legal_moves()[:-1]))
            _told(engine, f"play {name} {vertex(move, terms.size)}")
        elif color == ours:
            move = player.think(position, terms.komi).move
            _told(engine, f"play {name} {vertex(move, terms.size)}")
        else:
            answer = _told(engine, f"genmove {name}")
            if answer.lower() == "resign":
                result = f"{'B' if other(color) == BLACK else 'W'}+R"
                break
            move = _their_move(engine, answer, position)
        position = position.after(move)
    score = position.score(terms.komi)
    names = (terms.player, terms.engine) if ours == BLACK else (terms.engine, terms.player)
    said = result or _score_of(engine) or result_text(score)
    moves = tuple((BLACK if k % 2 == 0 else WHITE, move) for k, move in enumerate(position.moves))
    comment = f"area on the board: {result_text(score)}; result by {'resignation' if result else 'the engine'}"
    return GameRecord(terms.size, moves, terms.komi, result=said, names=names, comments={len(moves): comment})


def _told(engine: Engine, command: str) -> str:
    try:
        return engine.ask(command)
    except Declined as error:
        raise GameError(
            f"the engine `{engine.command}` does not take `{command}`", got=f"? {error}",
            mend="the games played so far are kept; look whether it plays by the same rules",
        ) from None  # fmt: skip


def _their_move(engine: Engine, answer: str, position: Position) -> int:
    try:
        move = move_of(answer, position.size)
        why = position.why_illegal(move)
    except Exception:
        why, move = "no point", -1
    if why is not None:
        raise GameError(
            f"the engine `{engine.command}` answers a move that cannot be played", got=f"{answer[:40]!r} ({why})",
            wanted="a legal move, pass or resign", mend="the games played so far are kept",
        )  # fmt: skip
    return move


def _score_of(engine: Engine) -> str:
    """B+3.5, W+2, 0; empty when the engine does not count."""
    try:
        answer = engine.ask("final_score")
    except Declined:
        return ""
    if answer == "0":
        return answer
    sign, _, points = answer.partition("+")
    try:
        return f"{sign}+{float(points):g}" if sign in ("B", "W") else ""
    except ValueError:
        return ""


def _claim(folder: Path, terms: Terms) -> None:
    """Writes the terms, or compares them with those of the match that lies there (more games are allowed)."""
    path = folder / "match.json"
    mine = {**asdict(terms), "games": None}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        theirs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise DataError(f"the match in {folder} cannot be read", got=error) from None
    if theirs is not None and theirs != mine:
        unlike = [key for key in mine if theirs.get(key) != mine[key]]
        raise DataError(
            f"{folder} holds another match", got=", ".join(f"{key} {mine[key]}" for key in unlike),
            wanted=", ".join(str(theirs.get(key)) for key in unlike), mend="give this one another folder",
        )  # fmt: skip
    if theirs is None:
        _write(path, json.dumps(mine, indent=2))


def _kept(path: Path, terms: Terms) -> GameRecord:
    """A game of an earlier run. Raises DataError for one that is damaged: it would be counted for what it is not."""
    wanted = f"{terms.size} lines, komi {terms.komi:g}"
    try:
        record = read_sgf(path.read_bytes())[0]
        for _ in record.positions():  # each move is looked at
            pass
        found = f"{record.size} lines, komi {record.komi:g}"
        fits = found == wanted and record.winner() is not None
        why = "" if fits else f"{found}, result {record.result or 'missing'}"
    except (OSError, DataError) as error:
        why = str(error)
    if why:
        raise DataError(
            f"{path} is no finished game of this match", got=why, wanted=f"{wanted}, a result",
            mend="remove the file, and the game is played again",
        )  # fmt: skip
    return record


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    draft = path.with_suffix(".part")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        kind = StorageFullError if error.errno == 28 else StoreError
        raise kind(f"{path} cannot be written", got=error.strerror, mend="the games before it are kept") from None
