"""What comes in over HTTP, typed: OpenAI's chat, text completion and embedding bodies and Prairie's feedback body.

A field that would change the answer and that we cannot honour is refused (images, audio ...); a field that
we do not know is ignored, as OpenAI's clients grow new ones. Every refusal is a RequestError with `param`.
Not here: the answers (`answers`), the work (`choices`), the routes (`app`), what forms there are (`forms`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prairie.data.records import Message, Role, Tools, tool_call_from_json, tools_from_json
from prairie.engine.constraint import Constraint
from prairie.errors import DataError, RequestError
from prairie.serve.forms import form_of

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_TOOLS = 128
MAX_INPUTS = 2048
"""Texts of one embeddings request, as OpenAI's."""


def sound(value: Any) -> Any:
    """Text with half surrogate pairs (a client cut an emoji in two) replaced by U+FFFD: no UTF-8 can hold them."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [sound(item) for item in value]
    if isinstance(value, dict):
        return {sound(key): sound(item) for key, item in value.items()}
    return value


class Body(BaseModel):
    """JSON types as they are (no "1" for 1); unknown keys are kept aside for `refuse_unsupported`."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None


class StructuredOutputs(Body):
    """vLLM's: one of these."""

    model_config = ConfigDict(extra="forbid", strict=True)

    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None


class ContentPart(Body):
    type: str
    text: str | None = None


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None

    def to_message(self, where: str) -> Message:
        """This turn. Raises RequestError for parts that are not text, and calls that are none."""
        extra = self.model_extra or {}
        for name in ("function_call", "audio"):
            if extra.get(name):
                raise RequestError(f"{where}.{name} is not supported", mend="send plain text", param=f"{where}.{name}")
        try:
            calls = tuple(tool_call_from_json(call) for call in self.tool_calls or ())
        except DataError as error:
            raise RequestError(error.what, got=error.got, wanted=error.wanted, param=f"{where}.tool_calls") from None
        if calls and self.role != "assistant":
            raise RequestError(f"{where} calls a tool, but only an assistant can", param=f"{where}.tool_calls")
        if self.content is None and not calls:
            raise RequestError(f"{where} has no content", wanted="a string", param=f"{where}.content")
        if self.content is None or isinstance(self.content, str):
            text = self.content or ""
        else:
            other = next((p.type for p in self.content if p.type != "text" or p.text is None), None)
            if other is not None:
                raise RequestError(
                    f"{where} holds a part that is not text", got=other, wanted="text", param=f"{where}.content"
                )
            text = "".join(p.text or "" for p in self.content)
        role: Role = "system" if self.role == "developer" else self.role
        thoughts = self.reasoning_content or ""
        return Message(role, text, calls, thoughts, self.name or "", self.tool_call_id or "")


class Request(Body):
    """A whole request body."""

    @model_validator(mode="before")
    @classmethod
    def _sound(cls, value: Any) -> Any:
        return sound(value)


class Sampling(Request):
    """What chat and text completions share."""

    model: str = Field(max_length=300)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOPS)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    user: str | None = Field(None, max_length=200)
    metadata: dict[str, str] | None = Field(None, max_length=16)
    response_format: dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None

    def form(self) -> Constraint | None:
        """What the answer must look like. Raises RequestError for several forms, or one that cannot be."""
        structured = None if self.structured_outputs is None else self.structured_outputs.model_dump(by_alias=True)
        names = ("guided_json", "guided_regex", "guided_choice")
        return form_of(self.response_format, structured, {name: getattr(self, name) for name in names})

    def stops(self) -> tuple[str, ...]:
        """Raises RequestError for an empty stop string or too many of them."""
        stops = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stops) > MAX_STOPS:
            raise RequestError("too many stop strings", got=len(stops), wanted=f"at most {MAX_STOPS}", param="stop")
        if any(not stop for stop in stops):
            raise RequestError("a stop string is empty", mend="remove it", param="stop")
        return stops

    def biases(self, vocab_size: int) -> dict[int, float]:
        """`logit_bias` with ids as numbers. Raises RequestError for ids outside the vocabulary, biases outside ±100."""
        out = {}
        for key, bias in (self.logit_bias or {}).items():
            if not key.isdecimal() or int(key) >= vocab_size:
                raise RequestError(
                    "logit_bias names no token", got=repr(key), wanted=f"0..{vocab_size - 1}", param="logit_bias"
                )
            if not -100 <= bias <= 100:
                raise RequestError("a logit_bias is too large", got=bias, wanted="-100..100", param="logit_bias")
            out[int(key)] = bias
        return out

    def prompt_top(self) -> int | None:
        """With how many alternatives the prompt's own tokens are to be shown (vLLM's `prompt_logprobs`); None: not at
        all. Raises RequestError for a number out of range, and in a stream, which has no place for them."""
        top = self.prompt_logprobs
        if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
            raise RequestError(
                "`prompt_logprobs` is out of range", got=top, wanted=f"0 to {MAX_TOP_LOGPROBS}", param="prompt_logprobs"
            )
        if top is not None and self.stream:
            raise RequestError(
                "prompt_logprobs come with a whole answer", got="a stream", mend="leave stream or prompt_logprobs out",
                param="prompt_logprobs",
            )  # fmt: skip
        return top

    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    UNSUPPORTED: ClassVar[Sequence[str]] = (
        "tools", "functions", "tool_choice", "function_call", "audio", "web_search_options", "guided_grammar",
        "repetition_penalty", "best_of", "suffix", "parallel_tool_calls", "echo", "min_tokens",
        "length_penalty", "use_beam_search", "bad_words", "allowed_token_ids", "truncate_prompt_tokens", "typical_p",
        "grammar", "json_schema", "skip_special_tokens", "include_stop_str_in_output", "add_special_tokens",
        "add_generation_prompt", "continue_final_message", "chat_template", "logits_processors",
    )  # fmt: skip

    def refuse_unsupported(self) -> None:
        """Raises RequestError for a field that would change the answer and that this server does not know."""
        extra = self.model_extra or {}
        # What says nothing: absent, null, empty, and the values that name the default.
        harmless = {"tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "repetition_penalty": (1,),
                    "best_of": (1, self.n), "parallel_tool_calls": (True, False), "echo": (False,), "min_tokens": (0,),
                    "length_penalty": (1,), "use_beam_search": (False,), "typical_p": (1,),
                    "skip_special_tokens": (True,), "include_stop_str_in_output": (False,),
                    "add_special_tokens": (False,), "add_generation_prompt": (True,),
                    "continue_final_message": (False,)}  # fmt: skip
        for name in self.UNSUPPORTED:
            value = extra.get(name)
            if value in (None, "", [], {}) or value in harmless.get(name, ()):
                continue
            raise _unsupported(name)
        modalities = extra.get("modalities")
        if modalities not in (None, [], ["text"]):
            raise _unsupported("modalities", 'leave it out or send ["text"]')
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options comes without stream", mend="set stream to true", param="stream_options")


def _unsupported(name: str, mend: str = "leave it out") -> RequestError:
    error = RequestError(f"`{name}` is not supported by this server", mend=mend, param=name)
    error.code = "unsupported_parameter"
    return error


@dataclass(frozen=True)
class Demand:
    """A call that must be made: of this tool; None: of any."""

    name: str | None


class ChatRequest(Sampling):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Options of the model's template, such as `enable_thinking`."""

    UNSUPPORTED: ClassVar[Sequence[str]] = tuple(
        name for name in Sampling.UNSUPPORTED if name not in ("tools", "tool_choice", "parallel_tool_calls")
    )

    def to_tools(self) -> Tools:
        """What the model may call. Raises RequestError for what is no function."""
        tools = _tools_of(self.tools)
        return () if self.tool_choice == "none" else tools

    def demanded(self) -> Demand | None:
        """The call that `tool_choice` asks for. Raises RequestError for a tool that was not given."""
        choice = self.tool_choice
        if choice in (None, "auto", "none"):
            return None
        names = [tool["function"]["name"] for tool in self.to_tools()]
        name = None
        if isinstance(choice, dict) and choice.get("type") == "function":
            function = choice.get("function")
            name = function.get("name") if isinstance(function, dict) else choice.get("name")
        if choice != "required" and not isinstance(name, str):
            raise RequestError(
                "unknown tool_choice", got=json.dumps(choice), param="tool_choice",
                wanted='none, auto, required or {"type": "function", "function": {"name": ...}}',
            )  # fmt: skip
        if not names or name not in (None, *names):
            raise RequestError(
                "the tool that is to be called is not among the tools", got=name or "no tools",
                wanted=", ".join(names) or "tools", param="tool_choice",
            )  # fmt: skip
        if self.form() is not None:
            raise RequestError(
                "an answer cannot be a call and have another form", mend="leave tool_choice or the form out",
                param="tool_choice",
            )  # fmt: skip
        return Demand(name)

    def to_messages(self) -> tuple[Message, ...]:
        return _messages_of(self.messages)

    def limit(self) -> int | None:
        """Tokens of an answer. Raises RequestError for two limits that differ."""
        new, old = self.max_completion_tokens, self.max_tokens
        if new is not None and old is not None and new != old:
            raise RequestError(
                "max_tokens contradicts max_completion_tokens", got=f"{old} and {new}", mend="send one of them",
                param="max_tokens",
            )  # fmt: skip
        return old if new is None else new

    def top(self) -> int | None:
        """How many alternatives a token is to be shown with; 0 = only itself, None = no log-probabilities."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs comes without logprobs", mend="set logprobs to true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    """Answers drawn for each prompt, of which the `n` likeliest a token are given."""
    add_special_tokens: bool | None = None

    UNSUPPORTED: ClassVar[Sequence[str]] = tuple(
        name for name in Sampling.UNSUPPORTED if name not in ("echo", "best_of", "add_special_tokens")
    )

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt. Raises RequestError for none or an empty one."""
        prompts = _entries(self.prompt)
        if not prompts:
            raise RequestError("prompt is an empty list", wanted="at least one prompt", param="prompt")
        if len(prompts) * self.drawn() > 8 * MAX_CHOICES:
            raise RequestError(
                "too many choices in one request", got=f"{len(prompts)} prompts x {self.drawn()} answers",
                wanted=f"at most {8 * MAX_CHOICES}", mend="send several requests", param="prompt",
            )  # fmt: skip
        return prompts

    def drawn(self) -> int:
        """Answers that are made for each prompt. Raises RequestError for a `best_of` that cannot be."""
        n = self.n or 1
        drawn = n if self.best_of is None else self.best_of
        if drawn < n:
            raise RequestError("best_of is less than n", got=f"{drawn} < {n}", wanted="n or more", param="best_of")
        if drawn > n and self.stream:
            raise RequestError(
                "the best of several answers is known at the end", mend="leave stream or best_of out", param="best_of"
            )
        return drawn


class EmbeddingRequest(Request):
    """POST /v1/embeddings"""

    model: str = Field(max_length=300)
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    user: str | None = Field(None, max_length=200)

    def inputs(self) -> list[str | list[int]]:
        """One entry a text, as text or as token ids. Raises RequestError for none or too many."""
        inputs = _entries(self.input)
        if not 1 <= len(inputs) <= MAX_INPUTS:
            raise RequestError(
                "input has no usable number of texts", got=len(inputs), wanted=f"1 to {MAX_INPUTS}", param="input"
            )
        return inputs


def _entries(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """A text, several, the token ids of one, or of several: one entry each."""
    if isinstance(given, str):
        return [given]
    ids = [item for item in given if isinstance(item, int)]
    return [ids] if ids else [item for item in given if not isinstance(item, int)]


class TokenizeRequest(Request):
    """POST /tokenize, as vLLM's: a `prompt` as text completions read it, or the `messages` of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(max_length=300)
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    """Of a prompt: whether a first bos is added where the model's documents have one (the default)."""
    return_token_strs: bool | None = None

    def to_tools(self) -> Tools:
        return _tools_of(self.tools)

    def to_messages(self) -> tuple[Message, ...]:
        return _messages_of(self.messages or ())


class DetokenizeRequest(Request):
    """POST /detokenize, as vLLM's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(max_length=300)
    tokens: list[int]


def _tools_of(tools: list[dict[str, Any]] | None) -> Tools:
    """What the model may call. Raises RequestError for what is no function."""
    try:
        return tools_from_json(tools)
    except DataError as error:
        raise RequestError(error.what, got=error.got, wanted=error.wanted, param="tools") from None


def _messages_of(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    return tuple(m.to_message(f"messages.{i}") for i, m in enumerate(messages))


class FeedbackRequest(Request):
    """POST /v1/feedback. `value` by kind: thumb "up"|"down" (or {"thumb", "reasons"}), rating 1-5,
    choice {"over": [response ids], "tie"?, "both_bad"?}, edit {"text"}, comment {"text"}, retract {"event": id};
    what was done without a word: regenerate {"new"?: response id}, copy and abandon without a value."""

    model_config = ConfigDict(extra="forbid", strict=True)

    response_id: str = Field(min_length=1, max_length=128)
    kind: Literal["thumb", "rating", "choice", "edit", "comment", "retract", "regenerate", "copy", "abandon"]
    value: Any = None
    user: str | None = Field(None, max_length=200)


class LoadAdapter(Request):
    """POST /v1/load_lora_adapter, as vLLM's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str = Field(min_length=1, max_length=200)
    lora_path: str = Field(min_length=1, max_length=4096)
    base_model_name: str | None = Field(None, max_length=300)


class UnloadAdapter(Request):
    """POST /v1/unload_lora_adapter, as vLLM's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str = Field(min_length=1, max_length=200)


class ErrorFacts(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every refusal looks like."""

    error: ErrorFacts
