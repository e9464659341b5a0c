"""Several server processes behind one port, on one home: `prairie serve --replicas N`.

This process only holds the listening socket and watches its children; each is a whole server that accepts from the
same socket, so the kernel gives a connection to whoever is free. They meet in the home: records go to one store, and
each sees a new champion by itself. A child that dies is started again; a signal goes to all, and they drain.
What is counted in memory is each child's own: limits of a key, queues, /metrics, adapters loaded at run time.
Not here: what a server is (`app`, `server`).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

from prairie.errors import PrairieError

log = logging.getLogger("prairie.serve")

SOCKET_VARIABLE = "PRAIRIE_LISTENING_SOCKET"
"""Holds the descriptor of the socket that a child inherits."""
RESTART_S = 5.0
"""A child that lives shorter than this was not worth starting again at once."""


class ReplicaFailed(PrairieError):
    """A server process ended before it was ready."""


def inherited_socket() -> socket.socket | None:
    """The socket of the process that started this one, if it did so as a replica."""
    number = os.environ.pop(SOCKET_VARIABLE, None)
    return None if number is None else socket.socket(fileno=int(number))


class Replicas:
    """The children and what becomes of them."""

    def __init__(self, listening: socket.socket, command: Sequence[str], count: int) -> None:
        """`command`: arguments of `prairie` that start one server, with --json."""
        self.listening, self.command, self.count = listening, list(command), count
        self.children: list[subprocess.Popen[str]] = []
        self.stopping = threading.Event()
        self._started: dict[int, float] = {}

    def run(self, on_ready: Callable[[str], None], grace_s: float) -> None:
        """Serves until a signal; `on_ready` gets the line that the first child prints when it is ready.

        Raises ReplicaFailed when a child cannot start; the others are ended before.
        """
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for _ in range(self.count):
                self._start()
            said = [self._ready(child) for child in self.children]
            if not self.stopping.is_set():
                on_ready(said[0])
            while not self.stopping.wait(0.2):
                self._replace_dead()
        finally:
            self.stopping.set()
            self._end(grace_s)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start(self) -> None:
        descriptor = self.listening.fileno()
        child = subprocess.Popen(
            [sys.executable, "-m", "prairie", *self.command],
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[descriptor],
            env={**os.environ, SOCKET_VARIABLE: str(descriptor)},
            # A Ctrl-C in a terminal goes to this process alone, which tells the children.
            start_new_session=True,
        )
        self.children.append(child)
        self._started[child.pid] = time.monotonic()

    def _ready(self, child: subprocess.Popen[str]) -> str:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line and not self.stopping.is_set():
            raise ReplicaFailed("a server process ended before it was ready", mend="its sentence stands above")
        return line

    def _replace_dead(self) -> None:
        for child in [child for child in self.children if child.poll() is not None]:
            self.children.remove(child)
            lived = time.monotonic() - self._started.pop(child.pid)
            log.error("replica %d ended with %s after %.0f s; another is started", child.pid, child.returncode, lived)
            self.stopping.wait(max(0.0, RESTART_S - lived))
            if not self.stopping.is_set():
                self._start()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping.set()
        for child in self.children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    def _end(self, grace_s: float) -> None:
        self.listening.close()
        for child in self.children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_s + 15
        for child in self.children:
            try:
                child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if child.stdout is not None:
                child.stdout.close()
