"""kill -9 of a server at random moments while people talk and vote: what was acknowledged is there once, and no answer
stays open. `PRAIRIE_KILLS=1000` asks for more kills."""

import os
import random
import signal
import threading
import time
import uuid

import httpx
import pytest
import tiny_server
from tiny_server import ask

from prairie.serve.app import create_app
from prairie.serve.server import bind, serve_on, url_of
from prairie.store.home import Home

KILLS = int(os.environ.get("PRAIRIE_KILLS", "100"))
READY_WITHIN_S = 600
"""A server that gets no processor time on a busy machine is slow, not wrong."""


def server_in_a_process(root, port):
    """(pid, url) of a server that is about to load."""
    listening = bind("127.0.0.1", port)
    url = url_of(listening)
    child = os.fork()
    if child == 0:
        try:
            with Home(root) as home:
                serve_on(listening, create_app(home), grace_s=1)
        finally:
            os._exit(0)
    listening.close()
    return child, url


class People(threading.Thread):
    """Somebody who asks and votes until the server is gone, and keeps what it acknowledged."""

    def __init__(self, url, number):
        super().__init__(daemon=True)
        self.url, self.number = url, number
        self.answers, self.votes = {}, {}

    def run(self):
        with httpx.Client(base_url=self.url, timeout=20) as http:
            while True:
                try:
                    body = ask("spark", max_tokens=4, user=f"user-{self.number}")
                    said = http.post("/v1/chat/completions", json=body).raise_for_status().json()
                    self.answers[said["id"]] = said["choices"][0]["message"]["content"]
                    key = uuid.uuid4().hex
                    vote = {"response_id": said["id"], "kind": "thumb", "value": "up", "user": f"user-{self.number}"}
                    done = http.post("/v1/feedback", json=vote, headers={"Idempotency-Key": key})
                    self.votes[key] = done.raise_for_status().json()["id"]
                except httpx.HTTPError:
                    return


@pytest.mark.slow
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("where", ["sqlite", "postgres"])
def test_a_killed_server_loses_and_doubles_nothing(where, tmp_path, monkeypatch, request):
    if where == "postgres":
        monkeypatch.setenv("PRAIRIE_DATABASE", request.getfixturevalue("postgres_url"))
    root, chance = tmp_path / "home", random.Random(where)
    tiny_server.make_home(root).close()
    answers, votes = {}, {}
    for life in range(KILLS):
        child, url = server_in_a_process(root, 0)
        people = [People(url, number) for number in range(3)]
        try:
            deadline = time.monotonic() + READY_WITHIN_S
            while httpx.get(f"{url}/readyz", timeout=READY_WITHIN_S).status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            if life:
                with Home(root) as home:
                    assert "started" not in {row.status for row in home.feedback.responses()}, "left open"
            for one in people:
                one.start()
            wanted, until = chance.randrange(8), time.monotonic() + 20
            while sum(len(one.votes) for one in people) < wanted and time.monotonic() < until:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.1))
            if life % 3 == 2:
                with Home(root) as home:
                    home.registry.promote(chance.choice(["spark@1", "spark@2", "spark@3"]))
                time.sleep(chance.uniform(0, 0.3))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for one in people:
            one.join(30)
            answers |= one.answers
            votes |= one.votes
        with Home(root) as home:
            events = home.feedback.events()
            ids = [event.id for event in events]
            assert len(set(ids)) == len(ids) and set(votes.values()) <= set(ids)
            assert len({event.response_id for event in events}) == len(events), "one vote an answer, none twice"
            texts = {row.id: (row.status, row.text) for row in home.feedback.responses()}
            assert all(texts[id] == ("done", text) for id, text in answers.items())
    assert len(votes) > KILLS
    print(f"{where}: {KILLS} kills, {len(answers)} answers and {len(votes)} votes acknowledged")
