"""The stages that make models: `import`, `train`, `sample`.

`learn` is the one place where records, a starting model and the keys of `Learning` become weights; the flywheel calls
it too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prairie.data.chat_template import ChatTemplate
from prairie.data.loader import Loader, TokenDataset
from prairie.data.records import Chat, Message, Preference, Record, Text
from prairie.data.sources import write_records
from prairie.data.tokenizer import Tokenizer
from prairie.engine.language_model import LanguageModel
from prairie.errors import DataError, ModelError
from prairie.models.config import ModelConfig
from prairie.models.lora import AdapterRows, LoRA, LoRAConfig
from prairie.models.transformer import Transformer
from prairie.models.weights import load_model, read_manifest, save_model
from prairie.pipeline.context import Work, file_fingerprint
from prairie.pipeline.data_stages import train_records
from prairie.recipe import Import, Learning, Sample, Shape, Train
from prairie.runtime import Runtime
from prairie.store.artifacts import Artifact
from prairie.tasks.catalog import check, items
from prairie.tasks.task import Item
from prairie.train.objective import Objective
from prairie.train.objectives.causal_lm import CausalLM
from prairie.train.objectives.dpo import DPO, DPOConfig, reference_logprobs
from prairie.train.trainer import TrainConfig, Trainer


@dataclass
class Start:
    """What training starts from: a base, perhaps an adapter on it, with its tokenizer and template."""

    model: Transformer
    tokenizer: Tokenizer
    template: ChatTemplate
    adapter: LoRA | None = None

    @property
    def adapters(self) -> list[AdapterRows]:
        """What the forward pass takes."""
        return [AdapterRows(self.adapter)] if self.adapter is not None else []


def new_model(shape: Shape, vocab_size: int) -> ModelConfig:
    """A Llama-shaped config from one dial: width = 32 x depth, heads of 32, FFN 8/3 of the width (arXiv 2002.05202)."""
    dim = shape.dim or 32 * shape.depth
    heads = shape.heads or max(1, dim // 32)
    return ModelConfig(
        vocab_size=vocab_size,
        dim=dim,
        layers=shape.depth,
        heads=heads,
        kv_heads=shape.kv_heads or heads,
        head_dim=dim // heads,
        ffn_dim=shape.ffn_dim or 32 * math.ceil(dim * 8 / 3 / 32),
        max_context=shape.context,
        tie_embeddings=True,
    )


def open_start(artifact: Artifact) -> Start:
    """A model to go on from; an adapter brings the base it stands on."""
    folder = artifact.path
    manifest = read_manifest(folder)
    if manifest.get("kind") != "adapter":
        tokenizer = Tokenizer.load(folder)
        model = load_model(folder)
        return Start(model, tokenizer, ChatTemplate.load(folder, tokenizer))
    base = folder.parent / str(manifest["base_artifact"])
    if not base.is_dir():
        raise ModelError(f"the base of `{artifact.name}` is gone", got=str(base), mend="run the recipe again")
    tokenizer = Tokenizer.load(base)
    lora = LoRA.load(folder)
    model = load_model(base)
    lora.require_base(model, artifact.name)
    return Start(model, tokenizer, ChatTemplate.load(base, tokenizer), lora)


def import_model(work: Work) -> dict[str, Any]:
    """A Hugging Face folder becomes an artifact: checked, rewritten in our own order, with tokenizer and template."""
    config: Import = work.config
    folder = Path(config.path).expanduser()
    model = load_model(folder)
    tokenizer = Tokenizer.load(folder)
    fits(tokenizer, model.config)
    template = (
        ChatTemplate.builtin(config.template, tokenizer) if config.template else ChatTemplate.load(folder, tokenizer)
    )
    write_model(model, tokenizer, template, work.folder, {"origin": folder.name})
    return {"parameters": model.config.parameters(), "vocab_size": model.config.vocab_size, "origin": folder.name}


def outside_of_import(config: Import) -> list[str]:
    """Other files, another product."""
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        raise ModelError("no such model folder", got=config.path, wanted="a folder with config.json and safetensors")
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".jinja"))
    return [f"{path.name}:{file_fingerprint(path)}" for path in files]


def fits(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raises ModelError if the tokenizer has ids that the model has not."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            "the tokenizer does not fit the model",
            got=f"{tokenizer.vocab_size} tokens for {config.vocab_size} embeddings",
            wanted="at most as many tokens as embeddings",
            mend="take the tokenizer that the model was trained with",
        )


def train(work: Work) -> dict[str, Any]:
    """A training stage: rows of the named stages, from a new model or an earlier one."""
    config: Train = work.config
    records = [r for name in config.sources() for r in train_records(work.inputs[name].product.path)]
    if config.start is not None:
        start = open_start(work.model(config.start))
        base_artifact = base_of(work.model(config.start))
    else:
        assert config.shape is not None and config.tokenizer is not None
        start = _fresh(config.shape, work.inputs[config.tokenizer].product.path, work.context.recipe.seed)
        base_artifact = ""
    runtime = work.context.runtime
    return learn(config, config.objective, records, start, base_artifact, work.folder, work.scratch, runtime, work.name)


def learn(
    config: Learning,
    objective: str,
    records: Sequence[Record],
    start: Start,
    base_artifact: str,
    folder: Path,
    scratch: Path,
    runtime: Runtime,
    title: str,
) -> dict[str, Any]:
    """Trains and writes the model (or adapter) into `folder`; returns the figures. Resumes from `scratch`."""
    runtime = replace(runtime, dtype=runtime.best_dtype() if config.dtype == "auto" else config.dtype)
    runtime.seed_all()
    dataset = dataset_of(records, start.tokenizer, start.template, config, objective)
    loader = Loader(dataset, tokens_per_batch=config.tokens_per_batch, seed=runtime.seed)
    steps = config.steps or max(1, round((config.epochs or 1) * loader.batches_per_epoch / config.micro_batches))
    reference = None
    if objective == "dpo":
        reference = reference_logprobs(start.model, dataset, start.adapters, dtype=runtime.torch_dtype())
    adapter = _adapter_to_train(config, start, runtime.seed)
    trainer = Trainer(
        start.model,
        _objective(objective, config, reference),
        loader,
        train_config(config, steps, runtime.seed),
        runtime=runtime,
        folder=scratch,
        adapter=adapter,
        title=title,
    )
    figures = trainer.fit()
    if adapter is None:
        write_model(start.model, start.tokenizer, start.template, folder, {})
    else:
        _write_adapter(adapter, start, folder, base_artifact)
    metrics = scratch / "metrics.jsonl"
    if metrics.is_file():
        (folder / "metrics.jsonl").write_bytes(metrics.read_bytes())
    return {**figures, "parameters": start.model.config.parameters(), "data": dataset.figures}


def train_config(config: Learning, steps: int, seed: int) -> TrainConfig:
    """The trainer's view of the keys of a recipe."""
    return TrainConfig(
        steps=steps,
        tokens_per_batch=config.tokens_per_batch,
        micro_batches=config.micro_batches,
        lr=config.lr,
        optimizer=config.optimizer,
        muon_lr=config.muon_lr,
        warmup_steps=round(config.warmup * steps),
        schedule=config.schedule,
        min_lr_ratio=config.min_lr_ratio,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        seed=seed,
    )


def dataset_of(
    records: Sequence[Record], tokenizer: Tokenizer, template: ChatTemplate, config: Learning, objective: str
) -> TokenDataset:
    """Tokens of records for an objective. Raises DataError when nothing is left to train on."""
    if objective == "dpo":
        pairs = [r for r in records if isinstance(r, Preference)]
        if len(pairs) != len(records):
            raise DataError("dpo needs preferences", got=f"{len(records) - len(pairs)} other rows")
        return TokenDataset.from_preferences(pairs, template, config.max_tokens, on_long=config.on_long)
    texts = [r for r in records if isinstance(r, Text)]
    if texts and len(texts) != len(records):
        raise DataError("text and conversations are mixed", mend="train on them in two stages")
    if texts:
        return TokenDataset.from_texts(texts, tokenizer, config.max_tokens)
    talks = [_as_chat(r) for r in records]
    return TokenDataset.from_chats(talks, template, config.max_tokens, on_long=config.on_long)


def _as_chat(record: Record) -> Chat:
    """A preference trains as its chosen side."""
    if isinstance(record, Preference):
        return Chat((*record.prompt, *record.chosen), record.source, record.tags)
    assert isinstance(record, Chat)
    return record


def sample(work: Work) -> dict[str, Any]:
    """Sampled answers to training prompts; each prompt with right and wrong ones gives pairs."""
    config: Sample = work.config
    model = load_language_model(work.model(config.model), work.context.runtime)
    seed = work.context.recipe.seed
    asked = items(config.tasks, "train", config.prompts, seed + 1, distinct=False)
    prompts = [(Message("user", item.prompt),) for item in asked for _ in range(config.answers)]
    with work.context.runtime.progress.bar(work.name, len(prompts), "answer") as bar:
        completions = model.generate(
            prompts,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            seed=seed,
            on_done=lambda _: bar.update(),
        )
    right = 0
    pairs: list[Preference] = []
    for number, item in enumerate(asked):
        texts = [c.text for c in completions[number * config.answers : (number + 1) * config.answers]]
        verdicts = [check(item, text) for text in texts]
        right += sum(verdicts)
        pairs += _pairs(item, texts, verdicts, config.pairs_per_prompt)
    if not pairs:
        raise DataError(
            f"stage `{work.name}` found no prompt with a right and a wrong answer",
            got=f"{right} of {len(prompts)} answers right",
            mend="raise `prompts`, `answers` or `temperature`",
        )
    write_records(work.folder / "train.jsonl", pairs)
    write_records(work.folder / "held_out.jsonl", [])
    return {
        "rows": len(pairs),
        "answers": len(prompts),
        "right": right / len(prompts),
        "kind": "preference",
        "held_out": 0,
        "refused": 0,
    }


def load_language_model(artifact: Artifact, runtime: Runtime) -> LanguageModel:
    """A model ready to answer; an adapter on its base."""
    folder = artifact.path
    manifest = read_manifest(folder)
    if manifest.get("kind") == "adapter":
        return LanguageModel.load(folder.parent / str(manifest["base_artifact"]), adapter=folder, runtime=runtime)
    return LanguageModel.load(folder, runtime=runtime)


def write_model(
    model: Transformer, tokenizer: Tokenizer, template: ChatTemplate, folder: Path, facts: dict[str, Any]
) -> None:
    """A folder that transformers, the engine and we can load."""
    save_model(model, folder, tokenizer_hash=tokenizer.hash, template_hash=template.hash, **facts)
    tokenizer.save(folder)
    template.save(folder)


def _fresh(shape: Shape, tokenizer_folder: Path, seed: int) -> Start:
    tokenizer = Tokenizer.load(tokenizer_folder)
    template = ChatTemplate.load(tokenizer_folder, tokenizer)
    config = new_model(shape, tokenizer.vocab_size)
    stops = tuple(dict.fromkeys(i for i in (tokenizer.eos_id, *template.stop_ids) if i is not None))
    config = replace(config, bos_id=tokenizer.bos_id, eos_id=stops, pad_id=tokenizer.pad_id)
    return Start(Transformer(config).init_weights(seed), tokenizer, template)


def base_of(artifact: Artifact) -> str:
    """The artifact id of the full weights under a model: its own, or those its adapter stands on."""
    manifest = read_manifest(artifact.path)
    return str(manifest["base_artifact"]) if manifest.get("kind") == "adapter" else artifact.id


def _adapter_to_train(config: Learning, start: Start, seed: int) -> LoRA | None:
    """The start's own adapter goes on learning, or a new one stands on it; otherwise a new one, or none."""
    shape = config.adapter
    if start.adapter is not None and (shape is None or not shape.stack):
        return start.adapter
    if shape is None:
        return None
    targets: Any = shape.targets if isinstance(shape.targets, str) else tuple(shape.targets)
    wanted = LoRAConfig(shape.rank, shape.alpha, shape.dropout, targets, shape.rslora, shape.dora)
    return LoRA.create(start.model, wanted, seed, start.adapter)


def _objective(name: str, config: Learning, reference: Any) -> Objective:
    if name == "dpo":
        family = DPOConfig(
            loss=config.loss, beta=config.beta, label_smoothing=config.label_smoothing, sft_weight=config.sft_weight
        )
        return DPO(family, reference)
    return CausalLM()


def _write_adapter(adapter: LoRA, start: Start, folder: Path, base_artifact: str) -> None:
    adapter.save(
        folder,
        template_hash=start.template.hash,
        tokenizer_hash=start.tokenizer.hash,
        base_artifact=base_artifact,
    )


def _pairs(item: Item, texts: Sequence[str], verdicts: Sequence[bool], most: int) -> list[Preference]:
    """Right over wrong, each text once, so that no wording is favoured by repetition."""
    sides: dict[bool, list[str]] = defaultdict(list)
    for text, verdict in zip(texts, verdicts, strict=True):
        if text not in sides[verdict]:
            sides[verdict].append(text)
    prompt = (Message("user", item.prompt),)
    tags = {"task": item.task, "language": item.language, "item": item.id}
    return [
        Preference(prompt, (Message("assistant", good),), (Message("assistant", bad),), "sample", tags)
        for good, bad in list(zip(sides[True], sides[False], strict=False))[:most]
    ]
