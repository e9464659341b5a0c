"""What a loss means to the trainer, and the few lines that every objective on a decoder shares.

An Objective owns meaning: what is supervised, what the loss is a sum over, what it is divided by. It knows nothing of
steps, optimisers, checkpoints or files: that is `trainer`.

ONE normalisation: `loss` returns a SUM and `count` says what that sum is over. The trainer divides the sum of each
micro-batch by the count of the whole step, so the gradient does not depend on how a step was split or packed.

Shapes: N tokens of all rows, flat; R rows; D width of the model; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from prairie.data.loader import Batch, TokenDataset, batch_of
from prairie.models.lora import AdapterRows
from prairie.models.transformer import Transformer
from prairie.ops.attention import PackedDocuments
from prairie.ops.loss import IGNORED


class Objective(Protocol):
    """One way to learn from a batch."""

    @property
    def name(self) -> str: ...

    @property
    def group(self) -> int:
        """Rows that belong together in a dataset for this objective: 1, or 2 for (chosen, rejected)."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What tells two objectives of one name apart; JSON-able, part of a checkpoint's identity."""
        ...

    def count(self, batch: Batch) -> float:
        """What the loss of this batch is a sum over: supervised tokens, pairs. Needs no model."""
        ...

    def loss(
        self, model: Transformer, batch: Batch, adapters: Sequence[AdapterRows]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The SUM of the loss over the batch (a scalar with gradient), and sums of figures (scalars without)."""
        ...


def hidden_states(model: Transformer, batch: Batch, adapters: Sequence[AdapterRows]) -> tuple[Tensor, Tensor]:
    """The forward pass of a batch: (hidden_ND after the final norm, labels_N on the same device)."""
    device = next(model.parameters()).device
    attend = PackedDocuments(batch.lengths, device=device)
    return model(batch.tokens_N.to(device), attend, adapters), batch.labels_N.to(device)


def row_sums(values_N: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sums the values of each row's tokens: (N,) -> (R,). In a fixed order, so the same bits every time."""
    return torch.segment_reduce(values_N, "sum", lengths=torch.tensor(lengths, device=values_N.device))


def supervised_per_row(batch: Batch) -> Tensor:
    """How many tokens of each row are supervised: (R,) float32 on the CPU."""
    return row_sums((batch.labels_N != IGNORED).float(), batch.lengths)


def every_batch(dataset: TokenDataset, tokens_per_batch: int) -> Iterator[Batch]:
    """Every row once, no gradient in mind: groups of like length together, filled up to `tokens_per_batch`.

    The same dataset gives the same batches, whatever ran before.
    """
    lengths_R = np.diff(dataset.offsets)
    group_lengths = lengths_R.reshape(-1, dataset.group).sum(axis=1)
    rows: list[int] = []
    filled = 0
    for group in np.argsort(-group_lengths, kind="stable").tolist():
        if rows and filled + int(group_lengths[group]) > tokens_per_batch:
            yield batch_of(dataset, rows)
            rows, filled = [], 0
        rows += range(group * dataset.group, (group + 1) * dataset.group)
        filled += int(group_lengths[group])
    if rows:
        yield batch_of(dataset, rows)


def computing_in(dtype: torch.dtype, model: Transformer) -> torch.autocast:
    """The forward pass in `dtype` inside, whatever the weights are kept in; float32 changes nothing."""
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype, enabled=dtype != torch.float32)


@contextmanager
def judging(model: Transformer, adapters: Sequence[AdapterRows]) -> Iterator[None]:
    """No dropout and no gradient inside; the modes of model and adapters are as before after it."""
    modules: list[nn.Module] = [model, *(adapter.lora for adapter in adapters)]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
