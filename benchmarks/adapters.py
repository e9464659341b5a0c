"""Eight adapters on one base, each on its own chats: together in one process against eight runs one after the other.

    python -m benchmarks.adapters [--quick] [--case "8 of ours apart"] --json

A base of 10 million in the blocks' shape with a vocabulary of 4k, LoRA of rank 16 on all linear layers, 24 chats for
each adapter, one pass. Seconds from the start of the first process to the end of the last, importing and loading
included: that is what somebody with eight verticals waits for. Ours end as `prairie` ends (`end_soon`). Of the
eight runs apart two are carried out and counted four times, as they are alike. TRL packs its rows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import workloads
from benchmarks.measure import Case, Found, forget_peak, peak_rss_mb, run

SHAPE, VOCABULARY, ADAPTERS, TOKENS = "10m", 4096, 8, 1024
APART = 2
"""Runs apart that are carried out."""


def rows(adapter: int, quick: bool) -> list[workloads.Row]:
    return workloads.chats(8 if quick else 24, VOCABULARY, seed=adapter)


def ours(numbers: list[int], quick: bool) -> Found:
    """The adapters of these numbers, in the same steps."""
    from prairie.data.loader import Loader
    from prairie.models.lora import LoRA, LoRAConfig
    from prairie.runtime import end_soon
    from prairie.train.config import TrainConfig
    from prairie.train.objectives.causal_lm import CausalLM
    from prairie.train.together import fit_together
    from prairie.train.trainer import Trainer

    end_soon()
    model, runtime = workloads.our_model(SHAPE, VOCABULARY), workloads.our_runtime()
    with TemporaryDirectory() as folder:
        trainers = []
        for number in numbers:
            loader = Loader(workloads.our_rows(rows(number, quick)), tokens_per_batch=TOKENS, seed=0)
            config = TrainConfig(steps=loader.batches_per_epoch, tokens_per_batch=TOKENS, lr=1e-4, save_every_s=None)
            adapter = LoRA.create(model, LoRAConfig(rank=16, alpha=32), seed=number)
            trainers.append(Trainer(
                model, CausalLM(), loader, config, runtime=runtime, folder=Path(folder) / str(number), adapter=adapter
            ))  # fmt: skip
        forget_peak()
        figures = fit_together(trainers)
    return {"rss_mb": peak_rss_mb(), "losses": [round(one["loss_last"], 4) for one in figures]}


def trl(numbers: list[int], quick: bool) -> Found:
    """One adapter."""
    workloads.peer_threads()
    with workloads.quietly() as folder:
        import datasets
        from trl import SFTConfig, SFTTrainer

        (number,) = numbers
        config = SFTConfig(
            **workloads.peer_arguments(folder), learning_rate=1e-4, packing=True, max_length=TOKENS,
            per_device_train_batch_size=1,
        )  # fmt: skip
        trainer = SFTTrainer(
            workloads.peer_model(SHAPE, VOCABULARY), args=config, processing_class=workloads.peer_tokenizer(VOCABULARY),
            train_dataset=datasets.Dataset.from_list(workloads.labelled(rows(number, quick))),
            peft_config=workloads.peer_lora(),
        )  # fmt: skip
        forget_peak()
        loss = trainer.train().training_loss
    return {"rss_mb": peak_rss_mb(), "losses": [round(loss, 4)]}


def processes(side: str, groups: list[list[int]], quick: bool) -> Found:
    """One process after the other, each with one group of adapters."""
    began, found = time.perf_counter(), []
    for group in groups:
        call = f"import json; from benchmarks import adapters; print(json.dumps(adapters.{side}({group}, {quick})))"
        done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr.strip().splitlines()[-1])
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    losses = [loss for one in found for loss in one["losses"]]
    return {"rate": time.perf_counter() - began, "rss_mb": max(one["rss_mb"] for one in found), "losses": losses}


def together(quick: bool) -> Found:
    return processes("ours", [list(range(ADAPTERS))], quick)


def apart(side: str) -> Any:
    def sample(quick: bool) -> Found:
        found = processes(side, [[number] for number in range(APART)], quick)
        return {**found, "rate": found["rate"] * ADAPTERS / APART, "carried_out": APART}

    return sample


CASES = [
    Case("8 of ours apart", "8 runs of Prairie", "s", together, apart("ours"), lower_is_better=True),
    Case("8 of trl+peft apart", "8 runs of TRL + PEFT, packed", "s", together, apart("trl"), lower_is_better=True),
]

if __name__ == "__main__":
    run("adapters", CASES)
