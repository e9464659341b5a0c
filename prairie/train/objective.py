"""What a loss means to the trainer, and the few lines that every objective on a decoder shares.

An Objective owns meaning: what is supervised, what the loss is a sum over, what it is divided by. It knows nothing of
steps, optimisers, checkpoints or files: that is `trainer`.

ONE normalisation: `loss` returns a SUM and `count` says what that sum is over. The trainer divides the sum of each
micro-batch by the count of the whole step, so the gradient does not depend on how a step was split or packed. Where
rows have weights, both the sum and the count are weighted: a row of weight 2 is the row twice, of 0.25 a quarter of it.
What a loss needs to know of the whole step beforehand (`WholeStep`) is a sum over all its rows as well.

Shapes: N tokens of all rows, flat; R rows; D width of the model; V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from prairie.data.loader import Batch, TokenDataset, batch_of, prompts_of
from prairie.errors import TrainingError
from prairie.models.lora import AdapterRows
from prairie.models.tower import Tower
from prairie.models.transformer import Transformer
from prairie.ops.attention import PackedDocuments
from prairie.ops.loss import IGNORED
from prairie.train.prefixes import Layout, layout_of

Learner = Transformer | Tower
"""What can be trained."""
ASKED_SHARE = 0.9
"""Of the tokens of a batch: if more are asked for, the last layer is computed for all."""


class Asked(NamedTuple):
    """Which tokens of a batch an objective reads, A of them, and where they are computed."""

    wanted_W: Tensor
    """Places in the layout, rising."""
    at_A: Tensor
    """Which of those each one stands at: rows that share a beginning may ask for the same."""
    tokens_A: Tensor
    """Which tokens of the batch they are."""


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

    def count(self, batch: Any) -> float:
        """What the loss of this batch is a sum over: supervised tokens, pairs, positions. Needs no model."""
        ...

    def loss(self, model: Any, batch: Any, adapters: Sequence[AdapterRows]) -> tuple[Tensor, dict[str, Tensor]]:
        """The SUM of the loss over the batch (a scalar with gradient), and sums of figures (scalars without).

        `model` and `batch` are of the kind that the objective is for: most take a Transformer and tokens.
        """
        ...


@runtime_checkable
class WholeStep(Objective, Protocol):
    """An objective whose loss needs figures of all rows of the step first; alone, its `loss` raises TrainingError."""

    def sums(self, model: Any, batch: Any, adapters: Sequence[AdapterRows]) -> list[float]:
        """What this batch adds to the figures; no gradient."""
        ...

    def knowing(self, sums: Sequence[float]) -> Objective:
        """The objective of a step, of all of whose batches `sums` are the sums."""
        ...


def for_step(
    objective: Objective,
    model: Any,
    batches: Iterable[Any],
    adapters: Sequence[AdapterRows],
    *,
    dtype: torch.dtype = torch.float32,
    total: Callable[[Sequence[float]], list[float]] = list,
    counted: Sequence[float] | None = None,
) -> Objective:
    """The objective that knows what it must of a step of these batches; `total` adds what other ranks found, and what
    a batch adds is multiplied with its number in `counted`."""
    if not isinstance(objective, WholeStep):
        return objective
    with judging(model, adapters), computing_in(dtype, model):
        found = [objective.sums(model, batch, adapters) for batch in batches]
    if counted is not None:
        found = [[value * counts for value in sums] for sums, counts in zip(found, counted, strict=True)]
    return objective.knowing(total([math.fsum(column) for column in zip(*found, strict=True)]))


def layout_for(model: Transformer, batch: Batch) -> Layout:
    """What the model is given for a batch; what rows share only if it sees nothing of what follows."""
    return layout_of(batch) if model.prefixes_stand_alone else Layout(batch.tokens_N, batch.lengths)


def asked_of(layout: Layout, batch: Batch) -> Asked | None:
    """Tokens with a label and the last of each row, which a head of scores reads; None if those are nearly all."""
    asked_N = batch.labels_N != IGNORED
    asked_N[torch.tensor(batch.lengths).cumsum(0) - 1] = True
    tokens_A = asked_N.nonzero()[:, 0]
    places_A = tokens_A if layout.places_N is None else layout.places_N[tokens_A]
    wanted_W, at_A = places_A.unique(return_inverse=True)
    return Asked(wanted_W, at_A, tokens_A) if len(wanted_W) < ASKED_SHARE * len(layout.tokens) else None


def hidden_states(
    model: Transformer, batch: Batch, adapters: Sequence[AdapterRows], *, every: bool = False
) -> tuple[Tensor, Tensor]:
    """The forward pass of a batch: (hidden_ND after the final norm, labels_N on the same device). Tokens without a
    label that are not the last of their row may have zeros, unless `every` one is read.

    What rows share at their beginning is computed once (`prefixes`), and its gradient is the sum over them.
    """
    device = next(model.parameters()).device
    layout = layout_for(model, batch)
    asked = None if every else asked_of(layout, batch)
    attend = PackedDocuments(layout.lengths, device, layout.prefixes)
    wanted_W = None if asked is None else asked.wanted_W.to(device)
    hidden = model(layout.tokens.to(device), attend, adapters, wanted_W=wanted_W)
    if asked is not None:
        hidden_AD = hidden.index_select(0, asked.at_A.to(device))
        zeros_ND = hidden.new_zeros(len(batch.tokens_N), hidden.shape[1])
        hidden = zeros_ND.index_copy(0, asked.tokens_A.to(device), hidden_AD)
    elif layout.places_N is not None:
        hidden = hidden.index_select(0, layout.places_N.to(device))
    return hidden, batch.labels_N.to(device)


def require_next_tokens(model: Transformer) -> None:
    """Raises TrainingError for a model that sees what follows, or that ends in something else than next tokens: its
    loss on them would be low and mean nothing."""
    if model.config.kind != "decoder" or not model.config.writes:
        ends = model.config.head.kind if model.config.head else "no head"
        raise TrainingError(
            "the model does not predict next tokens", got=f"an {model.config.kind}, {ends}", wanted="a decoder",
            mend="masked_lm, classification and reward are for encoders, seq2seq is for encoder-decoders",
        )  # fmt: skip


def require_pairs(batch: Batch) -> None:
    """Raises TrainingError unless the rows are (chosen, rejected), (chosen, rejected), ... of the dataset."""
    rows = batch.rows
    if len(rows) % 2 or any(row % 2 for row in rows[::2]) or rows[1::2] != [row + 1 for row in rows[::2]]:
        raise TrainingError("a batch is not in (chosen, rejected) pairs", got=f"rows {rows[:6]}", wanted="2i, 2i+1")


def row_scores(model: Transformer, batch: Batch, adapters: Sequence[AdapterRows]) -> Tensor:
    """(R, L) float32: the scores of each row, read where the model's head reads them (a decoder's: its last token)."""
    head, brought = model.config.head, any(adapter.lora.score is not None for adapter in adapters)
    every = not brought and (head is None or head.pool != "last")
    hidden_ND, _ = hidden_states(model, batch, adapters, every=every)
    return model.scores(hidden_ND, batch.lengths, adapters).float()


def row_sums(values_N: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sums the values of each row's tokens: (N,) -> (R,). In a fixed order, so the same bits every time."""
    return torch.segment_reduce(values_N, "sum", lengths=torch.tensor(lengths, device=values_N.device))


def row_weights(batch: Batch) -> Tensor:
    """(R,) float64 on the CPU: how much each row counts, 1 where nothing was said."""
    return batch.weights_R if batch.weights_R is not None else torch.ones(len(batch.lengths), dtype=torch.float64)


def refuse_weights(batch: Batch) -> None:
    """Raises TrainingError for rows with weights, which an objective would otherwise not look at."""
    if batch.weights_R is not None:
        raise TrainingError(
            "this objective learns without weights", got="rows with a `weight`",
            wanted="causal_lm, dpo, kto or reward, or rows without",
        )  # fmt: skip


def require_finite(reference_logps: Tensor) -> None:
    """Raises TrainingError for log-probabilities of a reference that are no numbers."""
    if not bool(torch.isfinite(reference_logps).all()):
        raise TrainingError("the reference log-probabilities are not finite", mend="look at the reference model")


def reference_of(reference_logps: Tensor, batch: Batch) -> Tensor:
    """(R,): what the reference gives to the rows of a batch. Raises TrainingError if it does not know them."""
    if max(batch.rows) >= len(reference_logps):
        raise TrainingError(
            "the reference log-probabilities are of another dataset",
            got=f"{len(reference_logps)} rows", wanted=f"more than {max(batch.rows)}",
        )  # fmt: skip
    return reference_logps[batch.rows]


def supervised_per_row(batch: Batch) -> Tensor:
    """How many tokens of each row are supervised: (R,) float32 on the CPU."""
    return row_sums((batch.labels_N != IGNORED).float(), batch.lengths)


def every_batch(dataset: TokenDataset, tokens_per_batch: int) -> Iterator[Batch]:
    """Every row once, no gradient in mind: groups of one prompt together, prompts of like length together, filled up
    to `tokens_per_batch`.

    The same dataset gives the same batches, whatever ran before.
    """
    lengths_R = np.diff(dataset.offsets)
    group_lengths = lengths_R.reshape(-1, dataset.group).sum(axis=1)
    prompts = prompts_of(dataset)
    longest = np.zeros(int(prompts.max()) + 1, np.int64)
    np.maximum.at(longest, prompts, group_lengths)
    rows: list[int] = []
    filled = 0
    for group in np.lexsort((prompts, -longest[prompts])).tolist():
        if rows and filled + int(group_lengths[group]) > tokens_per_batch:
            yield batch_of(dataset, rows)
            rows, filled = [], 0
        rows += range(group * dataset.group, (group + 1) * dataset.group)
        filled += int(group_lengths[group])
    if rows:
        yield batch_of(dataset, rows)


def held_out_figures(
    objective: Objective,
    model: Transformer,
    dataset: TokenDataset,
    adapters: Sequence[AdapterRows] = (),
    *,
    tokens_per_batch: int = 8192,
) -> dict[str, float]:
    """The objective's own loss and figures over a whole dataset, each divided by the one `count` of it."""
    count, sums = 0.0, {"loss": 0.0}
    objective = for_step(objective, model, every_batch(dataset, tokens_per_batch), adapters)
    with judging(model, adapters):
        for batch in every_batch(dataset, tokens_per_batch):
            loss, figures = objective.loss(model, batch, adapters)
            count += objective.count(batch)
            for name, value in {"loss": loss, **figures}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
    return {**{name: value / count for name, value in sums.items()}, "count": count}


def length_baseline(dataset: TokenDataset) -> float:
    """The share of preferences that length alone tells: the better of "longer wins" and "shorter wins", ties half.

    A model whose accuracy does not exceed it may have learnt to count.
    """
    marks = np.concatenate([[0], np.cumsum(dataset.mask)])
    lengths_R = marks[dataset.offsets[1:]] - marks[dataset.offsets[:-1]]
    longer = float(np.mean((np.sign(lengths_R[0::2] - lengths_R[1::2]) + 1) / 2))
    return max(longer, 1 - longer)


def computing_in(dtype: torch.dtype, model: nn.Module) -> torch.autocast:
    """The forward pass in `dtype` inside, whatever the weights are kept in; float32 changes nothing."""
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype, enabled=dtype != torch.float32)


@contextmanager
def judging(model: nn.Module, adapters: Sequence[AdapterRows]) -> Iterator[None]:
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
