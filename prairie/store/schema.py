"""The tables, and the numbered steps that made them. Written in SQLAlchemy Core, so that Postgres can read it as well.

Times are UNIX seconds (UTC). Once a schema has been released its step is frozen: a change is a new step at the end of
`MIGRATIONS`, and the step before it keeps a copy of the tables as they were.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

METADATA = MetaData()
# SQLite counts rows by itself only in a column that is declared exactly INTEGER PRIMARY KEY.
_Serial = BigInteger().with_variant(Integer, "sqlite")
# None is NULL, not the JSON text `null`.
_Json = JSON(none_as_null=True)

SCHEMA_STEPS = Table(
    "schema_steps",
    METADATA,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("about", Text, nullable=False),
    Column("applied", Float, nullable=False),
)

LINES = Table(
    "lines",
    METADATA,
    Column("name", String(200), primary_key=True),
    Column("champion", Integer, nullable=True, comment="number of the served version; changes only with an event"),
    Column("created", Float, nullable=False),
)

VERSIONS = Table(
    "versions",
    METADATA,
    Column("line", String(200), ForeignKey("lines.name"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("artifact_id", String(64), nullable=False),
    Column("base_artifact_id", String(64), nullable=True),
    Column("kind", String(40), nullable=False),
    Column("weights_hash", String(64), nullable=True),
    Column("figures", _Json, nullable=False),
    Column("lineage", _Json, nullable=False),
    Column("created", Float, nullable=False),
    UniqueConstraint("line", "artifact_id", name="one_number_per_artifact"),
)

REGISTRY_EVENTS = Table(
    "registry_events",
    METADATA,
    Column("id", _Serial, primary_key=True, autoincrement=True),
    Column("line", String(200), ForeignKey("lines.name"), nullable=False),
    Column("action", String(20), nullable=False, comment="promote or rollback; shadow, canary or end of a trial"),
    Column("number", Integer, nullable=False, comment="the champion afterwards; of a trial its version"),
    Column("previous", Integer, nullable=True, comment="the champion before"),
    Column("who", Text, nullable=True),
    Column("why", Text, nullable=True),
    Column("verdict", _Json, nullable=True),
    Column("created", Float, nullable=False),
    Index("registry_events_of_a_line", "line", "id"),
    sqlite_autoincrement=True,
)

TURNS = Table(
    "turns",
    METADATA,
    Column("line", String(200), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("champion", String(64), nullable=True),
    Column("candidate", String(64), nullable=True),
    Column("dataset", String(64), nullable=True),
    Column("verdict", _Json, nullable=False),
    Column("promoted", Boolean, nullable=False),
    Column("key", String(200), nullable=True, comment="of the work that turned; done again it finds this row"),
    Column("created", Float, nullable=False),
    UniqueConstraint("line", "key", name="one_turn_per_key"),
)

RESPONSES = Table(
    "responses",
    METADATA,
    Column("id", String(200), primary_key=True),
    Column("created", Float, nullable=False),
    Column("status", String(20), nullable=False, comment="started, done, aborted or forgotten"),
    Column("model", Text, nullable=False, comment="the name that was asked for"),
    Column("line", String(200), nullable=True),
    Column("version_id", String(64), nullable=True, comment="artifact id of what answered"),
    Column("weights_hash", String(64), nullable=True),
    Column("adapter_hash", String(64), nullable=True),
    Column("template_hash", String(64), nullable=True),
    Column("prompt", _Json, nullable=False, comment="messages, or a string for a raw completion"),
    Column("sampling", _Json, nullable=False),
    Column("token_ids", _Json, nullable=True),
    Column("logprobs", _Json, nullable=True),
    Column("text", Text, nullable=True),
    Column("finish_reason", String(40), nullable=True),
    Column("user", Text, nullable=True),
    Column("surface", Text, nullable=True),
    Column("purpose", String(40), nullable=False),
    Column("latency_ms", Float, nullable=True),
    Index("responses_of_a_user", "user"),
    Index("responses_of_a_line", "line", "created"),
)

FEEDBACK_EVENTS = Table(
    "feedback_events",
    METADATA,
    Column("seq", _Serial, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("response_id", String(200), ForeignKey("responses.id"), nullable=False),
    Column("kind", String(20), nullable=False),
    Column("value", _Json, nullable=False),
    Column("user", Text, nullable=True),
    Column("surface", Text, nullable=True),
    Column("created", Float, nullable=False),
    Column("idempotency_key", String(200), nullable=False, unique=True),
    Column("body_hash", String(64), nullable=False),
    Index("feedback_events_of_a_response", "response_id"),
    Index("feedback_events_of_a_user", "user"),
    sqlite_autoincrement=True,
)

FORGOTTEN_EVENTS = Table(
    "forgotten_events",
    METADATA,
    Column("id", String(64), primary_key=True, comment="of an event that was deleted; nothing else of it is kept"),
    Column("forgotten", Float, nullable=False),
)

TRIALS = Table(
    "trials",
    METADATA,
    Column("line", String(200), ForeignKey("lines.name"), primary_key=True),
    Column("number", Integer, nullable=False, comment="of the version on trial"),
    Column("share", Float, nullable=True, comment="of the users who get its answers; NULL: shadow, nobody does"),
    Column("event", BigInteger, nullable=False, comment="id of the registry event that began it"),
    Column("created", Float, nullable=False),
)

API_KEYS = Table(
    "api_keys",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("hash", String(64), nullable=False, unique=True, comment="sha256 of a key of 256 random bits"),
    Column("created", Float, nullable=False),
    Column("revoked", Float, nullable=True),
)


def _first_tables(connection: Connection) -> None:
    METADATA.create_all(
        connection, [table for table in METADATA.sorted_tables if table is not TRIALS], checkfirst=False
    )


def _trials(connection: Connection) -> None:
    METADATA.create_all(connection, [TRIALS], checkfirst=False)


def _by_time(connection: Connection) -> None:
    for table in (RESPONSES, FEEDBACK_EVENTS):  # not in METADATA: the first step is frozen without them
        connection.execute(text(f"CREATE INDEX {table.name}_by_time ON {table.name} (created)"))


MIGRATIONS: tuple[tuple[int, str, Callable[[Connection], None]], ...] = (
    (1, "registry, turns, responses, feedback, keys", _first_tables),
    (2, "versions on trial", _trials),
    (3, "answers and feedback by time", _by_time),
)
LATEST = MIGRATIONS[-1][0]
