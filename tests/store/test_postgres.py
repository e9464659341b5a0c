"""What a second kind of database must promise as the first does: one writer, one vote a key, honest refusals."""

import threading

import pytest
from sqlalchemy import select

from prairie.data.records import Message
from prairie.errors import BusyError, RequestError, StoreError
from prairie.store.database import Database
from prairie.store.feedback import FeedbackEvent, Response
from prairie.store.home import Home
from prairie.store.schema import API_KEYS

QUESTION = (Message("user", "two?"),)


def test_many_writers_of_several_processes_lose_and_double_nothing(home):
    """Three homes on one database, as three processes have them, and twelve threads that send the same forty votes."""
    home.feedback.start_response(Response("r", "spark", QUESTION))
    homes = [home, Home(home.root), Home(home.root)]
    ids: dict[int, set] = {}
    failures = []

    def vote(which):
        try:
            for number in range(40):
                event = FeedbackEvent("r", "comment", {"text": str(number)}, user="ann")
                ids.setdefault(number, set()).add(homes[which % 3].feedback.add(event, f"key-{number}")[0])
        except Exception as error:  # shown below
            failures.append(error)

    threads = [threading.Thread(target=vote, args=(which,)) for which in range(12)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    [other.close() for other in homes[1:]]
    assert failures == []
    assert [len(found) for found in ids.values()] == [1] * 40
    assert len(home.feedback.events()) == 40


def test_a_read_sees_one_state(home):
    home.keys.create("one")
    with home.database.read() as connection:
        before = len(list(connection.execute(select(API_KEYS.c.id))))
        other = Home(home.root)
        other.keys.create("two")
        other.close()
        assert len(list(connection.execute(select(API_KEYS.c.id)))) == before
    assert len(home.keys.all()) == before + 1


def test_opened_by_several_at_once_it_is_made_once(home):
    homes = [Home(home.root) for _ in range(4)]
    failures = []

    def open_it(one):
        try:
            one.registry.lines()
        except Exception as error:  # shown below
            failures.append(error)

    threads = [threading.Thread(target=open_it, args=(one,)) for one in homes]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    [one.close() for one in homes]
    assert failures == []


def test_a_blocked_database_says_so(postgres_url):
    first, second = Database(postgres_url), Database(postgres_url, busy_timeout_s=0.2)
    inside, done = threading.Event(), threading.Event()

    def hold(connection):
        inside.set()
        done.wait(20)

    thread = threading.Thread(target=first.write, args=(hold,))
    thread.start()
    inside.wait(20)
    try:
        with pytest.raises(BusyError, match=r"blocked by another process for more than 0\.2 s"):
            second.write(lambda connection: None)
    finally:
        done.set()
        thread.join()
        first.close()
        second.close()


def test_what_it_cannot_hold_is_refused(postgres_url, tmp_path):
    with Home(tmp_path / "home", postgres_url) as home, pytest.raises(RequestError, match="cannot be stored"):
        home.feedback.start_response(Response("r", "a\0b", QUESTION))


def test_a_url_that_cannot_be_used():
    with pytest.raises(StoreError, match=r"no such database can be used: got mysql"):
        Database("mysql://somewhere/db")
    with pytest.raises(StoreError, match="failed: got connection"):
        Database("postgresql+psycopg://nobody@127.0.0.1:1/none?connect_timeout=2")
