"""Locks between processes: one file, held by `flock`, freed by the kernel when its holder dies, however it dies.

Not here: locks between threads of one process, and locks inside the database (SQLite has its own).
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prairie.errors import BusyError
from prairie.store.disk import disk_errors


def take(path: Path) -> int | None:
    """Locks `path` for this process and returns the descriptor that holds it, or None when another one holds it.

    Close the descriptor to unlock. Two descriptors of one process exclude each other as well.
    """
    with disk_errors(f"the lock {path} cannot be made"):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def guards(descriptor: int, path: Path) -> bool:
    """Whether what `take` locked is still the file at `path`: another one may have removed it, and a third made it
    anew, before it was locked."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def locked(path: Path, what: str, wait_s: float = 0.0) -> Iterator[None]:
    """Holds the lock file `path` while the block runs; `what` names the locked thing in the error.

    Raises BusyError, which names the holder's pid, when the lock is not free within `wait_s` seconds.
    """
    deadline = time.monotonic() + wait_s
    while (descriptor := take(path)) is None:
        if time.monotonic() >= deadline:
            raise BusyError(
                f"{what} is in use by process {_holder(path)}", mend="wait until it is done, or stop that process"
            )
        time.sleep(0.02)
    try:
        # The pid is only for the other one's error message: the lock itself is the kernel's.
        with disk_errors(f"the lock {path} cannot be written"):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def share(path: Path) -> tuple[int, bool]:
    """Marks this process as one of the users of something until the descriptor is closed; True when it is the only one.

    Two processes must not do so at the same moment: call it under `locked`.
    """
    with disk_errors(f"the lock {path} cannot be made"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
    except BlockingIOError:
        alone = False
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor, alone


def _holder(path: Path) -> str:
    """The pid that stands in a lock file, `unknown` if its holder has not written it yet."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip() or "unknown"
    except OSError:
        return "unknown"
