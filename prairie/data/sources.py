"""Files of the world to records: texts, conversations and preferences in the shapes that people publish them in.

The shape of a file is found by its first row that is known. A row that cannot be used is refused with its number and
the reason, one by one, never in silence and never by an exception; a file with no usable row is a DataError.

Not here: cleaning (`clean`), tokens (`loader`), downloads.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, Generic, Literal, TypeVar, cast, overload

from prairie.data.processes import making_many
from prairie.data.records import (
    Chat,
    Message,
    Preference,
    Record,
    Role,
    Text,
    tool_call_from_json,
    tools_from_json,
    weight_from_json,
)
from prairie.errors import DataError

Want = Literal["text", "chat", "preference"]
R = TypeVar("R", bound=Record)
Row = Mapping[str, Any]

SUFFIXES = (".jsonl", ".json", ".txt", ".parquet", ".jsonl.gz", ".json.gz", ".txt.gz")
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_END_OF_TEXT = re.compile(r"^<\|endoftext\|>[ \t]*\r?$", re.MULTILINE)
_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that cannot be used; `row` counts from 1 and is the line number of a `.jsonl` file."""

    row: int
    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class Loaded(Generic[R]):
    """What was read, and what was refused."""

    records: list[R]
    refused: list[Refused]
    format: str


@overload
def read_records(path: str | Path, *, want: Literal["text"], format: str | None = None) -> Loaded[Text]: ...
@overload
def read_records(path: str | Path, *, want: Literal["chat"], format: str | None = None) -> Loaded[Chat]: ...
@overload
def read_records(path: str | Path, *, want: Literal["preference"], format: str | None = None) -> Loaded[Preference]: ...
@overload
def read_records(path: str | Path, *, want: None = None, format: str | None = None) -> Loaded[Record]: ...
def read_records(path: str | Path, *, want: Want | None = None, format: str | None = None) -> Loaded[Any]:
    """Reads a file, or all files of a folder, of JSONL, JSON, Parquet or text, the first three `.gz` or not.

    `format` is found by itself if not given. `want="chat"` takes the chosen side of preferences and refuses answers
    that people disliked. Raises DataError if there is no such file, no known shape, or no usable row.
    """
    path = Path(path)
    if format is not None and format not in _PARSERS:
        raise DataError("no such data format", got=repr(format), wanted=" | ".join(_PARSERS))
    records: list[Record] = []
    refused: list[Refused] = []
    found: list[str] = []
    for file in _files(path):
        with making_many():
            rows = list(_rows(file))
            known = format or _detect(file, [row for _, row in rows])
            found += [known] if known not in found else []
            for number, row in rows:
                try:
                    records += _wanted(_parse(row, known, file.name), want, known, file)
                except DataError as error:
                    refused.append(Refused(number, file.name, str(error)))
    if not records:
        first = f", the first (row {refused[0].row}): {refused[0].reason}" if refused else ""
        raise DataError(f"no usable row in {path}", got=f"{len(refused)} rows refused{first}", wanted="one row or more")
    return Loaded(records, refused, "+".join(found))


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """JSON lines in our own shapes, `.gz` by the name; `read_records` gives the same records back."""
    path = Path(path)
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record.to_json(), ensure_ascii=False, default=str) + "\n")


# Files ---------------------------------------------------------------------------------------------------------------


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(SUFFIXES))
        if not files:
            raise DataError(f"the folder {path} holds no data", got="no such file", wanted=" ".join(SUFFIXES))
        return files
    if not path.is_file():
        raise DataError(f"there is no file {path}", mend="check the path")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path} has an unknown file type", got=path.suffix or "no suffix", wanted=" ".join(SUFFIXES))
    return [path]


def _rows(file: Path) -> Iterator[tuple[int, object]]:
    """Row numbers from 1 and their values; a damaged row is a DataError as value."""
    kind = file.name.removesuffix(".gz").rsplit(".", 1)[-1]
    try:
        if kind == "parquet":
            yield from _parquet(file)
            return
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            data = cast("IO[bytes]", stream)
            if kind == "txt":
                yield from _documents(data.read())
            elif kind == "json":
                yield from _json_rows(file, data.read())
            else:
                yield from _json_lines(data)
    except (OSError, EOFError) as error:
        raise DataError(f"{file} cannot be read", got=str(error), mend="check that it is whole") from None


def _documents(data: bytes) -> Iterator[tuple[int, object]]:
    """A text file is one document, or several between lines of `<|endoftext|>`."""
    text = data.decode("utf-8-sig", errors="replace")
    for number, document in enumerate(_END_OF_TEXT.split(text), 1):
        if document.strip():
            yield number, {"text": document.strip("\r\n")}


def _json_rows(file: Path, data: bytes) -> Iterator[tuple[int, object]]:
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except ValueError as error:
        rows = list(_json_lines(io.BytesIO(data)))  # JSON lines under the wrong name are common
        if len(rows) < 2 or isinstance(rows[0][1], DataError):
            raise DataError(f"{file} is no JSON", got=str(error), wanted="a list of objects") from None
        yield from rows
        return
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        value = lists[0] if len(lists) == 1 and _format_of(value) is None else [value]
    if not isinstance(value, list):
        raise DataError(f"{file} holds no rows", got=type(value).__name__, wanted="a list of objects")
    yield from enumerate(value, 1)


def _json_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            yield number, DataError("the line is no JSON", got=str(error), wanted="one object")


def _parquet(file: Path) -> Iterator[tuple[int, object]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is no Parquet file", got=str(error).split("\n")[0]) from None


# Shapes --------------------------------------------------------------------------------------------------------------


def _format_of(row: Row) -> str | None:
    """The shape of a row by its keys; the more telling key first."""
    if "chosen" in row and "rejected" in row:
        dialogue = isinstance(row["chosen"], str) and not any(
            key in row for key in ("prompt", "instruction", "question")
        )
        return "hh" if dialogue else "preference"
    if "messages" in row:
        return "messages"
    if "conversations" in row or "conversation" in row:
        return "sharegpt"
    if "instruction" in row and ("output" in row or "instances" in row):
        return "ranking" if isinstance(row.get("output"), list) else "alpaca"
    if _pair_of(row) is not None:
        return "prompt_completion"
    if "text" in row or isinstance(row.get("paragraphs"), list):
        return "text"
    return None


def _detect(file: Path, rows: Sequence[object]) -> str:
    if not rows:
        raise DataError(f"{file} is empty", got="0 rows", wanted="one row or more")
    objects = [row for row in rows if isinstance(row, Mapping)]
    for row in objects:
        if (known := _format_of(row)) is not None:
            return known
    if not objects:
        got = str(rows[0]) if isinstance(rows[0], DataError) else f"rows of type {type(rows[0]).__name__}"
    else:
        got = f"the keys {', '.join(map(str, objects[0])) or 'none'}"
    raise DataError(
        f"the rows of {file} have no known shape",
        got=got,
        wanted="messages | conversations | instruction, output | prompt, completion | prompt, chosen, rejected | text",
        mend="rename the keys",
    )


def _parse(row: object, format: str, source: str) -> list[Record]:
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, Mapping):
        raise DataError("the row is no object", got=type(row).__name__)
    return [*_PARSERS[format](row, str(row.get("source") or source))]


def _wanted(records: list[Record], want: Want | None, format: str, file: Path) -> list[Record]:
    """Of the records of one row those of the kind asked for."""
    if want is None:
        return records
    kept: list[Record] = []
    for record in records:
        if want == "chat" and isinstance(record, Preference):
            chat = Chat((*record.prompt, *record.chosen), record.source, record.tags, record.tools, record.weight)
            if chat.messages not in [c.messages for c in kept if isinstance(c, Chat)]:  # a ranking: its best, once
                kept.append(chat)
        elif isinstance(record, {"text": Text, "chat": Chat, "preference": Preference}[want]):
            if want == "chat" and isinstance(record, Chat) and record.label is False:
                raise DataError("people disliked this answer (`label` is false), so it is not learnt")
            kept.append(record)
        else:
            raise DataError(f"a row of the format {format} holds no {want}", mend="use the file for another stage")
    return kept


def _text(row: Row, source: str) -> Iterator[Record]:
    text = row.get("text")
    if text is None and isinstance(row.get("paragraphs"), list):
        lines = [row.get("title"), row.get("author"), *row["paragraphs"]]
        text = "\n".join(line for line in lines if isinstance(line, str) and line)
    if not isinstance(text, str):
        raise DataError("the row has no text", got=type(text).__name__, wanted="a string in `text`")
    if not text.strip():
        raise DataError("the text is empty")
    if weight_from_json(row.get("weight")) != 1:
        raise DataError("a text takes no `weight`", got=row["weight"], mend="rename the key, or give the text twice")
    label = row.get("label")
    yield Text(text, source, str(label) if isinstance(label, str | int) else None)


def _messages(row: Row, source: str) -> Iterator[Record]:
    yield _chat(_turns(row.get("messages")), source, _tags(row, "messages"), row)


def _sharegpt(row: Row, source: str) -> Iterator[Record]:
    key = "conversations" if "conversations" in row else "conversation"
    turns = _turns(row.get(key))
    if isinstance(system := row.get("system"), str) and system:
        turns = (Message("system", system), *turns)
    yield _chat(turns, source, _tags(row, key, "system"), row)


def _alpaca(row: Row, source: str) -> Iterator[Record]:
    tags = _tags(row, "instruction", "input", "output", "history", "system", "instances")
    instances = row.get("instances", [row])
    if not isinstance(instances, list) or not instances:
        raise DataError("`instances` is no list of inputs and outputs", got=type(instances).__name__)
    for instance in instances:
        if not isinstance(instance, Mapping):
            raise DataError("an instance is no object", got=type(instance).__name__)
        answer = _string(instance.get("output"), "output")
        messages = (*_instruction(row, instance.get("input")), Message("assistant", answer))
        yield _chat(messages, source, tags, {"weight": row.get("weight")})


def _ranking(row: Row, source: str) -> Iterator[Record]:
    """`output` is a list, best first: the best against each other, one after the other."""
    outputs = row.get("output")
    if not isinstance(outputs, list) or len(outputs) < 2:
        raise DataError("`output` ranks nothing", got=type(outputs).__name__, wanted="a list of two answers or more")
    best, *others = [_string(output, "output") for output in outputs]
    prompt = _instruction(row, row.get("input"))
    tags = _tags(row, "instruction", "input", "output", "history", "system")
    if all(worse == best for worse in others):
        raise DataError("`output` ranks nothing: all its answers are the same")
    for rank, worse in enumerate(others, 1):
        if worse != best:
            sides = (Message("assistant", best),), (Message("assistant", worse),)
            yield _preference(prompt, *sides, source, {**tags, "rank": rank}, {"weight": row.get("weight")})


def _prompt_completion(row: Row, source: str) -> Iterator[Record]:
    pair = _pair_of(row)
    if pair is None:
        raise DataError("the row has no prompt and completion", got=f"the keys {', '.join(map(str, row))}")
    prompt, answer = _as_messages(row[pair[0]], "user"), _as_messages(row[pair[1]], "assistant")
    yield _chat((*prompt, *answer), source, _tags(row, *pair), row)


def _preferences(row: Row, source: str) -> Iterator[Record]:
    """`prompt` (or `conversations`, `messages`, `instruction`) with `chosen` and `rejected`, or without: then what both
    sides begin with is the prompt."""
    chosen, rejected = (_as_messages(row.get(side), "assistant") for side in ("chosen", "rejected"))
    used = ("prompt", "question", "conversations", "messages", "instruction", "input", "history", "system")
    tags = _tags(row, "chosen", "rejected", *used)
    prompt: tuple[Message, ...] = ()
    if "instruction" in row:
        prompt = _instruction(row, row.get("input"))
    else:
        for key in ("prompt", "conversations", "messages", "question"):
            if row.get(key):
                prompt = _as_messages(row[key], "user")
                break
    if isinstance(system := row.get("system"), str) and system and prompt and prompt[0].role != "system":
        prompt = (Message("system", system), *prompt)
    if (chosen and chosen[0].role != "assistant") or (rejected and rejected[0].role != "assistant"):
        shared = _shared(chosen, rejected)
        system_turns = prompt[:1] if prompt and prompt[0].role == "system" and shared[:1] != prompt[:1] else ()
        chosen, rejected = chosen[len(shared) :], rejected[len(shared) :]
        prompt = (*system_turns, *shared)
    yield _preference(prompt, chosen, rejected, source, tags, row)


def _hh(row: Row, source: str) -> Iterator[Record]:
    chosen, rejected = (_dialogue(row.get(side)) for side in ("chosen", "rejected"))
    shared = _shared(chosen, rejected)
    rest = chosen[len(shared) :], rejected[len(shared) :]
    yield _preference(shared, *rest, source, _tags(row, "chosen", "rejected"), {"weight": row.get("weight")})


_PARSERS: dict[str, Callable[[Row, str], Iterator[Record]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "ranking": _ranking,
    "prompt_completion": _prompt_completion,
    "preference": _preferences,
    "hh": _hh,
    "text": _text,
}


# Parts of rows -------------------------------------------------------------------------------------------------------


def _pair_of(row: Row) -> tuple[str, str] | None:
    pairs = [(p, c) for p in ("prompt", "question", "instruction") for c in ("completion", "response", "answer")]
    return next((pair for pair in pairs if pair[0] in row and pair[1] in row), None)


def _string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"`{name}` is no text", got=type(value).__name__, wanted="a string")
    return value


def _tags(row: Row, *used: str) -> dict[str, Any]:
    """What else the row says: our own `tags`, or every other key."""
    if isinstance(tags := row.get("tags"), Mapping):
        return dict(tags)
    return {
        key: value
        for key, value in row.items()
        if key not in (*used, "source", "tags", "tools", "weight") and value is not None
    }


def _turns(values: object) -> tuple[Message, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise DataError("the conversation is no list", got=type(values).__name__, wanted="a list of messages")
    return tuple(_turn(value, i) for i, value in enumerate(values))


def _turn(value: object, i: int) -> Message:
    """A turn in OpenAI's or ShareGPT's keys. Thoughts and calls may be fields, parts of the content, or (ShareGPT's
    `function_call`) the whole of it."""
    if not isinstance(value, Mapping):
        raise DataError(f"message {i} is no object", got=type(value).__name__, wanted='{"role": ..., "content": ...}')
    name = value.get("role", value.get("from"))
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"message {i} has an unknown role", got=repr(name), wanted=" | ".join(_ROLES))
    told = value.get("content", value.get("value"))
    if isinstance(told, str) and len(value) == 2 and name != "function_call":  # as nearly all are
        return Message(role, told)
    calls = value.get("tool_calls") or []
    if name == "function_call" and isinstance(told, str):
        calls, told = _json(told, i), None
    if not isinstance(calls, list):
        calls = [calls]
    if told is None and not calls:
        raise DataError(f"message {i} has no text", got="null", wanted="a string in `content`")
    thoughts = value.get("reasoning_content") or value.get("reasoning") or value.get("thinking") or ""
    texts: list[str] = []
    reasoning = [_string(thoughts, "reasoning_content")]
    for kind, text in _parts(told, i):
        if kind == "tool_call":
            calls = [*calls, _json(text, i)]
        else:
            (reasoning if kind == "reasoning" else texts).append(text)
    try:
        made = tuple(tool_call_from_json(call) for call in calls)
    except DataError as error:
        raise DataError(f"message {i}: {error.what}", got=error.got, wanted=error.wanted) from None
    if made and role != "assistant":
        raise DataError(f"message {i} calls a tool, but only an assistant can", got=f"role {role}")
    whose = [each if isinstance(each := value.get(key), str) else "" for key in ("name", "tool_call_id")]
    return Message(role, "\n".join(filter(None, texts)), made, "\n".join(filter(None, reasoning)), *whose)


def _parts(value: object, i: int) -> Iterator[tuple[str, str]]:
    """(kind, text) of a content: a string, or a list of text, reasoning and tool call parts."""
    if isinstance(value, str) or value is None:
        yield "text", value or ""
        return
    if not isinstance(value, Sequence):
        raise DataError(f"message {i} has no text", got=type(value).__name__, wanted="a string in `content`")
    for part in value:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part if isinstance(part, str) else None
        if isinstance(part, Mapping):
            text = next((part[key] for key in ("text", "value") if isinstance(part.get(key), str)), None)
        if text is None or kind not in ("text", "str", "reasoning", "tool_call"):
            raise DataError(f"message {i} has a part that is no text", got=repr(kind), wanted='{"type": "text", ...}')
        yield kind, text


def _json(text: str, i: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"message {i} has a tool call that is no JSON", got=str(error)) from None


def _as_messages(value: object, role: Role) -> tuple[Message, ...]:
    """A string, one message or a list of messages."""
    if isinstance(value, str):
        return _dialogue(value) if role == "user" and value.startswith("\n\nHuman:") else (Message(role, value),)
    return _turns([value] if isinstance(value, Mapping) else value)


def _instruction(row: Row, more: object) -> tuple[Message, ...]:
    """Alpaca's system, history and instruction, with the input below it."""
    messages = [Message("system", row["system"])] if isinstance(row.get("system"), str) and row["system"] else []
    for pair in row.get("history") or ():
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise DataError(
                "`history` is no list of pairs", got=repr(pair)[:60], wanted='[["question", "answer"], ...]'
            )
        messages += [Message("user", _string(pair[0], "history")), Message("assistant", _string(pair[1], "history"))]
    parts = [_string(row.get("instruction"), "instruction"), _string(more or "", "input")]
    return (*messages, Message("user", "\n".join(part for part in parts if part)))


def _dialogue(value: object) -> tuple[Message, ...]:
    """Anthropic's HH form: `\\n\\nHuman: ...\\n\\nAssistant: ...`."""
    pieces = _HH_TURN.split(_string(value, "chosen and rejected"))
    if len(pieces) < 3 or pieces[0].strip():
        raise DataError("the dialogue does not begin with a turn", got=repr(pieces[0][:40]), wanted=r"\n\nHuman: ...")
    roles, texts = pieces[1::2], pieces[2::2]
    return tuple(
        Message("user" if role == "Human" else "assistant", text.strip())
        for role, text in zip(roles, texts, strict=True)
    )


def _shared(a: tuple[Message, ...], b: tuple[Message, ...]) -> tuple[Message, ...]:
    """What two conversations begin with, up to where an assistant is to speak."""
    count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    while count and a[count - 1].role == "assistant":
        count -= 1
    return a[:count]


def _chat(messages: tuple[Message, ...], source: str, tags: Mapping[str, Any], beside: Row) -> Chat:
    """`beside`: the row, whose tools and weight stand beside its conversation."""
    if not any(message.role == "assistant" for message in messages):
        got = f"roles {', '.join(message.role for message in messages) or 'none'}"
        raise DataError("the conversation has no assistant turn", got=got, wanted="at least one answer")
    _check_answers(messages)
    return Chat(messages, source, tags, tools_from_json(beside.get("tools")), weight_from_json(beside.get("weight")))


def _preference(
    prompt: tuple[Message, ...],
    chosen: tuple[Message, ...],
    rejected: tuple[Message, ...],
    source: str,
    tags: Mapping[str, Any],
    beside: Row,
) -> Preference:
    """`beside`: the row, whose tools and weight stand beside its answers."""
    if not prompt or prompt[-1].role not in ("user", "tool"):
        last = prompt[-1].role if prompt else "no prompt"
        raise DataError("the prompt does not end with a question", got=last, wanted="a user or tool turn at its end")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side or side[0].role != "assistant":
            first = side[0].role if side else "nothing"
            raise DataError(f"`{name}` does not begin with an answer", got=first, wanted="an assistant turn")
        _check_answers(side)
    if chosen == rejected:
        raise DataError("chosen and rejected are the same")
    tools, weight = tools_from_json(beside.get("tools")), weight_from_json(beside.get("weight"))
    return Preference(prompt, chosen, rejected, source, tags, tools, weight)


def _check_answers(messages: tuple[Message, ...]) -> None:
    if any(m.role == "assistant" and not m.content.strip() and not m.tool_calls for m in messages):
        raise DataError("an answer is empty", wanted="text in every assistant turn")
