"""`prairie serve --speculate ngram`: eight clients at once get what they get without drafts, token for token."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tiny_server import ask, events, running, tokenizer

from prairie.engine import speculation
from prairie.serve.app import Settings

KINDS = [
    {},
    {"temperature": 1.0, "seed": 5},
    {"logprobs": True, "top_logprobs": 2},
    {"stop": ["xxx"], "temperature": 0.7, "seed": 6},
    {"stream": True, "stream_options": {"include_usage": True}},
    {"model": "spark:poet"},
    {"model": "spark:poet", "stream": True, "temperature": 0.9, "seed": 7},
    {"n": 2, "temperature": 1.0, "seed": 8},
]
COMPILED = Settings(compile_first=True)
"""Then answers have the same bits in whatever batch: torch's products differ in the last ones by their shape."""
COPIED = "草原 fox horse 草原 fox horse 草原 fox horse 草原 fox"


FEW = {str(token): 100 for token in tokenizer().encode("fox horse")[:4]}
"""With four tokens to draw from, what comes has mostly stood there before: drafts are made, right and wrong ones."""


def told(url: str, kind: dict) -> tuple[list, list[float]]:
    """What a client reads: the usage, of each choice its text and end, names of tokens; and their log-probabilities."""
    body = {"model": "spark", "max_tokens": 60, "temperature": 0, "ignore_eos": True, "logit_bias": FEW} | kind
    answer = httpx.post(f"{url}/v1/chat/completions", json=ask(body.pop("model"), COPIED, **body), timeout=120)
    assert answer.status_code == 200, answer.text
    if kind.get("stream"):
        chunks = [chunk for chunk in events(answer.text) if isinstance(chunk, dict)]
        deltas = [choice for chunk in chunks for choice in chunk["choices"]]
        text = "".join(choice["delta"].get("content") or "" for choice in deltas)
        ends = [choice["finish_reason"] for choice in deltas if choice["finish_reason"]]
        usage = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")]
        return [text, ends, usage], []
    said = answer.json()
    found, logprobs = [said["usage"]["completion_tokens"]], []
    for choice in said["choices"]:
        found += [choice["message"]["content"], choice["finish_reason"]]
        for entry in (choice["logprobs"] or {}).get("content") or []:
            found += [entry["token"], len(entry["top_logprobs"])]
            logprobs.append(entry["logprob"])
    return found, logprobs


def test_clients_get_the_same(home, monkeypatch):
    monkeypatch.setattr(speculation, "MARGIN", 0.0)  # what was looked up is drafted, whatever that costs
    answers = []
    for drafts in ({}, {"speculate": "ngram"}):
        with running(home, settings=COMPILED, **drafts) as server, ThreadPoolExecutor(8) as clients:
            answers.append(list(clients.map(lambda kind: told(server.url, kind), KINDS * 2)))
            figures = httpx.get(f"{server.url}/metrics").text
            server.idle()
            assert server.kv_blocks_held() == 0
    for kind, plain, drafted in zip(KINDS * 2, *answers, strict=True):
        assert plain[0] == drafted[0], kind
        assert plain[1] == pytest.approx(drafted[1], abs=1e-3)
    counts = {
        name: float(line.rsplit(" ", 1)[1])
        for line in figures.splitlines()
        for name in ("drafted_tokens", "accepted_tokens")
        if name in line and not line.startswith("#")
    }
    assert counts["drafted_tokens"] > 50 and counts["accepted_tokens"] > 20
