"""`prairie serve --replicas N`: one port, one home, processes that die and come back, one stop for all."""

import os
import signal
import time
from pathlib import Path

import httpx
import pytest
import tiny_server
from tiny_server import Process, ask

from prairie.store.home import Home


def answers(url, count):
    """Answers over fresh connections, so that the kernel may choose anew."""
    got = []
    for _ in range(count):
        got.append(httpx.post(f"{url}/v1/chat/completions", json=ask("spark", max_tokens=4), timeout=60))
    return got


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_replicas_share_a_port_and_a_home(spark_root, tmp_path):
    import shutil

    root = tmp_path / "home"
    shutil.copytree(spark_root, root)
    process = Process(root, "spark", "--replicas", "2", "--threads", "1")
    try:
        told = process.wait_ready()
        url, parent = told["url"], told["pid"]
        assert told["replicas"] == 2
        children = children_of(parent)
        assert len(children) == 2
        said = answers(url, 6)
        assert {answer.status_code for answer in said} == {200}
        with Home(root) as home:
            assert {a.json()["id"] for a in said} <= {row.id for row in home.feedback.responses()}, "one store"
            home.registry.promote(home.registry.resolve("spark@2"))
            deadline = time.monotonic() + 30
            while {a.json()["prairie"]["version"] for a in answers(url, 6)} != {2}:
                assert time.monotonic() < deadline, "the swap is not seen by all"
            os.kill(children[0], signal.SIGKILL)
            deadline = time.monotonic() + 60
            while len(children_of(parent)) < 2:
                assert time.monotonic() < deadline, "no replica came back"
                time.sleep(0.2)
            assert {a.status_code for a in answers(url, 4)} == {200}
        assert process.end() == 0
        assert not [pid for pid in children if os.path.exists(f"/proc/{pid}")], "all have ended"
    finally:
        process.end(signal.SIGKILL)
    assert tiny_server.bind("127.0.0.1", int(url.rpartition(":")[2])).close() is None, "the port is free"
