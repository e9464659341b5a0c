"""The database: migrations, refusals, durability settings, shared commits, and how it fails."""

import os
import signal
import sqlite3
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import Engine, event, func, select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateTable

from prairie.errors import BusyError, NotFoundError, StorageFullError, StoreError
from prairie.store import schema
from prairie.store.database import Database, _Work
from prairie.store.schema import API_KEYS

GOLDEN = {step: Path(__file__).parent / f"schema_{step}.sql" for step in (1, 2, 3)}


def key_row(name):
    return {"id": name, "name": name, "hash": name, "created": 0.0}


def insert(name):
    return lambda connection: connection.execute(API_KEYS.insert().values(**key_row(name)))


def names(path):
    """The committed rows, read past SQLAlchemy by a connection of its own."""
    connection = sqlite3.connect(path)
    try:
        return {row[0] for row in connection.execute("select name from api_keys")}
    finally:
        connection.close()


def dump(path):
    connection = sqlite3.connect(path)
    rows = connection.execute("select sql from sqlite_master where sql is not null order by type desc, name").fetchall()
    connection.close()
    return "\n".join(f"{row[0].strip()};" for row in rows) + "\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prairie.db"


def test_from_empty_to_latest_and_again(path):
    for _ in range(2):
        database = Database(path)
        with database.read() as connection:
            steps = list(connection.execute(select(schema.SCHEMA_STEPS.c.number)).scalars())
        database.close()
        assert steps == list(range(1, schema.LATEST + 1))


@pytest.mark.parametrize("step", GOLDEN)
def test_a_schema_that_was_released_is_frozen(path, step, monkeypatch):
    """Homes with these tables exist: a change is a new step in MIGRATIONS, not another one of that number."""
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:step])
        patch.setattr(schema, "LATEST", step)
        Database(path).close()
    assert dump(path) == GOLDEN[step].read_text()


def test_a_home_of_the_first_schema_gets_the_rest_and_keeps_its_rows(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
        patch.setattr(schema, "LATEST", 1)
        database = Database(path)
        database.write(insert("kept"))
        database.close()
    Database(path).close()
    assert dump(path) == GOLDEN[schema.LATEST].read_text()
    assert names(path) == {"kept"}


def test_a_home_from_the_future_is_refused_and_untouched(path):
    Database(path).close()
    connection = sqlite3.connect(path)
    connection.execute("insert into schema_steps values (?, 'from the future', 0)", (schema.LATEST + 1,))
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=rf"newer Prairie: got schema {schema.LATEST + 1}, wanted at most"):
        Database(path)
    assert path.read_bytes() == before


def test_a_foreign_database_is_refused(path):
    connection = sqlite3.connect(path)
    connection.execute("create table photos (id integer)")
    connection.close()
    with pytest.raises(StoreError, match="not a database of Prairie: got tables photos"):
        Database(path)


def test_a_failed_step_leaves_nothing_and_a_backup_stands(path, monkeypatch):
    database = Database(path)
    database.write(insert("kept"))
    database.close()

    def good(connection):
        connection.execute(text("create table extra (id integer)"))

    def bad(connection):
        connection.execute(text("create table more (id integer)"))
        connection.execute(text("insert into nowhere values (1)"))

    steps = ((schema.LATEST + 1, "good", good), (schema.LATEST + 2, "bad", bad))
    monkeypatch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS + steps)
    monkeypatch.setattr(schema, "LATEST", schema.LATEST + 2)
    with pytest.raises(StoreError, match="no such table: nowhere"):
        Database(path)
    connection = sqlite3.connect(path)
    tables = {row[0] for row in connection.execute("select name from sqlite_master where type = 'table'")}
    last = connection.execute("select max(number) from schema_steps").fetchone()[0]
    connection.close()
    assert not tables & {"extra", "more"}
    assert last == schema.LATEST - 2
    assert names(path.with_name(f"prairie.db.schema-{schema.LATEST - 2}")) == {"kept"}


def test_a_missing_step_is_made_up(path, monkeypatch):
    Database(path).close()
    step = (schema.LATEST + 1, "one more", lambda c: c.execute(text("create table extra (id integer)")) and None)
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, step))
    monkeypatch.setattr(schema, "LATEST", schema.LATEST + 1)
    database = Database(path)
    with database.read() as connection:
        assert connection.execute(text("select count(*) from extra")).scalar() == 0
    database.close()


def test_commits_are_synced_and_rules_hold(path):
    database = Database(path)
    with database.read() as connection:
        pragma = {
            name: connection.exec_driver_sql(f"pragma {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout", "secure_delete")
        }
    database.close()
    assert pragma == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "busy_timeout": 20_000,
        "secure_delete": 1,
    }


def test_the_tables_are_portable():
    for table in schema.METADATA.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=postgresql.dialect()))


def test_a_damaged_page_is_found_at_open(path):
    database = Database(path)
    database.write(lambda connection: [insert(f"key {number}")(connection) for number in range(300)])
    database.close()
    content = bytearray(path.read_bytes())
    content[-4096:-4032] = b"\xff" * 64  # of a row that opening does not read
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"is damaged.*put a backup in its place.*\.recover"):
        Database(path)


def test_a_large_file_is_checked_only_after_a_death(path, monkeypatch):
    monkeypatch.setattr("prairie.store.database.CHEAP_CHECK_BYTES", 0)
    asked = []

    def opened():
        def watch(connection, _record):
            connection.set_trace_callback(lambda sql: asked.append(sql) if "quick_check" in sql else None)

        event.listen(Engine, "connect", watch)
        asked.clear()
        database = Database(path)
        event.remove(Engine, "connect", watch)
        return database, bool(asked)

    first, _ = opened()
    first.write(insert("one"))
    second, checked = opened()
    assert not checked, "the log is in use by another one"
    first.close()
    second.close()
    third, checked = opened()
    assert not checked, "the last one closed it"
    third.close()
    child = os.fork()
    if child == 0:
        Database(path).write(insert("two"))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    fourth, checked = opened()
    assert checked, "a log that nobody uses"
    fourth.close()


def test_a_work_that_writes_through_the_database_is_a_mistake(path):
    database = Database(path)
    with pytest.raises(AssertionError, match="its own connection"):
        database.write(lambda connection: database.write(insert("inner")))
    database.write(insert("outer"))
    database.close()
    assert names(path) == {"outer"}


def test_a_file_that_is_no_database_is_a_sentence(path):
    path.write_bytes(b"not a database at all, but long enough to have a header" * 50)
    with pytest.raises(StoreError, match="is damaged: got file is not a database"):
        Database(path)


def test_a_full_disk_is_a_sentence_and_leaves_the_old_state(path):
    database = Database(path)
    database.write(insert("before"))

    def limit(connection, _record):
        connection.execute("pragma max_page_count = 40")

    event.listen(database._engine, "connect", limit)
    database._engine.dispose()
    with pytest.raises(StorageFullError, match="disk is full"):
        for number in range(200):
            database.write(insert(f"{number}" + "x" * 2000))
    event.remove(database._engine, "connect", limit)
    database._engine.dispose()
    assert "before" in names(path)
    database.write(insert("after"))
    database.close()
    assert "after" in names(path)


@pytest.mark.parametrize("free, kind", [(0, StorageFullError), (2**30, StoreError)])
def test_an_io_error_on_a_full_disk_is_called_so(path, monkeypatch, free, kind):
    """SQLite reports ENOSPC of a sync as an I/O error."""
    database = Database(path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))

    def failing(connection):
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorname = "SQLITE_IOERR_FSYNC"
        raise DBAPIError("commit", None, error)

    with pytest.raises(StoreError) as caught:
        database.write(failing)
    assert type(caught.value) is kind
    database.close()


def test_a_full_disk_fails_every_work_of_the_shared_commit(path):
    """SQLite ends the whole transaction: nobody of the batch may be told that it was written."""
    database = Database(path)
    event.listen(
        database._engine, "connect", lambda connection, _record: connection.execute("pragma max_page_count=40")
    )
    database._engine.dispose()
    outcomes = together(database, [insert("small"), insert("x" * 400_000), insert("small too")])
    database.close()
    written = names(path)
    assert isinstance(outcomes[1], StorageFullError)
    assert {"small": "small" in written, "small too": "small too" in written} == {
        "small": not isinstance(outcomes[0], Exception),
        "small too": not isinstance(outcomes[2], Exception),
    }


def test_another_writer_is_waited_for_and_then_named(path):
    database = Database(path, busy_timeout_s=0.1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("begin immediate")
    with pytest.raises(BusyError, match=r"blocked by another process for more than 0\.1 s"):
        database.write(insert("late"))
    other.execute("rollback")
    other.close()
    database.write(insert("then"))
    database.close()
    assert names(path) == {"then"}


def test_a_read_sees_one_state(path):
    database = Database(path)
    with database.read() as connection:
        assert connection.execute(select(func.count()).select_from(API_KEYS)).scalar() == 0
        database.write(insert("meanwhile"))
        assert connection.execute(select(func.count()).select_from(API_KEYS)).scalar() == 0
    assert names(path) == {"meanwhile"}
    database.close()


def together(database, works):
    """Runs works in threads so that all but the first wait in one queue; returns values or errors in their order."""
    gate, inside = threading.Event(), threading.Event()

    def hold(connection):
        inside.set()
        gate.wait(10)

    outcomes = [None] * len(works)

    def go(index, work):
        try:
            outcomes[index] = database.write(work)
        except Exception as error:
            outcomes[index] = error

    first = threading.Thread(target=database.write, args=(hold,))
    first.start()
    assert inside.wait(10)
    threads = [threading.Thread(target=go, args=pair) for pair in enumerate(works)]
    for number, thread in enumerate(threads, 1):
        thread.start()
        while len(database._queue) < number:  # so that they stand in the queue in this order
            time.sleep(0.001)
    gate.set()
    for thread in [first, *threads]:
        thread.join(20)
        assert not thread.is_alive()
    return outcomes


def test_writers_that_wait_share_one_commit(path):
    database = Database(path)
    commits = []
    event.listen(database._engine, "commit", lambda connection: commits.append(1))
    outcomes = together(database, [insert(f"key {n}") for n in range(20)])
    database.close()
    assert not [o for o in outcomes if isinstance(o, Exception)]
    assert names(path) == {f"key {n}" for n in range(20)}
    assert len(commits) == 2  # the one that held the door, and one for the twenty


def test_an_error_undoes_its_own_work_only(path):
    database = Database(path)

    def half(connection):
        insert("half")(connection)
        raise NotFoundError("on purpose")

    outcomes = together(database, [insert("one"), half, insert("two"), insert("one")])
    database.close()
    assert isinstance(outcomes[1], NotFoundError)
    assert isinstance(outcomes[3], StoreError) and "UNIQUE" in str(outcomes[3])
    assert names(path) == {"one", "two"}


def test_nobody_is_told_before_the_commit(path):
    """Every write is visible to another connection by the time it returns, while others write."""
    database = Database(path)
    missing = []

    def go(thread):
        for number in range(15):
            name = f"{thread}/{number}"
            database.write(insert(name))
            if name not in names(path):
                missing.append(name)

    threads = [threading.Thread(target=go, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    database.close()
    assert not missing
    assert len(names(path)) == 90


def test_ctrl_c_in_one_writer_is_an_error_in_the_others(path):
    """The one who is interrupted stops; those who waited for the same commit hear that it did not happen."""
    database = Database(path)
    waiting = _Work(insert("waiting"))
    database._queue.append(waiting)

    def interrupted(connection):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        database.write(interrupted)
    assert waiting.done
    with pytest.raises(StoreError, match="was interrupted; send it again"):
        waiting.result()
    assert names(path) == set()
    database.write(insert("later"))
    database.close()
    assert names(path) == {"later"}
