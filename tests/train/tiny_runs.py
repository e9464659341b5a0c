"""Small models, data and whole runs that the tests of this room share; a run can be started in a process of its own."""

import io
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from prairie.data.loader import Loader, TokenDataset
from prairie.models.config import ModelConfig
from prairie.models.lora import LoRA, LoRAConfig
from prairie.models.transformer import Transformer
from prairie.runtime import Progress, Runtime
from prairie.train.objectives.causal_lm import CausalLM
from prairie.train.objectives.dpo import DPO, DPOConfig, reference_logprobs
from prairie.train.trainer import TrainConfig, Trainer

VOCAB = 64


def tiny_model(seed: int = 0, **changes) -> Transformer:
    sizes = {"vocab_size": VOCAB, "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "max_context": 64}
    model = Transformer(ModelConfig(**{**sizes, **changes})).init_weights(seed)
    with torch.no_grad():  # away from the start's symmetry, so that gradients are not tiny
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model


def tiny_dataset(rows: int = 40, seed: int = 0, group: int = 1, longest: int = 24) -> TokenDataset:
    """Rows of 4 to `longest` tokens whose next token is often the one plus 1; a random part of each is supervised.

    In groups of two the rows share a prompt and only what follows is supervised; a chosen row counts up.
    """
    rng = np.random.default_rng(seed)
    ids, mask, lengths = [], [], []
    for _ in range(rows):
        prompt, start = int(rng.integers(2, 6)), int(rng.integers(0, VOCAB))
        for step in (1, -1)[:group]:
            length = int(rng.integers(prompt + 2, longest + 1))
            row = (start + np.concatenate([np.arange(prompt), prompt + step * np.arange(length - prompt)])) % VOCAB
            noise = (rng.random(length) < 0.1) & (np.arange(length) >= prompt)
            ids.append(np.where(noise, rng.integers(0, VOCAB, length), row).astype(np.uint32))
            mask.append(np.arange(length) >= prompt)
            lengths.append(length)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenDataset(np.concatenate(ids), np.concatenate(mask), offsets, group=group)


def quiet_runtime(**changes) -> Runtime:
    return Runtime(**{"threads": 1, "progress": Progress(stream=io.StringIO(), quiet=True), **changes})


def tiny_config(**changes) -> TrainConfig:
    size = {"steps": 12, "tokens_per_batch": 64, "micro_batches": 2}
    pace = {"lr": 1e-2, "warmup_steps": 2, "log_every": 3, "save_every": 2, "save_every_s": None}
    return TrainConfig(**{**size, **pace, **changes})


def full_trainer(folder: Path, config: TrainConfig | None = None, *, runtime: Runtime | None = None, **more) -> Trainer:
    """All weights on next tokens."""
    config = config or tiny_config()
    loader = Loader(tiny_dataset(), tokens_per_batch=config.tokens_per_batch, seed=config.seed)
    model = more.pop("model", None) or tiny_model()
    return Trainer(model, CausalLM(), loader, config, runtime=runtime or quiet_runtime(), folder=folder, **more)


def lora_dpo_trainer(
    folder: Path, config: TrainConfig | None = None, *, runtime: Runtime | None = None, **more
) -> Trainer:
    """An adapter with dropout on preferences."""
    config = config or tiny_config()
    model, dataset = tiny_model(), tiny_dataset(group=2)
    adapter = LoRA.create(model, LoRAConfig(rank=4, dropout=0.1), seed=1)
    objective = DPO(DPOConfig(sft_weight=0.2, label_smoothing=0.1), reference_logprobs(model, dataset))
    loader = Loader(dataset, tokens_per_batch=config.tokens_per_batch, seed=config.seed)
    runtime = runtime or quiet_runtime()
    return Trainer(model, objective, loader, config, runtime=runtime, folder=folder, adapter=adapter, **more)


TRAINERS = {"full": full_trainer, "lora_dpo": lora_dpo_trainer}


def run_to_the_end(kind: str, folder: Path, config: TrainConfig, said: Path | None = None) -> None:
    """A whole run; leaves `final.safetensors` in `folder`. What is said goes to the file `said`."""
    torch.set_num_threads(1)
    with (said or folder.with_suffix(".said")).open("a") as stream:
        runtime = quiet_runtime(progress=Progress(stream=stream))
        trainer = TRAINERS[kind](folder, config, runtime=runtime)
        trainer.fit()
    assert "torch._dynamo" not in sys.modules, "training must not load torch's compiler: it costs a second and 70 MB"
    save_file({name: p.detach() for name, p in trainer.parameters.items()}, folder / "final.safetensors")
