"""Several adapters on one resident base, trained in the same steps: one forward and backward pass of the base over the
rows of all, while each adapter has its own data, objective, optimiser, schedule and checkpoints.

Each run ends where it would have ended alone, apart from the last bits: a product over more rows may round otherwise.
Dropout is the exception, it draws once for all. Each run's folder is that of a run alone, so that either can go on with
what the other has begun. Not here: what one adapter's step means (`Trainer`).

Shapes: N tokens of all runs, flat.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from prairie.data.loader import Batch
from prairie.errors import TrainingError
from prairie.models.lora import AdapterRows, LoRA
from prairie.models.transformer import Transformer
from prairie.ops.attention import Attend, PackedDocuments
from prairie.train.objective import Objective, asked_of, computing_in, layout_for
from prairie.train.prefixes import Layout, joined
from prairie.train.trainer import StepSums, Trainer, count_of, seed_draw

PASS_TOKENS = 4096
"""Tokens that go through the base at once on all cores. More fill no core better; they only leave the cache and take
memory."""
CORE_TOKENS = 1024
"""The same on one core, where each core takes a pass of its own."""


@dataclass(frozen=True)
class Part:
    """What one run brings to a common step."""

    objective: Objective
    adapter: LoRA
    batches: Sequence[Batch]


def fit_together(trainers: Sequence[Trainer]) -> list[dict[str, Any]]:
    """Trains all to their last steps and returns their figures; each goes on from its newest sound checkpoint.

    After a kill those that were saved one step further go back to the newest step that all hold. Raises what
    `Trainer.fit` raises, and TrainingError for runs that cannot share a base.
    """
    _check(trainers)
    common = _common_step(trainers)
    with ExitStack() as stack:
        listener = trainers[-1]
        bars = [
            stack.enter_context(t.running(None if _finished(t) else common, listens=t is listener)) for t in trainers
        ]
        while at_work := [(t, bar) for t, bar in zip(trainers, bars, strict=True) if not t.over()]:
            active = [trainer for trainer, _ in at_work]
            _step(active)
            for trainer, bar in at_work:
                trainer.tell(bar)
            if listener.asked_to_stop is not None:
                for trainer in trainers:
                    trainer.stop(listener.asked_to_stop)
            due = [trainer.save_is_due() for trainer in active]  # of each: it learns of the signal there
            if any(due):
                with ThreadPoolExecutor(len(active)) as pool:  # most of a checkpoint is waiting for the disk
                    list(pool.map(Trainer.save, active))
        return [trainer.finish() for trainer in trainers]


def _step(trainers: Sequence[Trainer]) -> None:
    """One step of each."""
    started = time.perf_counter()
    parts = [Part(t.objective, cast(LoRA, t.adapter), t.loader.next_step(t.config.micro_batches)) for t in trainers]
    first = trainers[0]
    draw = f"{first.config.seed} {first.state.step}"
    sums = gradients_together(cast(Transformer, first.model), parts, dtype=first.runtime.torch_dtype(), draw=draw)
    for trainer, part, its_sums in zip(trainers, parts, sums, strict=True):
        trainer.update(part.batches, its_sums, started)


def gradients_together(
    model: Transformer, parts: Sequence[Part], *, dtype: torch.dtype = torch.float32, draw: str = ""
) -> list[StepSums]:
    """Adds to `.grad` of each part's adapter what `accumulate_gradients` would, the base computed once for all.

    Raises TrainingError if a part has nothing supervised.
    """
    counts = [count_of(part.objective, part.batches) for part in parts]
    losses: list[list[Tensor]] = [[] for _ in parts]
    sums: list[list[dict[str, Tensor]]] = [[] for _ in parts]
    apart = next(model.parameters()).device.type == "cpu" and not any(part.adapter.config.dropout for part in parts)
    for index in range(max(len(part.batches) for part in parts)):
        seed_draw(draw, index)

        def one_pass(at: Sequence[int], index: int = index) -> None:
            with computing_in(dtype, model):
                found = _losses(model, [(parts[i].objective, parts[i].adapter, parts[i].batches[index]) for i in at])
            torch.stack([loss / counts[i] for i, (loss, _) in zip(at, found, strict=True)]).sum().backward()
            for i, (loss, its_sums) in zip(at, found, strict=True):
                losses[i].append(loss.detach())
                sums[i].append(its_sums)

        tokens = [len(p.batches[index].tokens_N) if index < len(p.batches) else 0 for p in parts]
        _go_through(one_pass, tokens, torch.get_num_threads() if apart else 1)
    return [
        StepSums(
            torch.stack(mine).sum(), count, {name: torch.stack([one[name] for one in its]).sum() for name in its[0]}
        )
        for mine, count, its in zip(losses, counts, sums, strict=True)
    ]


def _go_through(one_pass: Callable[[Sequence[int]], None], tokens: Sequence[int], cores: int) -> None:
    """Every part that has tokens, in passes. Where they are enough for all cores each core takes one after the other by
    itself: no operator of a pass then waits for another core, and Python's share of one hides behind the other's.

    What is left over, and parts too few to share out, go through on all cores together. Which pass a core takes does
    not change a bit: a part is in one pass, and all passes are known before.
    """
    passes = _passes(tokens, min(CORE_TOKENS, max(1, sum(tokens) // cores)))
    shared_out = len(passes) - len(passes) % cores
    if cores == 1 or not shared_out:
        for at in _passes(tokens, PASS_TOKENS):
            one_pass(at)
        return
    passes.sort(key=lambda at: -sum(tokens[i] for i in at))
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(one_pass, passes[:shared_out]))
    finally:
        torch.set_num_threads(cores)
    for at in passes[shared_out:]:
        one_pass(at)


def _passes(tokens: Sequence[int], most: int) -> list[list[int]]:
    """Which parts go through the base together: neighbours, up to `most` tokens; those without tokens go nowhere."""
    passes: list[list[int]] = []
    filled = 0
    for i, count in enumerate(tokens):
        if not count:
            continue
        if not passes or filled + count > most:
            passes.append([])
            filled = 0
        passes[-1].append(i)
        filled += count
    return passes


def _losses(
    model: Transformer, work: Sequence[tuple[Objective, LoRA, Batch]]
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The loss of each (objective, adapter, batch) after one forward pass of the base for all."""
    layouts = [layout_for(model, batch) for _, _, batch in work]
    whole = joined(layouts)
    device = next(model.parameters()).device
    ends = list(accumulate(len(layout.tokens) for layout in layouts))
    rows = [slice(end - len(layout.tokens), end) for layout, end in zip(layouts, ends, strict=True)]
    adapters = [AdapterRows(lora, part) for (_, lora, _), part in zip(work, rows, strict=True)]
    wanted = [_wanted(layout, batch) for layout, (_, _, batch) in zip(layouts, work, strict=True)]
    wanted_W = torch.cat([places + part.start for places, part in zip(wanted, rows, strict=True)]).to(device)
    attend = PackedDocuments(whole.lengths, device, whole.prefixes)
    hidden_WD = model(whole.tokens.to(device), attend, adapters, wanted_W=wanted_W)
    states = hidden_WD.split([len(places) for places in wanted])
    return [
        objective.loss(cast(Transformer, _Computed(model, layout, places, hidden)), batch, [AdapterRows(lora)])
        for (objective, lora, batch), layout, places, hidden in zip(work, layouts, wanted, states, strict=True)
    ]


def _wanted(layout: Layout, batch: Batch) -> Tensor:
    """The places that `hidden_states` wants of a layout, all where it does not say."""
    asked = asked_of(layout, batch)
    return torch.arange(len(layout.tokens)) if asked is None else asked.wanted_W


class _Computed:
    """Stands for the model before one objective: its forward pass has been made, with the others'."""

    def __init__(self, model: Transformer, layout: Layout, wanted_W: Tensor, hidden_WD: Tensor) -> None:
        self._model, self._layout, self._wanted_W, self._hidden_WD = model, layout, wanted_W, hidden_WD

    def __call__(
        self,
        tokens_N: Tensor,
        attend: Attend,
        adapters: Sequence[AdapterRows] = (),
        *,
        wanted_W: Tensor | None = None,
    ) -> Tensor:
        """Raises TrainingError if the objective asks for other tokens than those of its batch."""
        places = torch.arange(len(tokens_N)) if wanted_W is None else wanted_W.cpu()
        if not (torch.equal(tokens_N.cpu(), self._layout.tokens) and torch.equal(places, self._wanted_W)):
            raise TrainingError(
                "this objective cannot be trained together with others",
                got="tokens that are not those of its batch", mend="train it alone",
            )  # fmt: skip
        return self._hidden_WD

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _finished(trainer: Trainer) -> bool:
    return trainer.checkpoints.steps()[-1:] == [trainer.config.steps]


def _common_step(trainers: Sequence[Trainer]) -> int | None:
    """The newest step of which every run that has begun and is not over has a checkpoint; None if there is none."""
    begun = [set(steps) for t in trainers if (steps := t.checkpoints.steps()) and not _finished(t)]
    return max(set.intersection(*begun), default=None) if begun else None


def _check(trainers: Sequence[Trainer]) -> None:
    """Raises TrainingError for runs that cannot share a base."""
    first = trainers[0]
    if any(t.model is not first.model for t in trainers):
        raise TrainingError("adapters that are trained together stand on one base", got="several models")
    if any(t.adapter is None for t in trainers) or len({id(t.adapter) for t in trainers}) < len(trainers):
        raise TrainingError("runs that share a base train an adapter each", got="a whole model, or one adapter twice")
    if len({t.folder.resolve() for t in trainers}) < len(trainers):
        raise TrainingError("every run has a folder of its own", got="one folder for two runs")
    if len({t.runtime.dtype for t in trainers}) > 1:
        raise TrainingError("runs that share a base share its dtype", got=", ".join(t.runtime.dtype for t in trainers))
    if any(t.ranks.count > 1 for t in trainers):
        raise TrainingError("adapters are trained together in one process", got=f"{first.ranks.count} processes")
