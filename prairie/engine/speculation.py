"""Drafts of what an answer says next, looked up in its own prompt and text, so that a step may check several tokens.

Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding; vLLM's `ngram`): where the last
tokens stood in this sequence before, what followed them is drafted. The sampler draws a token at every drafted place as
it would have drawn it there anyway, greedily or from (seed, place); a draft is kept as far as it equals them, so
answers and their log-probabilities stay what they are.

A draft costs its tokens' time in the step whether it is right or not. Every looked-up token is held against the one
that comes, drafted or not, so what drafts are worth is known before any is made; how a step's time grows with its
tokens is measured. A token is drafted if it makes the batch faster by these two figures: an answer that copies nothing
costs its look-ups, and a large batch, which has no time left over, drafts nothing. Whether that came true is measured,
too: where steps with drafts bring fewer tokens a second than steps without, hardly any are made.
Not here: which tokens are computed (`scheduler`), what becomes of them (`engine`).
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prairie.engine.request import Sequence

LONGEST_MATCH, SHORTEST_MATCH = 4, 2
"""Last tokens that are looked up; the longest that is found counts."""
OLD = 8
"""From so many tokens in agreement on, a match is likely a copy and not a turn of phrase."""
MOST_DRAFTED = 15
NEWS = 0.125
"""What the newest look-up weighs in the share of those that were right."""
MEMORY = 0.97
"""What a step weighs after the next one in the line of times."""
UNMEASURED = 0.15
"""What a token more is taken to cost, in steps of one token, until steps of different sizes were seen."""
MARGIN = 1.2
"""How much better than nothing a draft must be: the figures are noisy."""
TRIAL = 32
"""Every so many steps one goes the other way, with drafts or without, so that both are known."""
RECENT = 4
"""Steps that the tokens a second of either way are the mean of, the newest weighing most."""


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

    def read(self, ids: Seq[int], prompt_tokens: int) -> None:
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

    def draft(self, ids: Seq[int], count: int) -> list[int]:
        """The next tokens as expected; where the text runs into its own end it goes round."""
        found = list(ids[self._place : self._place + count])
        period = len(ids) - self._place
        while len(found) < count:
            found.append(found[len(found) - period])
        return found

    def _hold_against(self, ids: Seq[int], place: int, counts: bool) -> None:
        """The token at `place` came: was it the expected one?"""
        if not self._place:
            return
        right = ids[self._place] == ids[place]
        if counts:
            old = self._agreed >= OLD
            self._shares[old] += NEWS * (right - self._shares[old])
        self._place, self._agreed = (self._place + 1, self._agreed + 1) if right else (0, 0)


class Pace:
    """The time of a step by its tokens: a line through those seen, of which later ones weigh more."""

    def __init__(self) -> None:
        self._weight = self._tokens = self._seconds = self._squares = self._products = 0.0

    def learn(self, tokens: int, seconds: float) -> None:
        self._weight = MEMORY * self._weight + 1
        share = 1 / self._weight
        off, late = tokens - self._tokens, seconds - self._seconds
        self._tokens += share * off
        self._seconds += share * late
        self._squares += share * (off * (tokens - self._tokens) - self._squares)
        self._products += share * (off * (seconds - self._seconds) - self._products)

    def line(self) -> tuple[float, float]:
        """Seconds of a step without tokens, and of each of its tokens; 0 before anything was seen."""
        expected = self._seconds * UNMEASURED / (1 - UNMEASURED + UNMEASURED * self._tokens)
        each = max(0.0, (self._products + expected) / (self._squares + 1))
        each = min(each, self._seconds / max(self._tokens, 1.0))
        return self._seconds - each * self._tokens, each


class Worth:
    """What steps with drafts brought, and those without: tokens a second for each of their sequences. Batches of unlike
    sizes are told apart, by powers of two."""

    def __init__(self) -> None:
        self._rates: dict[tuple[int, bool], tuple[float, int]] = {}
        self._steps: dict[int, int] = {}

    def learn(self, sequences: int, drafted: bool, tokens: int, seconds: float) -> None:
        rate, seen = self._rates.get((sequences.bit_length(), drafted), (0.0, 0))
        seen = min(seen + 1, RECENT)
        rate += (tokens / sequences / seconds - rate) / seen
        self._rates[sequences.bit_length(), drafted] = rate, seen

    def allows(self, sequences: int) -> bool:
        """Whether the next step of so many sequences may have drafts."""
        size = sequences.bit_length()
        self._steps[size] = self._steps.get(size, 0) + 1
        with_drafts, without = (self._rates.get((size, drafted)) for drafted in (True, False))
        pays = with_drafts is None or (without is not None and with_drafts[0] >= without[0])
        return pays != (self._steps[size] % TRIAL == 0)


class Speculation:
    """Decides what is drafted in a step."""

    def __init__(self) -> None:
        self.pace, self.worth = Pace(), Worth()
        self.drafted_tokens = 0
        self.accepted_tokens = 0

    @staticmethod
    def may(sequence: Sequence) -> bool:
        """Whether each of its tokens can be drawn without the one before: neither penalties nor a form."""
        params = sequence.request.params
        return sequence.matcher is None and not params.presence_penalty and not params.frequency_penalty

    def draft(self, sequences: Iterable[Sequence], room: int) -> None:
        """Sets `draft` of sequences that generate; in all at most `room` tokens."""
        sequences = list(sequences)
        base, each = self.pace.line()
        tokens = float(len(sequences))
        seconds = base + each * tokens
        allowed = self.worth.allows(len(sequences))
        for sequence in sequences:
            lookup = sequence.lookup
            if lookup is None:
                continue
            lookup.read(sequence.ids, sequence.prompt_tokens)
            most = min(MOST_DRAFTED if allowed else 0, room, sequence.max_length - len(sequence.ids) - 1)
            gain, count, share = 1.0, 0, lookup.share
            while count < most:
                gain *= share
                if gain * seconds <= MARGIN * each * tokens:  # no more tokens a second with it than without
                    break
                tokens, seconds, count = tokens + gain, seconds + each, count + 1
            sequence.draft = lookup.draft(sequence.ids, count) if count else []
            room -= count
