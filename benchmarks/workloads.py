"""The work that both sides of a training benchmark do: shapes of models, rows of tokens, and how each side begins.

Rows are drawn from a seed: lengths lognormal (median 160 tokens, 30 to 800) as in chats, the last 65% of a row is
learnt. Both sides get the same token ids, so that neither pays for words.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.measure import Found, forget_peak, peak_rss_mb

SHAPES = {  # name: (dim, layers, heads, ffn_dim)
    "1m": (128, 4, 4, 352),
    "10m": (320, 6, 5, 864),
    "50m": (512, 12, 8, 1376),
}
CONTEXT = 2048
BOS, EOS, PAD = 1, 2, 0
FIRST_WORD = 8
"""Ids below are marks."""
Row = tuple[list[int], int]
"""Token ids, and how many of them at the end are learnt."""


def lognormal_lengths(count: int, median: float, least: int, most: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [int(min(most, max(least, math.exp(rng.gauss(math.log(median), 0.75))))) for _ in range(count)]


def chats(count: int, vocabulary: int, seed: int = 0) -> list[Row]:
    """Conversations as token ids."""
    rng = np.random.default_rng(seed)
    lengths = lognormal_lengths(count, 160, 30, 800, seed)
    return [(rng.integers(FIRST_WORD, vocabulary, n).tolist(), max(1, int(0.645 * n))) for n in lengths]


def preferences(
    prompts: int, pairs: int, vocabulary: int, seed: int = 0
) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) as token ids, `pairs` of them for each prompt."""
    rng = np.random.default_rng(seed)
    answers = iter(lognormal_lengths(2 * prompts * pairs, 120, 20, 300, seed + 1))
    made = []
    for length in lognormal_lengths(prompts, 160, 30, 500, seed):
        prompt = rng.integers(FIRST_WORD, vocabulary, length).tolist()
        for _ in range(pairs):
            chosen, rejected = (rng.integers(FIRST_WORD, vocabulary, next(answers)).tolist() for _ in range(2))
            made.append((prompt, chosen, rejected))
    return made


def warm_up_of(steps: int) -> int:
    """Steps at the beginning that are not counted: two, or one of few."""
    return 2 if steps >= 8 else 1


# --- ours -------------------------------------------------------------------------------------------------------------


def our_model(shape: str, vocabulary: int, seed: int = 0) -> Any:
    from prairie.models.config import ModelConfig
    from prairie.models.transformer import Transformer

    dim, layers, heads, ffn_dim = SHAPES[shape]
    config = ModelConfig(
        vocab_size=vocabulary, dim=dim, layers=layers, heads=heads, kv_heads=heads, ffn_dim=ffn_dim, max_context=CONTEXT
    )
    return Transformer(config).init_weights(seed)


def our_rows(rows: list[Row], group: int = 1) -> Any:
    from prairie.data.loader import TokenDataset

    ids = np.concatenate([np.asarray(ids, np.uint32) for ids, _ in rows])
    mask = np.concatenate([np.arange(len(ids)) >= len(ids) - learnt for ids, learnt in rows])
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in rows])]).astype(np.int64)
    return TokenDataset(ids, mask, offsets, group=group)


def our_runtime() -> Any:
    """All cores, no bar, and the dtype in which this machine multiplies fastest."""
    from prairie.runtime import Progress, Runtime

    runtime = Runtime.detect(progress=Progress(quiet=True))
    return replace(runtime, dtype=runtime.best_dtype())


def our_training(
    model: Any, objective: Any, dataset: Any, *, tokens_per_batch: int, adapter: Any = None, passes: int = 1
) -> Found:
    """Some passes over `dataset` by a Trainer. `rate` is in tokens a second, `counts_per_s` in what the objective
    counts (supervised tokens, pairs), both without the first steps."""
    from prairie.data.loader import Loader
    from prairie.train.config import TrainConfig
    from prairie.train.trainer import Trainer

    marks: list[tuple[float, int, float]] = []

    class Clocked(Trainer):
        def update(self, batches: Any, sums: Any, started: float) -> None:
            super().update(batches, sums, started)
            marks.append((time.perf_counter(), sum(len(batch.tokens_N) for batch in batches), sums.count))

    loader = Loader(dataset, tokens_per_batch=tokens_per_batch, seed=0)
    config = TrainConfig(
        steps=passes * loader.batches_per_epoch, tokens_per_batch=tokens_per_batch, lr=1e-4, save_every_s=None,
        log_every=1000,
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        trainer = Clocked(model, objective, loader, config, runtime=our_runtime(), folder=Path(folder), adapter=adapter)
        forget_peak()
        figures = trainer.fit()
    skipped = warm_up_of(len(marks))
    seconds = marks[-1][0] - marks[skipped - 1][0]
    _, tokens, counts = (sum(column) for column in zip(*marks[skipped:], strict=True))
    return {
        "rate": tokens / seconds,
        "counts_per_s": counts / seconds,
        "rss_mb": peak_rss_mb(),
        "steps": len(marks),
        "loss": figures["loss_last"],
        "dtype": trainer.runtime.dtype,
    }


# --- peers ------------------------------------------------------------------------------------------------------------


def peer_threads() -> None:
    import torch

    from prairie.runtime import usable_cores

    torch.set_num_threads(usable_cores())
    torch.manual_seed(0)


def peer_model(shape: str, vocabulary: int) -> Any:
    """The same shape in transformers, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dim, layers, heads, ffn_dim = SHAPES[shape]
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=ffn_dim, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    ))  # fmt: skip


def peer_tokenizer(vocabulary: int) -> Any:
    """One word `wN` is token N, so that a peer that insists on text gets the same ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {**{mark: i for i, mark in enumerate(marks)}, **{f"w{i}": i for i in range(len(marks), vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def labelled(rows: list[Row]) -> list[dict[str, list[int]]]:
    """Rows as TRL takes them when they are tokens already."""
    return [
        {"input_ids": ids, "labels": [-100] * (len(ids) - learnt) + ids[len(ids) - learnt :]} for ids, learnt in rows
    ]


def peer_lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def peer_arguments(folder: str) -> dict[str, Any]:
    """What both of TRL's trainers are told alike: nothing but the work. bfloat16 where this machine is good at it."""
    from prairie.runtime import Runtime

    return {
        "output_dir": folder, "num_train_epochs": 1, "bf16": Runtime.detect().best_dtype() == "bfloat16", "fp16": False,
        "use_cpu": True, "report_to": [], "logging_steps": 1000, "save_strategy": "no", "disable_tqdm": True, "seed": 0,
        "gradient_checkpointing": False,
    }  # fmt: skip


def peer_clock() -> Any:
    """A callback of transformers' trainer that remembers when each step ended."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ended: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.ended.append(time.perf_counter())

    return Clock()


@contextmanager
def quietly() -> Iterator[str]:
    """A folder for a peer's output, and none of its messages."""
    import logging
    import warnings

    import datasets

    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    with TemporaryDirectory() as folder:
        yield folder
