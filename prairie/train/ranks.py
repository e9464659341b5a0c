"""Several processes that train one model: each takes some of a step's batches, all end it with the same weights.

Sums are over all ranks, so a step means what it means in one process. Rank 0 decides what a clock, a signal or an
evaluation decides, and it alone writes. In one process every function here gives back what it was given.

Not here: which batches are whose (`data.loader`), how processes are started (torchrun).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prairie.errors import TrainingError
from prairie.runtime import Runtime


class Ranks:
    """The processes of one training. `rank` is this one's number, `count` how many there are."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @classmethod
    def join(cls, runtime: Runtime) -> Ranks:
        """Meets the other processes where MASTER_ADDR and MASTER_PORT say (torchrun sets them); gloo on a CPU.

        Raises TrainingError if they cannot be met.
        """
        if runtime.world_size > 1 and not dist.is_initialized():
            lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
            if lacking:
                raise TrainingError(
                    f"rank {runtime.rank} of {runtime.world_size} does not know where to meet the others",
                    got=f"no {', '.join(lacking)}",
                    mend="start the processes with torchrun",
                )
            with _meeting(runtime.rank):
                dist.init_process_group(
                    "nccl" if runtime.device.startswith("cuda") else "gloo",
                    rank=runtime.rank,
                    world_size=runtime.world_size,
                )
        return cls(runtime.rank, runtime.world_size)

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
            with _meeting(self.rank):
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
        """What rank 0 makes (a JSON value), on every rank; the others wait for it."""
        if self.count == 1:
            return make()
        text = json.dumps(make()).encode() if self.leads else b""
        size = int(self.most([len(text)])[0])
        told = torch.zeros(size, dtype=torch.uint8)
        if self.leads:
            told.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        return json.loads(bytes(self.add(told).tolist()))

    def require_same(self, text: str, what: str) -> None:
        """Raises TrainingError on every rank unless all bring the same text."""
        mine = float(zlib.crc32(text.encode()))
        if self.count > 1 and self.most([mine, -mine]) != [mine, -mine]:
            raise TrainingError(f"the ranks do not train the same {what}", wanted="the same command on each")

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with _meeting(self.rank):
            dist.all_reduce(tensor, op=operation)
        found: list[float] = tensor.tolist()
        return found


@contextmanager
def _meeting(rank: int) -> Iterator[None]:
    """A rank that is gone becomes a sentence on those that wait for it."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        raise TrainingError(
            f"rank {rank} has lost the others",
            got=str(error).splitlines()[0][:120],
            mend="see what the first rank that ended has said; the same command goes on from the last checkpoint",
        ) from error
