"""Clients that mean no good, and long days: drips, a thousand leavers, minutes under load with flat memory."""

import json
import os
import random
import socket
import statistics
import threading
import time
from collections import Counter
from urllib.parse import urlparse

import httpx
import pytest
from tiny_server import ask, running

from prairie.serve.metrics import resident_bytes


def connect(server):
    url = urlparse(server.url)
    return socket.create_connection((url.hostname, url.port), timeout=20)


def dripped(raw, data, every_s=0.05):
    """Sends bytes one by one until the other side ends it; what it said, and how many bytes it took."""
    said = b""
    raw.settimeout(every_s)
    for sent, byte in enumerate(data):
        try:
            raw.sendall(bytes([byte]))
            said += raw.recv(4096)
        except TimeoutError:
            continue
        except OSError:
            return said, sent
        if said or not raw.fileno():
            break
    raw.settimeout(0.5 if said else 20)
    try:
        while piece := raw.recv(4096):
            said += piece
    except OSError:
        pass
    return said, sent


def test_a_dripping_head_is_cut_off(home, monkeypatch):
    monkeypatch.setattr("prairie.serve.server.HEAD_S", 1.0)
    with running(home, ["spark"]) as server:
        with connect(server) as raw:
            said, sent = dripped(raw, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 400)
            assert not said and sent < 400
        with connect(server) as silent:
            silent.settimeout(60)
            assert silent.recv(10) == b"", "nor may one say nothing at all"
        with httpx.Client(base_url=server.url, timeout=30) as http:
            assert http.get("/healthz").status_code == 200
            time.sleep(1.2)
            assert http.get("/healthz").status_code == 200, "nor is the time between two heads that of one"
            slow = http.post("/v1/chat/completions", json=ask("spark", max_tokens=100, ignore_eos=True))
            assert slow.status_code == 200, "an answer may take longer than a head"


def test_a_dripping_body_is_cut_off(home, monkeypatch):
    monkeypatch.setattr("prairie.serve.gate.BODY_TIMEOUT_S", 0.5)
    with running(home, ["spark"]) as server, connect(server) as raw:
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n"
        )
        said, _ = dripped(raw, b" " * 100)
        assert b" 408 " in said.split(b"\r\n")[0], said[:200]
        assert server.service.desk.pending == 0


def leave(server, number, rng):
    """Asks and goes away: at once, in the middle, while queued, after the first bytes."""
    body = ask("spark", f"go {number}", stream=number % 2 == 0, n=1 + number % 3, max_tokens=60, ignore_eos=True)
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    with connect(server) as raw:
        raw.sendall(head.encode() + data[: len(data) if number % 7 else len(data) // 2])
        time.sleep(rng.random() * 0.05)


@pytest.mark.slow
def test_a_thousand_leavers_leak_nothing(home):
    with running(home, ["spark"]) as server:
        rng = random.Random(0)

        def some(first):
            for number in range(first, 1000, 8):
                leave(server, number, rng)

        threads = [threading.Thread(target=some, args=(first,)) for first in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        server.idle(60)
        assert server.kv_blocks_held() == 0 and server.service.desk.pending == 0
        engine = server.service.models._residents["spark@1"].engine
        engine.cache.pool.check([])
        assert not engine.has_work and all(r.in_use == 0 for r in server.service.models._residents.values())
        assert not [row for row in home.feedback.responses() if row.status == "started"]
        assert httpx.post(f"{server.url}/v1/chat/completions", json=ask("spark"), timeout=30).status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_minutes_under_load_with_flat_memory(home):
    """A soak: answers, streams, forms, leavers and votes, `PRAIRIE_SOAK_S` seconds of it (eight minutes)."""
    lasts = float(os.environ.get("PRAIRIE_SOAK_S", 480))
    with running(home, ["spark"]) as server:
        until, failures, done = time.monotonic() + lasts, [], Counter()

        def talk(seed):
            rng = random.Random(seed)
            with httpx.Client(base_url=server.url, timeout=600) as http:
                while time.monotonic() < until:
                    form = {"guided_choice": ["yes", "no"]} if rng.random() < 0.2 else {}
                    body = ask("spark", "x" * rng.randrange(1, 60), temperature=1, stream=rng.random() < 0.5, **form)
                    if rng.random() < 0.1:
                        leave(server, rng.randrange(100), rng)
                        done["left"] += 1
                    answer = http.post("/v1/chat/completions", json=body)
                    if answer.status_code != 200:
                        failures.append(answer.text)
                        continue
                    done["answers"] += 1
                    if not body["stream"] and rng.random() < 0.3:
                        vote = {"response_id": answer.json()["id"], "kind": "thumb", "value": "up"}
                        done["votes"] += http.post("/v1/feedback", json=vote).status_code == 201

        threads = [threading.Thread(target=talk, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        times, levels = [], []
        while time.monotonic() < until:
            time.sleep(lasts / 48)
            times.append((lasts + time.monotonic() - until) / 60)
            levels.append(resident_bytes() / 2**20)
        for thread in threads:
            thread.join()
        server.idle(60)
        assert not failures and done["answers"] > lasts, (failures[:2], done)
        assert server.kv_blocks_held() == 0
        # The first third warms up: caches, compiled grammars, threads.
        warm = len(levels) // 3
        slope = statistics.linear_regression(times[warm:], levels[warm:]).slope
        print(f"{dict(done)} in {times[-1]:.1f} minutes; {slope:+.2f} MiB/minute;", [round(level) for level in levels])
        assert levels[-1] - levels[warm] < 0.03 * levels[warm] + 8, levels
