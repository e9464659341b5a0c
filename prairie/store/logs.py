"""Logs of other systems become answers and feedback: JSON lines, plain or `.gz`, each row told by its keys.

    {"request", "response"}            OpenAI's chat bodies, as a proxy keeps them; beside them perhaps "user" and
                                       "feedback": a list of Prairie's {"kind", "value", "user"?}
    {"inference_id", "input", ...}     TensorZero's inferences with their feedback: a boolean on the answer is a thumb,
                                       a demonstration an edit, a comment a comment
    {"messages", "label"}              a conversation and a thumb on its last answer (KTO, arXiv 2402.01306)
    {"event", "response"}              what `prairie feedback export` wrote

Nothing is guessed: a row that cannot be used is refused with its number, feedback that has no counterpart here (a score
of a machine, a word on a whole episode) is counted by its reason. Ids are made from the content, so a log that is taken
over twice is there once. Not here: writing (`feedback`), what is learned from it (`prairie.flywheel.curate`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prairie.data.records import Message, messages_from_json
from prairie.errors import DataError, PrairieError
from prairie.recipe import canonical
from prairie.store.feedback import FeedbackEvent, Response

SURFACE = "import"
MACHINE = "tensorzero::"
"""Metrics of this name come from an evaluator, not from a person."""

Talk = tuple[Response, list[tuple[str, FeedbackEvent]]]
"""An answer, and what was said of it with the idempotency key of each piece."""


@dataclass
class Log:
    """What a log holds for us, and what became of the rest."""

    talks: list[Talk] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)
    """(row from 1, why) of rows that cannot be used."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Feedback that has no counterpart, by reason."""
    formats: Counter[str] = field(default_factory=Counter)


def read_log(file: Path, line: str | None = None) -> Log:
    """All rows of a log as answers of `line`. Raises DataError when the file is not there or holds no usable row."""
    if not file.is_file():
        raise DataError(f"there is no file {file}", mend="check the path")
    log = Log()
    for number, row in _rows(file):
        try:
            name, reader = _format(row)
            talk = reader(row, line, log.skipped)
        except (PrairieError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            why = str(error) if isinstance(error, PrairieError) else f"{type(error).__name__} {error}"
            log.refused.append((number, why))
            continue
        log.talks.append(talk)
        log.formats[name] += 1
    if not log.talks:
        first = f"row {log.refused[0][0]}: {log.refused[0][1]}" if log.refused else "no row"
        raise DataError(
            f"{file} holds no usable row", got=first, wanted="one of the shapes of `prairie feedback import`"
        )
    return log


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            for number, text in enumerate(lines, 1):
                if text.strip():
                    try:
                        yield number, json.loads(text)
                    except ValueError:
                        yield number, None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read", got=str(error), wanted="JSON lines in UTF-8, perhaps .gz") from error


def _format(row: Any) -> tuple[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError("the row is not a JSON object", got=type(row).__name__)
    for name, keys, reader in _FORMATS:
        if all(key in row for key in keys):
            return name, reader
    raise DataError("a row of an unknown shape", got="keys " + ", ".join(sorted(row)[:8]))


def _openai(row: Mapping[str, Any], line: str | None, skipped: Counter[str]) -> Talk:
    request, answer = row["request"], row["response"]
    answer = answer.get("body", answer)
    choices = answer["choices"]
    if len(choices) > 1:
        skipped["a further choice of one request"] += len(choices) - 1
    choice = choices[0]
    sampling = {key: request[key] for key in ("temperature", "top_p", "max_tokens", "seed") if key in request}
    user = row.get("user") or request.get("user")
    response = Response(
        _id(row["request"], answer),
        str(answer.get("model") or request.get("model") or "unknown"),
        _messages(request["messages"]),
        line=line,
        sampling=sampling,
        text=_text(choice["message"].get("content")),
        status="done",
        finish_reason=choice.get("finish_reason"),
        user=user,
        surface=SURFACE,
        latency_ms=row.get("latency_ms"),
        created=_when(row.get("created") or answer.get("created")),
    )
    given = [(one["kind"], one.get("value"), one.get("user") or user) for one in row.get("feedback") or []]
    return response, _events(response, given)


def _tensorzero(row: Mapping[str, Any], line: str | None, skipped: Counter[str]) -> Talk:
    asked = row["input"]
    system = [{"role": "system", "content": asked["system"]}] if asked.get("system") else []
    response = Response(
        f"import-{row['inference_id']}",
        f"{row['function']}/{row['variant']}",
        _messages([*system, *asked["messages"]]),
        line=line,
        sampling=dict((row.get("params") or {}).get("chat_completion") or {}),
        text=_text(row["output"]),
        status="done",
        finish_reason="stop",
        surface=SURFACE,
        latency_ms=row.get("processing_time_ms"),
    )
    given: list[tuple[str, Any, str | None]] = []
    for one in row.get("feedback") or []:
        kind, metric, value = one["kind"], one.get("metric"), one["value"]
        if one.get("target") != "inference":
            skipped[f"a {kind} on a whole episode"] += 1
        elif str(metric).startswith(MACHINE):
            skipped["a score that a machine gave"] += 1
        elif kind == "boolean":
            given.append(("thumb", "up" if value else "down", None))
        elif kind == "demonstration":
            given.append(("edit", {"text": _text(value)}, None))
        elif kind == "comment":
            given.append(("comment", {"text": value}, None))
        else:
            skipped[f"a {kind} on a scale that is not known"] += 1
    return response, _events(response, given)


def _labelled(row: Mapping[str, Any], line: str | None, skipped: Counter[str]) -> Talk:
    messages = _messages(row["messages"])
    if not messages or messages[-1].role != "assistant" or not isinstance(row["label"], bool):
        raise DataError(
            "a label needs an answer as last message", got=f"label {row['label']!r}", wanted="true or false"
        )
    response = Response(
        _id(row["messages"], None),
        str(row.get("model") or row.get("source") or "unknown"),
        messages[:-1],
        line=line,
        text=messages[-1].content,
        status="done",
        finish_reason="stop",
        user=row.get("user"),
        surface=SURFACE,
        created=_when(row.get("created")),
    )
    return response, _events(response, [("thumb", "up" if row["label"] else "down", row.get("user"))])


def _own(row: Mapping[str, Any], line: str | None, skipped: Counter[str]) -> Talk:
    """The event keeps its own id as key, so that two exports of one home meet. What points at other events or answers
    (a choice, a retraction) cannot be taken over row by row."""
    facts = dict(row["response"])
    prompt = facts.pop("prompt")
    facts = {key: facts[key] for key in Response.__dataclass_fields__ if key in facts}
    for name in ("token_ids", "logprobs"):
        facts[name] = tuple(facts[name]) if facts.get(name) is not None else None
    response = Response(prompt=prompt if isinstance(prompt, str) else messages_from_json(prompt), **facts)
    response = replace(response, line=line or response.line)
    event = row["event"]
    if event["kind"] in ("choice", "retract", "regenerate"):
        skipped[f"a {event['kind']}, which points at other rows"] += 1
        return response, []
    told = FeedbackEvent(response.id, event["kind"], event["value"], event["user"], SURFACE, created=event["created"])
    return response, [(f"import-{event['id']}", told)]


_FORMATS = (
    ("gateway", ("inference_id", "input", "output"), _tensorzero),
    ("export", ("event", "response"), _own),
    ("openai", ("request", "response"), _openai),
    ("labelled", ("messages", "label"), _labelled),
)


def _events(response: Response, given: Sequence[tuple[str, Any, str | None]]) -> list[tuple[str, FeedbackEvent]]:
    """Events under keys that their content gives them: the same row again is the same feedback."""
    return [
        (
            f"{response.id}-{place}-{_hash([kind, value, user])[:16]}",
            FeedbackEvent(response.id, kind, value, user, SURFACE, created=response.created),
        )
        for place, (kind, value, user) in enumerate(given)
    ]


def _messages(rows: Any) -> tuple[Message, ...]:
    """Messages whose content is a text, a list of text parts, or the arguments of a template (kept as JSON)."""
    return messages_from_json([
        {"role": "system" if row["role"] == "developer" else row["role"], "content": _text(row.get("content"))}
        for row in rows
    ])  # fmt: skip


def _text(content: Any) -> str:
    """Raises DataError for a part that is no text."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Mapping):
        return json.dumps(content, ensure_ascii=False)
    parts = []
    for part in content:
        if part.get("type", "text") not in ("text", "input_text", "output_text"):
            raise DataError("a part of a message is no text", got=str(part.get("type")))
        parts.append(_text(part["text"] if "text" in part else part["value"]))
    return "".join(parts)


def _when(created: Any) -> float:
    """UNIX seconds as the log says them, else now."""
    return float(created) if isinstance(created, int | float) else time.time()


def _id(asked: Any, answered: Any) -> str:
    return f"import-{_hash([asked, answered])[:32]}"


def _hash(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()
