"""Clients that leave, and a server that stops: nothing stays held, every answer has an end on disk."""

import contextlib
import json
import socket
import threading
import time
from urllib.parse import urlparse

import httpx
import pytest
from tiny_server import Running, ask, running, wait_for

LONG = {"max_tokens": 120, "ignore_eos": True}


@pytest.fixture
def slow(home):
    """A server whose steps take time, so that there is some to leave."""
    with running(home, ["spark"]) as server:
        server.hurry = server.slowed(0.03)
        yield server


def rows(server, status):
    return [row for row in server.home.feedback.responses() if row.status == status]


def test_a_stream_that_is_left_is_cancelled_and_recorded(slow):
    with httpx.stream("POST", f"{slow.url}/v1/chat/completions", json=ask("spark", stream=True, **LONG)) as answer:
        lines = answer.iter_lines()
        for _ in range(20):
            next(lines)
    slow.idle()
    (row,) = rows(slow, "aborted")
    assert 0 < len(row.token_ids) < 120 and row.finish_reason == "cancelled"
    assert len(row.logprobs) == len(row.token_ids)
    assert slow.kv_blocks_held() == 0
    again = httpx.post(f"{slow.url}/v1/chat/completions", json=ask("spark"), timeout=30)
    assert again.status_code == 200


def test_a_storm_of_leavers_harms_nobody(slow):
    alone = httpx.post(f"{slow.url}/v1/chat/completions", json=ask("spark", "stay"), timeout=30).json()

    def leave(number):
        # Whole answers, streams and several choices; some leave at once, some in the middle, some while queued.
        body = ask("spark", f"go {number}", stream=number % 2 == 0, n=1 + number % 3, **LONG)
        url = urlparse(slow.url)
        with socket.create_connection((url.hostname, url.port)) as raw:
            data = json.dumps(body).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
            raw.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
            time.sleep(0.02 * (number % 8))

    threads = [threading.Thread(target=leave, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    stayed = httpx.post(f"{slow.url}/v1/chat/completions", json=ask("spark", "stay"), timeout=30).json()
    for thread in threads:
        thread.join()
    slow.idle()
    assert stayed["choices"][0]["message"]["content"] == alone["choices"][0]["message"]["content"]
    assert slow.kv_blocks_held() == 0
    assert slow.service.desk.pending == 0
    assert not rows(slow, "started")
    assert all(r.in_use == 0 for r in slow.service.models._residents.values())
    engine = slow.service.models._residents["spark@1"].engine
    assert not engine.has_work


def test_a_client_that_leaves_while_its_model_is_loaded(home):
    with running(home, ["spark"]) as server:
        load, left = server.service.models._load, threading.Event()
        server.service.models._load = lambda source: left.wait(60) and load(source)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.url}/v1/chat/completions", json=ask("spark@2"), timeout=httpx.Timeout(60, read=0.15)
            )  # fmt: skip
        left.set()
        wait_for(lambda: "spark@2" in server.service.models._residents)
        server.idle()
        assert all(r.in_use == 0 for r in server.service.models._residents.values())
        assert httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark@2"), timeout=30).status_code == 200


def test_a_stop_lets_answers_end(home):
    server = Running(home, ["spark"], grace_s=60)
    hurry = server.slowed()
    body = ask("spark", **(LONG | {"max_tokens": 60}))
    answers = []

    def one():
        answers.append(httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(rows(server, "started")) == 4)
    threading.Timer(0.3, hurry.set).start()  # the stop begins while all of them are written
    server.stop()
    for thread in threads:
        thread.join()
    assert [a.status_code for a in answers] == [200] * 4
    assert len(rows(server, "done")) == 4 and not rows(server, "started")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/healthz")


def test_a_stop_that_waits_no_longer_records_what_was_said(home):
    server = Running(home, ["spark"], grace_s=1)
    server.slowed(0.2)
    answers = []

    def one():
        with contextlib.suppress(httpx.HTTPError):
            answers.append(httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark", **LONG), timeout=60))

    thread = threading.Thread(target=one)
    thread.start()
    wait_for(lambda: rows(server, "started"))
    server.stop()  # after 1 s; the answer needs 24
    thread.join()
    assert not answers or answers[0].status_code >= 500
    (row,) = rows(server, "aborted")
    assert row.token_ids


def test_a_client_that_does_not_read_holds_no_place(slow):
    url = urlparse(slow.url)
    body = ask("spark", stream=True, n=8, **LONG, logprobs=True, top_logprobs=20)
    with socket.create_connection((url.hostname, url.port)) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
        raw.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        slow.hurry.set()
        wait_for(lambda: len(rows(slow, "done")) == 8)
        slow.idle()
        assert slow.kv_blocks_held() == 0


def test_rows_of_a_killed_server_are_closed_by_the_next_one(home):
    from prairie.store.feedback import Response

    home.feedback.start_response(Response(id="chatcmpl-cut", model="spark", prompt="x"))
    with running(home, ["spark"]):
        row = home.feedback.get_response("chatcmpl-cut")
        assert (row.status, row.finish_reason) == ("aborted", "crashed")
        home.feedback.start_response(Response(id="chatcmpl-live", model="spark", prompt="x"))
        with running(home, ["spark"]):  # a second server leaves the first one's rows alone
            assert home.feedback.get_response("chatcmpl-live").status == "started"


def test_an_engine_that_is_faster_than_the_disk(home, monkeypatch):
    with running(home, ["spark"]) as server:
        start = home.feedback.start_responses
        monkeypatch.setattr(home.feedback, "start_responses", lambda rows: time.sleep(0.3) or start(rows))
        for stream in (False, True):
            body = ask("spark", max_tokens=1, n=2, stream=stream)
            assert httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30).status_code == 200
        server.idle()
        assert len(rows(server, "done")) == len(home.feedback.responses()) == 4


def test_an_answer_that_cannot_be_recorded_is_not_given(home, monkeypatch):
    from prairie.errors import StorageFullError

    with running(home, ["spark"]) as server:
        full = StorageFullError("the disk is full", mend="free some space")

        def refuse(*_):
            raise full

        monkeypatch.setattr(home.feedback, "start_responses", refuse)
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark"), timeout=30)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "storage_full"
        stream = httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark", stream=True), timeout=30)
        assert stream.status_code == 503
        monkeypatch.undo()
        monkeypatch.setattr(home.feedback, "finish_response", refuse)
        assert httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark"), timeout=30).status_code == 507
        stream = httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark", stream=True), timeout=30)
        last = stream.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "storage_full"
        server.idle()
        assert server.kv_blocks_held() == 0
