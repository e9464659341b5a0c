"""One forward pass: the tokens of many sequences, prompts and single tokens mixed, through the model and the sampler.

A step goes through the compiled form of the model where there is one that covers it, else through torch; both compute
the same from the same cache, so any step may go either way.
Not here: which tokens (`scheduler`), what becomes of the sampled ones (`engine`).
"""

from __future__ import annotations

import numpy as np
import torch

from prairie.engine.compiled import CompiledDecoder
from prairie.engine.kv_cache import KVCache
from prairie.engine.paged_attend import PagedAttend
from prairie.engine.sampler import Sampled, Sampler
from prairie.engine.scheduler import Step
from prairie.models.lora import AdapterRows
from prairie.models.transformer import Transformer


class Runner:
    """Model, cache and sampler of one device."""

    def __init__(
        self, model: Transformer, cache: KVCache, sampler: Sampler, compiled: CompiledDecoder | None = None
    ) -> None:
        self.model, self.cache, self.sampler, self.compiled = model, cache, sampler, compiled

    def run(self, step: Step) -> tuple[list[int], Sampled | None]:
        """Computes a step. Returns which of its sequences got a token, and these tokens. A sequence with a draft gets
        one behind each token of it, too, as if what stands before were right."""
        for sequence in step.seated:
            self.sampler.seat(sequence)
        tokens: list[int] = []
        ready: list[int] = []
        places: list[int] = []
        for number, sequence in enumerate(step.sequences):
            end = sequence.computed + sequence.scheduled
            if sequence.scheduled == 1:
                tokens.append(sequence.ids[sequence.computed])
            else:
                tokens += sequence.ids[sequence.computed : end]
                tokens += sequence.draft
            if end >= len(sequence.ids):
                ready += [number] * (1 + len(sequence.draft))
                places += range(len(tokens) - 1 - len(sequence.draft), len(tokens))
        if self.compiled is not None and self.compiled.takes(step):
            return ready, self._run_compiled(self.compiled, step, tokens, ready, places)
        return ready, self._run_torch(step, tokens, ready, places)

    def _run_compiled(
        self, compiled: CompiledDecoder, step: Step, tokens: list[int], ready: list[int], places: list[int]
    ) -> Sampled | None:
        found = compiled.run(step, tokens, places, self.sampler.vocab_size)
        if found is None:
            return None
        rows = step.rows if len(step.rows) == len(ready) == len(tokens) else step.rows[ready]
        if self.sampler.only_best(rows):
            return self.sampler.take_best(found.best_R, found.logprobs_R, found.norms_R)
        return self.sampler(torch.from_numpy(found.logits_RV), rows, _counters(step, ready))

    @torch.inference_mode()
    def _run_torch(self, step: Step, tokens: list[int], ready: list[int], places: list[int]) -> Sampled | None:
        lengths = np.array([len(sequence.ids) for sequence in step.sequences], dtype=np.int64)
        attend = PagedAttend(self.cache, step.rows, step.starts, step.counts, lengths)
        tokens_N = torch.tensor(tokens, device=self.cache.device)
        adapters = [AdapterRows(lora, rows if rows != slice(0, len(tokens)) else None) for lora, rows in step.adapters]
        hidden_ND = self.model(tokens_N, attend, adapters)
        if not ready:
            return None
        if len(ready) < len(tokens):
            hidden_ND = hidden_ND.index_select(0, torch.tensor(places, device=self.cache.device))
            adapters = [AdapterRows(lora, _among(places, rows)) for lora, rows in step.adapters]
        logits_BV = self.model.logits(hidden_ND, adapters).float()
        return self.sampler(logits_BV, step.rows[ready], _counters(step, ready))


def _counters(step: Step, ready: list[int]) -> np.ndarray:
    """How many tokens each of these sequences has generated before, those of its draft that stand before included."""
    counters: list[int] = []
    before = -1
    for number in ready:
        counters.append(counters[-1] + 1 if number == before else step.sequences[number].generated)
        before = number
    return np.array(counters, dtype=np.int64)


def _among(chosen: list[int], rows: slice) -> slice:
    """Where the chosen places, in rising order, lie inside `rows`."""
    start, stop = np.searchsorted(chosen, (rows.start, rows.stop)).tolist()
    return slice(start, stop)
