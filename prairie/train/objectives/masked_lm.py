"""Words left out and guessed (BERT, arXiv 1810.04805): of each row 15% of the tokens, at least one, are chosen; 80% of
these become the mask token, 10% a random one, 10% stay as they are.

What is chosen is a function of (seed, row, epoch) and of nothing else: a resumed run, another split of a step, another
rank see the same holes, and a row has other ones in each pass over the data.

Not here: which tokens may be chosen at all (`special` says), the division by the count (trainer).
Shapes: N tokens of all rows; T tokens of one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prairie.data.loader import Batch
from prairie.errors import TrainingError
from prairie.models.lora import AdapterRows
from prairie.models.transformer import Transformer
from prairie.ops.loss import IGNORED
from prairie.train.objective import hidden_states, refuse_weights


@dataclass(frozen=True)
class MaskedLM:
    """Sum over the chosen tokens of -log p(token), divided by the number of tokens chosen in the step.

    `special`: ids that are never chosen and never drawn. Raises TrainingError for a value outside its range.
    """

    mask_id: int
    vocab_size: int
    special: tuple[int, ...] = ()
    share: float = 0.15
    masked: float = 0.8
    """Of the chosen: how many become the mask token."""
    drawn: float = 0.1
    """Of the chosen: how many become a random token."""
    seed: int = 0
    name: str = "masked_lm"
    group: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.mask_id < self.vocab_size:
            raise TrainingError(
                "the mask token is no token of the model", got=self.mask_id, wanted=f"0 to {self.vocab_size - 1}"
            )
        if not 0 < self.share < 1:
            raise TrainingError("the share of masked tokens is out of range", got=self.share, wanted="above 0, below 1")
        if min(self.masked, self.drawn) < 0 or self.masked + self.drawn > 1:
            raise TrainingError(
                "the shares of masked and random tokens do not fit", got=f"{self.masked} and {self.drawn}",
                wanted="0 or more, together at most 1",
            )  # fmt: skip

    @property
    def settings(self) -> Mapping[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("name", "group")}

    def count(self, batch: Batch) -> float:
        tokens = batch.tokens_N.numpy()
        ends = np.cumsum(batch.lengths)
        return float(sum(self._holes(len(self._candidates(row))) for row in np.split(tokens, ends[:-1])))

    def loss(
        self, model: Transformer, batch: Batch, adapters: Sequence[AdapterRows] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        refuse_weights(batch)
        hidden_ND, labels_N = hidden_states(model, self.with_holes(batch), adapters)
        return model.cross_entropy(hidden_ND, labels_N, adapters), {}

    def with_holes(self, batch: Batch) -> Batch:
        """The batch as the model sees it: chosen tokens replaced, and these alone in the labels, each at its place."""
        tokens_N, labels_N = batch.tokens_N.numpy().copy(), np.full(len(batch.tokens_N), IGNORED, np.int64)
        end = 0
        for row, length in zip(batch.rows, batch.lengths, strict=True):
            start, end = end, end + length
            chance = np.random.Generator(np.random.PCG64([self.seed, batch.epoch, row]))
            places = self._candidates(tokens_N[start:end])
            chosen = start + np.sort(chance.choice(places, self._holes(len(places)), replace=False))
            labels_N[chosen] = tokens_N[chosen]
            fate = chance.random(len(chosen))
            random_ids = chance.choice(self._ordinary, len(chosen))
            tokens_N[chosen] = np.where(
                fate < self.masked,
                self.mask_id,
                np.where(fate < self.masked + self.drawn, random_ids, labels_N[chosen]),
            )
        return replace(batch, tokens_N=torch.from_numpy(tokens_N), labels_N=torch.from_numpy(labels_N))

    @cached_property
    def _ordinary(self) -> npt.NDArray[np.int64]:
        """The ids that may be drawn."""
        return np.setdiff1d(np.arange(self.vocab_size), [*self.special, self.mask_id])

    def _candidates(self, tokens_T: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The places of a row that may be chosen."""
        return np.flatnonzero(~np.isin(tokens_T, self.special))

    def _holes(self, candidates: int) -> int:
        """How many of a row's tokens are chosen."""
        return min(candidates, max(1, round(self.share * candidates)))
