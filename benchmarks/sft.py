"""Fine-tuning on chats: real tokens a second against TRL's SFTTrainer, padded (its default), packed, and with LoRA.

    python -m benchmarks.sft [--quick] [--case "trl packed"] --json

A model of 10 million in the blocks' shape with a vocabulary of 32k; one pass over the same token ids (96 chats packed,
24 padded, 32 with LoRA), the first steps left out. Padding is not counted. TRL takes 8 chats a step as it does by
default, or two packed rows of 1,024 tokens; ours takes up to 2,048 tokens a step.
"""

from __future__ import annotations

from typing import Any

from benchmarks import workloads
from benchmarks.measure import Case, Found, forget_peak, peak_rss_mb, run

SHAPE, VOCABULARY = "10m", 32768
CHATS = {"default": 24, "packed": 96, "lora": 32}
"""Where the peer is slow both sides get fewer."""


def ours(kind: str, quick: bool) -> Found:
    from prairie.models.lora import LoRA, LoRAConfig
    from prairie.train.objectives.causal_lm import CausalLM

    model = workloads.our_model(SHAPE, VOCABULARY)
    adapter = LoRA.create(model, LoRAConfig(rank=16, alpha=32)) if kind == "lora" else None
    dataset = workloads.our_rows(rows(kind, quick))
    return workloads.our_training(model, CausalLM(), dataset, tokens_per_batch=2048, adapter=adapter)


def peer(kind: str, quick: bool) -> Found:
    workloads.peer_threads()
    with workloads.quietly() as folder:
        import datasets
        from trl import SFTConfig, SFTTrainer

        packed = kind != "default"
        dataset = datasets.Dataset.from_list(workloads.labelled(rows(kind, quick)))
        config = SFTConfig(
            **workloads.peer_arguments(folder), learning_rate=1e-4, packing=packed, max_length=1024,
            per_device_train_batch_size=2 if packed else 8,
        )  # fmt: skip
        clock = workloads.peer_clock()
        trainer = SFTTrainer(
            workloads.peer_model(SHAPE, VOCABULARY), args=config, train_dataset=dataset,
            processing_class=workloads.peer_tokenizer(VOCABULARY), callbacks=[clock],
            peft_config=workloads.peer_lora() if kind == "lora" else None,
        )  # fmt: skip
        collate, sizes = trainer.data_collator, []

        def counting(features: Any) -> Any:
            batch = collate(features)
            sizes.append((sum(len(feature["input_ids"]) for feature in features), batch["input_ids"].numel()))
            return batch

        trainer.data_collator = counting
        forget_peak()
        loss = trainer.train().training_loss
    steps = len(clock.ended)
    skipped = workloads.warm_up_of(steps)
    seconds = clock.ended[-1] - clock.ended[skipped - 1]
    real, fed = (sum(column[skipped:steps]) for column in zip(*sizes, strict=True))
    return {
        "rate": real / seconds, "rss_mb": peak_rss_mb(), "steps": steps, "loss": loss,
        "padding": round(1 - real / fed, 3), "dtype": "bfloat16" if config.bf16 else "float32",
    }  # fmt: skip


def rows(kind: str, quick: bool) -> list[workloads.Row]:
    return workloads.chats(24 if quick else CHATS[kind], VOCABULARY)


def case(name: str, kind: str, peer_name: str) -> Case:
    return Case(name, peer_name, "tokens/s", lambda quick: ours(kind, quick), lambda quick: peer(kind, quick))


CASES = [
    case("trl default", "default", "TRL SFTTrainer, padded"),
    case("trl packed", "packed", "TRL SFTTrainer, packed"),
    case("lora trl packed", "lora", "TRL SFTTrainer + PEFT, packed"),
]

if __name__ == "__main__":
    run("sft", CASES)
