"""Compiled loops on the threads that torch's own operators use.

A pool beside torch's competes with it: after each operator torch's idle threads go on turning for a while on the cores
that the loops want (a third of the time of short ones). Inside that very team nobody waits for anybody.
Not here: what the loops do; they share their work by tickets, so that it does not matter how many threads come.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


COMPILED_NUMBERS = 800_000
"""Least numbers for each thread that an operator by elements reads for which its compiled loops are asked: below that
it takes a millisecond or two, and numba is not even imported."""


def worth_compiling(x: Tensor) -> bool:
    """Whether an operator that works on x by elements goes through compiled loops. The same batch is always computed in
    the same way by so many threads, so that a run repeats its bits."""
    large = x.numel() >= COMPILED_NUMBERS * torch.get_num_threads()
    return (
        large and x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous()
        and kernels("elementwise_kernel") is not None
    )  # fmt: skip


def by_bands(name: str, tensors: Mapping[str, Tensor], **numbers: float) -> None:
    """A function of `ops.elementwise_kernel` on all threads; `tensors` are contiguous, the fields of its JOB are called
    so."""
    loops = kernels("elementwise_kernel")
    assert loops is not None
    addresses = {field: tensor.data_ptr() for field, tensor in tensors.items()}
    share_out(getattr(loops, name), loops.JOB, bands(int(numbers["tokens"])), {**numbers, **addresses})


def bands(tokens: int) -> int:
    """How many tasks so many tokens are."""
    loops = kernels("elementwise_kernel")
    assert loops is not None
    return -(-tokens // int(loops.BAND))


@cache
def kernels(file: str) -> ModuleType | None:
    """A file of compiled loops beside this one; None where numba is not there: torch's forms do the same."""
    try:
        return import_module(f"prairie.ops.{file}")
    except ImportError:
        return None


def share_out(loops: Any, record: np.dtype[Any], tasks: int, fields: Mapping[str, float]) -> None:
    """Compiled loops on all threads, with a record of these fields; which of them does what does not change a bit.
    Raises MemoryError if a task was not done: compiled loops cannot raise."""
    tickets, job = np.zeros(2, np.int64), np.zeros(1, record)
    job["tickets"] = tickets.ctypes.data
    for field, number in fields.items():
        job[field] = number
    on_threads(loops, job, min(torch.get_num_threads(), tasks))
    if tickets[1] != tasks:
        raise MemoryError(f"compiled loops found no memory: {tickets[1]} of {tasks} tasks are done")


def on_threads(loops: Any, job: np.ndarray, threads: int) -> None:
    """Calls `loops`, a numba cfunc of one address, with that of `job` on each of so many threads; returns when all
    have returned. Holds no lock of Python's meanwhile."""
    entry = ENTRY(loops.address)
    if threads <= 1:
        entry(job.ctypes.data)
        return
    parallel = _team()
    if parallel is not None:
        parallel(ctypes.cast(entry, ctypes.c_void_p), job.ctypes.data, threads, 0)
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(entry, job.ctypes.data) for _ in range(threads - 1)]
        entry(job.ctypes.data)
        for other in others:
            other.result()


@cache
def _team() -> Any:
    """GCC's entry into an OpenMP parallel region (LLVM's and Intel's OpenMP have it too); None where nobody in this
    process has brought one."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel
