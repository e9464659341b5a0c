"""One normalisation: the gradient of a step is the same however its rows are split, packed, ordered or shared."""

import itertools
import multiprocessing
import socket
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import OBJECTIVES, Learner, quiet_runtime, tiny_dataset, tiny_learner

from prairie.data.loader import Loader, batch_of
from prairie.train.ranks import Ranks, share_of_step

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "tiny_runs"])
MOST = 1e-5


def splits_of(rows, group):
    """The same groups in 1, 2, 4 batches and one by one, evenly and not, in three orders."""
    groups = [rows[i : i + group] for i in range(0, len(rows), group)]
    orders = [groups, groups[::-1], [groups[i] for i in np.random.default_rng(0).permutation(len(groups))]]
    for order in orders:
        n = len(order)
        halves, quarters = [0, n // 2, n], [0, n // 4, n // 2, 3 * n // 4, n]
        for cuts in ([0, n], halves, [0, 1, n], quarters, [0, 1, 2, 3, n], list(range(n + 1))):
            yield [[row for g in order[a:b] for row in g] for a, b in pairwise(cuts)]


def residual(got, wanted):
    """The larger of: the largest difference, by the largest value; the mean difference, by the mean value. Parameter by
    parameter, so that nothing hides behind a large one."""
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        largest, mean = float(b.abs().max()), float(b.abs().mean())
        if largest == 0.0:
            assert float(a.abs().max()) == 0.0
            continue
        worst = max(worst, float((a - b).abs().max()) / largest, float((a - b).abs().mean()) / mean)
    return worst


def one_by_one(learner: Learner, rows: list[int], epoch: int = 0):
    """The reference: a forward and a backward pass of each row (or pair) alone, nothing packed."""
    group = learner.objective.group
    alone = [batch_of(learner.dataset, rows[i : i + group], epoch) for i in range(0, len(rows), group)]
    return learner.gradients(alone)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_gradient_is_the_same_however_a_step_is_split(kind):
    learner = tiny_learner(kind)
    group, rows = learner.objective.group, list(range(12 * learner.objective.group))
    wanted, wanted_loss = one_by_one(learner, rows)
    worst = 0.0
    for split in splits_of(rows, group):
        got, loss = learner.gradients([batch_of(learner.dataset, part) for part in split])
        worst = max(worst, residual(got, wanted))
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert worst < MOST
    # The wrong way, a mean of the micro-batches' means, is far from it: the test can fail.
    means = [one_by_one(learner, part)[0] for part in (rows[:group], rows[group:])]
    assert residual([(a + b) / 2 for a, b in zip(*means, strict=True)], wanted) > 100 * MOST


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_what_the_loader_makes_of_any_batch_size_agrees(kind):
    """Whole epochs in few or many batches; and a step that holds the end of one epoch and the start of the next."""
    learner = tiny_learner(kind)
    total = int(learner.dataset.offsets[-1])
    wanted, _ = one_by_one(learner, list(range(12 * learner.objective.group)))
    for size in (total, total // 2 + 48, total // 3 + 48, total // 5 + 48):
        loader = Loader(learner.dataset, tokens_per_batch=size, seed=1)
        batches = loader.next_step(loader.batches_per_epoch)
        assert sorted(row for b in batches for row in b.rows) == list(range(len(learner.dataset.offsets) - 1))
        assert residual(learner.gradients(batches)[0], wanted) < MOST
    loader = Loader(learner.dataset, tokens_per_batch=int(0.7 * total), seed=1)
    loader.next_step(loader.batches_per_epoch - 1)
    last, first = loader.next_step(2)
    assert (last.epoch, first.epoch) == (0, 1) and len(last.tokens_N) < 0.7 * len(first.tokens_N)
    group = learner.objective.group
    alone = [batch_of(learner.dataset, b.rows[i : i + group], b.epoch) for b in (last, first)
             for i in range(0, len(b.rows), group)]  # fmt: skip
    assert residual(learner.gradients([last, first])[0], learner.gradients(alone)[0]) < MOST


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_packed_row_is_a_row_alone(kind):
    """Its loss and its gradient do not change with what lies beside it: packed behind others, padded, or alone."""
    learner = tiny_learner(kind, rows=6)
    group = learner.objective.group
    mine = list(range(2 * group, 3 * group))
    others, reversed_others = (
        [row for g in groups for row in range(g * group, (g + 1) * group)]
        for groups in ((0, 1, 3, 4, 5), (5, 4, 3, 1, 0))
    )

    def loss_of(rows):
        batch = batch_of(learner.dataset, rows)
        loss, _ = learner.objective.loss(learner.model, batch, learner.adapters)
        for parameter in learner.parameters:
            parameter.grad = None
        loss.backward()
        return float(loss.detach()), [torch.zeros_like(p) if p.grad is None else p.grad for p in learner.parameters]

    alone, gradient_alone = loss_of(mine)
    for before in (others, reversed_others, others[: 2 * group]):
        loss_others, gradient_others = loss_of(before)
        for rows in (before + mine, mine + before, before[:group] + mine + before[group:]):
            loss, gradient = loss_of(rows)
            assert loss - loss_others == pytest.approx(alone, rel=2e-4, abs=1e-4)
            summed = [a + b for a, b in zip(gradient_alone, gradient_others, strict=True)]
            assert residual(gradient, summed) < MOST
    if group == 1:  # the same rows twice: equal lengths take the other path through attention, without padding
        twice, gradient_twice = loss_of(mine * 2)
        assert twice == pytest.approx(2 * alone, rel=1e-5)
        assert residual(gradient_twice, [2 * g for g in gradient_alone]) < MOST


def share_a_step(rank: int, ranks: int, port: int, folder: Path) -> None:
    """One of the processes that share a step, for every objective and some ways to cut it."""
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    together = Ranks.join(quiet_runtime(rank=rank, world_size=ranks))
    found = {}
    for kind in OBJECTIVES:
        for rows, pieces, even in ((12, 5, False), (12, 5, True), (12, 1, False), (1, 1, False), (1, 1, True)):
            learner = tiny_learner(kind, rows)
            size = int(learner.dataset.offsets[-1]) // pieces + 48
            loader = Loader(learner.dataset, tokens_per_batch=size, seed=1)
            share = share_of_step(loader, loader.batches_per_epoch, together, even=even)
            found[kind, rows, pieces, even] = learner.gradients(share.batches, together, share.idle)
    torch.save(found, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_ranks_share_the_rows_of_a_step_each_once():
    dataset = tiny_dataset(30, group=2)
    for count, micro_batches, even in itertools.product((2, 3, 4), (1, 2, 3, 5), (False, True)):
        loaders = [Loader(dataset, tokens_per_batch=300, seed=1) for _ in range(count + 1)]
        for _ in range(3):
            whole = [row for batch in loaders[-1].next_step(micro_batches) for row in batch.rows]
            shares = [
                share_of_step(loader, micro_batches, Ranks(rank, count), even=even)
                for rank, loader in enumerate(loaders[:-1])
            ]
            assert sorted(row for share in shares for b in share.batches for row in b.rows) == sorted(whole)
            passes = [len(share.batches) + len(share.idle) for share in shares]
            assert min(passes) >= 1 and (not even or len(set(passes)) == 1)
            if micro_batches < count:
                tokens = [sum(b.size for b in share.batches) for share in shares]
                assert max(tokens) - min(tokens) <= 2 * micro_batches * 2 * 24, "no rank gets much more"


def test_two_ranks_make_the_gradient_of_one(tmp_path):
    """Also where a micro-batch is shared, and where there is no row for one of them."""
    port = free_port()
    processes = [PROCESSES.Process(target=share_a_step, args=(rank, 2, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert {kind for kind, *_ in one} == set(OBJECTIVES)
    alone = {(kind, rows): tiny_learner(kind, rows) for kind, rows, *_ in one}
    alone = {(kind, n): one_by_one(each, list(range(n * each.objective.group))) for (kind, n), each in alone.items()}
    for (kind, rows, *way), (gradients, loss) in one.items():
        theirs, their_loss = other[kind, rows, *way]
        assert loss == their_loss and all(torch.equal(a, b) for a, b in zip(gradients, theirs, strict=True))
        wanted, wanted_loss = alone[kind, rows]
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
        assert residual(gradients, wanted) < MOST
