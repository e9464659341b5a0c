"""The form that a request demands of its answers: JSON, a schema, an expression, choices, a call of a tool.

OpenAI's `response_format` and `tool_choice`, vLLM's `structured_outputs` and `guided_*`. One form at most; what
contradicts another is refused. Not here: keeping to it (`prairie.engine.constraint`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prairie.data.records import Tools
from prairie.data.tool_calls import CallFormat
from prairie.engine.constraint import Constraint, ConstraintError, json_options, lark_text
from prairie.errors import RequestError

if TYPE_CHECKING:
    from prairie.data.tokenizer import Tokenizer

_ID, _BEFORE_ID, _QUOTE, _END = r"/[a-zA-Z0-9]{9}/", lark_text(', "id": "'), lark_text('"'), lark_text("}")


def form_of(
    response_format: Mapping[str, Any] | None, structured: Mapping[str, Any] | None, guided: Mapping[str, Any]
) -> Constraint | None:
    """What was asked for in either of three ways; None for free text. Raises RequestError, naming the field."""
    asked: dict[str, tuple[str, Any]] = {}
    if response_format is not None and (kind := response_format.get("type")) != "text":
        asked["response_format"] = ("response_format", _openai(kind, response_format))
    for key, value in (structured or {}).items():
        if value not in (None, False):
            asked[f"structured_outputs.{key}"] = (key, value)
    for name, value in guided.items():
        if value is not None:
            asked[name] = (name.removeprefix("guided_"), value)
    if len(asked) > 1:
        raise RequestError(
            "an answer cannot have several forms", got=", ".join(asked), wanted="one of them", param=list(asked)[1]
        )
    for param, (kind, value) in asked.items():
        try:
            return value if isinstance(value, Constraint) else _made(kind, value)
        except ConstraintError as error:
            error.param = param
            raise
        except (TypeError, ValueError, AttributeError):
            raise RequestError(f"`{param}` is wrong", got=repr(value)[:80], wanted=WANTED[kind], param=param) from None
    return None


WANTED = {
    "json": "a JSON schema", "json_object": "true", "regex": "a regular expression", "choice": "a list of texts",
}  # fmt: skip


def _made(kind: str, value: Any) -> Constraint:
    if kind == "json_object" and value is True:
        return Constraint.json_object()
    if kind == "json":
        return Constraint.json_schema(_schema(json.loads(value) if isinstance(value, str) else value))
    if kind == "regex" and isinstance(value, str):
        return Constraint.regex(value)
    if kind == "choice" and isinstance(value, list) and all(isinstance(text, str) for text in value):
        return Constraint.choice(value)
    raise TypeError(kind)


def _openai(kind: object, body: Mapping[str, Any]) -> Constraint:
    where = "response_format"
    if kind == "json_object":
        return Constraint.json_object()
    if kind != "json_schema":
        raise RequestError(
            "unknown response_format", got=repr(kind), wanted="text | json_object | json_schema", param=f"{where}.type"
        )
    told = body.get("json_schema")
    if not isinstance(told, dict) or "schema" not in told:
        raise RequestError(
            "response_format comes without its schema", wanted='{"json_schema": {"name": ..., "schema": {...}}}',
            param=f"{where}.json_schema",
        )  # fmt: skip
    if told.get("strict") not in (None, True, False):
        raise RequestError("`strict` is wrong", wanted="true or false", param=f"{where}.json_schema.strict")
    try:
        return Constraint.json_schema(_schema(told["schema"]))
    except ConstraintError as error:
        error.param = where
        raise
    except TypeError:
        raise RequestError(
            "the schema is none",
            got=type(told["schema"]).__name__,
            wanted="an object",
            param=f"{where}.json_schema.schema",
        ) from None


def _schema(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(value)
    return value


def call_form(format: CallFormat, tools: Tools, name: str | None, tokenizer: Tokenizer) -> Constraint:
    """One call of one of the tools (of `name`, if given), written as this model's template writes calls, with
    arguments that validate against the tool's schema. Raises ConstraintError, RequestError."""
    calls = []
    for tool in tools:
        function = tool["function"]
        if name not in (None, function["name"]):
            continue
        schema = function.get("parameters") or {"type": "object"}
        Constraint.json_schema(schema)  # within the bounds, or refused
        schema = {"type": "object", **schema, "x-guidance": json_options()}
        head = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "{format.key}": '
        id = f"{_BEFORE_ID} {_ID} {_QUOTE}" if format.has_id else ""
        calls.append(f"{lark_text(head)} %json {json.dumps(schema, ensure_ascii=False)} {id} {_END}")
    before, after = (_literal(text, tokenizer) for text in format.frame)
    return Constraint.grammar(f"start: {before} call {after}\ncall: " + "\n | ".join(calls))


def _literal(text: str, tokenizer: Tokenizer) -> str:
    """A text in which special tokens stand for themselves, as parts of a Lark rule."""
    parts = (f"<[{piece}]>" if isinstance(piece, int) else lark_text(piece) for piece, _ in tokenizer.pieces(text))
    return " ".join(parts)
