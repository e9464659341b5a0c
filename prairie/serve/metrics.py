"""What the server counts, for Prometheus: one private registry per server, labels only from closed sets.

A model label is a line of the registry or a folder that was named at the start, never what a client typed.
"""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The figures behind GET /metrics. Safe from any thread."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry(auto_describe=False)
        self.http = Counter(
            "prairie_http_requests", "HTTP requests answered", ["method", "route", "status"], registry=r
        )
        self.http_seconds = Histogram(
            "prairie_http_request_seconds", "First line to last byte", ["route"], buckets=LATENCY_S, registry=r
        )  # fmt: skip
        self.choices = Counter("prairie_choices", "Answers finished", ["model", "finish_reason"], registry=r)
        self.tokens = Counter("prairie_tokens", "prompt, cached, completion", ["model", "kind"], registry=r)
        self.first_token = Histogram(
            "prairie_first_token_seconds", "From arrival to the first token", ["model"], buckets=LATENCY_S, registry=r
        )
        self.queue = Histogram(
            "prairie_queue_seconds", "From arrival to a place in a batch", ["model"], buckets=LATENCY_S, registry=r
        )
        self.per_token = Histogram(
            "prairie_per_token_seconds",
            "Mean time between tokens of an answer",
            ["model"],
            buckets=PER_TOKEN_S,
            registry=r,
        )
        self.engines = Gauge(
            "prairie_engine",
            "Of all engines: running, waiting, kv_blocks, kv_blocks_held, preemptions, drafted_tokens, accepted_tokens",
            ["what"],
            registry=r,
        )
        self.refused = Counter(
            "prairie_refused_requests", "Requests turned away because the queue was full", registry=r
        )
        self.votes = Counter("prairie_votes", "Votes on disk", ["kind"], registry=r)
        self.swaps = Counter("prairie_swaps", "Champions that changed while serving", ["model"], registry=r)
        self.taken_back = Counter(
            "prairie_taken_back", "Trials ended and promotions taken back by the guard", ["model"], registry=r
        )
        self.shadows = Counter("prairie_shadow_answers", "done, failed, skipped", ["model", "end"], registry=r)
        self.load_failures = Counter("prairie_load_failures", "Versions that could not be loaded", registry=r)
        self.load_seconds = Histogram(
            "prairie_load_seconds", "Bringing a version into memory", ["kind"], buckets=LATENCY_S, registry=r
        )
        self.resident = Gauge("prairie_resident", "What is in memory: engines, versions", ["kind"], registry=r)
        self.rss = Gauge("prairie_resident_memory_bytes", "Resident memory of the process", registry=r)

    def render(self) -> bytes:
        self.rss.set(resident_bytes())
        return generate_latest(self.registry)


def resident_bytes() -> int:
    """RSS of this process; 0 where /proc is missing."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
