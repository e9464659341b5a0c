"""The one vocabulary of the data room: what a row of text, a conversation and a preference are.

As JSON lines: `{"text"}`, `{"messages"}`, `{"prompt", "chosen", "rejected"}`; the last three are lists of messages.
Not here: reading foreign formats (`sources`), tokens (`chat_template`, `loader`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from prairie.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str

    def to_json(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


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

    def to_json(self) -> dict[str, Any]:
        return {"messages": [m.to_json() for m in self.messages], "source": self.source, "tags": dict(self.tags)}


@dataclass(frozen=True, slots=True)
class Preference:
    """Two continuations of one prompt, the first preferred. `prompt` ends with a user (or tool) turn."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    source: str = ""
    tags: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt": [m.to_json() for m in self.prompt],
            "chosen": [m.to_json() for m in self.chosen],
            "rejected": [m.to_json() for m in self.rejected],
            "source": self.source,
            "tags": dict(self.tags),
        }


Record = Text | Chat | Preference


def message_from_json(value: object) -> Message:
    """Raises DataError if `value` is not `{"role", "content"}` with a known role and text content."""
    if not isinstance(value, Mapping):
        raise DataError("a message is not an object", got=type(value).__name__, wanted='{"role": ..., "content": ...}')
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise DataError("a message has an unknown role", got=repr(role), wanted=" | ".join(ROLES))
    if not isinstance(content, str):
        raise DataError("a message has no text", got=type(content).__name__, wanted="a string in `content`")
    return Message(role, content)


def messages_from_json(values: object) -> tuple[Message, ...]:
    """Raises DataError as `message_from_json` does, or if `values` is not a list."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise DataError("`messages` is not a list", got=type(values).__name__, wanted="a list of messages")
    return tuple(message_from_json(value) for value in values)
