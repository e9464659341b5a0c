"""Go: rules, records, search, self-play. What is compiled needs numba."""

from __future__ import annotations

import importlib.util
import os

from prairie.errors import UsageError

os.environ.setdefault("NUMBA_DISABLE_ERROR_MESSAGE_HIGHLIGHTING", "1")  # as in `ops`, which this room does not know


def require() -> None:
    """Raises UsageError when numba is not installed."""
    if importlib.util.find_spec("numba") is None:
        raise UsageError(
            "Go needs numba, which is not installed", mend="pip install 'prairie[games]', or pip install numba"
        )
