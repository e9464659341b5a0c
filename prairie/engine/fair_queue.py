"""The queue of waiting sequences, fair between those who ask.

Deficit round robin (Shreedhar and Varghese, SIGCOMM 1995) over owners, by tokens: each round every owner may take as
many tokens as the others, so that one with fifty requests does not make another with one wait for all of them. What was
thrown out of the batch for want of blocks goes first: it was let in before. One owner alone is a plain queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prairie.engine.request import Sequence

QUANTUM = 64
"""Tokens that each owner gains in a round."""


class FairQueue:
    """`queue[0]` is who is next until it is taken by `popleft`."""

    def __init__(self) -> None:
        self._first: deque[Sequence] = deque()
        self._of: dict[str, deque[Sequence]] = {}
        self._round: deque[str] = deque()
        """Owners with something that waits, the one whose turn it is first."""
        self._credit: dict[str, int] = {}

    def append(self, sequence: Sequence) -> None:
        owner = sequence.request.owner
        if owner not in self._of:
            self._of[owner] = deque()
            self._credit[owner] = 0
            self._round.append(owner)
        self._of[owner].append(sequence)

    def appendleft(self, sequence: Sequence) -> None:
        """Before all others."""
        self._first.appendleft(sequence)

    def popleft(self) -> Sequence:
        sequence = self[0]
        if self._first:
            return self._first.popleft()
        owner = self._round[0]
        self._credit[owner] -= cost(sequence)
        self._of[owner].popleft()
        self._leave_if_empty(owner)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Raises ValueError if it does not wait."""
        if sequence in self._first:
            self._first.remove(sequence)
            return
        owner = sequence.request.owner
        if owner not in self._of:
            raise ValueError("this sequence does not wait")
        self._of[owner].remove(sequence)
        self._leave_if_empty(owner)

    def __getitem__(self, index: int) -> Sequence:
        """Only the next one can be looked at: index 0. Raises IndexError if nothing waits."""
        if index != 0 or not self:
            raise IndexError("only the next sequence can be looked at")
        if self._first:
            return self._first[0]
        while True:
            owner = self._round[0]
            sequence = self._of[owner][0]
            if self._credit[owner] >= cost(sequence):
                return sequence
            self._credit[owner] += QUANTUM
            self._round.rotate(-1)

    def __len__(self) -> int:
        return len(self._first) + sum(map(len, self._of.values()))

    def __bool__(self) -> bool:
        return bool(self._first or self._of)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._first
        for sequences in self._of.values():
            yield from sequences

    def _leave_if_empty(self, owner: str) -> None:
        if not self._of[owner]:
            # Credit is not saved up: who comes back begins at nothing.
            del self._of[owner], self._credit[owner]
            self._round.remove(owner)


def cost(sequence: Sequence) -> int:
    """Tokens that it may take at most."""
    return sequence.max_length
