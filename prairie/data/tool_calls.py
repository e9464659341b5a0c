"""How a model writes its tool calls, learnt from its own template, and read back from its answers.

A template is given a call and shows how it looks: JSON between `<tool_call>` marks (Hermes, Qwen), the whole answer
(Llama 3), a list after `[TOOL_CALLS]` (Mistral). Nothing asks which model it is. Not here: how calls are shown to the
model (`chat_template`), OpenAI's JSON of an answer (`prairie.serve`).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field

from prairie.data.chat_template import PROBE_CALL, ChatTemplate
from prairie.data.records import ToolCall

_CALL = re.compile(
    rf'(?P<list>\[)?\s*\{{\s*"name":\s*"{PROBE_CALL.name}",\s*"(?P<key>arguments|parameters)":\s*'
    rf'{re.escape(PROBE_CALL.arguments)}(?:,\s*"id":\s*"{PROBE_CALL.id}")?\s*\}}\s*(?(list)\])'
)
_NO_THOUGHTS = re.compile(r"\s*<think>\s*</think>\s*")


@dataclass(frozen=True, slots=True)
class Said:
    """An answer taken apart."""

    content: str
    calls: tuple[ToolCall, ...]


@dataclass(frozen=True, slots=True)
class CallFormat:
    """What stands around the JSON of a call. `opening` is empty where a call is the whole answer."""

    opening: str
    closing: str
    key: str
    """`arguments` or `parameters`."""
    frame: tuple[str, str] = field(default=("", ""), compare=False)
    """What stands before the `{` of a call and after its `}`, exactly as the template writes it."""
    has_id: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, template: ChatTemplate) -> CallFormat | None:
        """None if the template shows no calls, or writes them as no JSON."""
        template = template.for_tools
        written = template.call_as_written
        for stop in sorted(template.stop_texts, key=len, reverse=True):
            written = written.removesuffix(stop)
        found = _CALL.search(written)
        if found is None:
            return None
        opening = _NO_THOUGHTS.sub("", written[: found.start()], count=1)
        call = found.group()
        frame = opening + call[: call.index("{")], call[call.rindex("}") + 1 :] + written[found.end() :].rstrip()
        has_id = PROBE_CALL.id in call
        return cls(opening.strip(), written[found.end() :].strip(), found["key"], frame, has_id)

    def read(self, text: str, known: Collection[str]) -> Said:
        """The calls in an answer and the text before them. What is no whole call of this format stays text; where a
        call is the whole answer, only one of a `known` function is taken for one."""
        if not self.opening:
            calls = self._objects(text.strip())
            if not calls or any(call.name not in known for call in calls):
                return Said(text, ())
            return Said("", calls)
        before, *parts = text.split(self.opening)
        made: list[ToolCall] = []
        for part in parts:
            body, closed, after = part.partition(self.closing) if self.closing else (part, "", "")
            calls = self._objects(body.strip())
            if not calls or (self.closing and not closed) or after.strip():
                return Said(text, ())
            made += calls
        return Said(before.rstrip() if made else text, tuple(made))

    def shown(self, text: str) -> int:
        """How many characters of an unfinished answer are surely content and not (the space before) a call."""
        if not self.opening:
            return 0 if text.lstrip()[:1] in ("", "{", "[") else len(text)
        place = text.find(self.opening)
        if place < 0:
            held = next((n for n in range(len(self.opening) - 1, 0, -1) if text.endswith(self.opening[:n])), 0)
            place = len(text) - held
        return len(text[:place].rstrip())

    def _objects(self, body: str) -> tuple[ToolCall, ...]:
        """Calls from one JSON object, a list of them, or several one after the other; empty if it is none of these."""
        decoder, place, calls = json.JSONDecoder(), 0, []
        try:
            while place < len(body):
                value, end = decoder.raw_decode(body, place)
                for each in value if isinstance(value, list) else [value]:
                    name, arguments = each["name"], each.get(self.key, {})
                    if not isinstance(name, str) or not isinstance(arguments, dict):
                        return ()
                    # Nine characters, letters and digits: what every template takes that looks at them.
                    id = secrets.token_hex(5)[:9]
                    calls.append(ToolCall(name, json.dumps(arguments, ensure_ascii=False), id))
                place = end + len(body[end:]) - len(body[end:].lstrip(" \n;"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return ()
        return tuple(calls)
