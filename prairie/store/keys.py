"""API keys: shown once, kept as a hash. Not here: which routes want one (`serve/`)."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, select, update

from prairie.errors import AuthError, ConflictError, NotFoundError, RequestError
from prairie.store.audit import record
from prairie.store.home import Home
from prairie.store.schema import API_KEYS

PREFIX = "prairie-"


@dataclass(frozen=True)
class Key:
    """What is known of a key; the key itself is not."""

    id: str
    name: str
    created: float
    revoked: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class KeyStore:
    """The keys of a home."""

    def __init__(self, home: Home | Path | str | None = None) -> None:
        self.home = home if isinstance(home, Home) else Home(home)

    def create(self, name: str) -> str:
        """Makes a key and returns it; it cannot be read again. Raises ConflictError when the name has a valid key."""
        if not name.strip() or len(name) > 200:
            raise RequestError("a key needs a name", got=repr(name[:50]), wanted="1 to 200 characters")
        secret = PREFIX + secrets.token_urlsafe(32)
        row = {"id": f"key-{secrets.token_hex(6)}", "name": name, "hash": _hash(secret), "created": time.time()}

        def run(connection: Connection) -> None:
            if connection.execute(_valid(name)).first() is not None:
                raise ConflictError(
                    f"there is a valid key named `{name}`",
                    mend=f"choose another name, or revoke it with `prairie keys revoke {name}`",
                )
            connection.execute(API_KEYS.insert().values(**row))

        record(self.home.root, "prairie keys", "create key", name=name, id=row["id"])
        self.home.database.write(run)
        return secret

    def all(self) -> Sequence[Key]:
        """Every key that was ever made, oldest first."""
        columns = (API_KEYS.c.id, API_KEYS.c.name, API_KEYS.c.created, API_KEYS.c.revoked)
        with self.home.database.read() as connection:
            rows = connection.execute(select(*columns).order_by(API_KEYS.c.created, API_KEYS.c.id)).mappings()
            return [Key(**row) for row in rows]

    def revoke(self, name: str) -> None:
        """Ends a key by name or id. Raises NotFoundError when no valid key is called so."""

        def run(connection: Connection) -> None:
            row = connection.execute(_valid(name)).first()
            if row is None:
                raise NotFoundError(f"no valid key is called `{name}`", mend="see `prairie keys list`")
            record(self.home.root, "prairie keys", "revoke key", name=name, id=row.id)
            connection.execute(update(API_KEYS).where(API_KEYS.c.id == row.id).values(revoked=time.time()))

        self.home.database.write(run)

    def required(self) -> bool:
        """True once a key was made. Revoking the last one keeps the door shut: a leaked key must not open it to all."""
        with self.home.database.read() as connection:
            return bool(connection.execute(select(func.count()).select_from(API_KEYS)).scalar())

    def check(self, secret: str | None) -> str | None:
        """The name of a valid key; None when no key was ever made and none is needed. Raises AuthError otherwise."""
        if not self.required():
            return None
        # The hash of 256 random bits is compared inside the index: its timing says nothing about the key.
        query = select(API_KEYS.c.name).where(API_KEYS.c.hash == _hash(secret or ""), API_KEYS.c.revoked.is_(None))
        with self.home.database.read() as connection:
            name = connection.execute(query).scalar()
        if name is None:
            raise AuthError(
                "this server wants an API key", got="a wrong one" if secret else "none",
                mend="send `Authorization: Bearer KEY` with a key of `prairie keys create NAME`",
            )  # fmt: skip
        return name


def _valid(name: str) -> Any:
    return select(API_KEYS.c.id).where(
        (API_KEYS.c.name == name) | (API_KEYS.c.id == name), API_KEYS.c.revoked.is_(None)
    )


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
