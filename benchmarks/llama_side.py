"""llama.cpp's half of `benchmarks.serving`, run by the Python of `make peers`: a job on stdin, figures on stdout, JSON.

    {"path", "slots", "threads", "requests": [[prompt ids, tokens wanted], ...], "measure": "mixed" | "single"}

Continuous batching over the C API as llama-server does it, without HTTP: a slot that is free takes the next request at
once, prompts and single tokens go through one batch, greedy choice by argmax. Needs neither torch nor Prairie.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np

STEP_TOKENS = 512


class Slots:
    """A model with a context of several sequences."""

    def __init__(self, path: str, slots: int, threads: int, context: int) -> None:
        llama.llama_backend_init()
        self.quiet = llama.llama_log_callback(lambda *_: None)
        llama.llama_log_set(self.quiet, ctypes.c_void_p(0))
        settings = llama.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(path.encode(), settings)
        shape = llama.llama_context_default_params()
        shape.n_ctx, shape.n_seq_max = context * slots, slots
        shape.n_batch, shape.n_ubatch = 2048, STEP_TOKENS
        shape.n_threads = shape.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, shape)
        self.memory = llama.llama_get_memory(self.context)
        self.batch = llama.llama_batch_init(2048, 0, 1)
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.slots = slots

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, slot, wants logits) of one step."""
        self.batch.n_tokens = len(tokens)
        for i, (token, position, slot, wanted) in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, wanted
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, slot
        if llama.llama_decode(self.context, self.batch):
            raise SystemExit("llama_decode failed")

    def best(self, place: int) -> int:
        logits = llama.llama_get_logits_ith(self.context, place)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())

    def answer(self, requests: list[tuple[list[int], int]]) -> tuple[list[list[int]], list[float]]:
        """The answers, and when each step ended."""
        llama.llama_memory_clear(self.memory, True)
        waiting = list(enumerate(requests))[::-1]
        running: dict[int, int] = {}
        answers: list[list[int]] = [[] for _ in requests]
        ended = []
        while waiting or running:
            tokens: list[tuple[int, int, int, bool]] = []
            places: dict[int, int] = {}
            for slot, number in running.items():
                prompt, _ = requests[number]
                places[len(tokens)] = slot
                tokens.append((answers[number][-1], len(prompt) + len(answers[number]) - 1, slot, True))
            for slot in range(self.slots):
                if slot not in running and waiting and len(tokens) + len(waiting[-1][1][0]) <= STEP_TOKENS:
                    number, (prompt, _) = waiting.pop()
                    running[slot] = number
                    tokens += [(token, at, slot, at == len(prompt) - 1) for at, token in enumerate(prompt)]
                    places[len(tokens) - 1] = slot
            self.decode(tokens)
            for place, slot in places.items():
                number = running[slot]
                answers[number].append(self.best(place))
                if len(answers[number]) == requests[number][1]:
                    llama.llama_memory_seq_rm(self.memory, slot, -1, -1)
                    del running[slot]
            ended.append(time.perf_counter())
        return answers, ended


def peak_rss_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def figures(job: dict[str, Any]) -> dict[str, Any]:
    requests = [(prompt, wanted) for prompt, wanted in job["requests"]]
    slots = Slots(job["path"], job["slots"], job["threads"], job["context"])
    slots.answer([(requests[0][0][:16], 8)])  # warms up
    began = time.perf_counter()
    answers, ended = slots.answer(requests)
    if job["measure"] == "single":  # the first step is the prompt's
        rate = (len(ended) - 1) / (ended[-1] - ended[0])
    else:
        rate = sum(map(len, answers)) / (ended[-1] - began)
    return {
        "rate": rate, "rss_mb": peak_rss_mb(), "first_token_ms": round(1000 * (ended[0] - began), 1),
        "begins": answers[0][:8],
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(figures(json.load(sys.stdin))))
