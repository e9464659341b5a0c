"""`prairie serve --quantize`: packed weights behind the same API, adapters on them, and an answer that says so."""

from __future__ import annotations

import httpx
from tiny_server import ask, running

from prairie.data.records import Message
from prairie.engine.language_model import LanguageModel


def test_answers_say_how_their_weights_are_kept(home):
    with running(home, quantize="int8") as packed, running(home) as full:
        answers = [
            httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark"), timeout=30).json()
            for server in (packed, full)
        ]
        poet = httpx.post(f"{packed.url}/v1/chat/completions", json=ask("spark:poet"), timeout=30).json()
    assert answers[0]["prairie"]["quantize"] == "int8" and "quantize" not in answers[1]["prairie"]
    assert answers[0]["prairie"]["weights_hash"] == answers[1]["prairie"]["weights_hash"]
    assert answers[0]["system_fingerprint"] != answers[1]["system_fingerprint"]
    assert poet["prairie"]["quantize"] == "int8" and poet["prairie"]["adapter_hash"]
    folder = home.artifacts.get(home.registry.resolve("spark@1").artifact_id).path
    alone = LanguageModel.load(folder, quantize="int8").generate(
        [Message("user", "草原 fox")], temperature=0, max_tokens=12
    )
    assert answers[0]["choices"][0]["message"]["content"] == alone.text
