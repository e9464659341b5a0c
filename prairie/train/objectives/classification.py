"""One of several labels for a row: cross entropy of the scores at its last token, as transformers' sequence
classifiers of decoders have it.

Not here: which label a row has (data), the division by the count (trainer). Shapes: R rows, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from prairie.data.loader import Batch
from prairie.errors import TrainingError
from prairie.models.lora import AdapterRows
from prairie.models.transformer import Transformer
from prairie.train.objective import refuse_weights, row_scores


@dataclass(frozen=True)
class Classification:
    """Sum over rows of -log p(label), divided by the rows of the step. Raises TrainingError for rows of no label."""

    name: str = "classification"
    group: int = 1

    @property
    def settings(self) -> Mapping[str, Any]:
        return {}

    def count(self, batch: Batch) -> float:
        return float(len(batch.lengths))

    def loss(
        self, model: Transformer, batch: Batch, adapters: Sequence[AdapterRows] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        refuse_weights(batch)
        if batch.targets_R is None:
            raise TrainingError("classification needs rows with a label", got="rows without", wanted="`label` in each")
        scores_RL = row_scores(model, batch, adapters)
        targets_R = batch.targets_R.to(scores_RL.device)
        right = (scores_RL.detach().argmax(1) == targets_R).float().sum()
        return F.cross_entropy(scores_RL, targets_R, reduction="sum"), {"accuracy": right}
