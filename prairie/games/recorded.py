"""Games of others as positions to learn from: records on disk, or an engine that plays itself over GTP.

A move becomes the policy of its position, the end of the game its outcome, lead and ownership. So the end must be
known: a game counts only if the area on its last board (dead stones taken off, where the engine says which) has the
winner that its result names. What is left out is counted. Not here: training, matches (`match`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from prairie.data.positions import PositionDataset
from prairie.errors import DataError, GameError
from prairie.games.features import encode
from prairie.games.go import BLACK, EMPTY, WHITE, Boards, Position, move_of, vertex
from prairie.games.match import Declined, Engine
from prairie.games.sgf import GameRecord, result_text

FEWEST_MOVES = 5
"""A shorter game teaches nothing."""


def engine_games(
    engine: Engine, size: int, games: int, *, komi: float, opening_moves: int, seed: int,
    on_game: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[GameRecord, Position]]:  # fmt: skip
    """The engine against itself from random openings: each game, and its last board without the dead stones.

    Raises GameError when the engine fails or resigns a game, so that nobody knows how it would have ended.
    """
    for number in range(games):
        for command in (f"boardsize {size}", "clear_board", f"komi {komi:g}"):
            engine.ask(command)
        position, chance = Position.empty(size), np.random.default_rng([seed, number])
        while not position.over and len(position.moves) < 3 * position.pass_move:
            name = "black" if position.to_move == BLACK else "white"
            if len(position.moves) < opening_moves:
                move = int(chance.choice(position.legal_moves()[:-1]))
                engine.ask(f"play {name} {vertex(move, size)}")
            else:
                said = engine.ask(f"genmove {name}")
                if said.lower() == "resign":
                    raise GameError(
                        f"the engine `{engine.command}` resigns", got="a game without an end",
                        mend="tell it not to, as GNU Go by --never-resign",
                    )  # fmt: skip
                move = move_of(said, size)
                if position.why_illegal(move) is not None:  # the engine has another rule for ko: the game ends here
                    break
            position = position.after(move)
        cleaned = _without_dead(engine, position)
        moves = tuple((BLACK if k % 2 == 0 else WHITE, move) for k, move in enumerate(position.moves))
        on_game(1)
        yield GameRecord(size, moves, komi, result=result_text(cleaned.score(komi))), cleaned


def rows_of(games: Sequence[tuple[GameRecord, Position | None]], size: int) -> tuple[PositionDataset, Counter[str]]:
    """A row for every move of the games that count, and how many did not, by reason. Without a last board the one that
    the record ends with is taken. Raises DataError when nothing is left."""
    columns: dict[str, list[Any]] = {name: [] for name in ("planes", "figures", "policy", "outcome", "lead", "owner")}
    left_out: Counter[str] = Counter()
    for record, last in games:
        why = _why_not(record, size)
        if why is None:
            try:
                last = last or list(record.positions())[-1]
            except DataError:
                why = "an illegal move"
        if why is None and last is not None and np.sign(last.score(record.komi)) != _sign(record.winner()):
            why = "its last board does not say who won"
        if why is not None or last is None:
            left_out[why or "no end"] += 1
            continue
        _add(columns, record, last)
    if not columns["policy"]:
        raise DataError(
            "no game can be learnt from", got=", ".join(f"{n} with {why}" for why, n in left_out.items()) or "no game",
            wanted=f"whole games on {size} lines from an empty board",
        )  # fmt: skip
    return PositionDataset({name: np.stack(values) for name, values in columns.items()}), left_out


def _add(columns: dict[str, list[Any]], record: GameRecord, last: Position) -> None:
    size, points = record.size, record.size**2
    boards = Boards.empty(size, 1, len(record.moves) + 1)
    score, owner = last.score(record.komi), np.array(last.owners, np.int8).reshape(size, size)
    for color, move in record.moves:
        sign = 1 if color == BLACK else -1
        planes, figures = encode(boards, np.array([record.komi]))
        policy = np.zeros(points + 1, np.float32)
        policy[move] = 1
        values = (planes[0], figures[0], policy, np.sign(sign * score), sign * score, sign * owner)
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value)
        boards.play([move])


def _why_not(record: GameRecord, size: int) -> str | None:
    if record.size != size:
        return "another board"
    if record.black or record.white:
        return "stones before the first move"
    if len(record.moves) < FEWEST_MOVES:
        return "hardly a move"
    if any(color != (BLACK if k % 2 == 0 else WHITE) for k, (color, _) in enumerate(record.moves)):
        return "moves out of turn"
    return None if record.winner() is not None else "no result"


def _sign(winner: int | None) -> int:
    return 1 if winner == BLACK else -1 if winner == WHITE else 0


def _without_dead(engine: Engine, position: Position) -> Position:
    """The board after the stones that the engine calls dead were taken off."""
    try:
        dead = [move_of(word, position.size) for word in engine.ask("final_status_list dead").split()]
    except Declined:
        return position
    stones = tuple(EMPTY if point in dead else color for point, color in enumerate(position.stones))
    return replace(position, stones=stones)
