"""Compiled loops on the threads that torch's own operators use.

A pool beside torch's competes with it: after each operator torch's idle threads go on turning for a while on the cores
that the loops want (a third of the time of short ones). Inside that very team nobody waits for anybody.
Not here: what the loops do; they share their work by tickets, so that it does not matter how many threads come.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


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
