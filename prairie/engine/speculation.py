"""Drafts of what an answer says next, looked up in its own prompt and text, so that a step may check several tokens.

Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding; vLLM's `ngram`): where the last
tokens stood in this sequence before, what followed them is drafted. The sampler draws a token at every drafted place as
it would have drawn it there anyway, greedily or from (seed, place); a draft is kept as far as it equals them, so
answers and their log-probabilities stay what they are.

A draft costs its tokens' time in the step whether it is right or not. Every looked-up token is held against the one
that comes, drafted or not, so what drafts are worth is known before any is made; what steps take is measured, of those
with drafts and of those without apart, since a step with drafts may go another way (`paged_attend`) and cost more from
its first draft on. A token is drafted if it makes the batch faster by these figures, and none is where all of them
together do not: an answer that copies nothing costs its look-ups, and a large batch, which has no time left over,
drafts nothing.
Not here: what is drafted (`lookup`), which tokens are computed (`scheduler`), what becomes of them (`engine`).
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prairie.engine.request import Sequence

MOST_DRAFTED = 15
MEMORY = 0.95
"""What is known of steps loses so much of its weight with each step that is computed, of either way."""
UNMEASURED = 0.15
"""What a token more is taken to cost, in steps of one token, until steps of different sizes were seen."""
MARGIN = 1.2
"""How much better than nothing a token more must be: the figures are noisy."""
WORTH = 1.03
"""How much faster a step with drafts must be, in tokens a second."""
KNOWN = 4
"""Steps after which the time of steps of a way is believed; so many have drafts to begin with."""
SLOWEST = 3.0
"""What a step takes in times of what was expected counts no more than this: something else held it up."""
TRIAL = 32
"""Steps in a row, at most, that all have drafts; and how many go by before drafts that do not pay are tried again,
then twice as many, and again."""
LONGEST_PATIENCE = 1024
LEAST_TRIED = 4
"""A trial drafts no more tokens than there are sequences, or this many: a token may turn out to be dear."""


class Pace:
    """The time of steps of one way by their tokens: a line through those seen, of which later ones weigh more."""

    def __init__(self) -> None:
        self._weight = self._tokens = self._seconds = self._squares = self._products = 0.0
        self.seen = 0
        self.since = 0
        """Steps that went the other way since the last of these."""
        self.patience = TRIAL
        """How many of them go by until it is tried again."""

    def learn(self, tokens: int, seconds: float) -> None:
        if self.seen >= KNOWN:
            base, each = self.line()
            seconds = min(seconds, SLOWEST * (base + each * tokens))
        self._weight = MEMORY ** (1 + self.since) * self._weight + 1
        share = 1 / self._weight
        off, late = tokens - self._tokens, seconds - self._seconds
        self._tokens += share * off
        self._seconds += share * late
        self._squares += share * (off * (tokens - self._tokens) - self._squares)
        self._products += share * (off * (seconds - self._seconds) - self._products)
        self.seen, self.since = self.seen + 1, 0

    def line(self) -> tuple[float, float]:
        """Seconds of a step without tokens, and of each of its tokens; 0 before anything was seen."""
        expected = self._seconds * UNMEASURED / (1 - UNMEASURED + UNMEASURED * self._tokens)
        each = max(0.0, (self._products + expected) / (self._squares + 1))
        each = min(each, self._seconds / max(self._tokens, 1.0))
        return self._seconds - each * self._tokens, each


class Speculation:
    """Decides what is drafted in a step."""

    def __init__(self) -> None:
        self._paces: dict[int, tuple[Pace, Pace]] = {}
        """Of steps without drafts and of those with some; of batches of unlike sizes, by powers of two."""
        self.drafted_tokens = 0
        self.accepted_tokens = 0

    def learn(self, sequences: int, tokens: int, seconds: float) -> None:
        """A step of so many sequences that generate computed so many tokens, drafts included."""
        plain, drafting = self._ways(sequences)
        if tokens == sequences:
            plain.learn(tokens, seconds)
            drafting.since += 1
        else:
            drafting.learn(tokens, seconds)
            plain.since += 1

    def _ways(self, sequences: int) -> tuple[Pace, Pace]:
        return self._paces.setdefault(sequences.bit_length(), (Pace(), Pace()))

    @staticmethod
    def may(sequence: Sequence) -> bool:
        """Whether each of its tokens can be drawn without the one before: neither penalties nor a form."""
        params = sequence.request.params
        return sequence.matcher is None and not params.presence_penalty and not params.frequency_penalty

    def draft(self, sequences: Iterable[Sequence], room: int) -> None:
        """Sets `draft` of sequences that generate; in all at most `room` tokens."""
        sequences = list(sequences)
        for sequence in sequences:
            sequence.draft = []
            if sequence.lookup is not None:
                sequence.lookup.read(sequence.ids, sequence.prompt_tokens)
        plain, drafting = self._ways(len(sequences))
        if not plain.seen or plain.since >= TRIAL:
            return  # such a step is due
        tried = drafting.seen < KNOWN or drafting.since >= drafting.patience
        if tried:
            room = min(room, max(len(sequences), LEAST_TRIED))
        counts, tokens, seconds = _worth_drafting(sequences, room, plain if tried else drafting)
        if not any(counts):
            return
        base, each = plain.line()
        if not tried:
            if tokens * (base + each * len(sequences)) <= WORTH * len(sequences) * seconds:
                return
            drafting.patience = TRIAL
        elif drafting.seen >= KNOWN:
            drafting.patience = min(2 * drafting.patience, LONGEST_PATIENCE)
        for sequence, count in zip(sequences, counts, strict=True):
            if count and sequence.lookup is not None:
                sequence.draft = sequence.lookup.draft(sequence.ids, count)


def _worth_drafting(sequences: Seq[Sequence], room: int, pace: Pace) -> tuple[list[int], float, float]:
    """How many tokens to draft of each sequence, how many tokens a step with them is likely to bring, and the seconds
    that it takes at this pace."""
    base, each = pace.line()
    tokens, counts = float(len(sequences)), []
    seconds = base + each * tokens
    for sequence in sequences:
        most = min(MOST_DRAFTED, room, sequence.max_length - len(sequence.ids) - 1)
        gain, count, share = 1.0, 0, sequence.lookup.share if sequence.lookup is not None else 0.0
        while count < most:
            gain *= share
            if gain * seconds <= MARGIN * each * tokens:  # no more tokens a second with it than without
                break
            tokens, seconds, count = tokens + gain, seconds + each, count + 1
        counts.append(count)
        room -= count
    return counts, tokens, seconds
