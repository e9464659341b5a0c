"""`--processes N`: the same command in N processes that share its work, as torchrun would start them on one machine.

Not here: how they share it (`train.ranks`, `pipeline.run`).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

GRACE_S = 30.0
"""What the others are given to notice that one has failed."""


def are_to_be_started(processes: int) -> bool:
    """Whether this process is the one that starts them, and none of them."""
    return processes > 1 and "RANK" not in os.environ


def run_in(processes: int) -> None:
    """Starts this command `processes` times, passes SIGTERM on to each, and ends by SystemExit as they end: with 0, or
    with the code of the first that did not."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places = [{**told, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    command = [sys.executable, "-m", "prairie", *sys.argv[1:]]
    children = [
        subprocess.Popen(command, env={**os.environ, **{name: str(value) for name, value in place.items()}})
        for place in places
    ]

    def pass_on(number: int, frame: object) -> None:
        for child in children:
            child.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal's Ctrl-C reaches them without us
    raise SystemExit(_code_of(children))


def _code_of(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits for all; once one has failed, for `GRACE_S` at most."""
    code, until = 0, float("inf")
    while any(child.poll() is None for child in children):
        failed = [child.returncode for child in children if child.returncode]
        if failed and not code:
            code, until = failed[0], time.monotonic() + GRACE_S
        if time.monotonic() > until:
            for child in children:
                child.kill()
        time.sleep(0.05)
    code = code or next((child.returncode for child in children if child.returncode), 0)
    return code if code >= 0 else 128 - code
