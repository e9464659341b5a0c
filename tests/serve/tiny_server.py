"""A home with tiny random models, and servers over it: one in a thread of the test, or `prairie serve` as a process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from prairie.data.chat_template import ChatTemplate
from prairie.data.tokenizer import Tokenizer
from prairie.models.config import ModelConfig
from prairie.models.lora import LoRA, LoRAConfig
from prairie.models.transformer import Transformer
from prairie.models.weights import save_model
from prairie.serve.app import Service, Settings, create_app
from prairie.serve.server import bind, serve_on, url_of
from prairie.store.home import Home
from prairie.store.registry import Version

TEXTS = [
    "The quick brown fox jumps over 13 lazy dogs.",
    "草原上的马在奔跑。",
    "café naïve 🐎🌾",
    "User: hi\nAssistant: hello",
]
CONTEXT = 160


def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe(TEXTS * 4, 320)


def make_model(folder: Path, seed: int, unnamed: int = 0) -> Path:
    """A complete model folder with random weights, large enough that its greedy choices are clear; `unnamed` rows of
    its vocabulary are no tokens."""
    words = tokenizer()
    config = ModelConfig(
        vocab_size=words.vocab_size + unnamed, dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, max_context=CONTEXT,
        eos_id=words.eos_id,
    )  # fmt: skip
    model = Transformer(config).init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(12)
    template = ChatTemplate.builtin("chatml", words)
    save_model(model, folder, tokenizer_hash=words.hash, template_hash=template.hash)
    words.save(folder)
    template.save(folder)
    return folder


def make_adapter(folder: Path, model: Transformer, seed: int, base_artifact: str) -> Path:
    """A PEFT folder whose delta is large enough to be seen in the answers."""
    lora = LoRA.create(model, LoRAConfig(rank=2), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path in lora.paths:
            _, b_OR = lora.pair(path)
            b_OR.copy_(torch.empty(b_OR.shape).normal_(0.0, 0.3, generator=generator))
    words = tokenizer()
    hashes = {"tokenizer_hash": words.hash, "template_hash": ChatTemplate.builtin("chatml", words).hash}
    lora.save(folder, base_artifact=base_artifact, **hashes)
    return folder


def register_model(home: Home, line: str, seed: int) -> Version:
    with home.artifacts.create("model", line, {"seed": seed}) as folder:
        make_model(folder, seed)
    id = home.artifacts.id_of("model", {"seed": seed}, [], "")
    return home.registry.register(line, id, kind="model", figures={"seed": seed})


def register_adapter(home: Home, line: str, base: Version, seed: int) -> Version:
    from prairie.models.weights import load_model

    model = load_model(home.artifacts.get(base.artifact_id).path)
    config = {"adapter": seed}
    with home.artifacts.create("adapter", line, config, [base.artifact_id]) as folder:
        make_adapter(folder, model, seed, base.artifact_id)
    id = home.artifacts.id_of("adapter", config, [base.artifact_id], "")
    return home.registry.register(line, id, kind="adapter", base=base.artifact_id)


def make_home(root: Path) -> Home:
    """spark@1 (champion) and spark@2 are models, spark@3 an adapter on spark@1, spark:poet@1 (champion) another."""
    home = Home(root)
    first = register_model(home, "spark", 1)
    register_model(home, "spark", 2)
    register_adapter(home, "spark", first, 3)
    poet = register_adapter(home, "spark:poet", first, 4)
    home.registry.promote(first)
    home.registry.promote(poet)
    return home


def wait_for(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    """Until it holds. The limit is for what will never hold: on a busy machine all else may take long."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class Running:
    """A server in a thread."""

    def __init__(
        self, home: Home, names: Sequence[str] = (), settings: Settings | None = None, grace_s: float = 5, **engine: Any
    ) -> None:
        self.listening = bind("127.0.0.1", 0)
        self.url = url_of(self.listening)
        self.app = create_app(home, names, settings, **engine)
        self.service: Service = self.app.state.service
        self.home = home
        self.error: BaseException | None = None
        ready = threading.Event()

        def run() -> None:
            try:
                serve_on(self.listening, self.app, grace_s=grace_s, on_ready=ready.set)
            except BaseException as error:
                self.error = error
            finally:
                ready.set()

        self.thread = threading.Thread(target=run)
        self.thread.start()
        assert ready.wait(60)
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        self.service.on_failure()
        self.thread.join(60)
        assert not self.thread.is_alive()

    def idle(self, limit_s: float = 60.0) -> None:
        """Waits until nothing is under way."""
        desk, worker = self.service.desk, self.service.worker
        wait_for(lambda: not (desk.pending or worker.busy or desk._tasks), limit_s)

    def slowed(self, seconds: float = 0.05) -> threading.Event:
        """From now on a step takes so much longer, until the event is set: time to do something in the meantime, also
        where this machine has little."""
        hurry = threading.Event()
        for base in self.service.models._bases.values():
            step = base.model.engine.step
            base.model.engine.step = lambda step=step: (hurry.wait(seconds), step())[1]
        return hurry

    def kv_blocks_held(self) -> int:
        """Blocks that are neither free nor only cached."""
        return sum(base.model.engine.figures()["kv_blocks_held"] for base in self.service.models._bases.values())


@contextlib.contextmanager
def running(
    home: Home, names: Sequence[str] = (), settings: Settings | None = None, **engine: Any
) -> Iterator[Running]:
    server = Running(home, names, settings, **engine)
    try:
        yield server
    finally:
        server.stop()


class Process:
    """`prairie serve` as a user starts it."""

    def __init__(self, root: Path, *arguments: str, port: int = 0) -> None:
        self.log = root.with_suffix(".log")
        command = [
            sys.executable,
            "-m",
            "prairie",
            "serve",
            "--home",
            str(root),
            "--port",
            str(port),
            "--json",
            *arguments,
        ]
        with self.log.open("ab") as stderr:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    def wait_ready(self) -> dict[str, Any]:
        """What the command prints when all models are loaded."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        return json.loads(line)

    def end(self, number: int = signal.SIGTERM, limit_s: float = 30) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(limit_s)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


def ask(model: str, content: str = "草原 fox", **more: Any) -> dict[str, Any]:
    """A chat request's body."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 12,
        "temperature": 0,
        **more,
    }


def events(text: str) -> list[Any]:
    """The objects of a stream; asserts that it is well formed and ends by [DONE]."""
    assert text.endswith("data: [DONE]\n\n")
    lines = text.split("\n\n")[:-2]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]
