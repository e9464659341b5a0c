"""Several pieces of play at once, each in a thread with one core: what is compiled lets go of Python's lock.

What a piece comes to does not depend on how many run beside it. Threads, because the net and the trees stay where they
are; beyond a few cores Python itself becomes what is waited for. Not here: what is played.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


class Stopped(Exception):
    """Nobody waits for this piece of play any more."""


class Watch:
    """What a piece of play asks now and then: shall it go on?"""

    def __init__(self) -> None:
        self._over = threading.Event()

    def stop(self) -> None:
        self._over.set()

    def go_on(self) -> None:
        """Raises Stopped when it need not."""
        if self._over.is_set():
            raise Stopped


def side_by_side(jobs: Sequence[Callable[[Watch], T]], threads: int) -> Generator[T]:
    """What each job comes to, in their order, `threads` at a time. A job that fails, or a caller who wants no more
    (closes the iterator), stops those under way."""
    before, watch = torch.get_num_threads(), Watch()
    pool = ThreadPoolExecutor(max(1, min(threads, len(jobs))), initializer=torch.set_num_threads, initargs=(1,))
    try:
        for future in [pool.submit(job, watch) for job in jobs]:
            yield future.result()
    finally:
        watch.stop()
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)
