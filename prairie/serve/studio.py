"""What the studio page shows: live traffic, votes, turns with their verdicts, lineage; and its two buttons.

Everything is read from the store, so it is true for whatever process made it. No text of a conversation is among it:
who may see the page may not therefore read what people wrote. Promoting and rolling back are for administrators.
Not here: the page (`prairie/web/studio.js`), what a turn does (`prairie.flywheel`).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from prairie.store.audit import record

if TYPE_CHECKING:
    from prairie.serve.choices import Desk
    from prairie.store.feedback import FeedbackEvent, Glimpse, Response
    from prairie.store.home import Home
    from prairie.store.registry import Registry, Turn

BUCKETS = 30
"""Bars of the traffic of an hour."""
LATEST = 40
"""Answers and votes that are listed, newest first."""


class Promotion(BaseModel):
    """Which version, and why; the reason stays in the line's history."""

    model_config = ConfigDict(extra="ignore")
    version: int = Field(ge=1)
    why: str | None = Field(None, max_length=500)


class Return(BaseModel):
    """Why a line goes back to the champion before."""

    model_config = ConfigDict(extra="ignore")
    why: str | None = Field(None, max_length=500)


class Studio:
    """Readings of one home."""

    def __init__(self, home: Home, desk: Desk) -> None:
        self.home, self.desk = home, desk
        self._counted: tuple[tuple[int, int], dict[str, Any]] | None = None

    def lines(self) -> list[dict[str, Any]]:
        """Every line: its champion, its versions, when its champion changed, the new base that a vertical waits for."""
        registry = self.home.registry
        waiting = registry.waiting()
        return [
            {**_line(registry, line), "waits_for": waiting[line].name if line in waiting else None}
            for line in registry.lines()
        ]

    def traffic(self, minutes: int = 60) -> dict[str, Any]:
        """Answers of the last hour in bars, and by version; the newest ones without their text."""
        now, store = time.time(), self.home.feedback
        since = now - 60 * minutes
        answers, width = store.glimpses(since), 60 * minutes / BUCKETS
        bars = [{"answers": 0, "aborted": 0, "votes": 0} for _ in range(BUCKETS)]
        for answer in answers:
            bar = bars[_bucket(now - answer.created, width)]
            bar["answers"] += 1
            bar["aborted"] += answer.status == "aborted"
        for said in store.said_at(since):
            bars[_bucket(now - said, width)]["votes"] += 1
        latest = store.responses(since=since, newest=LATEST)
        return {
            "pending": self.desk.pending, "minutes": minutes, "bars": bars, "versions": _by_version(answers),
            "latest": [_told(answer) for answer in reversed(latest)],
        }  # fmt: skip

    def votes(self) -> dict[str, Any]:
        """Counts of all votes, and the newest ones with what became of them."""
        events = self.home.feedback.events(newest=LATEST)
        fates = self._fates(events)
        return {**self._counts(), "latest": [fates[event.id] for event in reversed(events)]}

    def _counts(self) -> dict[str, Any]:
        """Of all votes. Counting reads each of them, so it is done again only when there is another one."""
        store = self.home.feedback
        mark = store.mark()
        if self._counted is None or self._counted[0] != mark:
            counts = store.stats(purpose="chat")
            keys = ("events", "by_kind", "current", "thumbs", "users")
            self._counted = (mark, {key: counts[key] for key in keys})
        return self._counted[1]

    def votes_of(self, user: str) -> list[dict[str, Any]]:
        """What became of one person's votes, newest first."""
        events = self.home.feedback.events(users=[user])
        fates = self._fates(events)
        return [fates[event.id] for event in reversed(events)]

    def turns(self, line: str) -> list[dict[str, Any]]:
        """The line's turns with their verdicts, newest first. Raises NotFoundError."""
        registry = self.home.registry
        names = {version.artifact_id: version.name for version in registry.versions(line)}
        found = []
        for turn in reversed(registry.turns(line)):
            dataset = self.home.artifacts.find(str(turn.dataset))
            found.append({
                **turn.to_json(), "champion_name": names.get(str(turn.champion)),
                "candidate_name": names.get(str(turn.candidate)),
                "rows": dataset.figures.get("rows") if dataset is not None else None,
                "votes": len(dataset.events) if dataset is not None else 0,
            })  # fmt: skip
        return found

    def lineage(self, name: str) -> dict[str, Any]:
        """What a version was made from, as nodes and arrows. Raises NotFoundError."""
        tree = self.home.registry.lineage(name)
        names = {v.artifact_id: v.name for v in self.home.registry.versions(tree["line"])}
        nodes: dict[str, dict[str, Any]] = {}
        arrows: set[tuple[str, str]] = set()

        def visit(node: dict[str, Any], depth: int) -> None:
            known = nodes.get(node["id"])
            if known is None or not node.get("repeated"):
                nodes[node["id"]] = {
                    "id": node["id"], "kind": node.get("kind", "missing"), "name": node.get("name", ""),
                    "version": names.get(node["id"]), "events": len(node.get("events", ())),
                    "rows": (node.get("figures") or {}).get("rows"),
                    "depth": max(depth, known["depth"] if known else 0),
                }  # fmt: skip
            else:
                known["depth"] = max(depth, known["depth"])
            for below in node.get("inputs", ()):
                arrows.add((below["id"], node["id"]))
                visit(below, depth + 1)

        for root in ("artifact", "base"):
            if root in tree:
                visit(tree[root], 0 if root == "artifact" else 1)
        if "base" in tree:
            arrows.add((tree["base"]["id"], tree["artifact"]["id"]))
        return {"name": tree["name"], "nodes": list(nodes.values()), "arrows": sorted(arrows), "judged": tree["judged"],
                "history": tree["history"]}  # fmt: skip

    def _fates(self, events: Sequence[FeedbackEvent]) -> dict[str | None, dict[str, Any]]:
        """Event id -> the event without its text, and which turns learned from it."""
        answers = self.home.feedback.responses_by_id(event.response_id for event in events)
        lines = {answer.line for answer in answers.values() if answer.line}
        known = set(self.home.registry.lines())
        turns = {line: self._learned(line) for line in lines if line in known}
        return {event.id: self._fate(event, answers[event.response_id], turns) for event in events}

    def _learned(self, line: str) -> list[tuple[Turn, set[str], str]]:
        """Each turn, the events it learned from, the name of its candidate."""
        names = {version.artifact_id: version.name for version in self.home.registry.versions(line)}
        found = []
        for turn in self.home.registry.turns(line):
            dataset = self.home.artifacts.find(str(turn.dataset))
            events = set(dataset.events) if dataset is not None else set()
            found.append((turn, events, names.get(str(turn.candidate), "")))
        return found

    @staticmethod
    def _fate(
        event: FeedbackEvent, answer: Response, learned: dict[str, list[tuple[Turn, set[str], str]]]
    ) -> dict[str, Any]:
        turns = learned.get(answer.line or "", [])
        used = [
            {"turn": turn.number, "candidate": name, "promoted": turn.promoted}
            for turn, events, name in turns
            if event.id in events
        ]
        passed_by = [turn.number for turn, _, _ in turns if turn.created > event.created]
        return {
            "id": event.id, "kind": event.kind, "thumb": event.thumb, "created": event.created, "line": answer.line,
            "response_id": event.response_id, "model": answer.model, "used": used,
            # Looked at and not learned from: it judges candidates, or the rules of `curate` left it out.
            "passed_by": [] if used else passed_by,
        }  # fmt: skip


def _line(registry: Registry, line: str) -> dict[str, Any]:
    champion = registry.champion(line)
    history = registry.history(line)
    return {
        "line": line, "champion": champion.number if champion else None,
        "kind": champion.kind if champion else None,
        "versions": [
            {"name": v.name, "number": v.number, "artifact_id": v.artifact_id, "created": v.created, "kind": v.kind}
            for v in registry.versions(line)
        ],
        "turns": len(registry.turns(line)),
        "history": [{key: value for key, value in event.to_json().items() if key != "verdict"} for event in history],
    }  # fmt: skip


def _by_version(answers: Sequence[Glimpse]) -> list[dict[str, Any]]:
    """Counts and speed of each version, the busiest first."""
    of: dict[tuple[str | None, str | None], list[Glimpse]] = {}
    for answer in answers:
        of.setdefault((answer.line, answer.version_id), []).append(answer)
    found = []
    for (line, version), mine in sorted(of.items(), key=lambda pair: -len(pair[1])):
        slow = [a.latency_ms for a in mine if a.latency_ms is not None]
        found.append({
            "line": line, "artifact_id": version, "answers": len(mine),
            "aborted": sum(a.status == "aborted" for a in mine),
            "median_ms": round(statistics.median(slow), 1) if slow else None,
        })  # fmt: skip
    return found


def _told(answer: Response) -> dict[str, Any]:
    return {
        "id": answer.id, "created": answer.created, "status": answer.status, "model": answer.model, "line": answer.line,
        "artifact_id": answer.version_id, "tokens": len(answer.token_ids or ()), "latency_ms": answer.latency_ms,
        "surface": answer.surface, "purpose": answer.purpose,
    }  # fmt: skip


def _bucket(age_s: float, width_s: float) -> int:
    """Bar of something so old; the newest is the last one."""
    return min(BUCKETS - 1, max(0, BUCKETS - 1 - int(age_s // width_s)))


def routes(app: FastAPI, studio: Studio, admit: Callable[[Request], str]) -> None:
    """The studio's routes, behind the same gate as all others; `admit` says which administrator asks, or refuses."""
    registry = studio.home.registry

    @app.get("/v1/studio/lines", tags=["studio"])
    async def studio_lines() -> dict[str, Any]:
        """Lines, versions, champions and their history."""
        return {"object": "list", "data": await asyncio.to_thread(studio.lines)}

    @app.get("/v1/studio/traffic", tags=["studio"])
    async def studio_traffic() -> dict[str, Any]:
        """The last hour's answers and votes, without their text."""
        return await asyncio.to_thread(studio.traffic)

    @app.get("/v1/studio/votes", tags=["studio"])
    async def studio_votes(user: str | None = None) -> dict[str, Any]:
        """Votes and what became of them: of everybody, or of the person `user`."""
        if user is None:
            return await asyncio.to_thread(studio.votes)
        return {"object": "list", "data": await asyncio.to_thread(studio.votes_of, user)}

    @app.get("/v1/studio/turns/{line}", tags=["studio"])
    async def studio_turns(line: str) -> dict[str, Any]:
        """A line's turns with their verdicts."""
        return {"object": "list", "data": await asyncio.to_thread(studio.turns, line)}

    @app.get("/v1/studio/lineage/{version}", tags=["studio"])
    async def studio_lineage(version: str) -> dict[str, Any]:
        """What a version was made from, as a graph."""
        return await asyncio.to_thread(studio.lineage, version)

    @app.post("/v1/studio/lines/{line}/promote", tags=["studio"])
    async def studio_promote(line: str, body: Promotion, request: Request) -> dict[str, Any]:
        """Makes a version champion; administrators only."""
        who = admit(request)
        version = await asyncio.to_thread(registry.resolve, f"{line}@{body.version}")
        await asyncio.to_thread(record, studio.home.root, who, "promote", version=version.name)
        made = await asyncio.to_thread(lambda: registry.promote(version, who=who, why=body.why))
        return {"line": line, "champion": made.name}

    @app.post("/v1/studio/lines/{line}/rollback", tags=["studio"])
    async def studio_rollback(line: str, body: Return, request: Request) -> dict[str, Any]:
        """Makes the champion before the present one champion again; administrators only."""
        who = admit(request)
        await asyncio.to_thread(record, studio.home.root, who, "roll back", line=line)
        made = await asyncio.to_thread(lambda: registry.rollback(line, who=who, why=body.why))
        return {"line": line, "champion": made.name}
