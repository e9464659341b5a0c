"""What goes out over HTTP: OpenAI's chat and text completion objects, whole and as stream chunks.

Plain functions from tokens to JSON-able dicts; no state, no IO. Beside OpenAI's fields every choice carries
`response_id` (what a vote refers to) and the top level carries `prairie`: the version that made the answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prairie.data.tokenizer import Tokenizer
    from prairie.serve.scoring import Score

DONE = b"data: [DONE]\n\n"
Top = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Head:
    """What is the same in every chunk of one answer."""

    id: str
    created: int
    model: str
    fingerprint: str
    prairie: dict[str, Any]

    def wrap(self, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        out = {
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint, "choices": choices, "prairie": self.prairie,
        }  # fmt: skip
        return out if usage is None else out | {"usage": usage}


def to_json(value: Any) -> bytes:
    """UTF-8 as it is (no \\u escapes). Lone surrogates, which no UTF-8 can hold, become U+FFFD."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def event(value: Any) -> bytes:
    """One server-sent event. JSON holds no raw newline, so one `data:` line is enough."""
    return b"data: " + to_json(value) + b"\n\n"


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class TokenText:
    """Names of single tokens for log-probabilities; half characters are U+FFFD in `token` and exact in `bytes`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special = {id: text for text, id in tokenizer.special_tokens.items()}

    def of(self, token_id: int) -> tuple[str, bytes]:
        if token_id in self.special:
            return self.special[token_id], self.special[token_id].encode()
        raw = self.tokenizer.token_bytes(token_id)
        return raw.decode("utf-8", "replace"), raw

    def entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = self.of(token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}


def chat_logprobs(
    names: TokenText, token_ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[Top]
) -> dict[str, Any]:
    """`choice.logprobs` of a chat answer; `tops` has one entry a token, or is empty."""
    content = []
    for i, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
        top = tops[i] if tops else ()
        content.append(names.entry(token_id, logprob) | {"top_logprobs": [names.entry(t, p) for t, p in top]})
    return {"content": content, "refusal": None}


def text_logprobs(
    names: TokenText,
    token_ids: Sequence[int],
    logprobs: Sequence[float | None],
    tops: Sequence[Top | None],
    offset: int,
) -> dict[str, Any]:
    """`choice.logprobs` of a text completion, in OpenAI's older parallel lists; `offset` in characters of the text."""
    tokens = [names.of(t)[0] for t in token_ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [None if p is None else _finite(p) for p in logprobs],
        "top_logprobs": [
            None if top is None else {names.of(t)[0]: _finite(p) for t, p in top} for top in tops
        ] if tops else None,
        "text_offset": offsets,
    }  # fmt: skip


def prompt_logprobs(names: TokenText, token_ids: Sequence[int], score: Score, top: int) -> list[Any]:
    """vLLM's `prompt_logprobs`: null for the first token, then a map from token ids to what is known of them, of the
    token that stands there and of the `top` likeliest."""
    out: list[Any] = [None]
    best = score.best(top) or [[]] * len(token_ids)
    for token_id, logprob, rank, likely in zip(
        token_ids[1:], score.logprobs[1:], score.ranks[1:], best[1:], strict=True
    ):
        told = {token_id: (logprob, rank)} | {t: (p, place) for place, (t, p) in enumerate(likely or (), 1)}
        out.append({
            str(t): {"logprob": _finite(p or 0.0), "rank": place, "decoded_token": names.of(t)[0]}
            for t, (p, place) in told.items()
        })  # fmt: skip
    return out


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's floor for "never" is -9999."""
    return logprob if logprob > -9999.0 else -9999.0
