"""One function over many chunks, a process a core: what renders and tokenises a large dataset is Python, so threads
would wait for each other.

Not here: what is done with a chunk (`loader`).
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, islice
from typing import Any, TypeVar

_C = TypeVar("_C")
_R = TypeVar("_R")
LEAST_CHUNKS = 4
"""Fewer are done here: starting a process takes about as long."""


@contextmanager
def making_many() -> Iterator[None]:
    """While millions of objects are made that are all kept and form no cycle: Python's search for cycles would look at
    all of them again and again, a third of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def in_processes(function: Callable[[_C], _R], chunks: Iterable[_C], processes: int | None = None) -> Iterator[_R]:
    """`function(chunk)` of each chunk, in their order, by default on as many cores as this process may use.

    `function` must not depend on what it did before; it and its results must pickle. What it raises is raised here.
    """
    waiting = iter(chunks)
    first = list(islice(waiting, LEAST_CHUNKS))
    all_chunks = chain(first, waiting)
    if len(first) < LEAST_CHUNKS or (processes := processes or _cores()) == 1:
        yield from map(function, all_chunks)
        return
    # loky and not multiprocessing: it neither forks a process with threads nor imports the caller's script again.
    from loky import ProcessPoolExecutor

    work = pickle.dumps(function)
    with ProcessPoolExecutor(processes, env={"TOKENIZERS_PARALLELISM": "false"}) as pool:
        yield from pool.map(_Call(work), all_chunks)


def _cores() -> int:
    """Those that this process may use."""
    import loky

    return int(loky.cpu_count())


class _Call:
    """A pickled function: unpickled once in a process, however many chunks it gets."""

    def __init__(self, work: bytes) -> None:
        self.work = work

    def __call__(self, chunk: Any) -> Any:
        return _function(self.work)(chunk)


@lru_cache(maxsize=1)
def _function(work: bytes) -> Callable[[Any], Any]:
    function: Callable[[Any], Any] = pickle.loads(work)
    return function
