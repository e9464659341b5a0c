"""What the server says no to, and how: always OpenAI's error object, in one sentence, before anything is computed."""

import json
import threading
import time

import httpx
import pytest
from tiny_server import CONTEXT, Settings, ask, running, wait_for

MIB = 2**20


def refusal(answer, status, code, param=None):
    body = answer.json()
    assert answer.status_code == status, body
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    assert body["error"]["param"] == param
    assert body["error"]["message"].endswith((".", "?", "!"))
    assert answer.headers["x-request-id"]
    return body["error"]


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"messages": None}, "invalid_value", "messages"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "invalid_value", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "invalid_request", "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "invalid_request",
            "messages.0.content",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
            "invalid_request",
            "messages.0.tool_calls",
        ),
        ({"model": 3}, "invalid_value", "model"),
        ({"model": "a" * 301}, "invalid_value", "model"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"temperature": "0.5"}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 1000}, "invalid_value", "n"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": True}, "invalid_value", "max_tokens"),
        ({"stop": ["a", ""]}, "invalid_request", "stop"),
        ({"stop": ["a"] * 99}, "invalid_request", "stop"),
        ({"logit_bias": {"99999": 1}}, "invalid_request", "logit_bias"),
        ({"logit_bias": {"x": 1}}, "invalid_request", "logit_bias"),
        ({"logit_bias": {"1": 101}}, "invalid_request", "logit_bias"),
        ({"top_logprobs": 2}, "invalid_request", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"presence_penalty": -3}, "invalid_value", "presence_penalty"),
        ({"stream_options": {"include_usage": True}}, "invalid_request", "stream_options"),
        ({"tools": [{}]}, "invalid_request", "tools"),
        ({"tools": [{"name": "f"}, {"name": "f"}]}, "invalid_request", "tools"),
        ({"chat_template_kwargs": {"messages": []}}, "invalid_template", None),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}]},
            "invalid_request",
            "messages.0.tool_calls",
        ),
        ({"functions": [{}]}, "unsupported_parameter", "functions"),
        ({"modalities": ["audio"]}, "unsupported_parameter", "modalities"),
        ({"repetition_penalty": 1.1}, "unsupported_parameter", "repetition_penalty"),
        ({"best_of": 2}, "unsupported_parameter", "best_of"),
        ({"min_tokens": 5}, "unsupported_parameter", "min_tokens"),
        ({"use_beam_search": True}, "unsupported_parameter", "use_beam_search"),
        ({"continue_final_message": True}, "unsupported_parameter", "continue_final_message"),
        ({"allowed_token_ids": [1]}, "unsupported_parameter", "allowed_token_ids"),
        ({"grammar": "root ::= x"}, "unsupported_parameter", "grammar"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "invalid_request", "max_tokens"),
        ({"stop_token_ids": [-1]}, "invalid_request", "stop_token_ids"),
        ({"metadata": {"a": 1}}, "invalid_value", "metadata.a"),
        ({"user": "u" * 201}, "invalid_value", "user"),
    ],
)
def test_what_cannot_be_honoured_is_refused(http, change, code, param):
    refusal(http.post("/v1/chat/completions", json=ask("spark") | change), 400, code, param)


def test_what_changes_nothing_is_ignored(http):
    extra = {
        "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "parallel_tool_calls": True,
        "store": False, "service_tier": "auto", "reasoning_effort": "low", "a_field_of_next_year": {"x": 1},
        "modalities": ["text"], "temperature": None, "stop": None, "n": None, "stream": None, "logit_bias": {},
        "metadata": {"a": "b"}, "user": "u", "min_tokens": 0, "use_beam_search": False, "add_generation_prompt": True,
        "skip_special_tokens": True, "best_of": 1, "max_tokens": 12, "max_completion_tokens": 12, "stop_token_ids": [],
    }  # fmt: skip
    answer = http.post("/v1/chat/completions", json=ask("spark") | extra)
    assert answer.status_code == 200, answer.text


def test_a_body_that_is_no_json(http):
    for body in (b"{", b"", b"[1]", b"null", b'"x"', b"\xff\xfe", b"{'a': 1}", b"[" * 10_000):
        answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, (body[:20], answer.text)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    error = refusal(
        http.post("/v1/chat/completions", content=b'{"a" 1}', headers={"Content-Type": "application/json"}),
        400, "invalid_json",
    )  # fmt: skip
    assert "character 5" in error["message"]
    for body, said in ((b'{"a": "\xff"}', "not UTF-8 at byte 7"), (b"[" * 100_000, "nested too deeply")):
        broken = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert said in refusal(broken, 400, "invalid_json")["message"]
    form = http.post("/v1/feedback", content=b'{"response_id": "x"}', headers={"Content-Type": "text/plain"})
    assert "application/json" in refusal(form, 400, "invalid_content_type")["message"]


def test_missing_fields_are_named(http):
    refusal(http.post("/v1/chat/completions", json={"messages": []}), 400, "missing_parameter", "model")
    refusal(http.post("/v1/completions", json={"model": "spark"}), 400, "missing_parameter", "prompt")


def test_half_a_character_becomes_a_mark_and_not_a_fault(http, server):
    body = json.dumps(ask("spark", "half a horse: \ud83d", user="u\udc00"))
    answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200, answer.text
    row = server.home.feedback.get_response(answer.json()["id"])
    assert row.prompt[0].content == "half a horse: \ufffd" and row.user == "u\ufffd"


def test_unknown_routes_and_methods(http):
    error = refusal(http.get("/v1/nothing"), 404, "not_found")
    assert "/v1/nothing" in error["message"]
    refusal(http.get("/v1/chat/completions"), 405, "method_not_allowed")
    refusal(http.get("/static/__init__.py"), 404, "not_found")
    refusal(http.get("/static/%2e%2e/errors.py"), 404, "not_found")
    refusal(http.get("/static/..%2f..%2fpyproject.toml"), 404, "not_found")


def test_unknown_models(http):
    for name in ("nobody", "spark@99", "spark@zzzz", "", "../spark", "spark:painter", "a" * 300):
        answer = http.post("/v1/chat/completions", json=ask(name))
        refusal(answer, 404, "model_not_found", "model")
    refusal(http.get("/v1/models/nobody"), 404, "model_not_found", "model")


def test_a_prompt_that_is_too_long(http, server):
    before = len(server.home.feedback.responses())
    body = ask("spark", "fox " * CONTEXT)
    refusal(http.post("/v1/chat/completions", json=body), 400, "context_length_exceeded", "messages")
    refusal(http.post("/v1/chat/completions", json=body | {"stream": True}), 400, "context_length_exceeded", "messages")
    assert len(server.home.feedback.responses()) == before, "what is refused is no answer"


def test_text_completions_that_make_no_sense(http):
    def refused(param, **body):
        answer = http.post("/v1/completions", json={"model": "spark", "prompt": "x", **body})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text

    refused("prompt", prompt="")
    refused("prompt", prompt=[])
    refused("prompt", prompt=[[]])
    refused("prompt", prompt=[99999])
    refused("prompt", prompt=["x"] * 1000)
    refused("max_tokens", max_tokens=0)
    refused("best_of", n=4, best_of=3)
    refused("best_of", best_of=3, stream=True)
    refused("best_of", best_of=99)
    refused("prompt", prompt=["x"] * 16, best_of=9)
    refused("stop_token_ids", stop_token_ids=[99999])
    refused("suffix", suffix="end")


def test_an_unknown_purpose_is_refused(http):
    headers = {"X-Prairie-Purpose": "fun"}
    answer = http.post("/v1/chat/completions", json=ask("spark"), headers=headers)
    refusal(answer, 400, "invalid_request", "X-Prairie-Purpose")


def test_request_ids_come_back(http):
    assert http.get("/healthz", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert http.get("/healthz", headers={"X-Request-Id": "x" * 500}).headers["x-request-id"].startswith("req-")


def test_a_body_over_the_limit(home):
    with running(home, (), Settings(max_body_bytes=2000)) as server, httpx.Client(base_url=server.url) as http:
        assert http.post("/v1/chat/completions", json=ask("spark")).status_code == 200
        refusal(http.post("/v1/chat/completions", json=ask("spark", "x" * 3000)), 413, "body_too_large")

        def chunks():
            for _ in range(10):
                yield b" " * 1000

        refusal(http.post("/v1/chat/completions", content=chunks()), 413, "body_too_large")


def test_a_full_queue_says_when_to_come_back(home):
    """Nothing is computed until nine of twelve have been refused."""
    with running(home, (), Settings(max_pending=3)) as server:
        answers, go_on = [], threading.Event()
        server.service.worker.call(lambda: go_on.wait(120))

        def one():
            answers.append(
                httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark", max_tokens=100), timeout=60)
            )

        threads = [threading.Thread(target=one) for _ in range(12)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(answers) == 9)
        go_on.set()
        for thread in threads:
            thread.join()
        refused = [a for a in answers if a.status_code == 429]
        assert answers[:9] == refused and [a.status_code for a in answers[9:]] == [200] * 3
        error = refusal(refused[0], 429, "overloaded")
        assert error["type"] == "rate_limit_error" and int(refused[0].headers["retry-after"]) >= 1
        server.idle()
        # The places are given back; a request larger than the limit is served when nothing else runs.
        assert httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark", n=5), timeout=60).status_code == 200


def test_a_queue_of_tokens_says_when_to_come_back(home):
    with running(home, (), Settings(max_pending_tokens=200)) as server:
        hurry = server.slowed()
        body = ask("spark", max_tokens=100, ignore_eos=True)
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body | {"stream": True}) as first:
            assert first.status_code == 200
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)
            assert "tokens" in refusal(answer, 429, "overloaded")["message"] and answer.headers["retry-after"]
            little = httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark", max_tokens=5), timeout=30)
            assert little.status_code == 200
        hurry.set()
        server.idle()
        assert server.service.desk.pending_tokens == 0
        # One that is larger than the limit is served when nothing else runs.
        whole = httpx.post(f"{server.url}/v1/chat/completions", json=body | {"n": 3}, timeout=60)
        assert whole.status_code == 200


def test_an_engine_fault_loses_its_requests_and_nothing_else(home, monkeypatch):
    with running(home) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        engine = server.service.models._residents["spark@1"].engine
        broken = threading.Event()

        def step():
            broken.set()
            raise RuntimeError("out of memory")

        monkeypatch.setattr(engine, "step", step)
        refusal(http.post("/v1/chat/completions", json=ask("spark")), 500, "engine_error")
        assert broken.is_set()
        answer = http.post("/v1/chat/completions", json=ask("spark"))
        assert answer.status_code == 200, "the version was read anew"
        assert server.service.models._residents["spark@1"].engine is not engine
        assert http.get("/healthz").status_code == 200
        states = [row.status for row in server.home.feedback.responses()]
        assert sorted(states) == ["aborted", "done"]


def test_health_tells_a_hanging_engine(home, monkeypatch):
    with running(home) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        assert http.get("/healthz").json() == {"status": "ok"} == http.get("/readyz").json()
        monkeypatch.setattr("prairie.serve.app.STUCK_S", 0.05)
        gate = threading.Event()
        server.service.worker.call(gate.wait)
        time.sleep(0.2)
        try:
            assert http.get("/healthz").status_code == 503 and http.get("/readyz").status_code == 503
        finally:
            gate.set()
        server.idle()
        assert http.get("/healthz").status_code == 200


def test_metrics(http):
    http.post("/v1/chat/completions", json=ask("spark", stream=True))
    http.get("/nowhere/at/all")
    text = http.get("/metrics").text
    for wanted in (
        'prairie_http_requests_total{method="POST",route="/v1/chat/completions",status="200"}',
        'prairie_http_requests_total{method="GET",route="unmatched",status="404"}',
        'prairie_tokens_total{kind="completion",model="spark"}',
        'prairie_choices_total{finish_reason="length",model="spark"}',
        "prairie_first_token_seconds_bucket",
        'prairie_engine{what="running"} 0.0',
        'prairie_resident{kind="engine"}',
        "prairie_resident_memory_bytes",
    ):
        assert wanted in text, wanted


def test_the_page_is_served(http):
    page = http.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    icon = http.get("/static/icon.svg")
    assert icon.status_code == 200 and icon.headers["content-type"].startswith("image/svg")
    assert http.get("/static/app.js").headers["content-type"].startswith("text/javascript")
    again = http.get("/static/icon.svg", headers={"If-None-Match": icon.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
