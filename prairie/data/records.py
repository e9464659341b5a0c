"""The one vocabulary of the data room: what a row of text, a conversation and a preference are.

As JSON lines: `{"text"}`, `{"messages"}`, `{"prompt", "chosen", "rejected"}`; the last three are lists of messages in
OpenAI's shape, and `tools` stands beside them. So does `weight` where a row counts more or less than others.
Not here: reading foreign formats (`sources`), tokens (`chat_template`, `loader`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from prairie.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that an assistant asks for; `arguments` is the text of a JSON object."""

    name: str
    arguments: str
    id: str = ""

    def to_json(self) -> dict[str, Any]:
        """OpenAI's shape."""
        function = {"name": self.name, "arguments": self.arguments}
        return ({"id": self.id} if self.id else {}) | {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `reasoning` is what an assistant thought before its answer; `name` and
    `tool_call_id` say which call a tool answers."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    name: str = ""
    tool_call_id: str = ""

    @property
    def written(self) -> str:
        """All that the turn says: thoughts, text and calls."""
        calls = (f"{call.name} {call.arguments}" for call in self.tool_calls)
        return "\n".join(part for part in (self.reasoning, self.content, *calls) if part)

    def to_json(self) -> dict[str, Any]:
        """OpenAI's shape; what is empty is left out."""
        more = {
            "reasoning_content": self.reasoning,
            "tool_calls": [call.to_json() for call in self.tool_calls],
            "name": self.name,
            "tool_call_id": self.tool_call_id,
        }
        return {"role": self.role, "content": self.content} | {key: value for key, value in more.items() if value}


Tools = tuple[Mapping[str, Any], ...]
"""Functions that an assistant may call, in OpenAI's shape: `{"type": "function", "function": {"name", ...}}`."""


@dataclass(frozen=True, slots=True)
class Text:
    """A document for pretraining, or with a label one to classify."""

    text: str
    source: str = ""
    label: str | None = None

    def to_json(self) -> dict[str, Any]:
        label = {} if self.label is None else {"label": self.label}
        return {"text": self.text, "source": self.source, **label}


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; every assistant turn is supervised."""

    messages: tuple[Message, ...]
    source: str = ""
    tags: Mapping[str, Any] = field(default_factory=dict)
    tools: Tools = ()
    weight: float = 1.0
    """How much the row counts; 2 is the row twice."""

    @property
    def label(self) -> bool | None:
        """Whether people liked the last answer; None where nobody said so."""
        found = self.tags.get("label")
        return found if isinstance(found, bool) else None

    def to_json(self) -> dict[str, Any]:
        row = {"messages": [m.to_json() for m in self.messages], "source": self.source, "tags": dict(self.tags)}
        return row | _tools_to_json(self.tools) | _weight_to_json(self.weight)


@dataclass(frozen=True, slots=True)
class Preference:
    """Two continuations of one prompt, the first preferred. `prompt` ends with a user (or tool) turn."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    source: str = ""
    tags: Mapping[str, Any] = field(default_factory=dict)
    tools: Tools = ()
    weight: float = 1.0
    """How much the row counts; 2 is the row twice."""

    def to_json(self) -> dict[str, Any]:
        row = {
            "prompt": [m.to_json() for m in self.prompt],
            "chosen": [m.to_json() for m in self.chosen],
            "rejected": [m.to_json() for m in self.rejected],
            "source": self.source,
            "tags": dict(self.tags),
        }
        return row | _tools_to_json(self.tools) | _weight_to_json(self.weight)


Record = Text | Chat | Preference


def message_from_json(value: object) -> Message:
    """Raises DataError if `value` is no message of OpenAI's shape with a known role and text content."""
    if not isinstance(value, Mapping):
        raise DataError("a message is not an object", got=type(value).__name__, wanted='{"role": ..., "content": ...}')
    role, content, calls = value.get("role"), value.get("content"), value.get("tool_calls") or ()
    if role not in ROLES:
        raise DataError("a message has an unknown role", got=repr(role), wanted=" | ".join(ROLES))
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise DataError("a message has no text", got=type(content).__name__, wanted="a string in `content`")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise DataError("`tool_calls` is no list", got=type(calls).__name__, wanted="a list of tool calls")
    if calls and role != "assistant":
        raise DataError("a message calls a tool, but only an assistant can", got=f"role {role}")
    return Message(role, content, tuple(tool_call_from_json(call) for call in calls), *_texts_of(value))


def _texts_of(value: Mapping[str, Any]) -> tuple[str, str, str]:
    reasoning = value.get("reasoning_content") or value.get("reasoning")
    texts = (reasoning or "", value.get("name") or "", value.get("tool_call_id") or "")
    if not all(isinstance(text, str) for text in texts):
        raise DataError(
            "a message is wrong", got="no text in reasoning_content, name or tool_call_id", wanted="strings"
        )
    return texts


def tool_call_from_json(value: object) -> ToolCall:
    """OpenAI's shape, or bare `{"name", "arguments"}`; arguments an object or its JSON text. Raises DataError."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError("a tool call has no name", got=type(value).__name__, wanted='{"name": ..., "arguments": {...}}')
    arguments = function.get("arguments", function.get("parameters"))
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    try:
        known = isinstance(json.loads(arguments or "{}"), dict)
    except (ValueError, RecursionError):
        known = False
    if not known:
        raise DataError("the arguments of a tool call are no JSON object", got=repr(arguments)[:60], wanted="{...}")
    return ToolCall(function["name"], arguments or "{}", str(value.get("id") or ""))


def tools_from_json(value: object) -> Tools:
    """A list of functions, each in OpenAI's shape or bare (`{"name", "parameters"}`), or its JSON text.

    Raises DataError for anything else, a function without a name, or one that is there twice.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError) as error:
            raise DataError("`tools` is no JSON", got=str(error), wanted="a list of functions") from None
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError("`tools` is no list", got=type(value).__name__, wanted="a list of functions")
    tools: list[dict[str, Any]] = []
    for tool in value:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError("a tool has no name", got=repr(tool)[:60], wanted='{"type": "function", "function": {...}}')
        tools.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) != len(names):
        raise DataError("a tool is named twice", got=", ".join(names), wanted="each name once")
    return tuple(tools)


def _tools_to_json(tools: Tools) -> dict[str, Any]:
    return {"tools": [dict(tool) for tool in tools]} if tools else {}


def _weight_to_json(weight: float) -> dict[str, Any]:
    return {"weight": weight} if weight != 1 else {}


def weight_from_json(value: object) -> float:
    """A row's `weight`; 1 where there is none. Raises DataError for what is no number above 0."""
    if value is None:
        return 1.0
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise DataError(
            "the row's `weight` cannot be one", got=repr(value)[:60], wanted="a number above 0",
            mend="leave rows that shall count for nothing out",
        )  # fmt: skip
    return float(value)


def messages_from_json(values: object) -> tuple[Message, ...]:
    """Raises DataError as `message_from_json` does, or if `values` is not a list."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise DataError("`messages` is not a list", got=type(values).__name__, wanted="a list of messages")
    return tuple(message_from_json(value) for value in values)
