"""Recipes of seconds, data and models for them, and ways to carry them out: in this process or in one to be killed."""

from __future__ import annotations

import io
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from prairie.cli.main import main
from prairie.data.chat_template import ChatTemplate
from prairie.data.tokenizer import Tokenizer
from prairie.models.config import ModelConfig
from prairie.models.transformer import Transformer
from prairie.models.weights import save_model
from prairie.pipeline import model_stages
from prairie.pipeline.context import Context, Made
from prairie.pipeline.handlers import HANDLERS
from prairie.pipeline.run import run
from prairie.recipe import resolve_recipe
from prairie.runtime import Progress, Runtime
from prairie.store.home import Home

COLOURS = ["red", "green", "blue", "white", "black", "grey", "pink", "gold", "褐色", "紫"]


def chat_rows(count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations in our own shape, every first question another one."""
    chance = random.Random(seed)
    return [
        {"messages": [
            {"role": "user", "content": f"what colour is thing {number}?"},
            {"role": "assistant", "content": f"It is {chance.choice(COLOURS)}."},
        ]}
        for number in range(count)
    ]  # fmt: skip


def pair_rows(count: int = 24) -> list[dict[str, Any]]:
    return [
        {"prompt": f"what colour is thing {number}?", "chosen": f"It is {COLOURS[number % 10]}.", "rejected": "no idea"}
        for number in range(count)
    ]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def data_stages(folder: Path) -> dict[str, Any]:
    """Conversations and preferences from files, and a tokenizer of them."""
    chats, pairs = write_jsonl(folder / "chats.jsonl", chat_rows()), write_jsonl(folder / "pairs.jsonl", pair_rows())
    return {
        "chats": {"kind": "prepare", "source": "file", "path": str(chats), "held_out": 0.1},
        "pairs": {"kind": "prepare", "source": "file", "path": str(pairs), "held_out": 0.1},
        "tokenizer": {"kind": "tokenizer", "data": ["chats", "pairs"], "vocab_size": 300},
    }


def learning(steps: int, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "steps": steps, "tokens_per_batch": 128, "max_tokens": 96, **more}


def training_recipe(folder: Path, steps: int = 12) -> dict[str, Any]:
    """Base (muon), sft, dpo, and an adapter; a third of a second of training each."""
    return {
        "name": "tiny",
        "seed": 5,
        "stages": {
            **data_stages(folder),
            "base": learning(
                steps, data="chats", tokenizer="tokenizer", shape={"depth": 2, "dim": 32, "context": 128},
                optimizer="muon", lr=4e-3,
            ),
            "sft": learning(steps, data="chats", start="base"),
            "dpo": learning(steps, objective="dpo", data="pairs", start="sft", lr=1e-3),
            "adapter": learning(steps, data="chats", start="dpo", adapter={"rank": 2, "dropout": 0.1}),
        },
    }  # fmt: skip


def write_recipe(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def quiet_runtime(seed: int = 5) -> Runtime:
    return Runtime(threads=1, seed=seed, progress=Progress(stream=io.StringIO(), quiet=True))


def run_here(tree: dict[str, Any], home: Home, overrides: tuple[str, ...] = ()) -> dict[str, Made]:
    recipe = resolve_recipe(json.loads(json.dumps(tree)), overrides)
    return run(Context(recipe, home, quiet_runtime(recipe.seed)), HANDLERS)


def prairie_run(recipe: Path, home: Path) -> None:
    """`prairie run` with checkpoints every other step; the whole of a process that may be killed."""
    sys.stdout = sys.stderr = open(home.with_suffix(".said"), "a")  # noqa: SIM115
    plain = model_stages.train_config
    model_stages.train_config = lambda *given: replace(plain(*given), save_every=2, log_every=1)
    main(["run", str(recipe), "--home", str(home), "--threads", "1", "--no-serve"])


def contents(home: Path) -> dict[str, dict[str, str]]:
    """Of every artifact: file -> sha256; metrics and their curves hold times, which differ."""
    with Home(home) as opened:
        found = opened.artifacts.list()
        for artifact in found:
            opened.artifacts.verify(artifact.id)
    return {
        artifact.name: {
            name: facts["sha256"]
            for name, facts in artifact.manifest["files"].items()
            if name not in ("metrics.jsonl", "curves.html")
        }
        for artifact in found
    }


def model_folder(folder: Path, seed: int = 0, *, embeddings: int | None = None) -> Path:
    """A Hugging Face folder with random weights."""
    rows = chat_rows()
    tokenizer = Tokenizer.train_bpe([m["content"] for row in rows for m in row["messages"]] * 2, 300)
    config = ModelConfig(
        vocab_size=embeddings or tokenizer.vocab_size, dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64,
        max_context=256, eos_id=tokenizer.eos_id,
    )  # fmt: skip
    template = ChatTemplate.builtin("chatml", tokenizer)
    save_model(
        Transformer(config).init_weights(seed), folder, tokenizer_hash=tokenizer.hash, template_hash=template.hash
    )
    tokenizer.save(folder)
    template.save(folder)
    return folder
