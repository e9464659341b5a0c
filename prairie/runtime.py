"""The machine as a value: device, dtype, threads, seed, progress. Built once by a command, passed on, never global.

torch is imported inside the functions, so that commands that do not compute answer at once.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import torch


class Progress:
    """Long work shows itself: one line of rate, figures and ETA on stderr, rewritten in place on a terminal."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False, every_s: float | None = None) -> None:
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self.live = self.stream.isatty()
        self.every_s = every_s if every_s is not None else (0.2 if self.live else 10.0)

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            print(("\r\033[K" if self.live else "") + text, file=self.stream, flush=True)

    @contextmanager
    def bar(self, title: str, total: int, unit: str = "step", start: int = 0) -> Iterator[Bar]:
        """A bar over `total` units of work, `start` of them already done by an earlier process."""
        bar = Bar(self, title, total, unit, start)
        try:
            yield bar
        finally:
            bar.close()


@dataclass
class Bar:
    """One running piece of work; `update` is cheap and prints at most every `progress.every_s` seconds."""

    progress: Progress
    title: str
    total: int
    unit: str
    done: int
    started: float = field(default_factory=time.monotonic)
    shown: float = field(default_factory=time.monotonic)
    figures: dict[str, Any] = field(default_factory=dict)
    first: int = 0

    def __post_init__(self) -> None:
        self.first = self.done

    def update(self, count: int = 1, **figures: Any) -> None:
        self.done += count
        self.figures.update(figures)
        now = time.monotonic()
        if now - self.shown >= self.progress.every_s:
            self.shown = now
            self._show(end="")

    def close(self) -> None:
        self._show(end="\n")

    def line(self) -> str:
        """The text that is shown: share, rate, ETA, figures."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = (self.done - self.first) / seconds
        left_s = (self.total - self.done) / rate if rate > 0 else float("inf")
        eta = "" if self.done >= self.total else f"  ETA {left_s:.0f}s" if left_s != float("inf") else ""
        figures = "  ".join(f"{k} {_short(v)}" for k, v in self.figures.items())
        share = self.done / self.total if self.total else 1.0
        return f"{self.title:<14} {share:4.0%}  {self.done}/{self.total} {self.unit}  {_short(rate)}/s{eta}  {figures}"

    def _show(self, end: str) -> None:
        p = self.progress
        if p.quiet:
            return
        if p.live:
            print("\r\033[K" + self.line(), end=end, file=p.stream, flush=True)
        else:
            print(self.line(), file=p.stream, flush=True)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def give_back() -> None:
    """What this process has freed goes back to the machine; the allocator keeps it otherwise."""
    with suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)


def end_soon() -> None:
    """When this process ends nobody looks for cycles among its objects any more: of torch's and numba's that takes half
    a second to a whole one, and the memory goes back all the same. What is registered for the end runs before, streams
    are flushed; only objects in cycles are not finalised, which Python does not promise either."""
    atexit.register(gc.freeze)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def gemm_flops(dtype: str = "float32", device: str = "cpu", seconds: float = 0.1, size: int = 1024) -> float:
    """The best rate of square matrix products in that dtype, in operations a second; takes about `seconds`, once."""
    import torch

    kind = getattr(torch, dtype)
    a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    a[:64] @ b  # builds the kernel
    wait()
    best, until = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < until:
        began = time.perf_counter()
        a @ b
        wait()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


BFLOAT16_GAIN = 1.3
"""How much faster its products must be: casts take back some of it."""
_TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""What torchrun tells each process."""


def process_rank() -> int:
    """The number of this process among those that torchrun started, 0 without it."""
    return int(os.environ.get("RANK", 0))


@dataclass(frozen=True)
class Runtime:
    """Where and how a computation runs."""

    device: str = "cpu"
    dtype: str = "float32"
    """Dtype of the forward pass; weights and optimiser state stay float32."""
    threads: int = 1
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    beside: int = 1
    """Processes of this work on this machine."""
    progress: Progress = field(default_factory=Progress)
    peak_flops: float = 0.0
    """Operations a second of this machine's own matrix product (`gemm_flops`); 0 = not measured."""
    command: str = ""
    """The command line that started the work; a run that is stopped says it."""

    @classmethod
    def detect(cls, *, seed: int = 0, threads: int | None = None, progress: Progress | None = None) -> Runtime:
        """Looks at the machine: CUDA if torch sees one, else the CPU with `threads`, the environment's
        `OMP_NUM_THREADS`, or all cores this process may use, shared among the processes that torchrun started beside
        it (it sets that variable to 1 for each of them, so there it says nothing)."""
        import torch

        rank, ranks, beside, here = (int(os.environ.get(name, default)) for name, default in _TORCHRUN.items())
        wished = os.environ.get("OMP_NUM_THREADS", "") if beside == 1 else ""
        count = threads or (int(wished) if wished.isdecimal() else 0) or max(1, usable_cores() // beside)
        torch.set_num_threads(count)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and beside > 1:
            torch.cuda.set_device(here)
        return cls(
            device=device, threads=count, seed=seed, rank=rank, world_size=ranks, beside=beside,
            progress=progress or Progress(),
        )  # fmt: skip

    def alone(self) -> Runtime:
        """The same for work that one of the processes does."""
        return replace(self, rank=0, world_size=1, beside=1)

    def seed_all(self, offset: int = 0) -> None:
        """Seeds every generator that training may draw from."""
        import numpy
        import torch

        seed = self.seed + offset
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def best_dtype(self) -> str:
        """bfloat16 where this machine multiplies it clearly faster than float32, else float32; measured in a moment.

        Without instructions for it (AVX512-BF16, AMX, a GPU) bfloat16 is a trap: up to sixty times slower, which a
        small product tells at once.
        """
        small = [gemm_flops(name, self.device, 0.01, 128) for name in ("bfloat16", "float32")]
        if small[0] < small[1] / 4:
            return "float32"
        bfloat16, float32 = (gemm_flops(name, self.device, 0.05, 512) for name in ("bfloat16", "float32"))
        return "bfloat16" if bfloat16 > BFLOAT16_GAIN * float32 else "float32"

    def computing_in(self, dtype: str) -> Runtime:
        """This machine for a computation in `dtype`, its matrix product measured; `auto` takes `best_dtype`, said."""
        if dtype == "auto":
            dtype = self.best_dtype()
            self.progress.say(f"dtype auto: {dtype}, by a probe of this machine's products")
        size = 1024 if dtype == "float32" or self.device != "cpu" else 384  # 0.1 s where it has no instructions
        return replace(self, dtype=dtype, peak_flops=gemm_flops(dtype, self.device, size=size))

    def torch_dtype(self) -> torch.dtype:
        import torch

        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]
