"""What was answered and what people said of it. Answers are rows; feedback is an append-only list of events.

An event is on the disk before `add` returns. Nothing is changed in place: a second thumb or a retraction is another
event, and the current view is derived:

- the latest thumb, rating and edit of a user on a response count, and the latest choice of a user among the same ones;
- every comment counts;
- a retraction takes an event back: if that was the latest, nothing of its kind counts (the one before does not return);
- of what a user did without a word (regenerate, copy, abandon) the latest of a kind on a response counts.

`forget(user)` is the one exception: it deletes. Not here: what is learned from it (`flywheel/`), HTTP (`serve/`).
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, Select, delete, func, select, update

from prairie.data.records import Message, messages_from_json
from prairie.errors import ConflictError, NotFoundError, RequestError
from prairie.recipe import canonical
from prairie.store.home import Home
from prairie.store.schema import FEEDBACK_EVENTS, FORGOTTEN_EVENTS, RESPONSES

SAID = ("thumb", "rating", "choice", "edit", "comment", "retract")
DONE = ("regenerate", "copy", "abandon")
"""What a user did and did not say. It is kept like what was said, and weighs less (`prairie.flywheel.curate`)."""
KINDS = (*SAID, *DONE)
TEXT_LIMIT = 100_000
NAME_LIMIT = 200
CHOICE_LIMIT = 32
CRASHED = "crashed"
FAULT = "error"
"""finish_reason of an answer that the model or its engine could not end."""


@dataclass(frozen=True)
class Response:
    """One answer (one row per choice). Everything that is needed to say where it came from, and to learn from it."""

    id: str
    """`chatcmpl-<hex>` for choice 0, `chatcmpl-<hex>:i` for choice i."""
    model: str
    """The name that was asked for."""
    prompt: tuple[Message, ...] | str
    """Messages, or a string for a raw completion."""
    line: str | None = None
    version_id: str | None = None
    """Artifact id of what answered."""
    weights_hash: str | None = None
    adapter_hash: str | None = None
    template_hash: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    """Of the tokens as they were sampled: what off-policy learning needs."""
    text: str | None = None
    status: str = "started"
    """started, done, aborted or forgotten."""
    finish_reason: str | None = None
    user: str | None = None
    surface: str | None = None
    purpose: str = "chat"
    """chat; gate: votes of a gate judge and are not learned from; shadow: by a version on trial, shown to nobody."""
    latency_ms: float | None = None
    created: float = field(default_factory=time.time)
    """UNIX seconds."""

    def to_json(self) -> dict[str, Any]:
        prompt = self.prompt if isinstance(self.prompt, str) else [message.to_json() for message in self.prompt]
        return {
            **{key: getattr(self, key) for key in _RESPONSE_KEYS},
            "prompt": prompt,
            "sampling": dict(self.sampling),
        }


_RESPONSE_KEYS = tuple(Response.__dataclass_fields__)


@dataclass(frozen=True)
class FeedbackEvent:
    """One thing that a user said of a response. `value` by kind:

    thumb: "up" | "down" | {"thumb": ..., "reasons": [text]} · rating: 1 to 5 · choice: {"over": [response ids],
    "tie": bool, "both_bad": bool} · edit, comment: {"text": ...} · retract: {"event": id} · regenerate: {"new":
    response id} or {} · copy, abandon: {}.
    """

    response_id: str
    kind: str
    value: Any
    user: str | None = None
    surface: str | None = None
    id: str | None = None
    """Given by the store."""
    created: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def thumb(self) -> str | None:
        """up, down, or None for another kind."""
        if self.kind != "thumb":
            return None
        return str(self.value["thumb"] if isinstance(self.value, Mapping) else self.value)

    @property
    def reasons(self) -> list[str]:
        """The reasons given with a thumb."""
        return list(self.value.get("reasons") or []) if isinstance(self.value, Mapping) else []

    @property
    def text(self) -> str | None:
        """The text of an edit or a comment."""
        return self.value["text"] if self.kind in ("edit", "comment") else None


@dataclass(frozen=True)
class Glimpse:
    """Of an answer what traffic is counted by: nothing that was asked or said."""

    created: float
    status: str
    line: str | None
    version_id: str | None
    latency_ms: float | None


@dataclass(frozen=True)
class Vote:
    """An event of the current view together with the answers that it speaks of."""

    event: FeedbackEvent
    response: Response
    over: tuple[Response, ...] = ()
    """choice: the answers it was chosen over, or tied with; regenerate: the answer that was made instead."""

    @property
    def decided(self) -> bool:
        """choice: False for a tie and for both bad, which prefer nothing."""
        value = self.event.value
        return self.event.kind == "choice" and not (value.get("tie") or value.get("both_bad"))

    def to_json(self) -> dict[str, Any]:
        return {
            "event": self.event.to_json(),
            "response": self.response.to_json(),
            "over": [response.to_json() for response in self.over],
        }


class FeedbackStore:
    """Responses and feedback of a home. Threads and processes may share it."""

    def __init__(self, home: Home | Path | str | None = None) -> None:
        self.home = home if isinstance(home, Home) else Home(home)

    # Responses

    def start_response(self, response: Response) -> None:
        """Writes the row before the first byte is sent, so that no vote precedes its target. ConflictError: known."""
        self.start_responses([response])

    def start_responses(self, responses: Sequence[Response]) -> None:
        """All choices of one request in one commit."""
        rows = [response.to_json() for response in responses]

        def run(connection: Connection) -> None:
            ids = [row["id"] for row in rows]
            known = connection.execute(select(RESPONSES.c.id).where(RESPONSES.c.id.in_(ids))).scalars().first()
            if known is not None:
                raise ConflictError(f"response {known} is started already")
            connection.execute(RESPONSES.insert(), rows)

        if rows:
            self.home.database.write(run)

    def finish_response(
        self,
        id: str,
        token_ids: Sequence[int],
        logprobs: Sequence[float] | None,
        text: str,
        finish_reason: str,
        latency_ms: float | None = None,
    ) -> None:
        """The whole answer. Raises NotFoundError, and ConflictError when it is finished already."""
        self._close(id, "done", token_ids, logprobs, text, finish_reason, latency_ms)

    def abort_response(
        self,
        id: str,
        token_ids: Sequence[int] = (),
        logprobs: Sequence[float] | None = None,
        text: str = "",
        finish_reason: str = "cancelled",
        latency_ms: float | None = None,
    ) -> None:
        """What was said until the client left or the engine failed."""
        self._close(id, "aborted", token_ids, logprobs, text, finish_reason, latency_ms)

    def abort_started(self, older_than_s: float | None = None) -> int:
        """Marks responses that a dead server left unfinished as aborted, all or only old ones; returns how many."""
        stale = update(RESPONSES).where(RESPONSES.c.status == "started")
        if older_than_s is not None:
            stale = stale.where(RESPONSES.c.created <= time.time() - older_than_s)
        return self.home.database.write(
            lambda connection: connection.execute(stale.values(status="aborted", finish_reason=CRASHED)).rowcount
        )

    def get_response(self, id: str) -> Response:
        """Raises NotFoundError."""
        with self.home.database.read() as connection:
            return _response(_response_row(connection, id))

    def responses(
        self,
        *,
        line: str | None = None,
        purpose: str | None = None,
        since: float | None = None,
        newest: int | None = None,
    ) -> list[Response]:
        """Answers, oldest first. `since`: UNIX seconds; `newest`: only so many, the last ones."""
        order = (RESPONSES.c.created, RESPONSES.c.id)
        query = _narrow(select(RESPONSES), line, purpose, since)
        with self.home.database.read() as connection:
            return [_response(row) for row in _last(connection, query, order, newest)]

    def responses_by_id(self, ids: Iterable[str]) -> dict[str, Response]:
        """Those of these answers that are there."""
        with self.home.database.read() as connection:
            return {
                row["id"]: _response(row)
                for some in _chunks(sorted(set(ids)), 500)
                for row in connection.execute(select(RESPONSES).where(RESPONSES.c.id.in_(some))).mappings()
            }

    def glimpses(self, since: float) -> list[Glimpse]:
        """Answers since then (UNIX seconds) without what they say, oldest first."""
        columns = [RESPONSES.c[name] for name in Glimpse.__dataclass_fields__]
        query = select(*columns).where(RESPONSES.c.created >= since).order_by(RESPONSES.c.created)
        with self.home.database.read() as connection:
            return [Glimpse(*row) for row in connection.execute(query)]

    # Feedback

    def add(self, event: FeedbackEvent, idempotency_key: str | None = None) -> tuple[str, bool]:
        """Appends an event and returns (its id, True) once it is on the disk; (the first id, False) for a key again.

        Raises ConflictError when the key came with another body, NotFoundError for an unknown response or event,
        RequestError for a kind or value that makes no sense.
        """
        key = secrets.token_hex(16) if idempotency_key is None else idempotency_key
        if not 0 < len(key) <= NAME_LIMIT:
            raise RequestError(
                "an idempotency key has a wrong length", got=len(key), wanted=f"1 to {NAME_LIMIT} characters",
                param="Idempotency-Key",
            )  # fmt: skip
        _validate(event)
        return self.home.database.write(lambda connection: _append(connection, event, key))

    def take_over(self, talks: Iterable[tuple[Response, Sequence[tuple[str, FeedbackEvent]]]]) -> dict[str, int]:
        """Answers that were given elsewhere with what was said of them, each event with its idempotency key.

        What is here already is left as it is, so the same log may be taken over again. A few hundred answers share a
        commit. Counts of new and of known answers and events. Raises as `add`.
        """
        counts = {"responses": 0, "known_responses": 0, "events": 0, "known_events": 0}
        for some in _chunks(list(talks), 200):
            rows = [(response.to_json(), events) for response, events in some]
            for _, events in rows:
                for _, event in events:
                    _validate(event)

            def run(connection: Connection, rows: Sequence[Any] = rows) -> dict[str, int]:
                found = dict.fromkeys(counts, 0)
                ids = [row["id"] for row, _ in rows]
                known = set(connection.execute(select(RESPONSES.c.id).where(RESPONSES.c.id.in_(ids))).scalars())
                for row, events in rows:
                    if row["id"] not in known:
                        connection.execute(RESPONSES.insert().values(**row))
                    found["known_responses" if row["id"] in known else "responses"] += 1
                    known.add(row["id"])
                    for key, event in events:
                        _, new = _append(connection, event, key)
                        found["events" if new else "known_events"] += 1
                return found

            for name, count in self.home.database.write(run).items():
                counts[name] += count
        return counts

    def events(
        self,
        kinds: Iterable[str] | None = None,
        users: Iterable[str] | None = None,
        since: float | None = None,
        purpose: str | None = None,
        line: str | None = None,
        response_id: str | None = None,
        newest: int | None = None,
    ) -> list[FeedbackEvent]:
        """All that was said, in the order in which it came, retractions and second thoughts included.

        `newest`: only so many, the last ones.
        """
        query = _narrow(select(FEEDBACK_EVENTS).join(RESPONSES), line, purpose, None)
        if kinds is not None:
            query = query.where(FEEDBACK_EVENTS.c.kind.in_(list(kinds)))
        if users is not None:
            query = query.where(FEEDBACK_EVENTS.c.user.in_(list(users)))
        if since is not None:
            query = query.where(FEEDBACK_EVENTS.c.created >= since)
        if response_id is not None:
            query = query.where(FEEDBACK_EVENTS.c.response_id == response_id)
        with self.home.database.read() as connection:
            return [_event(row) for row in _last(connection, query, (FEEDBACK_EVENTS.c.seq,), newest)]

    def said_at(self, since: float) -> list[float]:
        """When events came since then, UNIX seconds, in no order."""
        with self.home.database.read() as connection:
            query = select(FEEDBACK_EVENTS.c.created).where(FEEDBACK_EVENTS.c.created >= since)
            return list(connection.execute(query).scalars())

    def mark(self) -> tuple[int, int]:
        """Changes whenever an event comes or is forgotten: (the last event's number, how many were forgotten)."""
        with self.home.database.read() as connection:
            last = connection.execute(select(func.max(FEEDBACK_EVENTS.c.seq))).scalar() or 0
            return last, connection.execute(select(func.count()).select_from(FORGOTTEN_EVENTS)).scalar_one()

    def current(
        self, *, since: float | None = None, purpose: str | None = None, line: str | None = None
    ) -> list[FeedbackEvent]:
        """What counts now (see the rules on top), in the order in which it came."""
        counting = current_view(self.events(purpose=purpose, line=line))
        return [event for event in counting if since is None or event.created >= since]

    def votes(
        self,
        *,
        kinds: Iterable[str] | None = None,
        line: str | None = None,
        purpose: str | None = "chat",
        since: float | None = None,
    ) -> list[Vote]:
        """The current view with prompts and answers, for datasets. Answers that were forgotten are not in it."""
        wanted = None if kinds is None else set(kinds)
        events = [
            e for e in self.current(since=since, purpose=purpose, line=line) if wanted is None or e.kind in wanted
        ]
        found = self.responses_by_id(id for event in events for id in (event.response_id, *_others(event)))
        answers = {id: answer for id, answer in found.items() if answer.status != "forgotten"}
        return [
            Vote(event, answers[event.response_id], tuple(answers[id] for id in _others(event)))
            for event in events
            if answers.keys() >= {event.response_id, *_others(event)}
        ]

    def stats(self, *, line: str | None = None, purpose: str | None = None) -> dict[str, Any]:
        """Counts: events by kind, what counts now, thumbs by model version, people, answers by status."""
        with self.home.database.read() as connection:
            by_status = _narrow(select(RESPONSES.c.status, func.count()), line, purpose, None)
            statuses = {row[0]: row[1] for row in connection.execute(by_status.group_by(RESPONSES.c.status))}
            made_by = select(RESPONSES.c.id, RESPONSES.c.line, RESPONSES.c.version_id)
            made_by = _narrow(made_by.join(FEEDBACK_EVENTS).distinct(), line, purpose, None)
            makers = {row.id: (row.line, row.version_id) for row in connection.execute(made_by)}
        events = self.events(line=line, purpose=purpose)
        counting = current_view(events)
        models: dict[tuple[str | None, str | None], dict[str, Any]] = {}
        for event in counting:
            name, version_id = makers[event.response_id]
            row = models.setdefault(
                (name, version_id),
                {"line": name, "version_id": version_id, "up": 0, "down": 0, "ratings": 0, "edits": 0},
            )
            if event.thumb:
                row[event.thumb] += 1
            elif event.kind in ("rating", "edit"):
                row[event.kind + "s"] += 1
        return {
            "events": len(events),
            "by_kind": _counts(event.kind for event in events),
            "current": _counts(event.kind for event in counting),
            "thumbs": _counts(event.thumb for event in counting if event.thumb),
            "users": len({event.user for event in events if event.user is not None}),
            "responses": statuses,
            "by_model": list(models.values()),
        }

    def export(self, *, line: str | None = None, purpose: str | None = None) -> Iterator[dict[str, Any]]:
        """Every event with the answer that it speaks of, as JSON objects, in the order in which they came."""
        query = select(FEEDBACK_EVENTS.c.seq).join(RESPONSES).order_by(FEEDBACK_EVENTS.c.seq)
        with self.home.database.read() as connection:
            order = list(connection.execute(_narrow(query, line, purpose, None)).scalars())
        for some in _chunks(order, 500):
            with self.home.database.read() as connection:
                found = connection.execute(
                    select(FEEDBACK_EVENTS).where(FEEDBACK_EVENTS.c.seq.in_(some)).order_by(FEEDBACK_EVENTS.c.seq)
                )
                for event in [_event(row) for row in found.mappings()]:
                    row = _response_row(connection, event.response_id)
                    yield {"event": event.to_json(), "response": _response(row).to_json()}

    # Forgetting

    def forget(self, user: str) -> dict[str, Any]:
        """Deletes a user's feedback and the content of the answers to them, and says what has learned from it.

        The answers' rows stay, without user, prompt, text and tokens, so that history keeps its shape. Datasets and
        models are immutable: those that learned from the user's events are listed; the next dataset is made without.
        """
        now = time.time()
        blank: dict[str, Any] = {
            "status": "forgotten", "finish_reason": None, "user": None, "prompt": "", "text": None,
            "token_ids": None, "logprobs": None, "sampling": {}, "surface": None,
        }  # fmt: skip

        def run(connection: Connection) -> tuple[list[str], int]:
            of_user = select(FEEDBACK_EVENTS.c.id).where(FEEDBACK_EVENTS.c.user == user)
            ids = list(connection.execute(of_user).scalars())
            if ids:
                connection.execute(FORGOTTEN_EVENTS.insert(), [{"id": id, "forgotten": now} for id in ids])
                connection.execute(delete(FEEDBACK_EVENTS).where(FEEDBACK_EVENTS.c.user == user))
            return ids, connection.execute(update(RESPONSES).where(RESPONSES.c.user == user).values(**blank)).rowcount

        ids, answers = self.home.database.write(run)
        scrubbed = self.home.database.scrub()
        return {
            "user": user,
            "events": len(ids),
            "responses": answers,
            "erased_from_log": scrubbed,
            **self.learned_from(ids),
            "queued": self.to_rebuild(),
        }

    def to_rebuild(self) -> list[str]:
        """Champions that have learned from anything that was ever forgotten: they wait to be made again without it, and
        wait no more when a version that never knew it is champion."""
        forgotten = self.forgotten()
        return list(self.learned_from(forgotten)["champions"]) if forgotten else []

    def forgotten(self) -> list[str]:
        """Ids of all events that were ever forgotten."""
        with self.home.database.read() as connection:
            return list(connection.execute(select(FORGOTTEN_EVENTS.c.id).order_by(FORGOTTEN_EVENTS.c.id)).scalars())

    def learned_from(self, event_ids: Iterable[str]) -> dict[str, Any]:
        """The datasets that hold any of these events, the models made from those, and which of them are champions."""
        wanted = set(event_ids)
        artifacts = self.home.artifacts
        datasets = [artifact for artifact in artifacts.list() if wanted & set(artifact.events)]
        made = artifacts.made_from([dataset.id for dataset in datasets])
        models = [artifact for artifact in made if artifact.is_model]
        registry = self.home.registry
        names = {a.id: [v for v in registry.versions_of(a.id) if v.artifact_id == a.id] for a in models}
        champions = {v.name for line in registry.lines() if (v := registry.champion(line)) is not None}
        return {
            "datasets": [{"id": d.id, "name": d.name, "events": len(wanted & set(d.events))} for d in datasets],
            "models": [{"id": a.id, "name": a.name, "versions": [v.name for v in names[a.id]]} for a in models],
            "champions": sorted(champions & {v.name for of in names.values() for v in of}),
        }

    def _close(
        self,
        id: str,
        status: str,
        token_ids: Sequence[int],
        logprobs: Sequence[float] | None,
        text: str,
        finish_reason: str,
        latency_ms: float | None,
    ) -> None:
        values = {
            "status": status,
            "token_ids": list(token_ids),
            "logprobs": None if logprobs is None else list(logprobs),
            "text": text,
            "finish_reason": finish_reason,
            "latency_ms": latency_ms,
        }

        def run(connection: Connection) -> None:
            # Taken for dead by `abort_started`, but alive: then what it says counts. A user who asks to be forgotten
            # while the answer is under way stays forgotten.
            is_open = (RESPONSES.c.status == "started") | (RESPONSES.c.finish_reason == CRASHED)
            if (
                connection.execute(update(RESPONSES).where(RESPONSES.c.id == id, is_open).values(**values)).rowcount
                == 0
            ):
                present = _response_row(connection, id)["status"]
                if present != "forgotten":
                    raise ConflictError(f"response {id} is {present} already")

        self.home.database.write(run)


def current_view(events: Sequence[FeedbackEvent]) -> list[FeedbackEvent]:
    """The events that count, out of all of them in the order in which they came (rules: top of the file)."""
    latest: dict[Any, FeedbackEvent] = {}
    retracted = set()
    for event in events:
        if event.kind == "retract":
            retracted.add(event.value["event"])
            continue
        if event.kind == "comment":
            key: tuple[Any, ...] = (event.kind, event.id)
        elif event.kind == "choice":
            key = (event.kind, event.user, frozenset((event.response_id, *_over(event))))
        else:
            key = (event.kind, event.user, event.response_id)
        latest.pop(key, None)  # so that the order is that of the latest, not of the first
        latest[key] = event
    return [event for event in latest.values() if event.id not in retracted]


def _validate(event: FeedbackEvent) -> None:
    """Raises RequestError when kind and value do not go together."""
    if event.kind not in KINDS:
        raise RequestError("unknown kind of feedback", got=repr(event.kind), wanted=" | ".join(KINDS), param="kind")
    for name in ("response_id", "user", "surface"):
        text = getattr(event, name)
        required = name == "response_id"
        if not (text is None and not required) and not (isinstance(text, str) and 0 < len(text) <= NAME_LIMIT):
            raise RequestError(
                f"`{name}` cannot be used",
                got=repr(text)[:60],
                wanted=f"a text of 1 to {NAME_LIMIT} characters",
                param=name,
            )
    value = event.value
    if event.kind == "thumb":
        if isinstance(value, Mapping):
            _keys(event, {"thumb", "reasons"})
            reasons = value.get("reasons", [])
            if not isinstance(reasons, list) or not all(isinstance(r, str) and len(r) <= TEXT_LIMIT for r in reasons):
                raise _wrong(event, '{"thumb": "up", "reasons": ["text", ...]}')
            value = value.get("thumb")
        if value not in ("up", "down"):
            raise _wrong(event, '"up" or "down"')
    elif event.kind == "rating":
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 5:
            raise _wrong(event, "a whole number from 1 to 5")
    elif event.kind in ("edit", "comment"):
        _keys(event, {"text"})
        text = value.get("text")
        if not isinstance(text, str) or not text.strip() or len(text) > TEXT_LIMIT:
            raise _wrong(event, f'{{"text": ...}} with 1 to {TEXT_LIMIT:,} characters')
    elif event.kind == "choice":
        _keys(event, {"over", "tie", "both_bad"})
        over = value.get("over")
        if (
            not isinstance(over, list)
            or not all(isinstance(id, str) for id in over)
            or not 0 < len(over) <= CHOICE_LIMIT
        ):
            raise _wrong(event, '{"over": [response ids]}')
        if event.response_id in over or len(set(over)) < len(over):
            raise _wrong(event, "every response once, and not the chosen one itself")
        if not all(isinstance(value.get(key, False), bool) for key in ("tie", "both_bad")):
            raise _wrong(event, "true or false for `tie` and `both_bad`")
        if value.get("tie") and value.get("both_bad"):
            raise _wrong(event, "`tie` or `both_bad`, not both")
    elif event.kind in DONE:
        if value is not None:
            _keys(event, {"new"} if event.kind == "regenerate" else set())
        new = (value or {}).get("new", "")
        if not isinstance(new, str) or new == event.response_id:
            raise _wrong(event, '{"new": id of the answer that was made instead} or nothing')
    else:
        _keys(event, {"event"})
        if not isinstance(value.get("event"), str):
            raise _wrong(event, '{"event": id of the feedback}')


def _keys(event: FeedbackEvent, allowed: set[str]) -> None:
    if not isinstance(event.value, Mapping) or not set(event.value) <= allowed:
        names = ", ".join(f"`{name}`" for name in sorted(allowed))
        raise _wrong(event, f"an object with {names}" if names else "nothing")


def _wrong(event: FeedbackEvent, wanted: str) -> RequestError:
    return RequestError(
        f"the value of this {event.kind} cannot be used", got=repr(event.value)[:80], wanted=wanted, param="value"
    )


def _check_targets(connection: Connection, event: FeedbackEvent, response: RowMapping) -> None:
    """Raises NotFoundError or RequestError when an event points at what it may not."""
    if event.kind in ("choice", "regenerate"):
        for id in _others(event):
            other = _response_row(connection, id)
            if other["prompt"] != response["prompt"]:
                raise RequestError(
                    f"a {event.kind} is between answers to the same prompt",
                    got=f"{id}, which answers another one",
                    param="value",
                )
    if event.kind == "retract":
        id = event.value["event"]
        target = connection.execute(select(FEEDBACK_EVENTS).where(FEEDBACK_EVENTS.c.id == id)).mappings().first()
        if target is None or target["response_id"] != event.response_id:
            raise NotFoundError(f"no feedback {id} on response {event.response_id}", param="value")
        if target["user"] != event.user:
            raise RequestError("feedback is taken back by the user who gave it", got="another user", param="user")
        if target["kind"] == "retract":
            raise RequestError("a retraction cannot be taken back", mend="give the feedback again", param="value")


def _append(connection: Connection, event: FeedbackEvent, key: str) -> tuple[str, bool]:
    """The event's row, unless the key is there: (id, whether it is new). Raises as `FeedbackStore.add`."""
    value = {} if event.value is None and event.kind in DONE else event.value
    body = hashlib.sha256(canonical([event.response_id, event.kind, value, event.user]).encode()).hexdigest()
    columns = (FEEDBACK_EVENTS.c.id, FEEDBACK_EVENTS.c.body_hash)
    known = connection.execute(select(*columns).where(FEEDBACK_EVENTS.c.idempotency_key == key)).first()
    if known is not None:
        if known.body_hash != body:
            raise ConflictError(
                "this idempotency key was used for other feedback", got=repr(key),
                mend="use a new key for new feedback", param="Idempotency-Key",
            )  # fmt: skip
        return known.id, False
    response = _response_row(connection, event.response_id)
    if response["status"] == "forgotten":
        raise NotFoundError(f"response {event.response_id} was forgotten", param="response_id")
    _check_targets(connection, event, response)
    row = {
        "id": _event_id(connection, key),
        "response_id": event.response_id,
        "kind": event.kind,
        "value": value,
        "user": event.user,
        "surface": event.surface,
        "created": event.created,
        "idempotency_key": key,
        "body_hash": body,
    }
    connection.execute(FEEDBACK_EVENTS.insert().values(**row))
    return str(row["id"]), True


def _event_id(connection: Connection, key: str) -> str:
    """The same for the same idempotency key, so that whoever sends the same votes with the same keys to another home
    gets the same datasets; a new one where what was said under this key was forgotten."""
    id = f"fb-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    forgotten = connection.execute(select(FORGOTTEN_EVENTS.c.id).where(FORGOTTEN_EVENTS.c.id == id)).first()
    return id if forgotten is None else f"fb-{secrets.token_hex(12)}"


def _others(event: FeedbackEvent) -> list[str]:
    """The other answers that an event speaks of."""
    return [event.value["new"]] if event.kind == "regenerate" and "new" in event.value else _over(event)


def _over(event: FeedbackEvent) -> list[str]:
    return list(event.value["over"]) if event.kind == "choice" else []


def _response_row(connection: Connection, id: str) -> RowMapping:
    row = connection.execute(select(RESPONSES).where(RESPONSES.c.id == id)).mappings().first()
    if row is None:
        raise NotFoundError(f"no response {id[:NAME_LIMIT]}", param="response_id")
    return row


def _response(row: RowMapping) -> Response:
    facts = dict(row)
    prompt = facts.pop("prompt")
    for name in ("token_ids", "logprobs"):
        if facts[name] is not None:
            facts[name] = tuple(facts[name])
    return Response(prompt=prompt if isinstance(prompt, str) else messages_from_json(prompt), **facts)


def _event(row: RowMapping) -> FeedbackEvent:
    return FeedbackEvent(**{key: row[key] for key in FeedbackEvent.__dataclass_fields__})


def _narrow(query: Select[Any], line: str | None, purpose: str | None, since: float | None) -> Select[Any]:
    if line is not None:
        query = query.where(RESPONSES.c.line == line)
    if purpose is not None:
        query = query.where(RESPONSES.c.purpose == purpose)
    if since is not None:
        query = query.where(RESPONSES.c.created >= since)
    return query


def _last(
    connection: Connection, query: Select[Any], order: Sequence[ColumnElement[Any]], newest: int | None
) -> list[RowMapping]:
    """The query's rows in this order: all, or so many of its end."""
    if newest is None:
        return list(connection.execute(query.order_by(*order)).mappings())
    backwards = query.order_by(*(column.desc() for column in order)).limit(newest)
    return list(connection.execute(backwards).mappings())[::-1]


def _counts(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
