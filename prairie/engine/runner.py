"""One forward pass: the tokens of many sequences, prompts and single tokens mixed, through the model and the sampler.

Not here: which tokens (`scheduler`), what becomes of the sampled ones (`engine`).
"""

from __future__ import annotations

import numpy as np
import torch

from prairie.engine.kv_cache import KVCache
from prairie.engine.paged_attend import PagedAttend
from prairie.engine.sampler import Sampled, Sampler
from prairie.engine.scheduler import Step
from prairie.models.lora import AdapterRows
from prairie.models.transformer import Transformer


class Runner:
    """Model, cache and sampler of one device."""

    def __init__(self, model: Transformer, cache: KVCache, sampler: Sampler) -> None:
        self.model, self.cache, self.sampler = model, cache, sampler

    @torch.inference_mode()
    def run(self, step: Step) -> tuple[list[int], Sampled | None]:
        """Computes a step. Returns which of its sequences got a token, and these tokens."""
        for sequence in step.seated:
            self.sampler.seat(sequence)
        lengths = np.array([len(sequence.ids) for sequence in step.sequences], dtype=np.int64)
        attend = PagedAttend(self.cache, step.rows, step.starts, step.counts, lengths)
        tokens: list[int] = []
        ready: list[int] = []
        for number, sequence in enumerate(step.sequences):
            end = sequence.computed + sequence.scheduled
            if end == len(sequence.ids):
                ready.append(number)
            if sequence.scheduled == 1:
                tokens.append(sequence.ids[sequence.computed])
            else:
                tokens += sequence.ids[sequence.computed : end]
        tokens_N = torch.tensor(tokens, device=self.cache.device)
        adapters = [AdapterRows(lora, rows if rows != slice(0, len(tokens)) else None) for lora, rows in step.adapters]
        hidden_ND = self.model(tokens_N, attend, adapters)
        if not ready:
            return ready, None
        if len(ready) < len(tokens):
            last = (np.cumsum(step.counts) - 1)[ready]
            hidden_ND = hidden_ND.index_select(0, torch.from_numpy(last).to(self.cache.device))
            adapters = [AdapterRows(lora, _among(last, rows)) for lora, rows in step.adapters]
        counters = np.array([step.sequences[number].generated for number in ready], dtype=np.int64)
        return ready, self.sampler(self.model.logits(hidden_ND, adapters).float(), step.rows[ready], counters)


def _among(chosen: np.ndarray, rows: slice) -> slice:
    """Where the chosen places, in rising order, lie inside `rows`."""
    start, stop = np.searchsorted(chosen, (rows.start, rows.stop)).tolist()
    return slice(start, stop)
