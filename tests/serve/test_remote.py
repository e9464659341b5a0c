"""A model of another server: the same answers, with our ids, records and votes."""

import json
import threading

import httpx
import openai
import pytest
from tiny_server import Home, Settings, ask, running, wait_for

from prairie.engine.remote import Remote
from prairie.errors import UsageError


@pytest.fixture(scope="module")
def front(server, tmp_path_factory):
    """A server without a model of its own, before `server`."""
    remotes = [Remote.parse(f"far={server.url}#spark"), Remote("gone", "http://127.0.0.1:9/v1", "x")]
    with Home(tmp_path_factory.mktemp("front") / "home") as home, running(home, (), Settings(remotes=remotes)) as front:
        yield front


def test_answers_are_those_of_the_other_server(front, server):
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0) as client:
        near = client.chat.completions.create(**ask("far", n=2))
        there = httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark"), timeout=30).json()
        assert near.choices[0].message.content == there["choices"][0]["message"]["content"]
        assert near.model == "far" and near.prairie["remote"]["model"] == "spark"
        assert near.prairie["remote"]["prairie"] == there["prairie"], "who wrote it is known to the version"
        chunks = list(client.chat.completions.create(**ask("far"), stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == near.choices[0].message.content and chunks[-1].usage.completion_tokens == 12
        assert {c.id for c in chunks} == {chunks[0].id} and chunks[0].id != near.id
        said = client.completions.create(model="far", prompt=["草原", "fox"], max_tokens=5, temperature=0)
        assert len(said.choices) == 2 and said.choices[0].text
        assert "far" in [model.id for model in client.models.list()]
        assert client.models.retrieve("far").prairie["kind"] == "remote"
    rows = [front.home.feedback.get_response(choice.response_id) for choice in near.choices]
    assert [row.text for row in rows] == [choice.message.content for choice in near.choices]
    assert rows[0].prompt[0].content == "草原 fox" and rows[0].line == "far" and rows[0].status == "done"
    assert rows[0].weights_hash == there["prairie"]["weights_hash"]
    assert rows[0].sampling["remote"]["url"].startswith(server.url) and rows[0].sampling["max_tokens"] == 12
    vote = {"response_id": rows[0].id, "kind": "thumb", "value": "up"}
    assert httpx.post(f"{front.url}/v1/feedback", json=vote).status_code == 201


def test_refusals_are_its_own_words(front):
    answer = httpx.post(f"{front.url}/v1/chat/completions", json=ask("far", guided_regex="("), timeout=30)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "unsupported_constraint"
    for stream in (False, True):
        answer = httpx.post(f"{front.url}/v1/chat/completions", json=ask("gone", stream=stream), timeout=30)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "remote_error"
        assert answer.headers["retry-after"]
    front.idle()
    assert front.service.desk.pending == 0


def test_who_leaves_is_recorded_and_ends_it_there_too(front, server):
    with httpx.stream(
        "POST", f"{front.url}/v1/chat/completions", json=ask("far", stream=True, max_tokens=140)
    ) as answer:
        id = json.loads(next(answer.iter_lines()).removeprefix("data: "))["id"]
    front.idle()
    server.idle()
    wait_for(lambda: front.home.feedback.get_response(id).status != "started")  # closed behind the answer's last act
    assert front.home.feedback.get_response(id).status in ("aborted", "done")
    assert server.kv_blocks_held() == 0 and front.service.desk.pending == 0


def test_who_leaves_while_the_end_is_written_leaves_a_written_end(front, server):
    """No thread is free to write when the answer is over, and the client goes before one is."""
    desk, free, hurry = front.service.desk, threading.Event(), server.slowed(0.5)
    with httpx.stream("POST", f"{front.url}/v1/chat/completions", json=ask("far", stream=True)) as answer:
        lines = answer.iter_lines()
        id = json.loads(next(lines).removeprefix("data: "))["id"]
        kept = [desk.threads.submit(free.wait, 60) for _ in range(desk.threads._max_workers)]
        hurry.set()
        wait_for(lambda: desk.threads._work_queue.qsize())
    try:
        wait_for(lambda: len(desk._tasks) > 1)  # the writing, and the closing that waits for it
    finally:
        free.set()
    assert all(one.result() for one in kept)
    front.idle()
    assert front.home.feedback.get_response(id).status == "done" and desk.pending == 0


def test_how_remotes_are_told():
    assert Remote.parse("a=http://h:1") == Remote("a", "http://h:1/v1", "a")
    assert Remote.parse("a=https://h/v1/#b") == Remote("a", "https://h/v1", "b")
    for wrong in ("a", "=http://h", "a=h:1", "a=ftp://h"):
        with pytest.raises(UsageError):
            Remote.parse(wrong)
    assert "secret" not in repr(Remote("a", "u", "m", "secret"))
