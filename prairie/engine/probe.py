"""How many threads compute a step fastest: measured on the model itself, when its compiled form is ready.

A step of a small model is over before a second thread has woken; one of many tokens or of a large model wants every
core. What is best hangs on the model, the machine and what else runs there, so it is tried and not guessed. The answers
are the same with any number of threads.
Not here: a step (`compiled`), the numbers that weights are kept in, which may change answers and are never chosen here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MANY = 16
"""Tokens of the larger of the two steps that are tried."""
BETWEEN = 4
"""Tokens from which on a step counts as a large one."""
STEPS = 5
"""How often a step is timed, at least."""
EACH_S = 0.03
"""How long a number of threads is tried, if a step does not take longer."""
LONG_S = 0.05
"""A step that takes longer with all threads wants all of them, and is not tried with fewer."""
GAIN = 0.9
"""Fewer threads are taken for a step that then takes at most this share of the time: ties go to more of them, as cores
that are busy now may be idle later."""


@dataclass(frozen=True)
class Choice:
    """Threads of a step of few tokens and of one of many, and what steps took, in ms, by (tokens, threads); nothing
    where the number was given."""

    few: int
    many: int
    step_ms: dict[tuple[int, int], float] = field(default_factory=dict)

    def threads(self, tokens: int) -> int:
        return self.few if tokens < BETWEEN else self.many

    def to_json(self) -> dict[str, Any]:
        tried = {f"{tokens} tokens, {threads} threads": round(ms, 3) for (tokens, threads), ms in self.step_ms.items()}
        return {"threads_few_tokens": self.few, "threads_many_tokens": self.many, "step_ms": tried}

    def __str__(self) -> str:
        tried = ", ".join(
            f"{tokens} {'token' if tokens == 1 else 'tokens'} on {threads}: {ms:.3g} ms"
            for (tokens, threads), ms in self.step_ms.items()
        )
        return f"steps of fewer than {BETWEEN} tokens on {self.few} threads, larger ones on {self.many} ({tried})"


def probe(step_s: Callable[[int, int], float], most: int) -> Choice:
    """The best numbers of threads, at most `most`. `step_s` computes a step of so many tokens with so many threads and
    says how many seconds it took."""
    if most == 1:
        return Choice(1, 1)
    found: dict[tuple[int, int], float] = {}
    best = {}
    for tokens in (1, MANY):
        best[tokens] = most
        for threads in _numbers(most):
            seconds = found[tokens, threads] = _typical(step_s, tokens, threads)
            if seconds <= GAIN * found[tokens, best[tokens]]:
                best[tokens] = threads
            if seconds > LONG_S:
                break
    return Choice(best[1], best[MANY], {at: 1000 * seconds for at, seconds in found.items()})


def _numbers(most: int) -> list[int]:
    """All threads first, then powers of two, falling."""
    return [most, *(1 << power for power in range(most.bit_length(), -1, -1) if 1 << power < most)]


def _typical(step_s: Callable[[int, int], float], tokens: int, threads: int) -> float:
    """The median of some steps, without the first."""
    first = step_s(tokens, threads)
    if first > LONG_S:
        return first
    seconds: list[float] = []
    until = time.perf_counter() + EACH_S
    while len(seconds) < STEPS or time.perf_counter() < until:
        seconds.append(step_s(tokens, threads))
    return statistics.median(seconds)
