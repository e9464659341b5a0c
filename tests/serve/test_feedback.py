"""Votes over HTTP: acknowledged once they are on disk, once each."""

import concurrent.futures
import uuid

import pytest
from tiny_server import ask


@pytest.fixture(scope="module")
def answer(http):
    return http.post("/v1/chat/completions", json=ask("spark", user="ann")).json()["id"]


def vote(http, response_id, kind="thumb", value="up", key=None, **more):
    headers = {"Idempotency-Key": key} if key else {}
    body = {"response_id": response_id, "kind": kind, "value": value, **more}
    return http.post("/v1/feedback", json=body, headers=headers)


def test_the_same_vote_twice_counts_once(http, server, answer):
    key = uuid.uuid4().hex
    first, second = (vote(http, answer, key=key, user="ann") for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json()["id"] == second.json()["id"]
    other = vote(http, answer, value="down", key=key, user="ann")
    assert other.status_code == 409 and other.json()["error"]["code"] == "conflict"
    mine = [e for e in server.home.feedback.events() if e.id == first.json()["id"]]
    assert [(e.kind, e.value, e.user, e.surface) for e in mine] == [("thumb", "up", "ann", "api")]


def test_a_vote_before_its_answer_is_refused(http):
    refused = vote(http, "chatcmpl-unknown")
    assert refused.status_code == 404 and refused.json()["error"]["param"] == "response_id"


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("thumb", "sideways"), ("thumb", None), ("rating", 6), ("rating", "5"), ("edit", {"text": ""}), ("edit", "x"),
        ("choice", {"over": []}), ("choice", {"over": ["chatcmpl-unknown"]}), ("retract", {"event": "fb-none"}),
        ("shout", "x"),
    ],
)  # fmt: skip
def test_votes_that_make_no_sense(http, answer, kind, value):
    assert vote(http, answer, kind, value).status_code in (400, 404)


def test_unknown_fields_of_a_vote_are_refused(http, answer):
    refused = vote(http, answer, commment="typo")
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "commment"


def test_every_kind_and_the_present_state(http, server):
    both = http.post("/v1/chat/completions", json=ask("spark", n=2, temperature=1)).json()
    one, two = (choice["response_id"] for choice in both["choices"])
    given = [
        vote(http, one, "thumb", {"thumb": "down", "reasons": ["too long"]}, user="bob"),
        vote(http, one, "thumb", "up", user="bob"),
        vote(http, one, "rating", 4, user="bob"),
        vote(http, one, "choice", {"over": [two]}, user="bob"),
        vote(http, one, "edit", {"text": "草原 🐎"}, user="bob"),
        vote(http, one, "comment", {"text": "good"}, user="bob"),
    ]
    assert [g.status_code for g in given] == [201] * 6
    rating = given[2].json()["id"]
    assert vote(http, one, "retract", {"event": rating}, user="bob").status_code == 201
    state = http.get(f"/v1/feedback/{one}").json()
    assert state["status"] == "done" and state["line"] == "spark"
    assert [e["kind"] for e in state["current"]] == ["thumb", "choice", "edit", "comment"]
    assert state["current"][0]["value"] == "up" and len(state["events"]) == 7
    assert http.get("/v1/feedback/unknown").status_code == 404
    votes = {v.event.id: v for v in server.home.feedback.votes(line="spark")}
    choice = votes[given[3].json()["id"]]
    assert [r.id for r in choice.over] == [two] and choice.response.text == both["choices"][0]["message"]["content"]


def test_rows_say_where_an_answer_came_from(http, server):
    headers = {"X-Prairie-Surface": "web", "X-Prairie-Purpose": "gate"}
    body = ask("spark:poet", user="carl", seed=5, temperature=1, metadata={"turn": "3"})
    answer = http.post("/v1/chat/completions", json=body, headers=headers).json()
    row = server.home.feedback.get_response(answer["id"])
    poet = server.home.registry.resolve("spark:poet")
    assert (row.model, row.line, row.version_id) == ("spark:poet", "spark:poet", poet.artifact_id)
    assert (row.user, row.surface, row.purpose, row.status) == ("carl", "web", "gate", "done")
    assert row.adapter_hash == answer["prairie"]["adapter_hash"] == poet.weights_hash
    assert row.weights_hash == server.home.registry.resolve("spark@1").weights_hash
    assert (row.sampling["seed"], row.sampling["metadata"]) == (5, {"turn": "3"})
    assert row.text == answer["choices"][0]["message"]["content"]
    assert len(row.token_ids) == len(row.logprobs) == answer["usage"]["completion_tokens"]
    assert row.latency_ms > 0 and row.template_hash
    assert http.post("/v1/chat/completions", json=ask("spark")).json()["id"] not in {
        r.id for r in server.home.feedback.responses(purpose="gate")
    }


def test_an_answer_is_on_disk_before_its_first_byte(http, server):
    with http.stream("POST", "/v1/chat/completions", json=ask("spark", max_tokens=100, stream=True)) as stream:
        lines = stream.iter_lines()
        line = next(lines)
        id = line.split('"response_id":"')[1].split('"')[0]
        assert vote(http, id).status_code == 201
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    assert server.home.feedback.get_response(id).status == "done"


def test_raw_completions_are_recorded_as_text(http, server):
    ids = server.service.models._residents["spark@1"].engine.prompt_ids("草原 fox")
    for prompt in ("草原 fox", ids):
        answer = http.post("/v1/completions", json={"model": "spark", "prompt": prompt, "max_tokens": 3}).json()
        row = server.home.feedback.get_response(answer["choices"][0]["response_id"])
        assert (row.prompt, row.status) == ("草原 fox", "done")


def test_many_votes_at_once_are_all_there(http, server, answer):
    keys = [uuid.uuid4().hex for _ in range(60)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        done = list(pool.map(lambda key: vote(http, answer, "comment", {"text": key}, key=key), [*keys, *keys]))
    assert sorted(d.status_code for d in done) == [200] * 60 + [201] * 60
    texts = [e.text for e in server.home.feedback.events(kinds=["comment"])]
    assert sorted(t for t in texts if t in keys) == sorted(keys)
