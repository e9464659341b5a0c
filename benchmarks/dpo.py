"""Preferences: pairs a second against TRL's DPOTrainer, with four pairs to each prompt.

    python -m benchmarks.dpo [--quick] [--case full] --json

A model of 10 million in the blocks' shape with a vocabulary of 32k; 8 pairs, one pass of TRL's (which is slow), three
of ours; the first steps of each side are left out. `full`: the reference's forward pass of every pair is inside the
time, on both sides. `full precomputed`: it is outside, on both sides (ours finds it on the disk). `lora`: the reference
is the base without the adapter, and inside the time.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks import workloads
from benchmarks.measure import Case, Found, forget_peak, peak_rss_mb, run

SHAPE, VOCABULARY = "10m", 32768
PEERS_PAIRS = 2
"""Pairs of one step of TRL's; more only adds padding."""


def ours(kind: str, quick: bool) -> Found:
    from prairie.models.lora import LoRA, LoRAConfig
    from prairie.train.objectives.dpo import DPO, DPOConfig, reference_logprobs

    given = pairs()
    answers = [([*prompt, *answer, workloads.EOS], len(answer) + 1) for prompt, *both in given for answer in both]
    model, dataset = workloads.our_model(SHAPE, VOCABULARY), workloads.our_rows(answers, group=2)
    adapter = LoRA.create(model, LoRAConfig(rank=16, alpha=32)) if kind == "lora" else None
    dtype = workloads.our_runtime().torch_dtype()
    reference_logprobs(model, dataset, dtype=dtype)  # warms up
    began = time.perf_counter()
    reference = reference_logprobs(model, dataset, dtype=dtype)
    reference_s = time.perf_counter() - began
    objective = DPO(DPOConfig(), reference)
    found = workloads.our_training(model, objective, dataset, tokens_per_batch=2700, adapter=adapter, passes=3)
    seconds_a_pair = 1 / found["counts_per_s"]
    if kind != "full precomputed":
        seconds_a_pair += reference_s / len(given)
    return {**found, "rate": 1 / seconds_a_pair, "reference_s": round(reference_s, 3)}


def peer(kind: str, quick: bool) -> Found:
    workloads.peer_threads()
    with workloads.quietly() as folder:
        import datasets
        from trl import DPOConfig, DPOTrainer

        given = [
            {"prompt": words(prompt), "chosen": f" {words(chosen)} ", "rejected": f" {words(rejected)} "}
            for prompt, chosen, rejected in pairs()
        ]
        config = DPOConfig(
            **workloads.peer_arguments(folder), learning_rate=1e-5, max_length=1024,
            per_device_train_batch_size=PEERS_PAIRS, precompute_ref_log_probs=kind == "full precomputed",
        )  # fmt: skip
        clock = workloads.peer_clock()
        model = workloads.peer_model(SHAPE, VOCABULARY)
        reference = None
        if kind == "full":
            reference = workloads.peer_model(SHAPE, VOCABULARY)
            reference.load_state_dict(model.state_dict())
        trainer = DPOTrainer(
            model, reference, args=config, train_dataset=datasets.Dataset.from_list(given),
            processing_class=workloads.peer_tokenizer(VOCABULARY), callbacks=[clock],
            peft_config=workloads.peer_lora() if kind == "lora" else None,
        )  # fmt: skip
        collate, sizes = trainer.data_collator, []

        def counting(features: Any) -> Any:
            batch = collate(features)
            sizes.append((int(batch["attention_mask"].sum()), batch["attention_mask"].numel()))
            return batch

        trainer.data_collator = counting
        forget_peak()
        loss = trainer.train().training_loss
    skipped = workloads.warm_up_of(len(clock.ended))
    seconds = clock.ended[-1] - clock.ended[skipped - 1]
    real, fed = (sum(column) for column in zip(*sizes, strict=True))
    return {
        "rate": PEERS_PAIRS * (len(clock.ended) - skipped) / seconds, "rss_mb": peak_rss_mb(),
        "steps": len(clock.ended), "loss": loss, "padding": round(1 - real / fed, 3),
        "tokens_a_pair": round(real / (PEERS_PAIRS * len(sizes)), 1),
        "dtype": "bfloat16" if config.bf16 else "float32",
    }  # fmt: skip


def pairs() -> list[tuple[list[int], list[int], list[int]]]:
    return workloads.preferences(2, 4, VOCABULARY)


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def case(kind: str, peer_name: str) -> Case:
    return Case(kind, peer_name, "pairs/s", lambda quick: ours(kind, quick), lambda quick: peer(kind, quick))


CASES = [
    case("full", "TRL DPOTrainer"),
    case("full precomputed", "TRL DPOTrainer, reference precomputed"),
    case("lora", "TRL DPOTrainer + PEFT"),
]

if __name__ == "__main__":
    run("dpo", CASES)
