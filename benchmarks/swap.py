"""Champions that change while 64 people ask: what fails, what is not its model's answer, how long it takes, what stays.

    python -m benchmarks.swap [--case swap] [--quick] --json

A real `prairie serve` on two random models of 15 million parameters; each second for a minute (10 s when quick) the
other one is promoted, or the last promotion rolled back.

    swap                median time from the commit of the change to the moment from which new requests get the new
                        model, noticing it and reading 60 MB included; required: 0.1 s
    right answers       share that neither failed nor differs from what the named version alone gives; required: 1
    memory afterwards   resident set two seconds after the last request, over that before the first change; 1.1

Told beside them: what reading a model takes (`load_s`, a mean with the very first one); from the commit to the end of
the first answer by the new model (`first_answer_s`), beside what any answer takes under this load (`answer_s`); the
longest time within which nobody got an answer, in the half second after a change and in the half second before it
(`pause_s` and `pause_otherwise_s`, medians).
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from functools import cache
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from benchmarks.measure import Case, Found, run

CLIENTS, SECONDS, TOKENS = 64, 60, 6
QUESTIONS = [f"What is {n} plus {n}?" for n in range(8)]
SHAPE = {"dim": 384, "layers": 7, "heads": 6, "kv_heads": 6, "ffn_dim": 1024, "max_context": 256}


@cache
def minute(quick: bool) -> Found:
    """The whole experiment, once."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "home"
        size, right = _make(root)
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "prairie", "serve", "--home", str(root), "--port", "0", "--json"]
        with log.open("wb") as stderr:
            server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            found = _under_load(url, root, server.pid, right, 10 if quick else SECONDS)
        finally:
            server.terminate()
            server.wait(60)
        swaps = _swaps(log.read_text(encoding="utf-8"), found.pop("changes"))
    return {
        **found, "parameters": size, "swaps": len(swaps), "swap_s": statistics.median(swaps),
        "swap_s_worst": max(swaps), "clients": CLIENTS,
    }  # fmt: skip


def _make(root: Path) -> tuple[int, dict[str, dict[str, str]]]:
    """Two versions of one line; (parameters, version -> question -> its greedy answer)."""
    import torch

    from prairie.data.chat_template import ChatTemplate
    from prairie.data.records import Message
    from prairie.data.tokenizer import Tokenizer
    from prairie.engine.language_model import LanguageModel
    from prairie.models.config import ModelConfig
    from prairie.models.transformer import Transformer
    from prairie.models.weights import save_model
    from prairie.store.home import Home

    words = Tokenizer.train_bpe([*QUESTIONS, "The quick brown fox jumps over 13 lazy dogs."] * 4, 4096)
    template, right, size = ChatTemplate.builtin("chatml", words), {}, 0
    with Home(root) as home:
        for seed in (1, 2):
            model = Transformer(ModelConfig(vocab_size=4096, eos_id=words.eos_id, **SHAPE)).init_weights(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 2:
                        parameter.mul_(6)  # so that greedy choices are clear
            size = sum(parameter.numel() for parameter in model.parameters())
            with home.artifacts.create("model", f"random-{seed}", {"seed": seed}) as folder:
                save_model(model, folder, tokenizer_hash=words.hash, template_hash=template.hash)
                words.save(folder)
                template.save(folder)
            id = home.artifacts.id_of("model", {"seed": seed}, [], "")
            version = home.registry.register("spark", id, kind="model")
            alone = LanguageModel.load(home.artifacts.get(id).path)
            right[version.name] = {
                q: alone.generate([Message("user", q)], temperature=0, max_tokens=TOKENS).text for q in QUESTIONS
            }
        home.registry.promote("spark@1")
    assert right["spark@1"] != right["spark@2"]
    return size, right


def _under_load(url: str, root: Path, pid: int, right: dict[str, dict[str, str]], seconds: int) -> dict[str, Any]:
    from prairie.store.home import Home

    stop, wrong = threading.Event(), list[tuple[str, str]]()
    answers = list[tuple[float, float, str]]()
    """When each came (UNIX seconds), how long it took, whose it was."""
    host = url.removeprefix("http://")

    def client(number: int) -> None:
        http = HTTPConnection(host, timeout=120)  # light: 64 of a client library would take a core of their own
        for turn in itertools.count(number):
            if stop.is_set():
                http.close()
                return
            question, began = QUESTIONS[turn % len(QUESTIONS)], time.time()
            body = {"model": "spark", "messages": [{"role": "user", "content": question}], "temperature": 0}
            try:
                http.request(
                    "POST", "/v1/chat/completions", json.dumps({**body, "max_tokens": TOKENS}),
                    {"Content-Type": "application/json"},
                )  # fmt: skip
                said = json.loads(http.getresponse().read())
                name = f"spark@{said['prairie']['version']}"
                answers.append((time.time(), time.time() - began, name))
                if said["choices"][0]["message"]["content"] != right[name][question]:
                    wrong.append((name, question))
            except (OSError, HTTPException, KeyError, ValueError) as error:
                wrong.append((repr(error), question))
                http.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(8)  # the compiled form is made, both caches are as full as they get
    before, changes = _resident_mb(pid), []
    with Home(root) as home:
        for second in range(seconds):
            change = home.registry.promote("spark@2") if second % 2 == 0 else home.registry.rollback("spark")
            changes.append((change.name, time.time()))
            time.sleep(1)
    stop.set()
    for thread in threads:
        thread.join()
    time.sleep(2)
    after = _resident_mb(pid)
    metrics = HTTPConnection(host, timeout=120)
    metrics.request("GET", "/metrics")
    told = metrics.getresponse().read().decode()
    loads = {
        of: float(re.findall(rf'^prairie_load_seconds_{of}{{kind="model"}} (\S+)', told, re.MULTILINE)[0])
        for of in ("sum", "count")
    }
    return {
        "wrong": len(wrong), "requests": len(answers), "examples": wrong[:3], "changes": changes, "rss_mb": after,
        "memory_before_mb": round(before), "memory_after_mb": round(after), "load_s": loads["sum"] / loads["count"],
        **_seen(sorted(answers), changes),
    }  # fmt: skip


def _seen(answers: list[tuple[float, float, str]], changes: list[tuple[str, float]]) -> dict[str, float]:
    """What clients saw of the changes (top of the file)."""
    first, around = [], {"pause_s": [0.0], "pause_otherwise_s": [0.0]}
    for name, at in changes:
        first += [came - at for came, _, whose in answers if whose == name and came >= at][:1]
        for which, begin in (("pause_s", at), ("pause_otherwise_s", at - 0.5)):
            came = [begin, *(when for when, _, _ in answers if begin <= when < begin + 0.5), begin + 0.5]
            around[which].append(max(b - a for a, b in itertools.pairwise(came)))
    return {
        "first_answer_s": statistics.median(first), "answer_s": statistics.median(took for _, took, _ in answers),
        **{which: statistics.median(found) for which, found in around.items()},
    }  # fmt: skip


def _swaps(log: str, changes: list[tuple[str, float]]) -> list[float]:
    """Seconds from each change to the line in the server's log that says that it was followed."""
    said = [
        (match[2], datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f").timestamp())
        for match in re.finditer(r"^(\S+ \S+) spark is now (\S+)$", log, re.MULTILINE)
    ]
    followed = []
    for name, at in changes:
        later = [when - at for other, when in said if other == name and when >= at - 0.05]
        if later:
            followed.append(max(0.0, min(later)))
    return followed


def _resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def swap(quick: bool) -> Found:
    found = minute(quick)
    return {**found, "rate": found["swap_s"]}


def wrong(quick: bool) -> Found:
    found = minute(quick)
    return {**found, "rate": 1.0 - found["wrong"] / found["requests"]}


def memory(quick: bool) -> Found:
    found = minute(quick)
    return {**found, "rate": found["memory_after_mb"] / found["memory_before_mb"]}


def required(value: float) -> Any:
    return lambda quick: {"rate": value, "rss_mb": 0.0}


CASES = [
    Case("swap", "required", "s", swap, required(0.1), lower_is_better=True),
    Case("right answers", "required", "share", wrong, required(1.0)),
    Case("memory afterwards", "required", "of before", memory, required(1.1), lower_is_better=True),
]

if __name__ == "__main__":
    run("swap", CASES, repeats=1)
