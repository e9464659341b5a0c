"""A real server for the browser: `prairie serve` in a process of its own, on a home with two models made on the spot.

The models babble: each is a Transformer whose blocks add nothing and whose head holds the logarithms of which token
follows which in a few sentences, so that nothing is trained, answers are words, and only the token limit ends them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from prairie.data.chat_template import ChatTemplate
    from prairie.data.tokenizer import Tokenizer
    from prairie.store.home import Home

SPARK = (
    "The fox sat under the old oak and waited for the rain to stop.",
    "A small bird came down to the grass and asked the fox for a story.",
    "Then the sun came back, and the wind went over the grass like a wave.",
    "小狐狸坐在老橡树下，等着雨停。",
    "一只小鸟飞到草地上，请小狐狸讲一个故事。",
    "太阳出来了，风吹过草地，像波浪一样。",
)
TINDER = (
    "Fire keeps the night away, and the night keeps the fire warm.",
    "We sang by the embers until the stars were tired of us.",
    "火光赶走黑夜，我们围着火堆唱歌，直到星星也累了。",
)
NEVER = -40.0
MODELS_ARE_KNOWN = "#model option:not([value=''])"
"""What stands on the page once it has heard from the server."""


def babbler(folder: Path, tokenizer: Tokenizer, template: ChatTemplate, texts: tuple[str, ...]) -> None:
    """Writes a model folder that continues any prompt with words of `texts`."""
    import torch

    from prairie.models.config import ModelConfig
    from prairie.models.transformer import Transformer
    from prairie.models.weights import save_model

    size = tokenizer.vocab_size
    follows = torch.zeros(size, size)
    starts = torch.zeros(size)
    for text in texts:
        ids = tokenizer.encode(text + " ")
        starts[ids[0]] += 1
        for one, two in pairwise(ids):
            follows[one, two] += 1
        follows[ids[-1]] += starts
    alone = follows.sum(1) == 0
    follows[alone] = starts  # what ends a prompt, and every token that no text holds
    config = ModelConfig(size, size, layers=1, heads=8, kv_heads=8, ffn_dim=8, max_context=4096, tie_embeddings=False)
    model = Transformer(config).init_weights(0)
    with torch.no_grad():
        model.embed.copy_(torch.eye(size))
        for name, parameter in model.layers.named_parameters():
            if name.rsplit(".", 1)[-1] in ("o", "down"):
                parameter.zero_()
        logits = (follows / follows.sum(1, keepdim=True)).log().clamp_min(NEVER)
        assert model.head is not None
        model.head.copy_(logits.T / size**0.5)  # the norm stretches a unit vector to the square root of its width
    save_model(model, folder, template_hash=template.hash, tokenizer_hash=tokenizer.hash)
    tokenizer.save(folder)
    template.save(folder)


def make_home(root: Path) -> Home:
    """A home whose lines `spark` and `tinder` have one promoted version each."""
    from prairie.data.chat_template import ChatTemplate
    from prairie.data.tokenizer import Tokenizer
    from prairie.store.home import Home

    home = Home(root)
    tokenizer = Tokenizer.train_bpe([*SPARK * 4, *TINDER * 4], 400)
    assert tokenizer.vocab_size % 16 == 0, "the width is the vocabulary's size, shared by 8 heads of an even size"
    template = ChatTemplate.builtin("chatml", tokenizer)
    for line, texts in (("spark", SPARK), ("tinder", TINDER)):
        with home.artifacts.create("model", line, {"texts": list(texts)}) as folder:
            babbler(folder, tokenizer, template, texts)
        made = home.artifacts.id_of("model", {"texts": list(texts)}, [], "")
        home.registry.promote(home.registry.register(line, made, kind="model"))
    return home


def go_home(root: Path) -> Home:
    """A home whose line `go3` has been turned twice, on boards of 3 lines, in seconds."""
    import io

    from prairie.flywheel.go import HANDLERS as GO
    from prairie.pipeline.context import Context
    from prairie.pipeline.handlers import HANDLERS
    from prairie.pipeline.run import run
    from prairie.recipe import resolve_recipe
    from prairie.runtime import Progress, Runtime
    from prairie.store.home import Home

    stages = {
        "net": {"kind": "tower", "size": 3, "blocks": 2, "width": 16},
        "publish": {"kind": "publish", "line": "go3", "model": "net"},
        "turns": {
            "kind": "selfplay", "line": "go3", "start": "publish", "turns": 2,
            "play": {"games": 12, "visits": 12, "fast_visits": 4, "full_share": 0.5},
            "learn": {"batch": 32, "passes": 2}, "match": {"games": 12, "visits": 4, "opening_moves": 2},
        },
    }  # fmt: skip
    home = Home(root)
    quiet = Runtime(threads=1, seed=1, progress=Progress(io.StringIO(), quiet=True))
    run(Context(resolve_recipe({"name": "go3", "seed": 1, "stages": stages}), home, quiet), {**HANDLERS, **GO})
    return home


def follow_to(page: Page) -> None:
    """Waits until the chat page has heard of its models."""
    page.locator(MODELS_ARE_KNOWN).first.wait_for(state="attached")


class Site:
    """`prairie serve` on a home; may be killed and started again on the same port."""

    def __init__(self, home: Home) -> None:
        self.home = home
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = home.root / "serve.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Site:
        command = [sys.executable, "-m", "prairie", "serve", "--home", str(self.home.root), "--port", str(self.port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        end = time.monotonic() + 240  # one that gets no processor time is slow, not wrong
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                # A server with keys keeps even this to itself; the page waits for the models then.
                if httpx.get(self.url + "/readyz").status_code in (200, 401):
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        self.kill()
        raise AssertionError(f"the server did not start: {self.log.read_text()}")

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
