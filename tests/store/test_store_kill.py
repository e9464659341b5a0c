"""kill -9 and many writers: no acknowledged vote is missing and none is there twice, wherever the writer died."""

import os
import random
import signal
import sqlite3
import threading
import time

import pytest

from prairie.data.records import Message
from prairie.store.feedback import FeedbackEvent, Response
from prairie.store.home import Home

WRITERS = 3


def vote(key):
    return FeedbackEvent("r", "comment", {"text": key}, user=f"user {key}")


def cast(feedback, life, thread, count, tell):
    """Casts votes with keys of its own and tells each key as soon as `add` has returned."""
    for number in range(count):
        key = f"{life}.{thread}.{number}"
        id, _ = feedback.add(vote(key), key)
        tell(f"{key} {id}\n".encode())


def forked(root, life, count, tell):
    """A process that votes from some threads; returns its pid."""
    child = os.fork()
    if child:
        return child
    try:
        feedback = Home(root).feedback
        arguments = [(feedback, life, thread, count, tell) for thread in range(WRITERS)]
        threads = [threading.Thread(target=cast, args=given) for given in arguments]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        os._exit(0)


def live_and_die(root, life, chance):
    """Starts a voter, kills it at a random moment, and returns what it had acknowledged: key -> id."""
    reading, writing = os.pipe()
    child = forked(root, life, 10_000, lambda line: os.write(writing, line))
    os.close(writing)
    wanted = chance.randrange(1, 2000)
    acknowledged = b""
    while len(acknowledged) < wanted and (more := os.read(reading, 65536)):
        acknowledged += more
    time.sleep(chance.random() * 0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reading, 65536):
        acknowledged += more
    os.close(reading)
    # A line is written in one piece, so only whole ones were sent.
    return dict(line.split() for line in acknowledged.decode().splitlines())


def check(root, acknowledged):
    with Home(root) as home:  # opens what the dead left, a write-ahead log and all
        events = home.feedback.events()
        ids = {event.id: event for event in events}
        assert len(ids) == len(events)
        keys = [event.value["text"] for event in events]
        assert len(set(keys)) == len(keys), "a vote is there twice"
        missing = {key: id for key, id in acknowledged.items() if id not in ids}
        assert not missing, f"acknowledged and lost: {missing}"
        for key, id in acknowledged.items():
            assert (ids[id].value, ids[id].user) == ({"text": key}, f"user {key}")
        for key, id in list(acknowledged.items())[-5:]:
            assert home.feedback.add(vote(key), key) == (id, False), "the same key again is the same vote"
        assert len(home.feedback.events()) == len(events)


def killed(tmp_path, times, seed):
    root = tmp_path / "home"
    chance = random.Random(seed)
    with Home(root) as home:
        home.feedback.start_response(Response("r", "m", (Message("user", "hi"),)))
    acknowledged = {}
    for life in range(times):
        new = live_and_die(root, life, chance)
        acknowledged |= new
        check(root, new if life % 10 else acknowledged)
    check(root, acknowledged)
    assert len(acknowledged) > times
    connection = sqlite3.connect(root / "prairie.db")
    assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
    connection.close()


def test_kill_9_loses_no_acknowledged_vote(tmp_path):
    killed(tmp_path, 15, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kill_9_two_hundred_times(tmp_path):
    killed(tmp_path, 200, seed=2)


def test_two_processes_write_at_once(tmp_path):
    root = tmp_path / "home"
    with Home(root) as home:
        home.feedback.start_response(Response("r", "m", (Message("user", "hi"),)))
    reading, writing = os.pipe()
    children = [forked(root, life, 25, lambda line: os.write(writing, line)) for life in range(2)]
    os.close(writing)
    text = b""
    while more := os.read(reading, 65536):
        text += more
    os.close(reading)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    acknowledged = dict(line.split() for line in text.decode().splitlines())
    assert len(acknowledged) == 2 * WRITERS * 25
    check(root, acknowledged)
    with Home(root) as home:
        assert len(home.feedback.events()) == 2 * WRITERS * 25


def test_two_processes_open_a_new_home_at_once(tmp_path):
    """The tables are made once, whoever comes first."""
    children = []
    for number in range(6):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with Home(tmp_path / "home") as home:
                    home.keys.create(f"key {number}")
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    with Home(tmp_path / "home") as home:
        assert len(home.keys.all()) == 6
