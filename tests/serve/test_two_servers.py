"""Two servers on one store, on SQLite and on Postgres, one of them in a process of its own: each sees what is promoted
by the other, and votes that come to both are neither lost nor doubled."""

import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tiny_server import Process, Running, ask, make_home

pytestmark = pytest.mark.long
VOTERS, VOTES = 6, 5


@pytest.fixture(params=["sqlite", "postgres"])
def servers(tmp_path, monkeypatch, request):
    """(the home of one, its client, the other's client)."""
    if request.param == "postgres":
        monkeypatch.setenv("PRAIRIE_DATABASE", request.getfixturevalue("postgres_url"))
    home = make_home(tmp_path / "home")
    other = Process(tmp_path / "home", "--no-guard")
    try:
        url = other.wait_ready()["url"]
        one = Running(home)
        try:
            with httpx.Client(base_url=one.url, timeout=60) as here, httpx.Client(base_url=url, timeout=60) as there:
                yield home, here, there
        finally:
            one.stop()
    finally:
        other.end()
        home.close()


def answer(http):
    found = http.post("/v1/chat/completions", json=ask("spark", max_tokens=2)).raise_for_status().json()
    return found["id"], found["prairie"]["version"]


def follows(http, number, limit_s=60.0):
    deadline = time.monotonic() + limit_s
    while (found := answer(http)[1]) != number:
        assert time.monotonic() < deadline, f"{http.base_url} answers by version {found}, not by {number}"
        time.sleep(0.05)


def test_each_sees_what_the_other_promotes_and_no_vote_is_lost_or_doubled(servers):
    """Promotions by both in turn; then people who ask one server and vote at the other, each vote sent to both at once
    under one key, one of them twice: one event each, and one of the two says that it is new."""
    home, here, there = servers
    for http in (here, there):
        follows(http, 1)
    there.post("/v1/studio/lines/spark/promote", json={"version": 2}).raise_for_status()
    for http in (here, there):
        follows(http, 2)
    here.post("/v1/studio/lines/spark/rollback", json={}).raise_for_status()
    for http in (there, here):
        follows(http, 1)
    assert [event.number for event in home.registry.history("spark")] == [1, 2, 1]

    def talk(number):
        kept = []
        for vote in range(VOTES):
            asked, voted_at = (here, there) if (number + vote) % 2 else (there, here)
            id, _ = answer(asked)
            body = {"response_id": id, "kind": "thumb", "value": "up", "user": f"user-{number}"}
            key = {"Idempotency-Key": uuid.uuid4().hex}
            with ThreadPoolExecutor(3) as at_once:
                sent = [at_once.submit(http.post, "/v1/feedback", json=body, headers=key)
                        for http in (asked, voted_at, voted_at)]  # fmt: skip
                said = [one.result() for one in sent]
            assert sorted(one.status_code for one in said) == [200, 200, 201], [one.text for one in said]
            (event,) = {one.json()["id"] for one in said}
            kept.append((event, id))
        return kept

    with ThreadPoolExecutor(VOTERS) as people:
        kept = [pair for found in people.map(talk, range(VOTERS)) for pair in found]
    events = home.feedback.events()
    assert sorted((event.id, event.response_id) for event in events) == sorted(kept)
    assert len(kept) == len({id for _, id in kept}) == VOTERS * VOTES
    assert {row.status for row in home.feedback.responses()} == {"done"}
