"""The slow form of the engine, and tiny models to compare on: no cache, no batch, a whole forward pass per token."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import numpy as np
import torch

from prairie.data.chat_template import ChatTemplate
from prairie.data.tokenizer import Tokenizer
from prairie.engine.engine import Engine
from prairie.engine.request import Request, SamplingParams
from prairie.engine.sampler import uniform
from prairie.models.config import ModelConfig
from prairie.models.lora import AdapterRows, LoRA, LoRAConfig
from prairie.models.transformer import Transformer
from prairie.ops.attention import PackedDocuments

TEXTS = ("the horses of the prairie run", "grass grows 12 feet", "草原上的马 🐎 跑得很快", "what is 2 + 3? it is 5")


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe(TEXTS * 4, 320)


@functools.cache
def template() -> ChatTemplate:
    return ChatTemplate.builtin("chatml", tokenizer())


@functools.cache
def model(seed: int = 0, kv_heads: int = 2, vocab_size: int = 0, context: int = 96) -> Transformer:
    """Weights are large enough for lively answers, and small enough that rounding does not grow to matter."""
    vocab_size = vocab_size or tokenizer().vocab_size
    config = ModelConfig(
        vocab_size=vocab_size, dim=32, layers=2, heads=4, kv_heads=kv_heads, ffn_dim=48, max_context=context,
        tie_embeddings=False,
    )  # fmt: skip
    made = Transformer(config).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made.requires_grad_(False).eval()


@functools.cache
def adapter(seed: int) -> LoRA:
    """An adapter that changes answers."""
    lora = LoRA.create(model(), LoRAConfig(rank=4), seed=seed).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for path in lora.paths:
        b_OR = lora.pair(path)[1]
        b_OR.copy_(torch.randn(b_OR.shape, generator=generator) * 0.5)
    return lora.eval()


def engine(**settings) -> Engine:
    settings = {"weights_hash": "base", "max_batch": 8} | settings
    return Engine(settings.pop("model", model()), tokenizer(), template(), **settings)


@torch.no_grad()
def logits_of(ids: Sequence[int], lora: LoRA | None = None, base: Transformer | None = None) -> torch.Tensor:
    """(T, V) of a whole row."""
    base = base or model()
    adapters = [AdapterRows(lora)] if lora is not None else []
    return base.logits(base(torch.tensor(ids), PackedDocuments([len(ids)]), adapters), adapters)


def greedy(
    prompt: Sequence[int], count: int, lora: LoRA | None = None, base: Transformer | None = None, stops: bool = True
) -> list[int]:
    """What an engine has to answer; ends after a stop token of the template."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_of(ids, lora, base)[-1, : tokenizer().vocab_size].argmax()))
        if stops and ids[-1] in template().stop_ids:
            break
    return ids[len(prompt) :]


def sampled(prompt: Sequence[int], count: int, seed: int, temperature: float) -> list[int]:
    """Token i is where the cumulated probability passes the number that (seed, i) hashes to."""
    ids = list(prompt)
    for i in range(count):
        row_V = logits_of(ids)[-1, : tokenizer().vocab_size].double() / temperature
        number = float(uniform(np.array([seed], dtype=np.uint64), np.array([i], dtype=np.uint64))[0])
        ids.append(int(torch.searchsorted(row_V.softmax(-1).cumsum(-1), number, right=True)))
    return ids[len(prompt) :]


@functools.cache
def prompts(count: int = 24, seed: int = 0) -> list[list[int]]:
    """Of 1 to 60 tokens; every second one starts with the same 20."""
    rng = random.Random(seed)

    def words(n: int) -> list[int]:
        return [rng.randrange(3, tokenizer().vocab_size) for _ in range(n)]

    shared = words(20)
    return [(shared if i % 2 else []) + words(rng.choice((1, 2, 7, 16, 17, 40))) for i in range(count)]


def expected(place: int, count: int, adapter_seed: int | None = None) -> tuple[int, ...]:
    """The greedy answer to a prompt of `prompts()`."""
    said = _said(place, adapter_seed)
    lora = adapter(adapter_seed) if adapter_seed is not None else None
    while len(said) < count and not (said and said[-1] in template().stop_ids):
        said += greedy([*prompts()[place], *said], 1, lora)
    return tuple(said[:count])


@functools.cache
def _said(place: int, adapter_seed: int | None) -> list[int]:
    """What was computed of an answer so far: each token once, however many tests want how much of it."""
    return []


def request(id: str, ids: Sequence[int], adapter: str | None = None, salt: str = "", **sampling) -> Request:
    return Request(id, ids, SamplingParams(**{"temperature": 0.0} | sampling), adapter, salt)
