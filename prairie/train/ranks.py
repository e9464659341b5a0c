"""Several processes that train one model: each takes some of a step's batches, all end it with the same weights.

Sums are over all ranks, so a step means what it means in one process. Rank 0 decides what a clock, a signal or an
evaluation decides, and it alone writes. In one process every function here gives back what it was given.

Not here: who keeps which weights (`sharding`), how processes are started (torchrun).
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from prairie.data.loader import Loader
from prairie.errors import TrainingError
from prairie.runtime import Runtime

_BETWEEN = re.compile("gloo|nccl|connect|broken pipe|reset by peer|timed? ?out", re.IGNORECASE)
"""Words by which an error between processes is told from one inside a process."""
JOINING = timedelta(minutes=10)
"""How long a rank waits for the others to start."""
PATIENCE = timedelta(days=30)
"""How long ranks wait for one that lives, as rank 0 may carry out a long stage alone. One that is gone is
noticed at once."""


class Ranks:
    """The processes of one training. `rank` is this one's number, `count` how many there are."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @classmethod
    def join(cls, runtime: Runtime, *, alone: bool = False) -> Ranks:
        """Meets the other processes where MASTER_ADDR and MASTER_PORT say (torchrun sets them): gloo for what lies on
        the CPU, NCCL for what lies on GPUs. With `alone` a process without others makes a group of its own.

        Raises TrainingError if they cannot be met.
        """
        if dist.is_initialized():
            return cls(runtime.rank, runtime.world_size)
        if runtime.world_size > 1:
            lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
            if lacking:
                raise TrainingError(
                    f"rank {runtime.rank} of {runtime.world_size} does not know where to meet the others",
                    got=f"no {', '.join(lacking)}",
                    mend="start the processes with torchrun",
                )
        if runtime.world_size > 1 or alone:
            with meeting(runtime.rank):
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if runtime.device.startswith("cuda") else "gloo",
                    rank=runtime.rank,
                    world_size=runtime.world_size,
                    timeout=PATIENCE,
                    store=_everybody(runtime) if runtime.world_size > 1 else dist.HashStore(),
                )
        return cls(runtime.rank, runtime.world_size)

    def leave(self) -> None:
        """Ends the meeting: whoever still waits for this rank is told that it is gone."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and decides."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum over all ranks of each value."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def most(self, values: Sequence[float]) -> list[float]:
        """The largest over all ranks of each value."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks of a tensor, in place."""
        if self.count > 1:
            with meeting(self.rank):
                dist.all_reduce(tensor)
        return tensor

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sums the gradients over all ranks, in one buffer. A parameter that the objective does not use has none."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.add(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, part in zip(gradients, flat.split(sizes), strict=True):
            gradient.copy_(part.view_as(gradient))

    def first_says(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes (a JSON value), on every rank; the others wait for it.

        If `make` fails it raises on rank 0 what it raises, and on the others TrainingError with that sentence, or
        SystemExit where it ended the process.
        """
        if self.count == 1:
            return make()
        if not self.leads:
            return _heard(self.rank, json.loads(self._told(b"")))
        try:
            made = make()
        except BaseException as error:
            with suppress(TrainingError):  # nobody may be left to be told
                ends = {"ends": error.code} if isinstance(error, SystemExit) else {"fails": str(error)}
                self._told(json.dumps(ends).encode())
            raise
        return json.loads(self._told(json.dumps({"says": made}).encode()))["says"]

    def _told(self, text: bytes) -> bytes:
        """The text of rank 0, on every rank."""
        size = int(self.most([len(text)])[0])
        told = torch.zeros(size, dtype=torch.uint8)
        if self.leads:
            told.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        return bytes(self.add(told).tolist())

    def meet(self) -> None:
        """Waits until all ranks are here."""
        self.most([0.0])

    def require_same(self, text: str, what: str) -> None:
        """Raises TrainingError on every rank unless all bring the same text."""
        mine = float(zlib.crc32(text.encode()))
        if self.count > 1 and self.most([mine, -mine]) != [mine, -mine]:
            raise TrainingError(f"the ranks do not train the same {what}", wanted="the same command on each")

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with meeting(self.rank):
            dist.all_reduce(tensor, op=operation)
        found: list[float] = tensor.tolist()
        return found


ALONE = Ranks()
"""One process that shares with nobody."""


class Share(NamedTuple):
    """What one rank computes of a step."""

    batches: list[Any]
    idle: list[Any]
    """Computed because the others wait for this rank in the model, or want figures of it; they count nothing."""


def share_of_step(loader: Loader, micro_batches: int, ranks: Ranks, *, even: bool) -> Share:
    """This rank's share of the loader's next step: whole micro-batches where there is one for each rank, else a part of
    the rows of each. Together the ranks see what one process would.

    `even`: all ranks get equally many batches, idle ones included; otherwise each gets at least one.
    """
    if ranks.count <= micro_batches:
        mine = whole = loader.next_step(micro_batches, ranks.rank, ranks.count)
        passes = -(-micro_batches // ranks.count)
    else:
        whole = loader.next_step(micro_batches)
        mine = [part for batch in whole if (part := _part_of(loader, batch, ranks)) is not None]
        passes = micro_batches
    lacking = (passes if even else 1) - len(mine)
    return Share(mine, [loader.dataset.batch(whole[0].rows[: loader.dataset.group], whole[0].epoch)] * lacking)


def _part_of(loader: Loader, batch: Any, ranks: Ranks) -> Any | None:
    """This rank's rows of a batch, neighbours, about equally many tokens for each rank; None if it gets none."""
    offsets, rows_GR = loader.dataset.offsets, np.reshape(batch.rows, (-1, loader.dataset.group))
    tokens_G = (offsets[rows_GR + 1] - offsets[rows_GR]).sum(1).cumsum()
    ends = np.searchsorted(tokens_G, tokens_G[-1] * np.arange(1, ranks.count) / ranks.count, side="right")
    rows = np.split(rows_GR, ends)[ranks.rank].ravel().tolist()
    return loader.dataset.batch(rows, batch.epoch) if rows else None


def _heard(rank: int, told: dict[str, Any]) -> Any:
    if "ends" in told:
        raise SystemExit(told["ends"])
    if "fails" in told:
        raise TrainingError(f"rank {rank} ends, as rank 0 has failed", got=told["fails"].rstrip("."))
    return told["says"]


def _everybody(runtime: Runtime) -> dist.Store:
    """Where the processes of a training leave word for each other, once all of them are there."""
    store, _, _ = next(rendezvous("env://", runtime.rank, runtime.world_size, timeout=JOINING))
    store.set(f"here/{runtime.rank}", "")
    store.wait([f"here/{rank}" for rank in range(runtime.world_size)], JOINING)
    return store


@contextmanager
def meeting(rank: int) -> Iterator[None]:
    """A rank that is gone becomes a sentence on those that wait for it; other errors are what they are."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if not isinstance(error, dist.DistError) and not _BETWEEN.search(str(error)):
            raise
        raise TrainingError(
            f"rank {rank} has lost the others",
            got=str(error).splitlines()[0].partition(". ")[0][-120:],
            mend="see what the first rank that ended has said; the same command goes on from the last checkpoint",
        ) from error
