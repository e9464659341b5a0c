"""Answers of a given form: JSON, JSON of a schema, a regular expression, one of some choices.

A `Constraint` says what is wanted; a `Grammars` belongs to one engine and turns it into a `Matcher`, which knows at
each step which tokens may follow. The matching itself is llguidance's: a grammar over bytes, so that tokens need not
fall on the grammar's borders. The sampler puts the masks of a whole batch on its logits at once (`sampler`).
Not here: which fields of a request ask for it (`prairie.serve.schema`).
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from prairie.errors import RequestError

if TYPE_CHECKING:
    import llguidance

    from prairie.data.tokenizer import Tokenizer

Kind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]

MAX_SCHEMA_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 48
MAX_PROPERTIES = 1000
MAX_ALL_OF = 32
MAX_ENUM = 2000
MAX_REGEX = 4096
MAX_CHOICES = 1000
WHITE_SPACE = r" |\n {0,32}"
"""Between the parts of a JSON text: a space, or a new line and its indent; weak models would go on with it for ever."""
LEXER_FUEL = 300_000
"""What building a grammar may cost; llguidance's own bound is three times that."""
MAX_GRAMMAR = 100_000
"""Symbols of a grammar."""
KEPT = 64
"""Grammars that stay compiled."""


class ConstraintError(RequestError):
    """A schema, an expression or a list of choices cannot be kept to."""

    code = "unsupported_constraint"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must look like. `spec` is JSON: a schema, an expression, a list of choices, a Lark grammar."""

    kind: Kind
    spec: str

    @classmethod
    def json_object(cls) -> Constraint:
        """Any JSON object."""
        return cls("json_object", '{"type": "object"}')

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> Constraint:
        """JSON that validates. Raises ConstraintError for a schema that passes the bounds; what of it is not supported
        is found by `Grammars.matcher`."""
        spec = json.dumps(schema, ensure_ascii=False)
        _bound("a JSON schema", len(spec.encode("utf-8", "replace")), MAX_SCHEMA_BYTES, "bytes")
        _check_schema(schema)
        return cls("json_schema", spec)

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Text that matches as a whole; the syntax of Rust's `regex`: no look-around, no back references."""
        _bound("an expression", len(pattern), MAX_REGEX, "characters")
        if not pattern:
            raise ConstraintError("the expression is empty", wanted="a regular expression")
        return cls("regex", json.dumps(pattern, ensure_ascii=False))

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Constraint:
        """One of these texts."""
        _bound("a list of choices", len(choices), MAX_CHOICES, "texts")
        _bound(
            "a list of choices",
            sum(len(choice.encode("utf-8", "replace")) for choice in choices),
            MAX_SCHEMA_BYTES,
            "bytes",
        )
        if not choices or not all(choices):
            raise ConstraintError("there is an empty choice", wanted="one text or more, none of them empty")
        return cls("choice", json.dumps(list(choices), ensure_ascii=False))

    @classmethod
    def grammar(cls, lark: str) -> Constraint:
        """A Lark grammar as llguidance reads it. For grammars of our own making: what they may cost is not bounded."""
        return cls("grammar", json.dumps(lark, ensure_ascii=False))

    def to_json(self) -> dict[str, Any]:
        """As it is recorded beside an answer; `Constraint(**value)` makes it again."""
        return {"kind": self.kind, "spec": self.spec}

    def compiled(self) -> str:
        """The grammar as llguidance takes it."""
        from llguidance import LLMatcher

        value = json.loads(self.spec)
        if self.kind in ("json_object", "json_schema"):
            return LLMatcher.grammar_from_json_schema(self.spec, overrides=json_options())
        if self.kind == "regex":
            return LLMatcher.grammar_from_regex(value)
        if self.kind == "choice":
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(lark_text, value)))
        return LLMatcher.grammar_from_lark(value)


def json_options() -> Any:
    """How JSON is written, whatever the schema says of it (`x-guidance`): unknown keywords are errors."""
    return {"whitespace_pattern": WHITE_SPACE, "whitespace_flexible": True, "lenient": False, "coerce_one_of": False}


def lark_text(text: str) -> str:
    """A text as a Lark literal."""
    return json.dumps(text, ensure_ascii=False)


class Matcher:
    """How far an answer has come in its grammar."""

    __slots__ = ("_matcher",)

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def accept(self, token: int) -> None:
        """The next token of the answer."""
        self._matcher.consume_token(token)

    @property
    def whole(self) -> bool:
        """Nothing but the end can follow."""
        return bool(self._matcher.is_stopped())

    @property
    def broken(self) -> bool:
        """The grammar became too complex, or a token came that it forbids."""
        return bool(self._matcher.is_error())

    def allowed(self) -> bytes:
        """The tokens that may follow, a bit each, the lowest bit of the first byte first."""
        return bytes(self._matcher.compute_bitmask())


class Grammars:
    """The compiled constraints of one engine. Safe from any thread."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Iterable[int]) -> None:
        """`stop_ids` end an answer wherever its grammar allows it."""
        from llguidance import LLTokenizer, TokenizerWrapper

        # A tokenizer without any token that ends gets one that is never drawn: its mask bit is outside the vocabulary.
        stops = sorted(stop_ids) or ([] if tokenizer.eos_id is None else [tokenizer.eos_id]) or [tokenizer.vocab_size]
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Vocabulary(tokenizer, stops)), n_vocab=max(tokenizer.vocab_size, stops[-1] + 1),
            eos_token=stops,
        )  # fmt: skip
        self._known: OrderedDict[Constraint, llguidance.LLMatcher] = OrderedDict()

    def matcher(self, constraint: Constraint) -> Matcher:
        """At its beginning. Raises ConstraintError, with the reason, for what cannot be kept to."""
        known = self._known.get(constraint)
        if known is None:
            known = self._compile(constraint)
            self._known[constraint] = known
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        return Matcher(known.deep_copy())

    def _compile(self, constraint: Constraint) -> llguidance.LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(initial_lexer_fuel=LEXER_FUEL, max_grammar_size=MAX_GRAMMAR, verbose_errors=False)
        try:
            matcher = LLMatcher(self._tokenizer, constraint.compiled(), log_level=0, limits=limits)
        except ValueError as error:
            raise _unusable(constraint, str(error)) from None
        if not matcher.is_error():
            # A grammar that nothing can be written in shows itself at its first mask.
            first = matcher.deep_copy()
            first.compute_bitmask()
            if not first.is_error():
                return matcher
            matcher = first
        raise _unusable(constraint, matcher.get_error())


class _Vocabulary:
    """What llguidance asks of a tokenizer. Special tokens, and ids without text, are in no grammar."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[int]) -> None:
        size = tokenizer.vocab_size
        self.tokens = [tokenizer.token_bytes(token) for token in range(size)]
        self.tokens += [b""] * (stops[-1] + 1 - size)
        special = set(tokenizer.special_tokens.values()) | set(stops)
        special |= {token for token, data in enumerate(self.tokens) if not data}
        self.special_token_ids = sorted(special)
        for token in self.special_token_ids:
            self.tokens[token] = self.tokens[token] or f"<|empty {token}|>".encode()
        self.eos_token_id = stops[0]
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _unusable(constraint: Constraint, reason: str) -> ConstraintError:
    what = {"json_schema": "this JSON schema", "regex": "this expression"}.get(
        constraint.kind, "this form of an answer"
    )
    lines = [line.strip() for line in reason.splitlines() if line.strip() and not line.strip().startswith("<")]
    said = " ".join(lines)[:300].rstrip(".")
    return ConstraintError(f"{what} cannot be kept to", got=said or "an impossible one", mend="make it simpler")


def _bound(what: str, size: int, limit: int, unit: str) -> None:
    if size > limit:
        raise ConstraintError(f"{what} is too large", got=f"{size} {unit}", wanted=f"at most {limit}")


def _check_schema(schema: Any) -> None:
    """Bounds on what makes a grammar expensive: depth, properties, branches that must all hold, values."""
    counts = {"properties": 0, "allOf": 0, "enum": 0}
    stack = [(schema, 1)]
    while stack:
        value, depth = stack.pop()
        _bound("a JSON schema", depth, MAX_SCHEMA_DEPTH, "levels")
        children: Iterable[Any] = ()
        if isinstance(value, dict):
            for key in counts:
                part = value.get(key)
                counts[key] += len(part) if isinstance(part, dict | list) else 0
            children = value.values()
        elif isinstance(value, list):
            children = value
        stack += [(child, depth + 1) for child in children if isinstance(child, dict | list)]
    for key, limit in (("properties", MAX_PROPERTIES), ("allOf", MAX_ALL_OF), ("enum", MAX_ENUM)):
        _bound(f"the sum of all `{key}` of a JSON schema", counts[key], limit, "entries")
