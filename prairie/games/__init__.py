"""Go: rules, records, search, self-play. What is compiled needs numba, the extra `games`."""

from __future__ import annotations

import importlib.util

from prairie.errors import UsageError


def require() -> None:
    """Raises UsageError when numba is not installed."""
    if importlib.util.find_spec("numba") is None:
        raise UsageError(
            "Go needs numba, which is not installed", mend="pip install 'prairie[games]', or pip install numba"
        )
