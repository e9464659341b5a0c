"""How much one API key may ask for: requests and tokens a minute, as two buckets that fill up again.

A request costs one of the first when it comes, and its tokens of the second when they are known: the prompt's at the
start, the answer's as it ends. A bucket that is overdrawn is waited for; the wait stands in Retry-After.
Not here: how much the whole server takes (`choices.Desk`), who goes first (`engine.fair_queue`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from prairie.errors import OverloadedError

KEPT = 10_000
"""Names whose buckets are remembered; full ones are forgotten first."""


class RateLimited(OverloadedError):
    """This key has asked for more than it may in a minute."""

    code = "rate_limit_exceeded"

    def __init__(self, what: str, limit: int, wait_s: float) -> None:
        self.retry_after_s = max(1, math.ceil(wait_s))
        super().__init__(
            f"this API key has used up its {what} a minute", wanted=f"at most {limit}",
            mend=f"try again in {self.retry_after_s} s",
        )  # fmt: skip


@dataclass
class Bucket:
    """Holds a minute's worth, fills evenly."""

    limit: int
    level: float
    at: float

    def fill(self, now: float) -> None:
        self.level = min(self.limit, self.level + (now - self.at) * self.limit / 60)
        self.at = now


class Limits:
    """The buckets of all keys. For the event loop alone."""

    def __init__(
        self, requests: int | None = None, tokens: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`requests`, `tokens`: a minute, for each key; None does not limit."""
        self.requests, self.tokens = requests, tokens
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def admit(self, name: str) -> None:
        """One request of this key. Raises RateLimited; a request that is refused costs nothing."""
        asked, said = self._bucket(name, "requests"), self._bucket(name, "tokens")
        if asked is not None and asked.level < 1:
            raise RateLimited("requests", asked.limit, (1 - asked.level) * 60 / asked.limit)
        if said is not None and said.level <= 0:
            raise RateLimited("tokens", said.limit, (1 - said.level) * 60 / said.limit)
        if asked is not None:
            asked.level -= 1

    def charge(self, name: str, tokens: int) -> None:
        """Tokens that a request of this key has cost."""
        bucket = self._bucket(name, "tokens")
        if bucket is not None:
            bucket.level -= tokens

    def _bucket(self, name: str, kind: str) -> Bucket | None:
        limit = self.requests if kind == "requests" else self.tokens
        if limit is None:
            return None
        now = self._clock()
        bucket = self._buckets.get((name, kind))
        if bucket is None:
            if len(self._buckets) >= KEPT:
                self._forget_full(now)
            bucket = self._buckets[name, kind] = Bucket(limit, limit, now)
        bucket.fill(now)
        return bucket

    def _forget_full(self, now: float) -> None:
        for bucket in self._buckets.values():
            bucket.fill(now)
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if bucket.level < bucket.limit}
