"""The next token: pretraining on text, and fine-tuning on conversations (the mask of the dataset tells them apart).

Not here: which tokens are supervised (data), the fused loss itself (ops), the division by the count (trainer).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from prairie.data.loader import Batch, TokenDataset
from prairie.data.tokenizer import Tokenizer
from prairie.errors import TrainingError
from prairie.models.lora import AdapterRows
from prairie.models.transformer import Transformer
from prairie.ops.loss import IGNORED
from prairie.train.objective import (
    every_batch,
    hidden_states,
    judging,
    require_next_tokens,
    row_sums,
    supervised_per_row,
)


@dataclass(frozen=True)
class CausalLM:
    """Sum of -log p(next token) over the supervised tokens, each as often as its row's weight says."""

    name: str = "causal_lm"
    group: int = 1

    @property
    def settings(self) -> Mapping[str, Any]:
        return {}

    def count(self, batch: Batch) -> float:
        if batch.weights_R is None:
            return float(batch.supervised)
        return float((supervised_per_row(batch).double() * batch.weights_R).sum())

    def loss(
        self, model: Transformer, batch: Batch, adapters: Sequence[AdapterRows] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        require_next_tokens(model)
        hidden_ND, labels_N = hidden_states(model, batch, adapters)
        if batch.weights_R is None:
            return model.cross_entropy(hidden_ND, labels_N, adapters), {}
        logps_R = row_sums(model.logprobs(hidden_ND, labels_N, adapters), batch.lengths)
        return -(logps_R * batch.weights_R.to(logps_R)).sum(), {}


def held_out_loss(
    model: Transformer,
    dataset: TokenDataset,
    adapters: Sequence[AdapterRows] = (),
    *,
    tokenizer: Tokenizer | None = None,
    tokens_per_batch: int = 8192,
) -> dict[str, float]:
    """Mean -log p (nats) over all supervised tokens of `dataset`, its perplexity and the count; weights are not
    looked at, it is a figure of the text.

    With `tokenizer` also `bits_per_byte`: the same sum in bits over the UTF-8 bytes of the supervised tokens, which may
    be compared between models of different tokenizers. Raises TrainingError if nothing is supervised.
    """
    total, count, bytes_count = 0.0, 0, 0
    bytes_of = _bytes_per_token(tokenizer, model.config.vocab_size) if tokenizer else None
    with judging(model, adapters):
        for batch in every_batch(dataset, tokens_per_batch):
            hidden_ND, labels_N = hidden_states(model, batch, adapters)
            total += float(model.cross_entropy(hidden_ND, labels_N, adapters))
            count += batch.supervised
            if bytes_of is not None:
                bytes_count += int(bytes_of[batch.labels_N[batch.labels_N != IGNORED].numpy()].sum())
    if count == 0:
        raise TrainingError("the held-out data has no supervised token", got=f"{len(dataset)} rows")
    loss = total / count
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "supervised_tokens": float(count)}
    if bytes_count:
        figures["bits_per_byte"] = total / math.log(2) / bytes_count
    return figures


def _bytes_per_token(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """(V,) int64: the length of each token's text; a model may have more rows than its tokenizer has tokens."""
    sizes = np.zeros(max(vocab_size, tokenizer.vocab_size), dtype=np.int64)
    special = set(tokenizer.special_tokens.values())
    for token_id in range(tokenizer.vocab_size):
        sizes[token_id] = 0 if token_id in special else len(tokenizer.token_bytes(token_id))
    return sizes
