"""Which sequences compute which tokens in the next step.

Continuous batching: sequences join and leave between any two steps. Those that generate go first, one token each;
what is left of the step's tokens goes to prompts, in chunks. When blocks run out, the latest sequence gives its blocks
back and is computed again later (recompute, arXiv 2309.06180 section 4.5); its answer does not change. A sequence that
fits into the pool alone is never refused: the eldest can always take every block.
Not here: blocks (`kv_cache`), arithmetic (`runner`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from prairie.engine.fair_queue import FairQueue
from prairie.engine.kv_cache import KVCache
from prairie.engine.request import Sequence

if TYPE_CHECKING:
    from prairie.engine.speculation import Speculation
    from prairie.models.lora import LoRA


@dataclass(slots=True)
class Step:
    """Work of one forward pass: sequence s computes its tokens starts[s] .. starts[s] + counts[s], the last of them its
    draft."""

    sequences: list[Sequence]
    rows: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    adapters: list[tuple[LoRA, slice]]
    """Each adapter with its tokens, which lie together."""
    seated: list[Sequence]
    """Those that joined the batch."""


class Scheduler:
    """Owns the queue of waiting sequences and the batch of running ones."""

    def __init__(
        self, cache: KVCache, max_batch: int, step_tokens: int, speculation: Speculation | None = None
    ) -> None:
        self.cache, self.speculation = cache, speculation
        self.step_tokens = max(step_tokens, max_batch)
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._free_rows = list(range(max_batch))
        """A heap: low rows first, so that those in use lie close together."""

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is done or no longer wanted: its blocks and its row are free at once."""
        if sequence.row >= 0:
            self._unseat(sequence)
        else:
            self.waiting.remove(sequence)

    def recompute(self, sequence: Sequence) -> None:
        """Nothing that the cache holds of this running sequence is true any more: it begins again at the next step."""
        self._unseat(sequence)
        sequence.block_hashes.clear()
        self.waiting.appendleft(sequence)

    def schedule(self) -> Step | None:
        """The next step; None if nothing is left to do."""
        generating = [s for s in self.running if len(s.ids) - s.computed == 1]
        prompts = [s for s in self.running if len(s.ids) - s.computed > 1]
        planned: list[Sequence] = []
        budget, preempted = self.step_tokens, self.preemptions
        if self.speculation is not None:
            self.speculation.draft(generating, budget - len(generating))
            self._trim_drafts(generating)
        for sequence in [*generating, *prompts]:
            wanted = min(len(sequence.ids) + len(sequence.draft) - sequence.computed, budget)
            if sequence.row >= 0 and wanted and self._make_room(sequence, wanted):
                self._plan(sequence, wanted)
                planned.append(sequence)
                budget -= wanted
        seated = self._admit(budget) if self.preemptions == preempted else []
        planned += seated
        return self._step(planned, seated) if planned else None

    def keep_drafted(self, sequence: Sequence) -> None:
        """The next token of its draft was drawn, and stands behind its ids: it is computed already."""
        self.cache.publish(sequence, sequence.computed, sequence.computed + 1)
        sequence.computed += 1

    def start_over(self) -> None:
        """After a step that failed: nothing it should have stored can be trusted, all sequences begin again."""
        for sequence in sorted(self.running, key=lambda s: -s.arrival):
            self._preempt(sequence)
        self.cache.pool.forget_all()

    def _admit(self, budget: int) -> list[Sequence]:
        """Seats waiting sequences, as their owners are due, while there are rows, blocks and tokens left."""
        seated: list[Sequence] = []
        pool = self.cache.pool
        while self.waiting and self._free_rows and budget > 0:
            sequence = self.waiting[0]
            self.cache.match_prefix(sequence)
            # One block for each that runs, lest the newcomer is thrown out again by the next step.
            needed = self.cache.lacks(sequence, len(sequence.ids)) + len(self.running)
            if self.running and pool.available < needed:
                self.cache.free(sequence)
                break
            self.waiting.popleft()
            self.running.append(sequence)
            seated.append(sequence)
            if sequence.cached_tokens < 0:
                sequence.cached_tokens, sequence.seated_at = sequence.computed, time.perf_counter()
            self.cache.seat(sequence, heappop(self._free_rows))
            wanted = min(len(sequence.ids) - sequence.computed, budget)
            self._plan(sequence, wanted)
            budget -= wanted
        return seated

    def _trim_drafts(self, generating: list[Sequence]) -> None:
        """Drafts take blocks that are left over, none that a running sequence may need in this step."""
        spare = self.cache.pool.available - len(self.running)
        for sequence in generating:
            if sequence.draft:
                own = max(0, self.cache.lacks(sequence, len(sequence.ids) + len(sequence.draft)))
                if own > spare:
                    sequence.draft = []
                else:
                    spare -= own

    def _make_room(self, sequence: Sequence, wanted: int) -> bool:
        """Frees blocks for `wanted` more tokens, the latest sequences first; False if this one had to go itself."""
        missing = self.cache.lacks(sequence, sequence.computed + wanted)
        while self.cache.pool.available < missing:
            victim = max((s for s in self.running if s.scheduled == 0), key=lambda s: s.arrival)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _plan(self, sequence: Sequence, wanted: int) -> None:
        after = sequence.computed + wanted
        sequence.scheduled = wanted
        self.cache.grow(sequence, after)
        self.cache.publish(sequence, sequence.computed, min(after, len(sequence.ids)))  # a draft may be wrong

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._unseat(sequence)
        self.waiting.appendleft(sequence)

    def _unseat(self, sequence: Sequence) -> None:
        self.cache.free(sequence)
        self.running.remove(sequence)
        heappush(self._free_rows, sequence.row)
        sequence.row = -1
        sequence.scheduled = 0
        sequence.draft = []

    @staticmethod
    def _step(planned: list[Sequence], seated: list[Sequence]) -> Step:
        adapters: list[tuple[LoRA, slice]] = []
        planned.sort(key=lambda s: (s.request.adapter or "", s.scheduled > 1, s.row))
        if any(s.lora is not None for s in planned):
            start = 0
            for _, group in groupby(planned, key=lambda s: s.request.adapter):
                members = list(group)
                end = start + sum(s.scheduled for s in members)
                if members[0].lora is not None:
                    adapters.append((members[0].lora, slice(start, end)))
                start = end
        return Step(
            sequences=planned,
            rows=np.array([s.row for s in planned], dtype=np.int64),
            starts=np.array([s.computed for s in planned], dtype=np.int64),
            counts=np.array([s.scheduled for s in planned], dtype=np.int64),
            adapters=adapters,
            seated=seated,
        )
