"""What administrators did: HOME/audit.jsonl, a line for each act, on the disk before the act is answered."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from prairie.store.disk import disk_errors

FILE = "audit.jsonl"


def record(root: Path, who: str, act: str, **facts: Any) -> None:
    """Appends one line: time, who (name of an API key, or the command), what, and on what.

    Raises StorageFullError or StoreError: what cannot be recorded is not done.
    """
    line = json.dumps({"time": round(time.time(), 3), "who": who, "act": act, **facts}, ensure_ascii=False) + "\n"
    with disk_errors("the act cannot be recorded"):
        descriptor = os.open(root / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, line.encode("utf-8", "replace"))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lines(root: Path) -> list[dict[str, Any]]:
    """All of them, oldest first; a line that a crash cut off is left out."""
    try:
        text = (root / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]
