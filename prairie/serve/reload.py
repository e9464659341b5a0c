"""The watcher: looks at the registry's generation fifty times a second and brings the server to what it says.

It also sees the first API key that is made, and lets the guard look at what is new (`guard`). Loading happens off the
hot path (`models`); an unreadable store is waited out, the versions in memory go on serving.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from prairie.errors import AuthError, PrairieError
from prairie.serve.guard import Guard
from prairie.serve.models import Models

if TYPE_CHECKING:
    from prairie.store.home import Home

log = logging.getLogger("prairie.serve")

POLL_S = 0.02
RETRY_S = 5.0
SWEEP_S = 30.0
GUARD_S = 2.0
BELIEVED_S = 1.0


class Keys:
    """The store's API keys as the gate asks for them: a good key is believed for a second, then looked up again."""

    def __init__(self, home: Home) -> None:
        self._store = home.keys
        self._good: dict[str, tuple[str, float]] = {}
        """Key -> (its name, until when that is believed)"""
        self.required = self._store.required()

    async def name_of(self, key: str) -> str | None:
        """Whose valid key it is; None for any other."""
        now = time.monotonic()
        name, until = self._good.get(key, ("", 0.0))
        if until > now:
            return name
        try:
            found = await asyncio.to_thread(self._store.check, key)
        except AuthError:
            found = None
        self._good = {known: kept for known, kept in self._good.items() if kept[1] > now and known != key}
        if found is not None:
            self._good[key] = (found, now + BELIEVED_S)
        return found

    def refresh(self) -> None:
        """Sees the first key that is made; from then on every request wants one."""
        if not self.required:
            self.required = self._store.required()


class Watcher:
    """A thread that polls until `stop`."""

    def __init__(
        self,
        home: Home,
        models: Models,
        keys: Keys,
        on_swap: Callable[[list[str]], None] | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.home, self.models, self.keys, self.on_swap, self.guard = home, models, keys, on_swap, guard
        self._stopped = threading.Event()
        self._seen: int | None = None
        self._retry_at = float("inf")
        self._sweep_at = time.monotonic() + SWEEP_S
        self._guard_at = time.monotonic() + GUARD_S
        self._thread = threading.Thread(target=self._run, name="prairie-watcher", daemon=True)

    def start(self) -> None:
        """From here on a change is seen; call it before the first load, so that none falls between."""
        self._seen = self.home.registry.generation()
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(POLL_S):
            try:
                self.look()
            except PrairieError as error:
                log.warning("the registry cannot be read, the present versions go on: %s", error)
            except Exception:
                log.exception("looking for new versions failed, the present ones go on")

    def look(self) -> None:
        """One look: new champions are loaded and switched to, and the keys are read again."""
        self.keys.refresh()
        if not self.models.ready:
            return
        now = time.monotonic()
        generation = self.home.registry.generation()
        if generation != self._seen or now >= self._retry_at:
            moved, failed = self.models.refresh()
            # Seen only when it is done: a refresh that failed is tried again.
            self._seen, self._retry_at = generation, now + RETRY_S if failed else float("inf")
            if moved and self.on_swap is not None:
                self.on_swap(moved)
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_S
            self.models.sweep()
        if self.guard is not None and now >= self._guard_at:
            self._guard_at = now + GUARD_S
            self.guard.look(self.models.lines())
