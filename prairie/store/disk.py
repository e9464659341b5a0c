"""The disk as it fails: OSError becomes a sentence, and what is written is on the platter before it is believed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prairie.errors import StorageFullError, StoreError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def disk_errors(what: str, only_full: bool = False) -> Iterator[None]:
    """Turns an OSError of the block into StorageFullError (full, read-only) or StoreError; `what` begins the sentence.

    `only_full`: any OSError but that of a full disk is the block's own matter and passes.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageFullError(
                f"{what}: the disk is full", mend="free some space and run the command again"
            ) from error
        if only_full:
            raise
        if error.errno in CLOSED:
            where = f" ({error.filename})" if error.filename else ""
            raise StorageFullError(
                f"{what}: writing is not allowed{where}", mend="give --home a folder that this user may write"
            ) from error
        raise StoreError(what, got=str(error)) from error


def sync_file(path: Path) -> None:
    """The content of a file, or the names in a folder, on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Every file and every folder below and including `folder`, inner ones first. Raises OSError."""
    for path, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_file(Path(path, name))
        sync_file(Path(path))
