"""One database, opened, migrated and written so that an acknowledged write survives `kill -9` and a power cut.

SQLite by default: WAL, `synchronous=FULL` (a commit returns after the disk has it), foreign keys, a busy timeout, and
`BEGIN IMMEDIATE` for writes, so that two writers wait for each other instead of failing half-way. A Postgres URL gets
the same promises: one writer at a time (an advisory lock that its transaction holds), reads of one unchanging state,
and a commit that returns after the server has it on its disk.

Writes of many threads share a commit: each enters its work in a queue, one of them does all that waits in one
transaction (every work in a savepoint of its own), and nobody returns before the commit that holds their work. One disk
sync then acknowledges many votes, and a lone vote waits for nobody. Not here: the tables (`schema`), their meaning
(`registry`, `feedback`, `keys`).
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, create_engine, event, func, inspect, make_url, select
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DataError as ValueRefused
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError

from prairie.errors import BusyError, PrairieError, RequestError, StorageFullError, StoreError
from prairie.store import schema
from prairie.store.disk import disk_errors, sync_file
from prairie.store.locks import locked, share

BUSY_TIMEOUT_S = 20.0
WRITERS_LOCK = 0x50524149
"""Who holds this advisory lock of a Postgres database writes to it; the number spells PRAI."""
WORKS_PER_COMMIT = 256
NO_SPACE_BYTES = 2**18
CHEAP_CHECK_BYTES = 16 * 2**20
"""Up to this size the whole file is checked at every open; above it only after a shutdown that left a WAL behind."""

T = TypeVar("T")


class _Work(Generic[T]):
    """One caller's part of a shared commit."""

    def __init__(self, call: Callable[[Connection], T]) -> None:
        self.call = call
        self.done = False
        self.error: BaseException | None = None
        self.value: T

    def result(self) -> T:
        if self.error is not None:
            raise self.error
        return self.value


class Database:
    """A store's database. Threads may share it; processes open their own.

    Raises StoreError when the file is damaged, is no database of ours or is newer than this code; StorageFullError when
    the disk is full or read-only; BusyError when another process blocks it for longer than the busy timeout.
    """

    def __init__(self, where: Path | str, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        """`where`: path of an SQLite file (made when missing) or an SQLAlchemy URL."""
        self.path = where if isinstance(where, Path) else None
        self.url: URL = URL.create("sqlite", database=str(where)) if isinstance(where, Path) else make_url(where)
        if (
            self.path is None
            and self.url.get_backend_name() == "sqlite"
            and self.url.database not in (None, ":memory:")
        ):
            self.path = Path(str(self.url.database))
        self.name = str(self.path or self.url.render_as_string(hide_password=True))
        self._busy_timeout_s = busy_timeout_s
        self._queue: deque[_Work[Any]] = deque()
        self._queue_lock = threading.Lock()
        self._commit_lock = threading.Lock()
        self._committer: int | None = None
        """The thread that commits just now."""
        self._presence: int | None = None
        """The descriptor that says that this process uses the file."""
        self._engine = self._make_engine()
        if self.url.get_backend_name() == "sqlite":
            event.listen(self._engine, "connect", self._set_up_connection)
            event.listen(self._engine, "begin", _begin)
        elif self.url.get_backend_name() == "postgresql":
            event.listen(self._engine, "begin", self._begin_on_postgres)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def write(self, work: Callable[[Connection], T]) -> T:
        """Runs `work` in a write transaction and returns its result once the commit is on the disk.

        What `work` raises undoes its own writes only. It may share the commit with other threads' works; it must not
        commit by itself.
        """
        assert self._committer != threading.get_ident(), "a work writes through its own connection"
        mine = _Work(work)
        with self._queue_lock:
            self._queue.append(mine)
        with self._commit_lock:
            # Whoever comes in first commits for all who wait; the others find their work done when it is their turn.
            while not mine.done:
                with self._queue_lock:
                    batch = [self._queue.popleft() for _ in range(min(WORKS_PER_COMMIT, len(self._queue)))]
                self._commit(batch)
        return mine.result()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection that sees one unchanging state of the database."""
        with self._errors(), self._engine.connect() as connection, connection.begin():
            yield connection

    def scrub(self, wait_s: float = 5.0) -> bool:
        """Empties the write-ahead log, so that what was deleted cannot be read from it either.

        False when another process read all that time: then the log goes at its next checkpoint. False on Postgres: what
        was deleted there leaves the files at the next VACUUM and the log when it is recycled.
        """
        if self.url.get_backend_name() != "sqlite":
            return False
        deadline = time.monotonic() + wait_s
        while True:
            with self._errors(), self._engine.connect() as connection:
                (busy, _, _) = connection.connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if not busy or time.monotonic() >= deadline:
                return not busy
            time.sleep(0.05)

    def backup(self, target: Path) -> None:
        """A consistent copy of an SQLite database, also while it is written to."""
        with self._errors(), disk_errors(f"{target} cannot be written"), self._engine.connect() as connection:
            copy = sqlite3.connect(target)
            try:
                source = connection.connection.driver_connection
                assert isinstance(source, sqlite3.Connection), "only SQLite is copied as a file"
                source.backup(copy)
            finally:
                copy.close()
            sync_file(target)

    def close(self) -> None:
        """Closes every connection; the last process to do so folds the write-ahead log into the file."""
        self._engine.dispose()
        if self._presence is not None:
            os.close(self._presence)
            self._presence = None

    def _commit(self, batch: list[_Work[Any]]) -> None:
        """Runs a batch in one transaction. Every work of it is done afterwards, with a value or an error."""
        self._committer = threading.get_ident()
        try:
            with (
                self._errors(),
                self._engine.connect().execution_options(prairie_writes=True) as connection,
                connection.begin(),
            ):
                for work in batch:
                    own = connection.begin_nested()
                    try:
                        work.value = work.call(connection)
                        own.commit()
                    except Exception as error:
                        # A full or failing disk ends the whole transaction by itself: then nobody's work counts.
                        if not _transaction_lives(connection):
                            raise
                        own.rollback()
                        work.error = self._sentence(error) if isinstance(error, StatementError) else error
        except Exception as error:
            for work in batch:
                work.error = work.error or error
        except BaseException:
            # Ctrl-C is this thread's own matter; the others only learn that nothing is certain.
            for work in batch:
                work.error = StoreError(f"writing to {self.name} was interrupted", mend="send it again")
            raise
        finally:
            self._committer = None
            for work in batch:
                work.done = True

    def _open(self) -> None:
        if self.path is None:
            with self._errors():
                self._migrate()
            return
        with disk_errors(f"the store {self.path.parent} cannot be made"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.with_name(self.path.name + ".lock")
        with locked(lock, f"the opening of {self.name}", wait_s=self._busy_timeout_s), self._errors():
            new = not self.path.exists()
            self._presence, alone = share(self.path.with_name(self.path.name + ".users"))
            # The last user folds the log into the file. A log that nobody uses was left by a process that died.
            unclean = alone and self.path.with_name(self.path.name + "-wal").exists()
            with self._engine.connect() as connection:
                cursor = connection.connection.cursor()
                if not new and (unclean or self.path.stat().st_size <= CHEAP_CHECK_BYTES):
                    (verdict,) = cursor.execute("PRAGMA quick_check(1)").fetchone()
                    if verdict != "ok":
                        raise self._damaged(verdict)
                (mode,) = cursor.execute("PRAGMA journal_mode=WAL").fetchone()
                if mode.lower() != "wal":
                    raise StoreError(
                        f"{self.name} cannot keep a write-ahead log", got=mode, mend="put --home on a local disk"
                    )
            self._migrate()
            if new:
                with disk_errors(f"{self.path.parent} cannot be written"):
                    sync_file(self.path.parent)

    def _migrate(self) -> None:
        """Brings the tables to `schema.LATEST`: all missing steps or none. The caller holds the opening lock."""
        with self.read() as connection:
            tables = set(inspect(connection).get_table_names())
            if schema.SCHEMA_STEPS.name in tables:
                at = connection.execute(select(func.max(schema.SCHEMA_STEPS.c.number))).scalar() or 0
            elif tables:
                raise StoreError(
                    f"{self.name} is not a database of Prairie",
                    got=f"tables {', '.join(sorted(tables)[:5])}",
                    mend="name another folder with --home",
                )
            else:
                at = 0
        if at > schema.LATEST:
            raise StoreError(
                f"{self.name} was written by a newer Prairie",
                got=f"schema {at}",
                wanted=f"at most {schema.LATEST}",
                mend="update Prairie, or name another folder with --home",
            )
        steps = [step for step in schema.MIGRATIONS if step[0] > at]
        if not steps:
            return
        if at and self.path is not None:
            self.backup(self.path.with_name(f"{self.path.name}.schema-{at}"))

        def run(connection: Connection) -> None:
            for number, about, step in steps:
                if _is_done(connection, number):
                    continue  # another process opened the same Postgres database in the meantime
                step(connection)
                row = {"number": number, "about": about, "applied": time.time()}
                connection.execute(schema.SCHEMA_STEPS.insert().values(row))

        self.write(run)

    def _make_engine(self) -> Engine:
        """Raises StoreError for a URL of a database that is not known here, or whose driver is missing."""
        if self.url.get_backend_name() not in ("sqlite", "postgresql"):
            raise StoreError(
                "no such database can be used", got=self.url.get_backend_name(), wanted="sqlite or postgresql+psycopg"
            )
        try:
            return create_engine(self.url, json_serializer=_to_json, pool_pre_ping=self.path is None)
        except (ImportError, SQLAlchemyError) as error:
            raise StoreError(
                f"{self.name} cannot be opened", got=str(error), wanted="postgresql+psycopg://USER@HOST/DATABASE",
                mend="pip install 'prairie[postgres]'",
            ) from error  # fmt: skip

    def _begin_on_postgres(self, connection: Connection) -> None:
        if connection.get_execution_options().get("prairie_writes", False):
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(self._busy_timeout_s * 1000)}")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITERS_LOCK})")
        else:
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")

    def _set_up_connection(self, connection: sqlite3.Connection, _record: object) -> None:
        # The driver's own transactions stay off: it would begin them late and deferred. `_begin` does it instead.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={int(self._busy_timeout_s * 1000)}")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        # What is forgotten is overwritten, not only unlinked.
        cursor.execute("PRAGMA secure_delete=ON")
        cursor.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise self._sentence(error) from error
        except sqlite3.Error as error:
            raise self._sentence(error) from error

    def _sentence(self, error: StatementError | sqlite3.Error) -> Exception:
        """The error of ours that a driver's error means."""
        if isinstance(error, StatementError) and isinstance(error.orig, PrairieError):
            return error.orig
        if isinstance(error, StatementError) and not isinstance(error, DBAPIError):
            return RequestError("a value cannot be stored", got=str(error.orig), wanted="what JSON can say")
        if isinstance(error, ValueRefused):
            return RequestError("a value cannot be stored", got=" ".join(str(error.orig).split()))
        original = error.orig if isinstance(error, StatementError) else error
        if getattr(original, "sqlstate", None) in ("55P03", "57014"):  # lock not available, statement cancelled
            return BusyError(
                f"{self.name} is blocked by another process for more than {self._busy_timeout_s:g} s",
                mend="stop that process or try again",
            )
        if str(getattr(original, "sqlstate", None) or "").startswith("53"):  # disk full, out of memory, connections
            return StorageFullError(f"{self.name} has no room left", got=" ".join(str(original).split()))
        name = getattr(original, "sqlite_errorname", "") or ""
        text = str(original)
        if name.startswith("SQLITE_FULL") or (name.startswith("SQLITE_IOERR") and self._no_space()):
            return StorageFullError(
                f"{self.name} cannot be written: the disk is full", mend="free some space and try again"
            )
        if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            return StorageFullError(
                f"{self.name} cannot be written", got=text, mend="give --home a folder that this user may write"
            )
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            return BusyError(
                f"{self.name} is blocked by another process for more than {self._busy_timeout_s:g} s",
                mend="stop that process or try again",
            )
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return self._damaged(text)
        return StoreError(f"{self.name} failed", got=" ".join(text.split()) or type(original).__name__)

    def _no_space(self) -> bool:
        """SQLite calls a full disk an I/O error when it meets it while syncing or mapping its log."""
        try:
            return self.path is not None and shutil.disk_usage(self.path.parent).free < NO_SPACE_BYTES
        except OSError:
            return False

    def _damaged(self, text: str) -> StoreError:
        return StoreError(
            f"{self.name} is damaged",
            got=" ".join(text.split()),
            mend=f"move it away and put a backup in its place, or save what is readable with "
            f"`sqlite3 {self.name} .recover | sqlite3 mended.db`",
        )


def _is_done(connection: Connection, number: int) -> bool:
    if connection.dialect.name == "sqlite" or not inspect(connection).has_table(schema.SCHEMA_STEPS.name):
        return False
    done = select(schema.SCHEMA_STEPS.c.number).where(schema.SCHEMA_STEPS.c.number == number)
    return connection.execute(done).first() is not None


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("prairie_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _transaction_lives(connection: Connection) -> bool:
    """False when SQLite has rolled the whole transaction back by itself (disk full, I/O error)."""
    driver = connection.connection.driver_connection
    return driver.in_transaction if isinstance(driver, sqlite3.Connection) else True


def _to_json(value: Any) -> str:
    """Raises RequestError itself: what Postgres' driver meets while it serialises comes out unwrapped."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError("a value cannot be stored", got=str(error), wanted="what JSON can say") from error
