"""What followed the last tokens of a text when they stood in it before: where drafts come from.

Not here: whether drafts pay (`speculation`).
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_MATCH, SHORTEST_MATCH = 4, 2
"""Last tokens that are looked up; the longest that is found counts."""
OLD = 8
"""From so many tokens in agreement on, a match is likely a copy and not a turn of phrase."""
NEWS = 0.125
"""What the newest look-up weighs in the share of those that were right."""


class Lookup:
    """What followed the last tokens of a sequence when they stood in it before, and how often that came again."""

    __slots__ = ("_agreed", "_follows", "_known", "_place", "_shares")

    def __init__(self) -> None:
        self._follows: dict[tuple[int, ...], int] = {}
        """Some tokens -> the place behind the last time that they stood here."""
        self._known = 0
        self._place = 0
        """Of the token that is expected next; 0: none is."""
        self._agreed = 0
        """How many tokens before it are the last ones."""
        self._shares = [0.0, 0.5]
        """Of tokens that came as expected, behind matches that are short and long."""

    @property
    def share(self) -> float:
        """How likely the next token is the expected one; 0 where none is expected."""
        return self._shares[self._agreed >= OLD] if self._place else 0.0

    def read(self, ids: Sequence[int], prompt_tokens: int) -> None:
        """Takes note of the tokens that were not here last time, and looks the last ones up."""
        if not self._known:
            self._known = max(prompt_tokens - 1, 0)
            for size in range(SHORTEST_MATCH, LONGEST_MATCH + 1):
                pieces = zip(*(ids[start : self._known] for start in range(size)), strict=False)
                self._follows.update(zip(pieces, range(size, self._known + 1), strict=False))
        for place in range(self._known, len(ids)):
            self._hold_against(ids, place, counts=place >= prompt_tokens)
            for size in range(min(LONGEST_MATCH, place + 1), SHORTEST_MATCH - 1, -1):
                last = tuple(ids[place + 1 - size : place + 1])
                if not self._place:
                    self._place = self._follows.get(last, 0)
                    self._agreed = size
                self._follows[last] = place + 1
        self._known = len(ids)

    def draft(self, ids: Sequence[int], count: int) -> list[int]:
        """The next tokens as expected; where the text runs into its own end it goes round."""
        found = list(ids[self._place : self._place + count])
        period = len(ids) - self._place
        while len(found) < count:
            found.append(found[len(found) - period])
        return found

    def _hold_against(self, ids: Sequence[int], place: int, counts: bool) -> None:
        """The token at `place` came: was it the expected one?"""
        if not self._place:
            return
        right = ids[self._place] == ids[place]
        if counts:
            old = self._agreed >= OLD
            self._shares[old] += NEWS * (right - self._shares[old])
        self._place, self._agreed = (self._place + 1, self._agreed + 1) if right else (0, 0)
