"""One folder that holds all that Prairie remembers: the database, the artifacts, work in progress.

HOME/prairie.db, HOME/artifacts/<id>/, HOME/work/<id>/ (checkpoints of unfinished work), HOME/references/ (what DPO
computed of its reference models), HOME/tmp/, HOME/locks/.
Not here: what stands in them (`database`, `artifacts`, `registry`, `feedback`, `keys`).
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from prairie.errors import RequestError
from prairie.store.disk import disk_errors
from prairie.store.locks import locked

if TYPE_CHECKING:
    from prairie.store.artifacts import ArtifactStore
    from prairie.store.database import Database
    from prairie.store.feedback import FeedbackStore
    from prairie.store.keys import KeyStore
    from prairie.store.registry import Registry


def default_home() -> Path:
    """PRAIRIE_HOME, else ~/.prairie."""
    named = os.environ.get("PRAIRIE_HOME")
    return Path(named).expanduser() if named else Path.home() / ".prairie"


class Home:
    """A store's folder. Made when missing, readable by its owner only (it holds people's conversations).

    Raises StoreError or StorageFullError when the folder cannot be made.
    """

    def __init__(self, root: Path | str | None = None, url: str | None = None) -> None:
        """`url`: an SQLAlchemy URL in place of HOME/prairie.db; else $PRAIRIE_DATABASE names one, if it is set."""
        self.root = Path(root).expanduser().absolute() if root is not None else default_home().absolute()
        self.url = url or os.environ.get("PRAIRIE_DATABASE") or None
        self._opening = threading.Lock()
        self._database: Database | None = None
        with disk_errors(f"the home {self.root} cannot be made"):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in ("artifacts", "work", "tmp", "locks"):
                (self.root / name).mkdir(exist_ok=True)

    @property
    def database(self) -> Database:
        """Opened at first use."""
        with self._opening:
            if self._database is None:
                from prairie.store.database import Database

                self._database = Database(self.url or self.root / "prairie.db")
            return self._database

    @cached_property
    def artifacts(self) -> ArtifactStore:
        from prairie.store.artifacts import ArtifactStore

        return ArtifactStore(self)

    @cached_property
    def registry(self) -> Registry:
        from prairie.store.registry import Registry

        return Registry(self)

    @cached_property
    def feedback(self) -> FeedbackStore:
        from prairie.store.feedback import FeedbackStore

        return FeedbackStore(self)

    @cached_property
    def keys(self) -> KeyStore:
        from prairie.store.keys import KeyStore

        return KeyStore(self)

    def work(self, id: str) -> Path:
        """The folder where unfinished work keeps its checkpoints; made when missing, kept after a crash."""
        folder = self.root / "work" / _file_name(id)
        with disk_errors(f"the work folder {folder} cannot be made"):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def references(self) -> Path:
        """Where log-probabilities of reference models are kept; may be deleted at any time."""
        return self.root / "references"

    @contextmanager
    def working(self, id: str) -> Iterator[Path]:
        """The work folder of `id` for one process and one thread at a time, since equal work has equal ids; removed
        when the block ends well, kept after a crash. Raises BusyError naming the holder's pid."""
        with self.lock(f"work-{id}"):
            yield self.work(id)
            self.clear_work(id)

    def clear_work(self, id: str) -> None:
        """Removes a work folder once its artifact stands."""
        with disk_errors(f"the work folder of {id} cannot be removed"):
            shutil.rmtree(self.root / "work" / _file_name(id), ignore_errors=True)

    def lock(self, name: str, wait_s: float = 0.0) -> AbstractContextManager[None]:
        """One process at a time holds `name`. Raises BusyError naming the holder's pid; the dead hold nothing."""
        return locked(self.root / "locks" / f"{_file_name(name)}.lock", f"`{name}` of {self.root}", wait_s)

    def close(self) -> None:
        """Closes the database if it was opened; it opens again when it is used again."""
        with self._opening:
            if self._database is not None:
                self._database.close()
                self._database = None

    def __enter__(self) -> Home:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _file_name(name: str) -> str:
    """A name as a file name; a colon (of `line:vertical`) is written as `~`."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:@-]*", name):
        raise RequestError("a name cannot be used as a file name", got=repr(name), wanted="letters, digits, . _ : @ -")
    return name.replace(":", "~")
