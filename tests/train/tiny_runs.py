"""Small models, data and whole runs that the tests of this room share; a run can be started in a process of its own."""

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from prairie.data.loader import Batch, Loader, TokenDataset
from prairie.models.config import ModelConfig
from prairie.models.lora import AdapterRows, LoRA, LoRAConfig
from prairie.models.transformer import Transformer
from prairie.runtime import Progress, Runtime
from prairie.train.objective import Objective
from prairie.train.objectives.causal_lm import CausalLM
from prairie.train.objectives.classification import Classification
from prairie.train.objectives.dpo import DPO, DPOConfig, reference_logprobs
from prairie.train.objectives.kto import KTO, KTOConfig
from prairie.train.objectives.masked_lm import MaskedLM
from prairie.train.objectives.replay import Replay
from prairie.train.objectives.reward import LABELS, Reward
from prairie.train.ranks import ALONE, Ranks
from prairie.train.trainer import TrainConfig, Trainer, accumulate_gradients

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


def labelled(dataset: TokenDataset, classes: int = 3) -> TokenDataset:
    """The same rows, each with the class that its first token says."""
    targets = dataset.ids[dataset.offsets[:-1]].astype(np.int64) % classes
    return TokenDataset(dataset.ids, dataset.mask, dataset.offsets, targets=targets)


def moved_adapter(model: Transformer, seed: int = 3) -> LoRA:
    """An adapter that already does something."""
    adapter = LoRA.create(model, LoRAConfig(rank=4), seed=seed)
    with torch.no_grad():
        for path in adapter.paths:
            adapter.pair(path)[1].normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
    return adapter


@dataclass
class Learner:
    """An objective with all that it needs to give a gradient."""

    model: Transformer
    objective: Objective
    dataset: TokenDataset
    adapters: list[AdapterRows]

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.adapters[0].lora.parameters() if self.adapters else self.model.parameters())

    def gradients(
        self, batches: Sequence[Batch], ranks: Ranks = ALONE, idle: Sequence[Batch] = ()
    ) -> tuple[list[torch.Tensor], float]:
        """Of one step of these batches, and its loss."""
        for parameter in self.parameters:
            parameter.grad = None
        sums = accumulate_gradients(self.model, self.objective, batches, self.adapters, ranks=ranks, idle=idle)
        ranks.add_gradients(self.parameters)
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]
        return found, float(sums.loss) / sums.count


def weighted(dataset: TokenDataset, seed: int = 4) -> TokenDataset:
    """The same rows, each group with a weight of its own."""
    weights = np.random.default_rng(seed).uniform(0.2, 3, len(dataset))
    return TokenDataset(
        dataset.ids, dataset.mask, dataset.offsets, group=dataset.group, targets=dataset.targets, weights=weights
    )


def judged(dataset: TokenDataset) -> TokenDataset:
    """The same pairs as answers, liked and not by turns, each with a mismatched one."""
    targets = np.arange(len(dataset)).repeat(2) % 2
    return TokenDataset(dataset.ids, dataset.mask, dataset.offsets, group=2, targets=targets)


OBJECTIVES = (
    "causal_lm", "causal_lm_weighted", "masked_lm", "classification", "reward_weighted", "dpo", "ipo",
    "dpo_lora_weighted", "kto_weighted", "kto_replay",
)  # fmt: skip


def tiny_learner(kind: str, rows: int = 12) -> Learner:
    """One of OBJECTIVES on `rows` groups of rows."""
    kind, is_weighted = kind.removesuffix("_weighted"), kind.endswith("_weighted")
    kind, goes_over = kind.removesuffix("_replay"), kind.endswith("_replay")
    pairs = kind in ("reward", "dpo", "ipo", "dpo_lora", "kto")
    model, dataset = tiny_model(), tiny_dataset(rows, group=2 if pairs else 1)
    dataset = weighted(dataset) if is_weighted else dataset
    adapters: list[AdapterRows] = []
    objective: Objective
    if kind == "causal_lm":
        objective = CausalLM()
    elif kind == "masked_lm":
        objective = MaskedLM(mask_id=1, vocab_size=VOCAB, special=(0, 1), share=0.3)
    elif kind == "classification":
        model, dataset, objective = model.with_scores(("a", "b", "c")), labelled(dataset), Classification()
    elif kind == "reward":
        model, objective = model.with_scores(LABELS), Reward()
    elif kind == "kto":
        config = KTOConfig(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
        # A reference point, for those who ask for the loss of a batch alone; a step finds its own.
        dataset = weighted(judged(dataset)) if is_weighted else judged(dataset)
        objective = KTO(config, reference_logprobs(tiny_model(seed=9), dataset), 0.4)
    else:
        family = DPOConfig(loss="ipo") if kind == "ipo" else DPOConfig(label_smoothing=0.1, sft_weight=0.3)
        objective = DPO(family, reference_logprobs(tiny_model(seed=9), dataset))
    if kind == "dpo_lora":
        model.requires_grad_(False)
        adapters = [AdapterRows(moved_adapter(model))]
    if goes_over:
        objective = Replay(objective, tiny_dataset(9, seed=5), len(dataset), share=0.7, weight=0.4)
    return Learner(model, objective, dataset, adapters)


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


def pretrain_trainer(folder: Path, config: TrainConfig | None = None, *, runtime: Runtime | None = None) -> Trainer:
    """Muon on rows whose every token but the first is learnt."""
    config = replace(config or tiny_config(), optimizer="muon")
    rows = tiny_dataset()
    mask = np.ones(len(rows.ids), bool)
    mask[rows.offsets[:-1]] = False
    loader = Loader(
        TokenDataset(rows.ids, mask, rows.offsets), tokens_per_batch=config.tokens_per_batch, seed=config.seed
    )
    return Trainer(tiny_model(), CausalLM(), loader, config, runtime=runtime or quiet_runtime(), folder=folder)


def lora_trainer(folder: Path, config: TrainConfig | None = None, *, runtime: Runtime | None = None) -> Trainer:
    """An adapter with dropout on next tokens."""
    model = tiny_model()
    adapter = LoRA.create(model, LoRAConfig(rank=4, dropout=0.2), seed=1)
    return full_trainer(folder, config, runtime=runtime, model=model, adapter=adapter)


def of_learner(kind: str):
    """A trainer of one of OBJECTIVES, all weights."""

    def build(folder: Path, config: TrainConfig | None = None, *, runtime: Runtime | None = None) -> Trainer:
        learner, config = tiny_learner(kind, rows=40), config or tiny_config()
        loader = Loader(learner.dataset, tokens_per_batch=config.tokens_per_batch, seed=config.seed)
        runtime = runtime or quiet_runtime()
        return Trainer(learner.model, learner.objective, loader, config, runtime=runtime, folder=folder)

    return build


RUNS = {
    **TRAINERS, "pretrain": pretrain_trainer, "sft": full_trainer, "lora": lora_trainer, "dpo": of_learner("dpo"),
    "kto": of_learner("kto"), "reward": of_learner("reward"), "masked_lm": of_learner("masked_lm"),
    "classification": of_learner("classification"),
}  # fmt: skip


def run_to_the_end(
    kind: str, folder: Path, config: TrainConfig, said: Path | None = None, rank: int = 0, ranks: int = 1, port: int = 0
) -> None:
    """A whole run; leaves `final.safetensors` in `folder`. What is said goes to the file `said`."""
    before = set(sys.modules)
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with (said or folder.with_suffix(".said")).open("a") as stream:
        runtime = quiet_runtime(progress=Progress(stream=stream), rank=rank, world_size=ranks)
        trainer = RUNS[kind](folder, config, runtime=runtime)
        trainer.fit()
    assert trainer.config.shard or "torch._dynamo" not in sys.modules.keys() - before, (
        "training must not load torch's compiler: it costs a second and 70 MB"
    )
    with trainer.whole_model():
        weights = {n: p.detach() for n, p in (trainer.adapter or trainer.model).named_parameters() if p.requires_grad}
        save_file(weights, folder / ("final.safetensors" if rank == 0 else f"final-rank{rank}.safetensors"))
