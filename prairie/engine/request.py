"""What goes into the engine and what comes out: requests, sampling parameters, per-step outputs, whole completions.

Also here: `Sequence`, a request while the engine works on it, and `TextStream`, which turns its tokens into text that
never splits a character and never shows a stop string. Not here: when a sequence runs (`scheduler`), which token comes
next (`sampler`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from prairie.data.tokenizer import Detokenizer
from prairie.errors import RequestError

if TYPE_CHECKING:
    from prairie.data.tokenizer import Tokenizer
    from prairie.engine.constraint import Constraint, Matcher
    from prairie.engine.lookup import Lookup
    from prairie.models.lora import LoRA

FinishReason = Literal["stop", "length", "cancelled", "error", "constraint"]
""" "constraint": the form that was asked for became too complex to go on."""
TopLogprobs = list[tuple[int, float]]
"""(token id, log-probability), best first."""
MAX_TOP_LOGPROBS = 20
GREEDY_BELOW = 1e-5
"""Temperatures under this are taken as 0: dividing by them leaves one token anyway."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one answer are drawn. Raises RequestError, naming the parameter, if a value is out of range.

    Order of the filters, as in transformers: penalties and bias, temperature, top_k, top_p, min_p.
    Penalties count the generated tokens, not the prompt.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    min_p: float = 0.0
    """A token needs at least this share of the best token's probability (arXiv 2407.01082)."""
    seed: int | None = None
    """With a seed the answer depends on prompt, parameters and weights only, whatever else runs beside it."""
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    """How many alternatives to report per token; the chosen token's log-probability is always reported."""
    ignore_eos: bool = False
    """Runs to max_tokens whatever the template's stop tokens say; for benchmarks."""
    constraint: Constraint | None = None
    """What the answer must look like; it ends as soon as nothing can follow."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        _check(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
        _check(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (no limit) or more")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1")
        _check(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "-2 to 2")
        _check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "-2 to 2")
        _check(all(self.stop), "stop", "an empty string", "strings of at least one character")
        _check(
            self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS,
            "logprobs",
            self.logprobs,
            f"0 to {MAX_TOP_LOGPROBS}",
        )
        for bias in (self.logit_bias or {}).values():
            _check(-100 <= bias <= 100, "logit_bias", bias, "-100 to 100")
        if self.constraint is not None and self.ignore_eos:
            raise RequestError(
                "an answer of a given form ends by itself", mend="leave ignore_eos out", param="ignore_eos"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


def _check(good: bool, param: str, got: object, wanted: str) -> None:
    if not good:
        raise RequestError(f"`{param}` is out of range", got=got, wanted=wanted, param=param)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, to be answered once."""

    id: str
    prompt_ids: Seq[int]
    params: SamplingParams = SamplingParams()
    adapter: str | None = None
    """Content hash of the adapter to answer with; None is the base."""
    salt: str = ""
    """Requests share cached prefixes only with requests of the same salt: set it per tenant (CVE-2025-46570)."""
    stream: bool = True
    """False: `Output.text_delta` stays empty until the end, which saves work when nobody reads along."""
    owner: str = ""
    """Who asks: when requests have to wait, owners are served in turn."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `token_ids` are all sampled tokens, a stop token included; `text` ends before the stop."""

    request_id: str
    token_ids: list[int]
    text: str
    logprobs: list[float]
    """Of each token under the raw distribution: temperature 1, no penalty, no filter."""
    top_logprobs: list[TopLogprobs]
    """One list per token if `SamplingParams.logprobs` is above 0, else empty."""
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose keys and values were found in the cache."""
    seated_at: float | None = None
    """When it first had a place in a batch, by `time.perf_counter`."""


@dataclass(slots=True)
class Output:
    """What one step added to one answer. The deltas of all steps join to the completion's text."""

    request_id: str
    text_delta: str
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    completion: Completion | None = None
    """The whole answer, with the last output."""

    def then(self, later: Output) -> Output:
        """Both as one."""
        return Output(
            self.request_id,
            self.text_delta + later.text_delta,
            self.token_ids + later.token_ids,
            self.logprobs + later.logprobs,
            self.top_logprobs + later.top_logprobs,
            later.finish_reason,
            later.completion,
        )


class TextStream:
    """Tokens -> text, piece by piece. Text that may begin a stop string is held back until that is known."""

    __slots__ = ("_detokenizer", "_held", "_pieces", "_stops", "stopped")

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...], *, continuation: bool = True) -> None:
        """`continuation`: the text goes on from another, so that a first space of it is kept."""
        self._detokenizer = Detokenizer(tokenizer, continuation=continuation)
        self._stops = stops
        self._held = ""
        self._pieces: list[str] = []
        self.stopped = False
        """A stop string was met; nothing more will be said."""

    @property
    def text(self) -> str:
        """All that was said so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """The text that this token makes certain."""
        return self._say(self._detokenizer.push(token_id), last=False)

    def finish(self) -> str:
        """The rest, after the last token."""
        return self._say(self._detokenizer.finish(), last=True)

    def _say(self, delta: str, last: bool) -> str:
        if self._stops and not self.stopped:
            delta = self._hold_back(self._held + delta, last)
        elif self.stopped:
            delta = ""
        if delta:
            self._pieces.append(delta)
        return delta

    def _hold_back(self, text: str, last: bool) -> str:
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        self._held = ""
        if starts:
            self.stopped = True
            return text[: min(starts)]
        if last:
            return text
        kept = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a true beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class Sequence:
    """A request under way. `ids`: the prompt and what was generated; the first `computed` of them are in the cache."""

    __slots__ = (
        "arrival",
        "block_hashes",
        "blocks",
        "cached_tokens",
        "computed",
        "draft",
        "ids",
        "logprobs",
        "lookup",
        "lora",
        "matcher",
        "max_length",
        "prompt_tokens",
        "request",
        "root_hash",
        "row",
        "scheduled",
        "seated_at",
        "seed",
        "stop_ids",
        "stream",
        "top_logprobs",
    )

    def __init__(
        self,
        request: Request,
        *,
        arrival: int,
        seed: int,
        max_length: int,
        stop_ids: frozenset[int],
        stream: TextStream | None,
        root_hash: bytes,
        lora: LoRA | None,
        matcher: Matcher | None = None,
    ) -> None:
        self.request = request
        self.arrival = arrival
        self.seed = seed
        self.max_length = max_length
        """Prompt and answer together end here."""
        self.stop_ids = stop_ids
        self.stream = stream
        self.lora = lora
        self.matcher = matcher
        """Of its constraint; it stands behind the last generated token."""
        self.ids = list(request.prompt_ids)
        self.prompt_tokens = len(self.ids)
        self.logprobs: list[float] = []
        self.top_logprobs: list[TopLogprobs] = []
        self.cached_tokens = -1
        """-1 until the sequence first ran."""
        self.seated_at: float | None = None
        self.row = -1
        """Its row in the batch's tables while it runs."""
        self.computed = 0
        self.scheduled = 0
        """Tokens of it in the step under way, those of the draft included."""
        self.draft: list[int] = []
        """What may come next; computed in the step under way, and kept as far as it is drawn."""
        self.lookup: Lookup | None = None
        """Where drafts come from; None: there are none."""
        self.blocks: list[int] = []
        self.root_hash = root_hash
        self.block_hashes: list[bytes] = []

    @property
    def generated(self) -> int:
        return len(self.ids) - self.prompt_tokens

    def completion(self, text: str, finish_reason: FinishReason) -> Completion:
        return Completion(
            request_id=self.request.id,
            token_ids=self.ids[self.prompt_tokens :],
            text=text,
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
            finish_reason=finish_reason,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=max(self.cached_tokens, 0),
            seated_at=self.seated_at,
        )
