"""A reward model from comparisons (Bradley-Terry; InstructGPT, arXiv 2203.02155, eq. 1).

    -log s(r(chosen) - r(rejected)),   r: the one score of a row, read at its last token

The loss is a sum over PAIRS and is divided by their number in the step. InstructGPT divides the pairs of one prompt by
their count first; here each pair weighs the same, whichever prompt it answers, but for weights of its own: a pair of
weight w is w pairs in the loss, the figures and the number.

Not here: which of two answers is preferred (data), the division by the count (trainer).
Shapes: R rows (chosen, rejected, chosen, ...), P = R / 2 pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prairie.data.loader import Batch
from prairie.models.lora import AdapterRows
from prairie.models.transformer import Transformer
from prairie.train.objective import require_pairs, row_scores, row_weights, supervised_per_row

LABELS = ("reward",)
"""What the head of a reward model gives."""


@dataclass(frozen=True)
class Reward:
    """Sum over pairs of -log s(r(chosen) - r(rejected)), divided by the pairs of the step."""

    name: str = "reward"
    group: int = 2

    @property
    def settings(self) -> Mapping[str, Any]:
        return {}

    def count(self, batch: Batch) -> float:
        return float(row_weights(batch)[0::2].sum())

    def loss(
        self, model: Transformer, batch: Batch, adapters: Sequence[AdapterRows] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        require_pairs(batch)
        scores_R = row_scores(model, batch, adapters)[:, 0]
        margins_P = scores_R[0::2] - scores_R[1::2]
        w_P = row_weights(batch)[0::2].to(margins_P)
        with torch.no_grad():
            lengths_R = supervised_per_row(batch).to(scores_R.device)
            figures_P = {
                "accuracy": (margins_P > 0).float(),
                "margin": margins_P,
                "score_chosen": scores_R[0::2],
                "score_rejected": scores_R[1::2],
                "length_chosen": lengths_R[0::2],
                "length_rejected": lengths_R[1::2],
            }
            figures = {name: (w_P * value_P).sum() for name, value_P in figures_P.items()}
        return -(w_P * logsigmoid(margins_P)).sum(), figures
