"""Go over HTTP: which lines play, what a game stands like, and a champion's thoughts while it thinks.

Games are kept by the client: each request brings all moves, and the rules of `prairie.games` say what they came to.
One search runs at a time, in a thread of its own, beside the engines that write. Not here: the board that people see
(`prairie/web/go.js`), search, matches (`prairie go`).
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from prairie.errors import BusyError, NotFoundError, RequestError

if TYPE_CHECKING:
    from prairie.games.features import TowerJudge
    from prairie.games.go import Position
    from prairie.games.player import Look, Thought
    from prairie.serve.models import Models
    from prairie.store.home import Home
    from prairie.store.registry import Version

MOST_VISITS = 5_000
MOST_WAITING = 16
"""Searches in the queue; more are told to come back."""
KEPT_NETS = 4
SHOWN_EVERY_S = 0.15
SHOWN_MOVES = 8
"""Candidates that a thought names, best first."""


class Game(BaseModel):
    """A game as far as it went: black and white in turn, black first."""

    model_config = ConfigDict(extra="ignore")
    size: int = Field(ge=2, le=19)
    moves: list[str] = Field([], max_length=1200)
    """D4, or pass."""
    komi: float = Field(0.5, ge=-400, le=400)


class Question(Game):
    """What would `model` play here?"""

    model: str = Field(max_length=200)
    visits: int = Field(200, ge=2, le=MOST_VISITS)


class BoardRoom:
    """The nets in memory and the thread that thinks."""

    def __init__(self, home: Home, models: Models) -> None:
        self.home, self.models = home, models
        self._thread = ThreadPoolExecutor(1, "prairie-go")
        self._judges: OrderedDict[str, TowerJudge] = OrderedDict()
        self._waiting = 0

    def lines(self) -> list[dict[str, Any]]:
        """Every line that plays, with its champion and the boards that its net is for."""
        found = []
        for line in self.home.registry.lines():
            champion = self.home.registry.champion(line)
            if champion is not None and champion.kind == "tower" and self.models.serves(line):
                turns = len(self.home.registry.turns(line))
                found.append(
                    {"line": line, "champion": champion.name, "boards": self._boards(champion), "turns": turns}
                )
        return found

    def curve(self, line: str) -> dict[str, Any]:
        """The line's turns with what they cost and brought. Raises NotFoundError."""
        from prairie.games.curve import Step, learning_curve

        registry, store = self.home.registry, self.home.artifacts
        turns = registry.turns(line)
        if not turns:
            registry.versions(line)
        steps, told = [], []
        for turn in turns:
            made = [store.find(str(id)) for id in (turn.dataset, turn.candidate)]
            cpu_s = sum(float(artifact.figures.get("cpu_s", 0)) for artifact in made if artifact is not None)
            verdict = turn.verdict
            steps.append(Step(cpu_s, float(verdict["win_rate"] or 0.5), turn.promoted))
            health = made[0].figures.get("health") if made[0] is not None else None
            told.append({
                "turn": turn.number, "promoted": turn.promoted, "win_rate": verdict["win_rate"], "low": verdict["low"],
                "high": verdict["high"], "games": verdict["n"], "created": turn.created, "health": health,
            })  # fmt: skip
        return {"line": line, "turns": [
            {**row, **point.to_json()} for row, point in zip(told, learning_curve(steps), strict=True)
        ]}  # fmt: skip

    async def think(self, asked: Question) -> AsyncIterator[str]:
        """Server-sent events: the position, thoughts as they grow, the last one with the move to play.

        Raises before the first event: NotFoundError, RequestError, ModelError, BusyError.
        """
        if self._waiting >= MOST_WAITING:
            raise BusyError("too many searches are waiting", got=self._waiting, mend="ask again in a moment")
        position = await asyncio.to_thread(position_of, asked)
        if position.over:
            raise RequestError("the game is over", got="two passes", wanted="a game that goes on")
        version = await asyncio.to_thread(self._resolve, asked.model)
        self._waiting += 1
        try:
            judge = await asyncio.get_running_loop().run_in_executor(self._thread, self._judge, version)
            judge.check(position.size)
        except BaseException:
            self._waiting -= 1
            raise
        return self._events(asked, position, version, judge)

    async def _events(
        self, asked: Question, position: Position, version: Version, judge: TowerJudge
    ) -> AsyncIterator[str]:
        from prairie.games.player import Player

        loop, gone = asyncio.get_running_loop(), threading.Event()
        news: asyncio.Queue[tuple[Look, Thought] | Exception | None] = asyncio.Queue()

        def search() -> None:
            told: tuple[Look, Thought] | Exception | None = None
            try:
                player = Player(judge, visits=asked.visits)
                look = player.look(position, asked.komi)

                def watch(thought: Thought) -> bool:
                    loop.call_soon_threadsafe(news.put_nowait, (look, thought))
                    return not gone.is_set()

                player.think(position, asked.komi, watch=watch, every_s=SHOWN_EVERY_S, visits=asked.visits)
            except Exception as error:
                told = error
            loop.call_soon_threadsafe(news.put_nowait, told)

        searching = loop.run_in_executor(self._thread, search)
        try:
            while (item := await news.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                thought = thought_json(*item, position, version.name)
                yield f"data: {json.dumps(thought)}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            gone.set()
            self._waiting -= 1
            await asyncio.shield(searching)

    def _resolve(self, name: str) -> Version:
        version = self.home.registry.resolve(name)
        if not self.models.serves(name):
            raise NotFoundError("no such line is served here", got=f"`{name}`")
        if version.kind != "tower":
            raise RequestError(f"{version.name} does not play Go", got=version.kind, wanted="a line of a Go recipe",
                               param="model")  # fmt: skip
        return version

    def _judge(self, version: Version) -> TowerJudge:
        """The version's net, from memory or disk; the least used one leaves."""
        from prairie.games import require

        require()
        from prairie.games.features import TowerJudge
        from prairie.models.tower import load_tower

        judge = self._judges.pop(version.artifact_id, None)
        if judge is None:
            judge = TowerJudge(load_tower(self.home.artifacts.get(version.artifact_id).path), seed=None)
        self._judges[version.artifact_id] = judge
        while len(self._judges) > KEPT_NETS:
            self._judges.popitem(last=False)
        return judge

    def _boards(self, version: Version) -> list[int]:
        from prairie.models.weights import read_json

        return list(read_json(self.home.artifacts.get(version.artifact_id).path / "tower.json")["boards"])

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def position_of(game: Game) -> Position:
    """The game played through. Raises RequestError for a move that is no point or illegal, with its number."""
    from prairie.games.go import Position, move_of

    position = Position.empty(game.size)
    for number, text in enumerate(game.moves, 1):
        try:
            if position.over:
                raise RequestError("the game is over", got=text, wanted="no move after two passes")
            position = position.after(move_of(text, game.size))
        except RequestError as error:
            raise RequestError(
                f"move {number}: {error.what}", got=error.got, wanted=error.wanted, param="moves"
            ) from None
    return position


def position_json(game: Game) -> dict[str, Any]:
    """The board, whose turn it is, what may be played; once it is over the result and the game as SGF."""
    from prairie.games.go import BLACK, WHITE, vertex
    from prairie.games.sgf import GameRecord, result_text, write_sgf

    position = position_of(game)
    moves = tuple((BLACK if k % 2 == 0 else WHITE, move) for k, move in enumerate(position.moves))
    score = position.score(game.komi)
    result = result_text(score) if position.over else ""
    return {
        "object": "go.position", "size": game.size, "komi": game.komi, "stones": list(position.stones),
        "to_move": "black" if position.to_move == BLACK else "white",
        "legal": [] if position.over else [vertex(move, game.size) for move in position.legal_moves()],
        "moves": [vertex(move, game.size) for move in position.moves], "over": position.over, "score": score,
        "owners": list(position.owners), "result": result,
        "sgf": write_sgf(GameRecord(game.size, moves, game.komi, result=result)),
    }  # fmt: skip


def thought_json(look: Look, thought: Thought, position: Position, name: str) -> dict[str, Any]:
    """`policy` and `owner` are the net's own, point by point (the pass last); win rate and lead are black's."""
    from prairie.games.go import BLACK, vertex

    black = position.to_move == BLACK
    return {
        "object": "go.thought", "model": name, "visits": thought.visits, "move": vertex(thought.move, position.size),
        "black_wins": round(thought.winrate if black else 1 - thought.winrate, 4),
        "black_leads": round(look.lead if black else -look.lead, 2),
        "policy": [round(float(p), 4) for p in look.policy_M], "owner": [round(float(o), 3) for o in look.owner_P],
        "candidates": [
            {
                "move": vertex(c.move, position.size), "visits": c.visits, "win": round(c.winrate, 4),
                "line": [vertex(move, position.size) for move in c.line],
            }
            for c in thought.candidates[:SHOWN_MOVES]
        ],
    }  # fmt: skip


def routes(app: FastAPI, room: BoardRoom) -> None:
    """The routes of Go, behind the same gate as all others."""

    @app.get("/v1/go/lines", tags=["go"])
    async def go_lines() -> dict[str, Any]:
        """The lines that play Go."""
        return {"object": "list", "data": await asyncio.to_thread(room.lines)}

    @app.get("/v1/go/lines/{line}", tags=["go"])
    async def go_curve(line: str) -> dict[str, Any]:
        """A line's learning curve: Elo by CPU-minute, turn by turn."""
        return await asyncio.to_thread(room.curve, line)

    @app.post("/v1/go/position", tags=["go"])
    async def go_position(body: Game) -> dict[str, Any]:
        """What moves came to: stones, legal moves, and at the end the score."""
        return await asyncio.to_thread(position_json, body)

    @app.post("/v1/go/think", tags=["go"])
    async def go_think(body: Question) -> StreamingResponse:
        """What a line would play, as server-sent events: policy, value and ownership while it thinks."""
        return StreamingResponse(await room.think(body), media_type="text/event-stream")
