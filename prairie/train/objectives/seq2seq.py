"""A text answered by a text: next tokens of an encoder-decoder (T5, arXiv 1910.10683; BART, arXiv 1910.13461).

A group of the dataset is (what is read, what is answered). The decoder is given the answer one place later, behind the
config's start token, and every token of the answer is learnt, its end included.

Not here: which token starts an answer (config), the division by the count (trainer).
Shapes: M tokens read, N tokens answered, of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prairie.data.loader import Batch
from prairie.errors import TrainingError
from prairie.models.lora import AdapterRows
from prairie.models.transformer import Transformer
from prairie.ops.attention import PackedDocuments
from prairie.ops.cross_attention import Memory
from prairie.train.objective import refuse_weights, require_pairs


@dataclass(frozen=True)
class Seq2Seq:
    """Sum of -log p over the tokens of the answers, divided by their number in the step."""

    name: str = "seq2seq"
    group: int = 2

    @property
    def settings(self) -> Mapping[str, Any]:
        return {}

    def count(self, batch: Batch) -> float:
        return float(sum(batch.lengths[1::2]))

    def loss(
        self, model: Transformer, batch: Batch, adapters: Sequence[AdapterRows] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        require_pairs(batch)
        refuse_weights(batch)
        start_id = model.config.start_id
        if start_id is None:
            raise TrainingError(
                "the model does not say by which token an answer begins", wanted="decoder_start_token_id in config.json"
            )
        device = next(model.parameters()).device
        rows = batch.tokens_N.to(device).split(batch.lengths)
        reads, answers = rows[0::2], rows[1::2]
        lengths, answer_lengths = batch.lengths[0::2], batch.lengths[1::2]
        hidden_MD = model.encode(torch.cat(reads), PackedDocuments(lengths, device))
        begin = torch.full((1,), start_id, device=device)
        given_N = torch.cat([torch.cat([begin, answer[:-1]]) for answer in answers])
        memory = Memory(hidden_MD, lengths, answer_lengths)
        hidden_ND = model(given_N, PackedDocuments(answer_lengths, device), adapters, memory=memory)
        return model.cross_entropy(hidden_ND, torch.cat(answers), adapters), {}
