"""The one renderer of conversations: training rows and served prompts come from the same code.

A template is jinja, as in a model folder. Ours mark what the assistant says by `{% generation %}`; for a foreign one
the marks are found by rendering prefixes of the conversation. The rendered text is cut at these marks and each segment
is tokenised apart, so that the ids of a served prompt are an exact prefix of the ids that were trained on.

Content is data: a special token written inside a message stays plain text. Not here: the tokens themselves
(`tokenizer`), rows and batches (`loader`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prairie.data.records import Message
from prairie.data.tokenizer import Place, Tokenizer
from prairie.errors import TemplateError, TokenizerError

BUILTIN: dict[str, str] = {
    "chatml": (
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
        "{%- if message['role'] == 'assistant' -%}"
        "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
        "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}"
        "{{- '\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    ),
    "zephyr": (
        "{%- for message in messages -%}"
        "{{- '<|' + message['role'] + '|>\\n' -}}"
        "{%- if message['role'] == 'assistant' -%}"
        "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
        "{%- else -%}{{- message['content'] + eos_token -}}{%- endif -%}"
        "{{- '\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
    ),
    "plain": (
        "{%- if bos_token and bos_token != eos_token -%}{{- bos_token -}}{%- endif -%}"
        "{%- for message in messages -%}"
        "{{- message['role'] | capitalize + ': ' -}}"
        "{%- if message['role'] == 'assistant' -%}"
        "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
        "{%- else -%}{{- message['content'] -}}{%- endif -%}"
        "{{- '\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}"
    ),
}
_NEEDED = {"chatml": ("<|im_start|>", "<|im_end|>"), "zephyr": (), "plain": ()}
_STOP_STRINGS = {"plain": ("\nUser:",)}

# Unicode noncharacters, never part of text: they mark spans inside the rendered text and shield content.
_OPEN, _CLOSE, _GUARD, _ESCAPE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_MARKS = _OPEN + _CLOSE + _GUARD + _ESCAPE
_PROBE = (Message("user", "QUESTION"), Message("assistant", "ANSWER"))


@dataclass(frozen=True, slots=True)
class Rendered:
    """Ids of a conversation; `mask[i]`: token i is learnt (what an assistant said, and its stop token)."""

    ids: list[int]
    mask: list[bool]


@dataclass(frozen=True, slots=True)
class _Segment:
    text: str
    supervised: bool


class ChatTemplate:
    """A chat template bound to its tokenizer."""

    def __init__(self, source: str, tokenizer: Tokenizer, extra_stop_ids: Sequence[int] = (), name: str = "") -> None:
        """Raises TemplateError if `source` is no jinja or cannot render a question."""
        self.source = source
        self.hash = hashlib.sha256(source.encode()).hexdigest()
        self._tokenizer = tokenizer
        self._marked = re.search(r"\{%-?\s*generation\b", source) is not None
        self._render = _compile(source, tokenizer)
        special = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._shield = re.compile("|".join([f"[{_MARKS}]", *map(re.escape, special)]))
        self._untrainable = self._why_untrainable()
        stops = [*self._stops_of_template(), tokenizer.eos_id, *extra_stop_ids]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(stop for stop in stops if stop is not None))
        self.stop_strings: tuple[str, ...] = _STOP_STRINGS.get(name, ())

    @classmethod
    def builtin(cls, name: str, tokenizer: Tokenizer) -> ChatTemplate:
        """Raises TemplateError for an unknown name, TokenizerError if the tokenizer lacks a token of the template."""
        if name not in BUILTIN:
            raise TemplateError("no such chat template", got=repr(name), wanted=" | ".join(BUILTIN))
        for token in _NEEDED[name]:
            if token not in tokenizer.special_tokens:
                raise TokenizerError(
                    f"the template {name} needs a special token that the tokenizer does not have",
                    got=", ".join(tokenizer.special_tokens) or "none",
                    wanted=token,
                    mend="use the template plain, or train the tokenizer with this token",
                )
        if tokenizer.eos_id is None and name != "chatml":
            raise TokenizerError(
                f"the template {name} ends an answer by the end-of-text token", got="none", wanted="an eos_token"
            )
        return cls(BUILTIN[name], tokenizer, name=name)

    @classmethod
    def load(cls, folder: Path | str, tokenizer: Tokenizer) -> ChatTemplate:
        """`chat_template.jinja`, else that of `tokenizer_config.json`, else builtin chatml where its tokens exist,
        else plain. Stop ids of `generation_config.json` are added."""
        folder = Path(folder)
        stops = _stops_of_folder(folder)
        source = _source_of_folder(folder)
        if source is None:
            fits = all(token in tokenizer.special_tokens for token in _NEEDED["chatml"])
            source = cls.builtin("chatml" if fits else "plain", tokenizer).source
        name = next((name for name, text in BUILTIN.items() if text == source), "")
        return cls(source, tokenizer, stops, name)

    def save(self, folder: Path | str) -> None:
        """Writes `chat_template.jinja`, and the same into `tokenizer_config.json` where that exists.

        The `{% generation %}` marks stay: transformers knows them and returns the same mask by them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "chat_template.jinja").write_text(self.source, encoding="utf-8")
        path = folder / "tokenizer_config.json"
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8")) | {"chat_template": self.source}
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def encode(self, messages: Sequence[Message]) -> Rendered:
        """A whole conversation. Raises TemplateError if the template refuses it or cannot be trained on."""
        return self.encode_many([messages])[0]

    def encode_many(self, conversations: Sequence[Sequence[Message]], *, prompt: bool = False) -> list[Rendered]:
        """`encode` of many conversations (with `prompt`: up to where the assistant speaks); all their text is
        tokenised in one batch on all cores."""
        self.check_trainable()
        return self._assemble([self._segments(messages, prompt) for messages in conversations])

    def check_trainable(self) -> None:
        """Raises TemplateError if rows of this template would differ from what is served with it."""
        if self._untrainable:
            raise TemplateError(self._untrainable, mend="use a builtin template: " + " | ".join(BUILTIN))

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The conversation up to where the assistant speaks: an exact prefix of `encode` of it with the answer."""
        if self._untrainable:
            text = self._text(messages, True)
            return self._assemble([[_Segment(text.replace(_OPEN, "").replace(_CLOSE, ""), False)]])[0].ids
        return self._assemble([self._segments(messages, True)])[0].ids

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text, as transformers' `apply_chat_template(tokenize=False)` gives it."""
        text = self._text(messages, add_generation_prompt).replace(_OPEN, "").replace(_CLOSE, "")
        return _unshield(text)

    def _text(self, messages: Sequence[Message], prompt: bool) -> str:
        """Rendered text with span marks and shielded content."""
        values = [{"role": m.role, "content": self._shield.sub(_shield_match, m.content)} for m in messages]
        return self._render(values, prompt)

    def _segments(self, messages: Sequence[Message], prompt: bool) -> list[_Segment]:
        """The rendered text cut where an assistant starts and stops to speak."""
        text = self._text(messages, prompt)
        return _cut_at_marks(text) if self._marked else self._cut_at_prefixes(messages, text)

    def _cut_at_prefixes(self, messages: Sequence[Message], text: str) -> list[_Segment]:
        segments: list[_Segment] = []
        end = 0
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before, through = self._text(messages[:i], True), self._text(messages[: i + 1], False)
            if not (text.startswith(before) and text.startswith(through) and end <= len(before) <= len(through)):
                raise TemplateError(
                    "this chat template writes earlier turns anew when the conversation grows, so what was served "
                    "is not what would be trained on",
                    got=f"another text before or in message {i}",
                    wanted="the rendered beginning of a conversation to be a prefix of the whole",
                    mend="use a builtin template, or mark the assistant's text with {% generation %}",
                )
            stop = len(before) + self._spoken(text[len(before) : len(through)])
            segments += [_Segment(text[end : len(before)], False), _Segment(text[len(before) : stop], True)]
            end = stop
        segments.append(_Segment(text[end:], False))
        return [segment for segment in segments if segment.text]

    def _spoken(self, answer: str) -> int:
        """Length of an assistant's rendered turn up to its stop token, without the white space that follows it."""
        ends = [match.end() for match in self._tokenizer.special_pattern.finditer(answer)] or [0]
        return ends[-1] if not answer[ends[-1] :].strip() else len(answer)

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

    def _why_untrainable(self) -> str:
        """Empty, or why rows of this template would differ from what is served with it."""
        prompt = self._text(_PROBE[:1], True)
        try:
            if not self._marked:
                self._cut_at_prefixes(_PROBE, self._text(_PROBE, False))
                grown = (*_PROBE, *(replace(m, content=m.content + " 2") for m in _PROBE))
                self._cut_at_prefixes(grown, self._text(grown, False))
                return ""
            text = self._text(_PROBE, False)
        except TemplateError as error:
            return error.what
        if _OPEN not in text:
            return "this chat template marks no text of the assistant"
        if text[: text.index(_OPEN)] != prompt:
            return "the generation prompt of this chat template is not what stands before the assistant's text"
        return ""

    def _stops_of_template(self) -> list[int]:
        """The special token that ends an answer, found by rendering one."""
        try:
            text = self._text(_PROBE, False)
        except TemplateError:
            return []
        after = text[text.rfind("ANSWER") + len("ANSWER") :].replace(_CLOSE, "")
        match = self._tokenizer.special_pattern.match(after.lstrip()) if self._tokenizer.special_tokens else None
        return [self._tokenizer.special_id(match.group())] if match else []


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: puts span marks around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Callable[[], str]) -> str:
        return _OPEN + caller() + _CLOSE


def _compile(source: str, tokenizer: Tokenizer) -> Callable[[list[dict[str, str]], bool], str]:
    """The same environment as transformers': sandbox, trimmed blocks, loop controls, `raise_exception`, `tojson`."""

    def refuse(message: str) -> str:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise TemplateError("the chat template is no jinja", got=str(error), wanted="a jinja template") from None
    names = {
        key: token
        for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (token := getattr(tokenizer, key)) is not None
    }

    def render(messages: list[dict[str, str]], prompt: bool) -> str:
        try:
            return template.render(messages=messages, add_generation_prompt=prompt, tools=None, documents=None, **names)
        except Exception as error:  # a template is foreign code: it may fail in any way
            raise TemplateError(
                "the chat template refuses this conversation",
                got=f"{error} for roles {', '.join(m['role'] for m in messages) or 'none'}",
            ) from None

    return render


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


def _source_of_folder(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    value = _json_of(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(value, list):  # several named templates
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}.get("default")
    return value if isinstance(value, str) else None


def _stops_of_folder(folder: Path) -> list[int]:
    value = _json_of(folder / "generation_config.json").get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return [stop for stop in values if isinstance(stop, int)]


def _json_of(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TemplateError(f"{path} cannot be read", got=str(error), wanted="a JSON object") from None
    return value if isinstance(value, dict) else {}
