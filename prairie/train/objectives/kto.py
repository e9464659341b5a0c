"""Learning from thumbs: answers that people liked and answers that they did not, unpaired (KTO, arXiv 2402.01306).

r = log p(y|x) - log p_ref(y|x), summed over the supervised tokens; z the reference point:
  liked      desirable_weight   (1 - s(beta (r - z)))
  disliked   undesirable_weight (1 - s(beta (z - r)))
  z = max(0, mean of log p(y'|x) - log p_ref(y'|x)), without gradient, y' an answer to another prompt

The sum over ANSWERS is divided by their number in the step. The two weights are not part of that number (so in trl),
the weight of a row is: a row of weight w is w answers, in the loss, in z and in the number.

z is of the WHOLE STEP: the mean over every answer of it, of all micro-batches and ranks, computed before the first
loss. So the gradient does not depend on how a step is split; of one micro-batch alone there is no loss. Which answer y'
is stands in the dataset and not in the batch (`TokenDataset.from_judged`): the second row of a group. trl takes y' from
the same batch; for the same y' loss and gradient are trl's. z is computed without dropout.

Not here: who liked what (data, flywheel), the division by the count (trainer).
Shapes: R rows (answer, mismatched answer, answer, ...), A = R / 2 answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from prairie.data.loader import Batch
from prairie.errors import TrainingError
from prairie.models.lora import AdapterRows
from prairie.models.transformer import Transformer
from prairie.train.objective import (
    hidden_states,
    reference_of,
    require_finite,
    require_next_tokens,
    require_pairs,
    row_sums,
    row_weights,
    supervised_per_row,
)


@dataclass(frozen=True)
class KTOConfig:
    """Raises TrainingError for a value outside its range."""

    beta: float = 0.1
    """The pull towards the reference."""
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    """The paper wants desirable_weight x liked answers between 1 and 4/3 of undesirable_weight x disliked ones."""

    def __post_init__(self) -> None:
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"{name} is not positive", got=getattr(self, name), wanted="above 0", param=name)


@dataclass(frozen=True)
class KTO:
    """`reference_logps` (rows of the dataset,) are the log-probabilities that the reference gives to the same rows."""

    config: KTOConfig
    reference_logps: Tensor
    reference_point: float | None = None
    """z of the step; None before the step is known."""
    name: str = "kto"
    group: int = 2

    def __post_init__(self) -> None:
        require_finite(self.reference_logps)

    @property
    def settings(self) -> Mapping[str, Any]:
        return asdict(self.config)

    def count(self, batch: Batch) -> float:
        return float(row_weights(batch)[0::2].sum())

    def sums(self, model: Transformer, batch: Batch, adapters: Sequence[AdapterRows] = ()) -> list[float]:
        """The weighted sum of the mismatched answers' log ratios, and of the weights."""
        ratios_A = self._ratios(model, _every_second(batch, 1), adapters)[0]
        weights_A = row_weights(batch)[1::2]
        return [float((ratios_A.double().cpu() * weights_A).sum()), float(weights_A.sum())]

    def knowing(self, sums: Sequence[float]) -> KTO:
        """The objective of the step of which `sums` are the sums over all batches."""
        return replace(self, reference_point=max(0.0, sums[0] / sums[1]))

    def loss(
        self, model: Transformer, batch: Batch, adapters: Sequence[AdapterRows] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.reference_point is None:
            raise TrainingError(
                "KTO's loss of a batch is not defined before its step is known", got="no reference point",
                wanted="that of all batches of the step", mend="ask `prairie.train.objective.for_step` first",
            )  # fmt: skip
        if batch.targets_R is None:
            raise TrainingError("KTO needs answers with a label", got="rows without", wanted="liked or not, each")
        own = _every_second(batch, 0)
        ratios_A, logps_A = self._ratios(model, own, adapters)
        liked_A = batch.targets_R[0::2].to(ratios_A.device) == 1
        lengths_A = supervised_per_row(own).to(ratios_A.device)
        weights_A = row_weights(own).to(ratios_A)
        return judged_loss(ratios_A, logps_A, liked_A, lengths_A, weights_A, self.reference_point, self.config)

    def _ratios(self, model: Transformer, own: Batch, adapters: Sequence[AdapterRows]) -> tuple[Tensor, Tensor]:
        """(A,) log p - log p_ref of some rows, and log p."""
        require_next_tokens(model)
        reference_A = reference_of(self.reference_logps, own)
        hidden_ND, labels_N = hidden_states(model, own, adapters)
        logps_A = row_sums(model.logprobs(hidden_ND, labels_N, adapters), own.lengths)
        return logps_A - reference_A.to(logps_A), logps_A


def judged_loss(
    ratios_A: Tensor,
    logps_A: Tensor,
    liked_A: Tensor,
    lengths_A: Tensor,
    weights_A: Tensor,
    reference_point: float,
    config: KTOConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The formulas above. Returns the SUM over answers and sums of figures; divide each by the sum of the weights.

    `accuracy` is the share of answers on the right side of the reference point.
    """
    sides_A = liked_A.to(ratios_A) * 2 - 1
    lambdas_A = torch.where(liked_A, config.desirable_weight, config.undesirable_weight)
    losses_A = lambdas_A * torch.sigmoid(-config.beta * sides_A * (ratios_A - reference_point))
    with torch.no_grad():
        rewards_A = config.beta * ratios_A.detach()
        liked = liked_A.to(ratios_A)
        figures_A = {
            "accuracy": (sides_A * (ratios_A - reference_point) > 0).float(),
            "margin": sides_A * rewards_A,
            "liked": liked,
            "reward_liked": rewards_A * liked,
            "reward_disliked": rewards_A * (1 - liked),
            "reference_point": torch.full_like(rewards_A, reference_point),
            "logps": logps_A.detach(),
            "length": lengths_A,
        }
        figures = {name: (weights_A * value_A).sum() for name, value_A in figures_A.items()}
    return (weights_A * losses_A).sum(), figures


def _every_second(batch: Batch, first: int) -> Batch:
    """The answers (`first` 0) or the mismatched answers (1) of a batch."""
    require_pairs(batch)
    starts = [0, *accumulate(batch.lengths)]
    places = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in range(first, len(batch.lengths), 2)])
    return replace(
        batch,
        tokens_N=batch.tokens_N[places],
        labels_N=batch.labels_N[places],
        lengths=batch.lengths[first::2],
        rows=batch.rows[first::2],
        targets_R=None if batch.targets_R is None else batch.targets_R[first::2],
        weights_R=None if batch.weights_R is None else batch.weights_R[first::2],
    )
