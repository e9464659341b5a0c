"""Earlier conversations beside what is learnt now, so that old skills stay (experience replay, arXiv 1811.11682).

Each group of the dataset brings `share` earlier rows into its step, other ones in each epoch. The loss is that of the
other objective, plus `weight` times -log p of each earlier row, averaged over its own supervised tokens; both are sums
over what the other objective counts. Which rows a group brings follows from its place in the dataset and from the
epoch: the gradient does not depend on how a step is split, and a resumed run goes on as if nothing had been.
Not here: which rows are gone over again (flywheel), what is learnt now (the other objectives).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prairie.data.loader import Batch, TokenDataset
from prairie.models.lora import AdapterRows
from prairie.models.transformer import Transformer
from prairie.train.objective import Objective, WholeStep, hidden_states, row_sums, supervised_per_row


@dataclass(frozen=True)
class Replay:
    """`learnt` with earlier `rows`, a dataset of conversations; `groups` is the length of the dataset that `learnt` is
    for."""

    learnt: Objective
    rows: TokenDataset
    groups: int
    share: float = 1.0
    """Earlier rows for each group and epoch."""
    weight: float = 1.0

    @property
    def name(self) -> str:
        return self.learnt.name

    @property
    def group(self) -> int:
        return self.learnt.group

    @property
    def settings(self) -> Mapping[str, Any]:
        about = {"share": self.share, "weight": self.weight, "rows": self.rows.fingerprint}
        return {**self.learnt.settings, "replay": about}

    def count(self, batch: Batch) -> float:
        return self.learnt.count(batch)

    def sums(self, model: Any, batch: Batch, adapters: Sequence[AdapterRows] = ()) -> list[float]:
        """What `learnt` must know of the whole step; nothing for most."""
        return self.learnt.sums(model, batch, adapters) if isinstance(self.learnt, WholeStep) else []

    def knowing(self, sums: Sequence[float]) -> Replay:
        """The same for a step that `learnt` knows."""
        return replace(self, learnt=self.learnt.knowing(sums)) if isinstance(self.learnt, WholeStep) else self

    def loss(
        self, model: Transformer, batch: Batch, adapters: Sequence[AdapterRows] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, figures = self.learnt.loss(model, batch, adapters)
        places = self.places(batch)
        if not places:
            return loss, {**figures, "replay_loss": torch.zeros_like(loss)}
        earlier = self.rows.batch(places)
        hidden_ND, labels_N = hidden_states(model, earlier, adapters)
        logps_R = row_sums(model.logprobs(hidden_ND, labels_N, adapters), earlier.lengths)
        found = (-logps_R / supervised_per_row(earlier).to(logps_R).clamp(min=1)).sum()
        return loss + self.weight * found, {**figures, "replay_loss": found.detach() / self.share}

    def places(self, batch: Batch) -> list[int]:
        """The earlier rows of a batch: those of each of its groups, which stand one after the other."""
        found: list[int] = []
        for group in dict.fromkeys(row // self.group for row in batch.rows):
            place = batch.epoch * self.groups + group
            found += range(math.floor(place * self.share), math.floor((place + 1) * self.share))
        return [place % len(self.rows) for place in found]
