"""Who is let in, and what a server without space does: limits of a key, a full disk, a model that is too large."""

import httpx
import openai
import pytest
from tiny_server import Settings, ask, running

from prairie.errors import StorageFullError
from prairie.serve.limits import Limits, RateLimited
from prairie.serve.memory import DoesNotFit, check_fits


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_buckets_fill_again_and_each_key_has_its_own():
    clock = Clock()
    limits = Limits(requests=3, tokens=60, clock=clock)
    for _ in range(3):
        limits.admit("ann")
    with pytest.raises(RateLimited, match="requests a minute") as refused:
        limits.admit("ann")
    assert refused.value.retry_after_s == 20, "a third of a minute brings the next one"
    limits.admit("bob")
    clock.now = 19.9
    with pytest.raises(RateLimited):
        limits.admit("ann")
    clock.now = 20.1
    limits.admit("ann")
    clock.now = 200
    limits.charge("ann", 90)
    with pytest.raises(RateLimited, match="tokens a minute") as refused:
        limits.admit("ann")
    assert refused.value.retry_after_s == 31, "what was overdrawn is waited for"
    clock.now = 232
    limits.admit("ann")
    with pytest.raises(RateLimited):
        for _ in range(9):
            limits.admit("ann")


def test_limits_over_http(home):
    keys = {name: home.keys.create(name) for name in ("ann", "bob")}
    settings = Settings(requests_per_minute=2, tokens_per_minute=100)
    with running(home, ["spark"], settings) as server:
        server.service.desk.limits._clock = Clock()  # nothing fills again, however long an answer takes

        def asked(name):
            header = {"Authorization": f"Bearer {keys[name]}"}
            return httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark"), headers=header, timeout=30)

        assert [asked("ann").status_code for _ in range(3)] == [200, 200, 429]
        refused = asked("ann")
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.json()["error"]["type"] == "rate_limit_error" and 1 <= int(refused.headers["retry-after"]) <= 30
        assert asked("bob").status_code == 200
        server.idle()
        bucket = server.service.desk.limits._buckets["bob", "tokens"]
        assert bucket.level < 100 - 12, "prompt and answer are charged"
        with pytest.raises(openai.RateLimitError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key=keys["ann"], max_retries=0).chat.completions.create(
                **ask("spark")
            )


def test_a_full_disk_refuses_new_work_and_recovers(home, monkeypatch):
    with running(home, ["spark"]) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        first = http.post("/v1/chat/completions", json=ask("spark")).json()

        def refuse(*_):
            raise StorageFullError("the disk is full", mend="free some space")

        monkeypatch.setattr(home.database, "write", refuse)
        for path, body in (("/v1/chat/completions", ask("spark")), ("/v1/chat/completions", ask("spark", stream=True))):
            answer = http.post(path, json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (503, "storage_full"), error
            assert int(answer.headers["retry-after"]) > 0
        assert http.post("/v1/feedback", json={"response_id": first["id"], "kind": "copy"}).status_code == 507
        for path in ("/v1/models", f"/v1/feedback/{first['id']}", "/healthz", "/metrics"):
            assert http.get(path).status_code == 200, path
        monkeypatch.undo()
        server.idle()
        assert server.kv_blocks_held() == 0
        assert http.post("/v1/chat/completions", json=ask("spark")).status_code == 200


def test_a_model_that_is_too_large_is_one_sentence(home, monkeypatch, tmp_path):
    folder = home.artifacts.get(home.registry.resolve("spark@2").artifact_id).path
    check_fits(folder)
    monkeypatch.setattr("prairie.serve.memory.free_bytes", lambda: 1000)
    with pytest.raises(DoesNotFit, match=r"does not fit into memory: got .* MiB of weights"):
        check_fits(folder)
    with pytest.raises(DoesNotFit), running(home, ["spark"]):
        pass
    monkeypatch.undo()
    with running(home, ["spark"]) as server:
        monkeypatch.setattr("prairie.serve.memory.free_bytes", lambda: 1000)
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark@2"), timeout=30)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "out_of_memory")
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark"), timeout=30)
        assert answer.status_code == 200, "what is in memory goes on"
