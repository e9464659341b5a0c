"""Log-probabilities of a prompt's own tokens (`echo` with `logprobs`, `prompt_logprobs`), as evaluation programs ask
for them.

One forward pass beside the engine, run by the worker between two steps. Legend: N tokens, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prairie.serve.models import Resident

ROWS = 256
"""Positions whose logits exist at the same time."""


@dataclass(frozen=True)
class Score:
    """One entry a token; None for the first, which nothing stands before."""

    logprobs: list[float | None]
    ranks: list[int | None]
    """1: it was the likeliest of the vocabulary."""
    tops: list[list[tuple[int, float]] | None]

    def best(self, count: int) -> list[list[tuple[int, float]] | None]:
        """`count` alternatives to each token, best first; nothing at all for 0."""
        return [top and top[:count] for top in self.tops] if count else []


def score(resident: Resident, token_ids: Sequence[int], top: int) -> Score:
    """log p of each token given those before it, with the `top` best alternatives that the tokenizer has. For the
    engine's thread."""
    import torch

    from prairie.models.lora import AdapterRows
    from prairie.ops.attention import PackedDocuments

    model = resident.engine.model
    adapters = resident.engine.adapters
    rows = [AdapterRows(adapters[resident.adapter_hash])] if resident.adapter_hash is not None else []
    named = resident.engine.runner.sampler.vocab_size  # a model may have more rows than its tokenizer has tokens
    logprobs: list[float | None] = [None]
    ranks: list[int | None] = [None]
    tops: list[list[tuple[int, float]] | None] = [None]
    with torch.inference_mode():
        tokens_N = torch.tensor(token_ids, dtype=torch.long, device=model.head_weight.device)
        hidden_ND = model(tokens_N, PackedDocuments([len(token_ids)], tokens_N.device), rows)
        for start in range(0, len(token_ids) - 1, ROWS):
            part = slice(start, min(start + ROWS, len(token_ids) - 1))
            logprobs_NV = torch.log_softmax(model.logits(hidden_ND[part], rows).float(), dim=-1)
            chosen_N1 = tokens_N[part.start + 1 : part.stop + 1, None]
            of_chosen_N1 = logprobs_NV.gather(1, chosen_N1)
            logprobs += of_chosen_N1[:, 0].tolist()
            ranks += (1 + (logprobs_NV > of_chosen_N1).sum(-1)).tolist()
            if top:
                best = logprobs_NV[:, :named].topk(min(top, named), dim=-1)
                for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                    tops.append(list(zip(ids, values, strict=True)))
    return Score(logprobs, ranks, tops if top else [])
