"""The one renderer of conversations: training rows and served prompts come from the same code.

A template is jinja, as in a model folder. Ours mark what the assistant says by `{% generation %}`; for a foreign one
the marks are found by rendering prefixes of the conversation. The rendered text is cut at these marks and each segment
is tokenised apart, so that the ids of a served prompt are an exact prefix of the ids that were trained on. A template
that writes earlier turns anew as the conversation grows gives one row for each answer instead of one for all.

Content is data: a special token written inside a message, a tool or a result stays plain text. Not here: the tokens
themselves (`tokenizer`), the bounds of foreign jinja (`template_sandbox`), rows and batches (`loader`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from prairie.data.builtin_templates import AS_SAID, BUILTIN, ENDS_BY_EOS, NEEDED, PLAIN_CHATML, STOP_STRINGS
from prairie.data.records import Message, Role, ToolCall, Tools
from prairie.data.template_sandbox import Sandbox, load_trusted
from prairie.data.tokenizer import Place, Tokenizer
from prairie.data.words import spread
from prairie.errors import TemplateError, TokenizerError

# Unicode noncharacters, never part of text: they mark spans inside the rendered text and shield content.
_OPEN, _CLOSE, _GUARD, _ESCAPE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_MARKS = _OPEN + _CLOSE + _GUARD + _ESCAPE
_SLOT = re.compile("\ufdd4([0-9]+)\ufdd5")
"""Where turn n goes in a conversation of which only the roles are known."""
_MOST_FORMS = 1000
_NO_THOUGHTS = re.compile(r"\s*<think>\s*</think>\s*")
_PROBE = (Message("user", "QUESTION"), Message("assistant", "ANSWER"))
PROBE_CALL = ToolCall("probe_name", '{"probe_key": "probe_value"}', "probe0001")
"""A call that is rendered to see how a template writes one; Mistral's want ids of nine characters."""
_PROBE_TOOLS: Tools = (
    {
        "type": "function",
        "function": {
            "name": PROBE_CALL.name,
            "description": "A probe.",
            "parameters": {
                "type": "object",
                "properties": {"probe_key": {"type": "string", "description": "A key."}},
                "required": ["probe_key"],
            },
        },
    },
)
Options = Mapping[str, Any]
"""What a template may be told beside the conversation: `enable_thinking`, `reasoning_effort` and the like."""
_TAKEN = frozenset(
    ["messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token"]
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """Ids of a conversation; `mask[i]`: token i is learnt (what an assistant said, and its stop token)."""

    ids: list[int]
    mask: list[bool]


@dataclass(frozen=True, slots=True)
class Filled:
    """Rows of dialogues: row r is that of dialogue `numbers[r]`, its ids and mask are those from `offsets[r]` on to
    `offsets[r + 1]`."""

    numbers: list[int]
    ids: npt.NDArray[np.uint32]
    mask: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]

    def fit(self, max_tokens: int) -> list[bool]:
        """Of each row, whether it has at most so many tokens and one behind its first that is learnt."""
        marks = np.concatenate([[0], np.cumsum(self.mask)])
        learnt = marks[self.offsets[1:]] - marks[np.minimum(self.offsets[:-1] + 1, self.offsets[1:])]
        fits: list[bool] = ((np.diff(self.offsets) <= max_tokens) & (learnt > 0)).tolist()
        return fits

    def row(self, r: int) -> Rendered:
        """One of them."""
        start, end = int(self.offsets[r]), int(self.offsets[r + 1])
        return Rendered(self.ids[start:end].tolist(), self.mask[start:end].tolist())


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What is rendered: turns, the tools that may be called, and options of the template."""

    messages: tuple[Message, ...]
    tools: Tools = ()
    options: Options | None = None

    def until(self, i: int) -> Dialogue:
        """The first `i` turns."""
        return Dialogue(self.messages[:i], self.tools, self.options)


@dataclass(frozen=True, slots=True)
class _Segment:
    text: str
    supervised: bool


class _Run(NamedTuple):
    """A stretch of a row: `ids` where the template says all of it, else text of the template at the even places of
    `parts` and numbers of turns at the odd ones."""

    ids: tuple[int, ...]
    parts: tuple[str, ...]
    place: Place
    supervised: bool

    def filled(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """The text of each conversation."""
        columns = [
            [turns[int(part)].content for turns in conversations] if i % 2 else repeat(part)
            for i, part in enumerate(self.parts)
        ]
        return list(map("".join, zip(*columns, strict=False)))


_Form = tuple[_Run, ...]
"""A row of which only the roles are known; empty where there is no such thing."""


class _Rewritten(TemplateError):
    """The rendered beginning of a conversation is no prefix of the whole."""


class ChatTemplate:
    """A chat template bound to its tokenizer."""

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        extra_stop_ids: Sequence[int] = (),
        name: str = "",
        tool_source: str | None = None,
    ) -> None:
        """`tool_source`: what a model uses instead when there are tools. Raises TemplateError if a source is no jinja
        or cannot render a question."""
        self.source, self.tool_source = source, tool_source
        both = source if tool_source is None else f"{source}\0{tool_source}"
        self.hash = hashlib.sha256(both.encode()).hexdigest()
        self._tokenizer = tokenizer
        self._trusted = source in BUILTIN.values() or source == PLAIN_CHATML
        self._render = load_trusted(source, _Generation) if self._trusted else Sandbox(_Generation).load(source)
        self._made_of = (source, tokenizer, tuple(extra_stop_ids), name, tool_source)
        self._with_tools = None if tool_source is None else ChatTemplate(tool_source, tokenizer)
        special = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._firsts = sorted({*_MARKS, *(token[0] for token in special if token)})
        self._forms: dict[tuple[str, ...], _Form] = {}
        self._shield = re.compile("|".join([f"[{_MARKS}]", *map(re.escape, special)]))
        self._in_parts = False
        self._in_parts = self._wants_parts()
        self._untrainable = self._why_untrainable()
        stops = [*self._stops_of_template(), tokenizer.eos_id, *extra_stop_ids]
        if self._with_tools is not None:
            stops += self._with_tools.stop_ids
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(stop for stop in stops if stop is not None))
        self.stop_strings: tuple[str, ...] = STOP_STRINGS.get(name, ())

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, self._made_of

    @classmethod
    def builtin(cls, name: str, tokenizer: Tokenizer) -> ChatTemplate:
        """Raises TemplateError for an unknown name, TokenizerError if the tokenizer lacks a token of the template."""
        if name not in BUILTIN:
            raise TemplateError("no such chat template", got=repr(name), wanted=" | ".join(BUILTIN))
        for token in NEEDED[name]:
            if token not in tokenizer.special_tokens:
                raise TokenizerError(
                    f"the template {name} needs a special token that the tokenizer does not have",
                    got=", ".join(tokenizer.special_tokens) or "none",
                    wanted=token,
                    mend="use the template plain, or train the tokenizer with this token",
                )
        if tokenizer.eos_id is None and name in ENDS_BY_EOS:
            raise TokenizerError(
                f"the template {name} ends an answer by the end-of-text token", got="none", wanted="an eos_token"
            )
        return cls(BUILTIN[name], tokenizer, name=name)

    @classmethod
    def load(cls, folder: Path | str, tokenizer: Tokenizer) -> ChatTemplate:
        """`chat_template.jinja` (and `additional_chat_templates/tool_use.jinja`), else `chat_template.json`, else that
        of `tokenizer_config.json`, else ChatML where its tokens exist, else plain. Stop ids of
        `generation_config.json` are added."""
        folder = Path(folder)
        stops = _stops_of_folder(folder)
        source, tool_source = _sources_of_folder(folder)
        if source is None:
            fits = all(token in tokenizer.special_tokens for token in NEEDED["chatml"])
            source = cls.builtin("chatml" if fits else "plain", tokenizer).source
        name = next((name for name, text in BUILTIN.items() if text == source), "")
        return cls(source, tokenizer, stops, name, tool_source)

    def save(self, folder: Path | str) -> None:
        """Writes `chat_template.jinja` (that for tools beside it, where transformers looks for it), and the same into
        `tokenizer_config.json` where that exists.

        The `{% generation %}` marks stay: transformers knows them and returns the same mask by them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "chat_template.jinja").write_text(self.source, encoding="utf-8")
        if self.tool_source is not None:
            (folder / _TOOL_FILE).parent.mkdir(exist_ok=True)
            (folder / _TOOL_FILE).write_text(self.tool_source, encoding="utf-8")
        path = folder / "tokenizer_config.json"
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8")) | {"chat_template": self.source}
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def encode(self, messages: Sequence[Message], tools: Tools = ()) -> Rendered:
        """A whole conversation. Raises TemplateError if the template refuses it or cannot be trained on."""
        return self.encode_many([Dialogue(tuple(messages), tools)])[0]

    def encode_many(self, dialogues: Sequence[Dialogue], *, prompt: bool = False) -> list[Rendered]:
        """One row for each (with `prompt`: up to where the assistant speaks); all text is tokenised in one batch on
        all cores. Raises TemplateError if one cannot be one row."""
        self.check_trainable()
        return self._assemble([self._of(d)._prompt(d) if prompt else self._of(d)._row(d) for d in dialogues])

    def encode_rows(self, dialogues: Sequence[Dialogue]) -> list[list[Rendered]]:
        """Rows to learn each answer from: one for a conversation, or one for each of its answers where the template
        writes earlier turns anew. Raises TemplateError if the template refuses one or cannot be trained on."""
        self.check_trainable()
        rows = [self._of(dialogue)._rows(dialogue) for dialogue in dialogues]
        flat = iter(self._assemble([row for each in rows for row in each]))
        return [[next(flat) for _ in each] for each in rows]

    def fill(self, dialogues: Sequence[Dialogue]) -> Filled:
        """The rows of those dialogues that differ from others in nothing but what is said: the same as `encode_rows`
        makes of each, sooner. Other dialogues are left out."""
        forms = [(i, form) for i, dialogue in enumerate(dialogues) if (form := self._form_of(dialogue))]
        run_ends = np.cumsum([len(form) for _, form in forms], dtype=np.int64)
        members: dict[_Form, list[int]] = {}
        for k, (_, form) in enumerate(forms):
            members.setdefault(form, []).append(k)
        texts: dict[Place, list[str]] = {"start": [], "after_special": [], "after_text": []}
        constant: list[int] = []
        columns: list[tuple[npt.NDArray[np.int64], _Run, int]] = []
        for form, rows in members.items():
            first = run_ends[rows] - len(form)
            for r, run in enumerate(form):
                columns.append((first + r, run, len(texts[run.place]) if run.parts else len(constant)))
                if run.parts:
                    texts[run.place] += run.filled([dialogues[forms[k][0]].messages for k in rows])
                constant += run.ids
        count = int(run_ends[-1]) if forms else 0
        starts, sizes, learnt = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, np.bool_)
        read = {place: self._tokenizer.encode_spans(said, place=place) for place, said in texts.items()}
        ids = [np.array(constant, np.uint32), *(spans.ids for spans in read.values())]
        begins = dict(zip(read, np.cumsum([len(part) for part in ids]).tolist(), strict=False))
        for places, run, at in columns:
            learnt[places] = run.supervised
            if run.parts:
                spans, these = read[run.place], slice(at, at + len(places))
                starts[places], sizes[places] = begins[run.place] + spans.starts[these], spans.sizes[these]
            else:
                starts[places], sizes[places] = at, len(run.ids)
        until = np.concatenate([[0], np.cumsum(sizes)])
        offsets = until[np.concatenate([[0], run_ends])]
        numbers = [i for i, _ in forms]
        return Filled(numbers, np.concatenate(ids)[spread(starts, sizes)], np.repeat(learnt, sizes), offsets)

    def check_trainable(self) -> None:
        """Raises TemplateError if rows of this template would differ from what is served with it."""
        if self._untrainable:
            raise TemplateError(self._untrainable, mend="use a builtin template: " + " | ".join(BUILTIN))

    def encode_prompt(
        self, messages: Sequence[Message], tools: Tools = (), options: Options | None = None
    ) -> list[int]:
        """The conversation up to where the assistant speaks: an exact prefix of the row that its answer is learnt
        from. Raises TemplateError if the template refuses it, or cannot show its tools or calls."""
        dialogue = Dialogue(tuple(messages), tools, options)
        return self._assemble([self._of(dialogue)._prompt(dialogue)])[0].ids

    def render(
        self,
        messages: Sequence[Message],
        tools: Tools = (),
        options: Options | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text, as transformers' `apply_chat_template(tokenize=False)` gives it."""
        dialogue = Dialogue(tuple(messages), tools, options)
        return _unshield(_unmarked(self._of(dialogue)._text(dialogue, add_generation_prompt)))

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The tokens that end an answer, as text."""
        return tuple(text for text, token in self._tokenizer.special_tokens.items() if token in self.stop_ids)

    @property
    def for_tools(self) -> ChatTemplate:
        """The template that is used where there are tools: another than this one if the model has two."""
        return self._with_tools or self

    # ---- text

    def _of(self, dialogue: Dialogue) -> ChatTemplate:
        """The template for tools where there are some."""
        return self._with_tools if dialogue.tools and self._with_tools is not None else self

    def _text(self, dialogue: Dialogue, prompt: bool) -> str:
        """Rendered text with span marks and shielded content."""
        if dialogue.tools and not self._shows_tools:
            raise TemplateError(
                "this chat template cannot show tools", mend="leave them out, or use the template chatml"
            )
        if any(message.tool_calls for message in dialogue.messages) and not self._shows_calls:
            raise TemplateError("this chat template cannot show tool calls", mend="use the template chatml")
        return self._written(dialogue, prompt, self._shows_reasoning)

    def _written(self, dialogue: Dialogue, prompt: bool, shows_reasoning: bool = True) -> str:
        options = {key: self._shielded(value) for key, value in (dialogue.options or {}).items()}
        if wrong := sorted(_TAKEN & options.keys()):
            raise TemplateError("an option of the template has a name that is taken", got=", ".join(wrong))
        given = {
            "messages": [
                self._shielded(_values(message, shows_reasoning, self._in_parts)) for message in dialogue.messages
            ],
            "tools": self._shielded(list(dialogue.tools)) or None,
            "documents": None,
            "add_generation_prompt": prompt,
        }
        try:
            return self._render(given | self._names | options)
        except Exception as error:  # a template is foreign code: it may fail in any way
            roles = ", ".join(message.role for message in dialogue.messages) or "none"
            raise TemplateError(
                "the chat template refuses this conversation", got=f"{error or type(error).__name__} for roles {roles}"
            ) from None

    @cached_property
    def _names(self) -> dict[str, str]:
        """The tokens that a template may name."""
        tokens = {key: getattr(self._tokenizer, key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return {key: token for key, token in tokens.items() if token is not None}

    def _shielded(self, value: Any) -> Any:
        """A value whose texts cannot be taken for marks or special tokens."""
        if isinstance(value, str):
            return self._shield.sub(_shield_match, value)
        if isinstance(value, Mapping):
            return {self._shielded(key): self._shielded(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._shielded(each) for each in value]
        return value

    # ---- forms: rows that differ from others in nothing but what is said

    def _form_of(self, dialogue: Dialogue) -> _Form:
        """The form of a dialogue, if its template writes what is said as it stands and nothing in it is special."""
        turns = dialogue.messages
        if self.source not in AS_SAID or dialogue.tools or dialogue.options or not all(map(self._is_plain, turns)):
            return ()
        roles = tuple([message.role for message in turns])
        form = self._forms.get(roles)
        if form is None:
            form = self._form(roles)
            if len(self._forms) < _MOST_FORMS:
                self._forms[roles] = form
        return form

    def _is_plain(self, message: Message) -> bool:
        """Whether a turn is nothing but text, in which no mark, special token or thought can begin."""
        if message.tool_calls or message.reasoning or message.name or message.tool_call_id:
            return False
        text = message.content
        for first in self._firsts:
            if first in text:
                return False
        return bool(text) and "<think>" not in text

    def _form(self, roles: Sequence[Role]) -> _Form:
        """Empty if the template refuses these roles, or a special token could begin before a turn and end in it."""
        if self._tokenizer.swallows_spaces:
            return ()
        slots = tuple([Message(role, f"\ufdd4{i}\ufdd5") for i, role in enumerate(roles)])
        try:
            segments = self._row(Dialogue(slots))
        except TemplateError:  # said again, for this very dialogue, where it is rendered
            return ()
        runs: list[_Run] = []
        place: Place = "start"
        for segment in segments:
            for piece, at in self._tokenizer.pieces(segment.text, place):
                place = "after_special" if isinstance(piece, int) else "after_text"
                parts = [] if isinstance(piece, int) else _SLOT.split(piece)
                if any(_begins(token, before) for before in parts[:-1:2] for token in self._tokenizer.special_tokens):
                    return ()
                if len(parts) > 1:
                    runs.append(_Run((), tuple(parts), at, segment.supervised))
                else:
                    ids = [piece] if isinstance(piece, int) else self._tokenizer.encode(piece, place=at)
                    runs.append(_Run(tuple(ids), (), at, segment.supervised))
        return tuple(runs)

    # ---- segments

    def _prompt(self, dialogue: Dialogue) -> list[_Segment]:
        """What is served: cut at earlier answers where they stand as they were served."""
        marked = self._text(dialogue, True)
        text = _unmarked(marked)
        try:
            segments = self._cut(dialogue, marked, prompt=True)
        except _Rewritten:
            segments = [_Segment(text, False)] if text else []
        # The mark of an answer without thoughts is a segment of its own, so that it may follow the plain prompt.
        plain = self._plain_prompt(dialogue)
        if segments and plain and text.startswith(plain):
            last = segments[-1].text
            start = len(plain) - len(text) + len(last)
            if 0 < start < len(last):
                segments[-1:] = [_Segment(last[:start], False), _Segment(last[start:], False)]
        return segments

    def _row(self, dialogue: Dialogue) -> list[_Segment]:
        """What is learnt from in one row. Raises TemplateError if an earlier turn is written anew."""
        return self._without_empty_thoughts(dialogue, self._cut(dialogue, self._text(dialogue, False)))

    def _rows(self, dialogue: Dialogue) -> list[list[_Segment]]:
        try:
            return [self._row(dialogue)]
        except _Rewritten:
            return [self._last_answer(dialogue.until(i + 1)) for i in _answers(dialogue)]

    def _last_answer(self, dialogue: Dialogue) -> list[_Segment]:
        """A row from which only the last turn is learnt, after the prompt that is served before it."""
        text, last = _unmarked(self._text(dialogue, False)), len(dialogue.messages) - 1
        served = self._served(dialogue, last, text)
        stop = len(served) + self._spoken(text[len(served) :])
        prompt = [_Segment(segment.text, False) for segment in self._prompt(dialogue.until(last))]
        start = sum(len(segment.text) for segment in prompt)  # the prompt with thinking; `served` may be without
        if not text.startswith("".join(segment.text for segment in prompt)):
            prompt, start = [], 0
        rest = [_Segment(text[start : len(served)], False), _Segment(text[len(served) : stop], True)]
        rest.append(_Segment(text[stop:], False))
        return self._without_empty_thoughts(dialogue, [segment for segment in (*prompt, *rest) if segment.text])

    def _cut(self, dialogue: Dialogue, marked: str, prompt: bool = False) -> list[_Segment]:
        """The rendered text cut where an assistant starts and stops to speak.

        A foreign template's own marks are not used: they often hold the line end after a stop token, or a part of
        the prompt, or leave out what a model has to say itself.
        """
        return _cut_at_marks(marked) if self._trusted else self._cut_at_prefixes(dialogue, _unmarked(marked), prompt)

    def _cut_at_prefixes(self, dialogue: Dialogue, text: str, prompt: bool) -> list[_Segment]:
        segments: list[_Segment] = []
        end = 0
        for i in _answers(dialogue):
            before, through = self._served(dialogue, i, text), text
            if i + 1 < len(dialogue.messages) or prompt:
                through = _unmarked(self._text(dialogue.until(i + 1), False))
            if not (text.startswith(through) and end <= len(before) <= len(through)):
                raise _rewritten(i)
            stop = len(before) + self._spoken(text[len(before) : len(through)])
            segments += [_Segment(text[end : len(before)], False), _Segment(text[len(before) : stop], True)]
            end = stop
        segments.append(_Segment(text[end:], False))
        return [segment for segment in segments if segment.text]

    def _served(self, dialogue: Dialogue, i: int, text: str) -> str:
        """The prompt before answer `i`, which `text` begins with; for an answer without thoughts also that with
        thinking switched off. Raises _Rewritten."""
        plain = _unmarked(self._text(dialogue.until(i), True))
        if text.startswith(plain):
            return plain
        if self._knows_thinking and not dialogue.messages[i].reasoning:
            silent = self._silent_prompt(dialogue.until(i))
            if text.startswith(silent):
                return silent
        raise _rewritten(i)

    def _without_empty_thoughts(self, dialogue: Dialogue, segments: list[_Segment]) -> list[_Segment]:
        """Marks that say "no thoughts" are not learnt before an answer that brought none: where the template knows
        them, they belong to the prompt that is served when thinking is switched off."""
        text = "".join(segment.text for segment in segments)
        if not self._knows_thinking and "<think>" not in text:
            return segments
        silent: list[str] = []
        if self._knows_thinking:
            thoughtless = [i for i in _answers(dialogue) if not dialogue.messages[i].reasoning]
            silent = [prompt for i in thoughtless if text.startswith(prompt := self._silent_prompt(dialogue.until(i)))]
        kept: list[_Segment] = []
        place = 0
        for segment in segments:
            start, stop = place, place + len(segment.text)
            place = stop
            if segment.supervised:
                cut = max([start, *(len(prompt) for prompt in silent if start < len(prompt) <= stop)])
                if empty := _NO_THOUGHTS.match(text, cut, stop):
                    cut = empty.end()
                kept.append(_Segment(text[start:cut], False))
                start = cut
            kept.append(_Segment(text[start:stop], segment.supervised))
        return [segment for segment in kept if segment.text]

    def _silent_prompt(self, dialogue: Dialogue) -> str:
        """The prompt with thinking switched off."""
        options = {**(dialogue.options or {}), "enable_thinking": False}
        return _unmarked(self._text(Dialogue(dialogue.messages, dialogue.tools, options), True))

    def _plain_prompt(self, dialogue: Dialogue) -> str:
        """The prompt without options that switch thinking off; empty if there are none."""
        options = dialogue.options or {}
        if options.get("enable_thinking") is not False or not self._knows_thinking:
            return ""
        kept = {key: value for key, value in options.items() if key != "enable_thinking"}
        return _unmarked(self._text(Dialogue(dialogue.messages, dialogue.tools, kept), True))

    def _spoken(self, answer: str) -> int:
        """Length of an assistant's rendered turn up to its stop token, without the white space that follows it."""
        ends = [match.end() for match in self._tokenizer.special_pattern.finditer(answer)] or [0]
        return ends[-1] if not answer[ends[-1] :].strip() else len(answer)

    # ---- tokens

    def _assemble(self, conversations: Sequence[Sequence[_Segment]]) -> list[Rendered]:
        """Tokens of segments; the pieces of text are tokenised once each, in one batch for each place."""
        plans: list[list[tuple[list[int], bool]]] = []
        waiting: dict[Place, dict[str, list[int]]] = {"start": {}, "after_special": {}, "after_text": {}}
        for segments in conversations:
            plan: list[tuple[list[int], bool]] = []  # lists of ids; those of text are filled in below
            place: Place = "start"
            for segment in segments:
                for piece, at in self._tokenizer.pieces(segment.text, place):
                    if isinstance(piece, str):
                        plan.append((waiting[at].setdefault(_unshield(piece), []), segment.supervised))
                        place = "after_text"
                    else:
                        plan.append(([piece], segment.supervised))
                        place = "after_special"
            plans.append(plan)
        for at, texts in waiting.items():
            if texts:
                for ids, tokens in zip(
                    texts.values(), self._tokenizer.encode_batch(list(texts), place=at), strict=True
                ):
                    ids += tokens
        rendered = []
        for plan in plans:
            row: list[int] = []
            mask: list[bool] = []
            for ids, supervised in plan:
                row += ids
                mask += [supervised] * len(ids)
            rendered.append(Rendered(row, mask))
        return rendered

    # ---- what a template can do, found by rendering

    def _why_untrainable(self) -> str:
        """Empty, or why rows of this template would differ from what is served with it."""
        why = ""
        for answer in (_PROBE[1], Message("assistant", "ANSWER", reasoning="THOUGHT")):
            try:
                row = self._row(Dialogue((_PROBE[0], answer)))
            except _Rewritten:
                why = "the generation prompt of this chat template is not what stands before the assistant's text"
            except TemplateError as error:
                why = error.what
            else:
                return "" if any(segment.supervised for segment in row) else "this chat template shows no answer"
        return why

    def _wants_parts(self) -> bool:
        """Whether content is to be a list of parts, as templates of models that see images want it. Raises
        TemplateError if the template shows a question in neither form."""
        question = Dialogue(_PROBE[:1])
        if _PROBE[0].content in self._probe(question, True):
            return False
        self._in_parts = True
        if _PROBE[0].content not in self._written(question, True):
            raise TemplateError("this chat template does not show what is said", mend="use a builtin template")
        return True

    @cached_property
    def _shows_tools(self) -> bool:
        return PROBE_CALL.name in self._probe(Dialogue(_PROBE[:1], _PROBE_TOOLS))

    @cached_property
    def _shows_calls(self) -> bool:
        return PROBE_CALL.name in self.call_as_written

    @cached_property
    def _shows_reasoning(self) -> bool:
        """Whether it has a field for thoughts, even if it writes them only in some turns."""
        return "reasoning" in self.source or "thinking" in self.source

    @cached_property
    def _knows_thinking(self) -> bool:
        """Whether `enable_thinking` changes the prompt."""
        question = _PROBE[:1]
        return self._probe(Dialogue(question), True) != self._probe(
            Dialogue(question, (), {"enable_thinking": False}), True
        )

    @cached_property
    def call_as_written(self) -> str:
        """How an assistant writes `PROBE_CALL`, up to its stop token; empty if the template cannot show calls."""
        for tools in (_PROBE_TOOLS, ()):
            dialogue = Dialogue((_PROBE[0], Message("assistant", "", (PROBE_CALL,))), tools)
            before, text = self._probe(dialogue.until(1), True), self._probe(dialogue)
            if text.startswith(before) and PROBE_CALL.name in (spoken := text.removeprefix(before)):
                return spoken[: self._spoken(spoken)]
        return ""

    def _probe(self, dialogue: Dialogue, prompt: bool = False) -> str:
        """Rendered text; empty if the template refuses."""
        try:
            return _unmarked(self._written(dialogue, prompt))
        except TemplateError:
            return ""

    def _stops_of_template(self) -> list[int]:
        """The special tokens that end an answer and a call, found by rendering them."""
        stops = []
        text = self._probe(Dialogue(_PROBE))
        after = text[text.rfind("ANSWER") + len("ANSWER") :]
        match = self._tokenizer.special_pattern.match(after.lstrip()) if self._tokenizer.special_tokens else None
        stops += [self._tokenizer.special_id(match.group())] if match else []
        if self._tokenizer.special_tokens:
            matches = list(self._tokenizer.special_pattern.finditer(self.call_as_written))
            if matches and matches[-1].end() == len(self.call_as_written):
                stops.append(self._tokenizer.special_id(matches[-1].group()))
        return stops


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: puts span marks around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Callable[[], str]) -> str:
        return _OPEN + caller() + _CLOSE


def _values(message: Message, shows_reasoning: bool, in_parts: bool) -> dict[str, Any]:
    """A turn as templates read it: arguments as objects, and thoughts in the text where the template knows no field
    for them."""
    values: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning and shows_reasoning:
        values |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
    elif message.reasoning:
        values["content"] = f"<think>\n{message.reasoning}\n</think>\n\n{message.content}"
    if in_parts:
        values["content"] = [{"type": "text", "text": values["content"]}]
    if message.tool_calls:
        values["tool_calls"] = [
            call.to_json() | {"function": {"name": call.name, "arguments": json.loads(call.arguments)}}
            for call in message.tool_calls
        ]
    return values | {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key))}


def _begins(token: str, text: str) -> bool:
    """Whether `text` ends with the beginning of a special token."""
    return any(text.endswith(token[:length]) for length in range(1, len(token)))


def _answers(dialogue: Dialogue) -> list[int]:
    return [i for i, message in enumerate(dialogue.messages) if message.role == "assistant"]


def _rewritten(i: int) -> _Rewritten:
    return _Rewritten(
        "this chat template writes earlier turns anew when the conversation grows, so what was served "
        "is not what would be trained on",
        got=f"another text before or in message {i}",
        wanted="the rendered beginning of a conversation to be a prefix of the whole",
        mend="use a builtin template, or mark the assistant's text with {% generation %}",
    )


def _unmarked(text: str) -> str:
    return text.replace(_OPEN, "").replace(_CLOSE, "")


def _cut_at_marks(text: str) -> list[_Segment]:
    segments = []
    for part in re.split(f"({_OPEN}[^{_CLOSE}]*{_CLOSE})", text):
        if part:
            supervised = part.startswith(_OPEN)
            segments.append(_Segment(part.strip(_OPEN + _CLOSE), supervised))
    return [segment for segment in segments if segment.text]


def _shield_match(match: re.Match[str]) -> str:
    """Content cannot forge marks (they are escaped) or special tokens (a guard after the first character)."""
    text = match.group()
    return f"{_ESCAPE}{ord(text):x}{_GUARD}" if len(text) == 1 else text[0] + _GUARD + text[1:]


def _unshield(text: str) -> str:
    if _GUARD not in text and _ESCAPE not in text:
        return text
    return re.sub(f"{_ESCAPE}([0-9a-f]+){_GUARD}|{_GUARD}", lambda m: chr(int(m[1], 16)) if m[1] else "", text)


_TOOL_FILE = Path("additional_chat_templates") / "tool_use.jinja"


def _sources_of_folder(folder: Path) -> tuple[str | None, str | None]:
    """(the template, the one for tools if that is another)."""
    found: Any = None
    if (folder / "chat_template.jinja").is_file():
        found = {"default": _text_of(folder / "chat_template.jinja")}
        if (folder / _TOOL_FILE).is_file():
            found["tool_use"] = _text_of(folder / _TOOL_FILE)
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = found or _json_of(folder / name).get("chat_template")
    if isinstance(found, list):  # several named templates
        found = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
    if isinstance(found, dict):
        source, tool_source = found.get("default"), found.get("tool_use")
        return (source if isinstance(source, str) else None), (tool_source if isinstance(tool_source, str) else None)
    return (found if isinstance(found, str) else None), None


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError, RecursionError) as error:
        raise TemplateError(f"{path} cannot be read", got=str(error), wanted="UTF-8 text") from None


def _stops_of_folder(folder: Path) -> list[int]:
    value = _json_of(folder / "generation_config.json").get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return [stop for stop in values if isinstance(stop, int)]


def _json_of(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TemplateError(f"{path} cannot be read", got=str(error), wanted="a JSON object") from None
    return value if isinstance(value, dict) else {}
