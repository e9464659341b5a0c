"""How many threads compute a step fastest, and whether weights that bfloat16 can hold are faster in it: measured on the
model itself, when its compiled form is ready.

A step of a small model is over before a second thread has woken; one of many tokens or of a large model wants every
core. What is best hangs on the model, the machine and what else runs there, so it is tried and not guessed. The answers
are the same with any number of threads, and of weights that lose nothing.
Not here: a step, and which weights lose nothing (`compiled`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
SLOWER = 1.05
"""What times of equal steps may differ by."""
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
    dtype: str = "float32"
    """In what the weights are kept."""
    why: str = ""
    compared: bool = False
    """Both forms were tried."""

    def threads(self, tokens: int) -> int:
        return self.few if tokens < BETWEEN else self.many

    def ms(self, tokens: int) -> float:
        """What a step takes as chosen."""
        return self.step_ms[tokens, self.threads(tokens)]

    def to_json(self) -> dict[str, Any]:
        tried = {f"{tokens} tokens, {threads} threads": round(ms, 3) for (tokens, threads), ms in self.step_ms.items()}
        chosen = {"threads_few_tokens": self.few, "threads_many_tokens": self.many, "step_ms": tried}
        return chosen | ({"dtype": self.dtype, "dtype_why": self.why} if self.why else {})

    def __str__(self) -> str:
        tried = ", ".join(
            f"{tokens} {'token' if tokens == 1 else 'tokens'} on {threads}: {ms:.3g} ms"
            for (tokens, threads), ms in self.step_ms.items()
        )
        kept = f"weights in {self.dtype}: {self.why}; " if self.why else ""
        return f"{kept}steps of fewer than {BETWEEN} tokens on {self.few} threads, larger ones on {self.many} ({tried})"


def probe(step_s: Callable[[int, int], float], numbers: Sequence[int]) -> Choice:
    """The best of some `numbers` of threads, falling. `step_s` computes a step of so many tokens with so many threads
    and says how many seconds it took."""
    found: dict[tuple[int, int], float] = {}
    best = {}
    for tokens in (1, MANY):
        best[tokens] = numbers[0]
        for threads in numbers:
            seconds = found[tokens, threads] = _typical(step_s, tokens, threads)
            if seconds <= GAIN * found[tokens, best[tokens]]:
                best[tokens] = threads
            if seconds > LONG_S:
                break
    return Choice(best[1], best[MANY], {at: 1000 * seconds for at, seconds in found.items()})


def of_dtype(narrow: Choice, wide: Choice) -> Choice:
    """The faster of two forms of the same numbers, bfloat16 and float32: bfloat16 only if single tokens gain from it
    and larger steps lose nothing."""
    gains = narrow.ms(1) <= GAIN * wide.ms(1) and narrow.ms(MANY) <= SLOWER * wide.ms(MANY)
    times = ", ".join(
        f"a step of {tokens} takes {narrow.ms(tokens):.3g} ms and {wide.ms(tokens):.3g} in float32"
        for tokens in (1, MANY)
    )
    if gains:
        why = f"it holds them to the last bit and is faster here, {times}"
        return replace(narrow, dtype="bfloat16", why=why, compared=True)
    why = f"bfloat16 holds them to the last bit too, and is not faster here, {times}"
    return replace(wide, why=why, compared=True)


def numbers_to_try(most: int) -> list[int]:
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
