"""What was seen of one version while it served: answers that failed, their speed, people who disliked one.

Read from the answers and the feedback that lie in the store, so that every server of a home sees the same, also after a
restart. Not here: what is alarming (`prairie.serve.guard`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, func, select

from prairie.store.feedback import FAULT, FeedbackEvent
from prairie.store.home import Home
from prairie.store.registry import Version
from prairie.store.schema import FEEDBACK_EVENTS, RESPONSES

MOST_ANSWERS = 2000
STALE_S = 600.0
"""An answer that is still open after so long was left by a server that died."""


@dataclass(frozen=True)
class Signals:
    """Of one version's answers, in the order in which they were begun (or backwards)."""

    failed: list[bool]
    """Of each answer that ended: whether by a fault of the model or its engine. Clients that left are not in it."""
    ms_per_token: list[float]
    """Of each whole answer, waiting included."""
    disliked: list[bool]
    """Of each PERSON: whether the first thumb or rating that they gave was down, or 1 or 2 of 5; a 3 says nothing."""


def signals(
    home: Home,
    version: Version,
    *,
    purpose: str = "chat",
    since: float | None = None,
    before: float | None = None,
    backwards: bool = False,
) -> Signals:
    """The first `MOST_ANSWERS` of a version under its line, begun from `since` on and before `before` (UNIX seconds);
    `backwards`: the latest, latest first. What follows an answer that is still being written is not there yet, so that
    the order never changes."""
    length = func.json_array_length(RESPONSES.c.token_ids)
    columns = (RESPONSES.c.status, RESPONSES.c.finish_reason, RESPONSES.c.latency_ms, RESPONSES.c.created, length)
    answers = _of(select(*columns), version, purpose, since, before)
    order = RESPONSES.c.created.desc() if backwards else RESPONSES.c.created
    opinions = _of(
        select(FEEDBACK_EVENTS.c.kind, FEEDBACK_EVENTS.c.value, FEEDBACK_EVENTS.c.user).join(RESPONSES),
        version, purpose, since, before,
    ).where(FEEDBACK_EVENTS.c.kind.in_(("thumb", "rating")))  # fmt: skip
    said = FEEDBACK_EVENTS.c.seq.desc() if backwards else FEEDBACK_EVENTS.c.seq
    failed: list[bool] = []
    ms_per_token: list[float] = []
    first: dict[str, bool] = {}
    with home.database.read() as connection:
        rows = list(connection.execute(answers.order_by(order, RESPONSES.c.id).limit(MOST_ANSWERS)))
        votes = list(connection.execute(opinions.order_by(said).limit(MOST_ANSWERS)))
    for status, reason, latency_ms, created, tokens in rows:
        if status == "started" and created > time.time() - STALE_S:
            break
        if status == "done" or reason == FAULT:
            failed.append(reason == FAULT)
        if status == "done" and latency_ms is not None and tokens:
            ms_per_token.append(latency_ms / tokens)
    for kind, value, user in votes:
        event = FeedbackEvent("", kind, value)
        opinion = event.thumb == "down" if kind == "thumb" else None if value == 3 else value < 3
        if user and opinion is not None:
            first.setdefault(user, opinion)
    return Signals(failed, ms_per_token, list(first.values()))


def _of(query: Select[Any], version: Version, purpose: str, since: float | None, before: float | None) -> Select[Any]:
    query = query.where(
        RESPONSES.c.line == version.line, RESPONSES.c.version_id == version.artifact_id, RESPONSES.c.purpose == purpose
    )
    if since is not None:
        query = query.where(RESPONSES.c.created >= since)
    return query if before is None else query.where(RESPONSES.c.created < before)
