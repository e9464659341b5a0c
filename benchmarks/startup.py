"""From the start of the process to the end of the first step of fine-tuning on a file of 100,000 conversations.

    python -m benchmarks.startup [--quick] --json

Seconds, everything included: importing, reading the file, tokenising it with the chat template, building the model, one
step. Both sides read the same JSONL with the same tokenizer and template; ours also checks and counts every row.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import workloads
from benchmarks.measure import Case, Found, peak_rss_mb, run

SHAPE, VOCABULARY, ROWS = "10m", 4096, 100_000


class Finished(Exception):
    """The first step is done."""


def ours(folder: Path) -> None:
    from prairie.data.chat_template import ChatTemplate
    from prairie.data.loader import Loader, TokenDataset
    from prairie.data.sources import read_records
    from prairie.data.tokenizer import Tokenizer
    from prairie.train.config import TrainConfig
    from prairie.train.objectives.causal_lm import CausalLM
    from prairie.train.trainer import Trainer

    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate.load(folder, tokenizer)
    records = read_records(folder / "chats.jsonl", want="chat").records
    dataset = TokenDataset.from_chats(records, template, 1024)
    model = workloads.our_model(SHAPE, tokenizer.vocab_size)
    loader = Loader(dataset, tokens_per_batch=1024, seed=0)
    config = TrainConfig(steps=1000, tokens_per_batch=1024, lr=1e-4)

    class OneStep(Trainer):
        def tell(self, bar: Any) -> None:
            raise Finished

    OneStep(model, CausalLM(), loader, config, runtime=workloads.our_runtime(), folder=folder / "run").fit()


def peer(folder: Path) -> None:
    workloads.peer_threads()
    with workloads.quietly() as output:
        import datasets
        from transformers import PreTrainedTokenizerFast, TrainerCallback
        from trl import SFTConfig, SFTTrainer

        class OneStep(TrainerCallback):
            def on_step_end(self, *args: Any, **more: Any) -> None:
                raise Finished

        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<|im_end|>"
        )
        tokenizer.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        rows = datasets.load_dataset(
            "json", data_files=str(folder / "chats.jsonl"), split="train", cache_dir=str(folder / "cache")
        )
        config = SFTConfig(
            **workloads.peer_arguments(output), learning_rate=1e-4, packing=True, max_length=1024,
            per_device_train_batch_size=1, assistant_only_loss=True, dataset_num_proc=2,
        )  # fmt: skip
        SFTTrainer(
            workloads.peer_model(SHAPE, len(tokenizer)), args=config, train_dataset=rows, processing_class=tokenizer,
            callbacks=[OneStep()],
        ).train()  # fmt: skip


def first_step(side: str, folder: str) -> None:
    """The child process that is timed."""
    try:
        {"ours": ours, "peer": peer}[side](Path(folder))
    except Finished:
        print(json.dumps({"rss_mb": peak_rss_mb()}), flush=True)


def measured(side: str, quick: bool) -> Found:
    with TemporaryDirectory() as folder:
        write_data(Path(folder), ROWS // 20 if quick else ROWS)
        call = f"from benchmarks import startup; startup.first_step({side!r}, {folder!r})"
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)
        seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "rate": seconds}


def write_data(folder: Path, rows: int) -> None:
    """Conversations of made-up words, some far more frequent than others, and a tokenizer trained on such words."""
    from prairie.data.chat_template import ChatTemplate
    from prairie.data.tokenizer import Tokenizer

    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er")]
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3)))) for _ in range(5000)]

    def text(least: int, most: int) -> str:
        return " ".join(words[int(len(words) ** rng.random()) - 1] for _ in range(rng.randint(least, most)))

    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(rows):
            turns = [("user", text(4, 24)), ("assistant", text(8, 60))]
            file.write(json.dumps({"messages": [{"role": role, "content": said} for role, said in turns]}) + "\n")
    tokenizer = Tokenizer.train_bpe([text(20, 60) for _ in range(3000)], VOCABULARY)
    tokenizer.save(folder)
    ChatTemplate.builtin("chatml", tokenizer).save(folder)


CASES = [
    Case(
        "100k rows", "TRL SFTTrainer, packed", "s",
        lambda quick: measured("ours", quick), lambda quick: measured("peer", quick), lower_is_better=True,
    )
]  # fmt: skip

if __name__ == "__main__":
    run("startup", CASES)
