"""The stages that make models: `import`, `train`, `sample`.

`_lesson` is the one place where records, a starting model and the keys of `Learning` become a training; `learn` is it
for one run, which the flywheel calls too, `train_together` for several adapters on one base.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from prairie.data.chat_template import ChatTemplate
from prairie.data.loader import Loader, TokenDataset
from prairie.data.records import Chat, Message, Preference, Record, Text
from prairie.data.sources import write_records
from prairie.data.tokenizer import Tokenizer
from prairie.engine.language_model import LanguageModel
from prairie.errors import DataError, ModelError
from prairie.models.config import ModelConfig
from prairie.models.config_file import read_config
from prairie.models.lora import AdapterRows, LoRA, LoRAConfig
from prairie.models.pooling import carry_pooling
from prairie.models.quantized import quantize
from prairie.models.transformer import Transformer
from prairie.models.weights import load_model, read_json, read_manifest, save_model
from prairie.pipeline.context import Work, file_fingerprint
from prairie.pipeline.curves import curve_page
from prairie.pipeline.data_stages import held_out_records, train_records
from prairie.pipeline.held_out import watcher
from prairie.pipeline.hub import ORIGIN
from prairie.recipe import AdapterShape, Import, Learning, Sample, Shape, Train, VoteLearning
from prairie.runtime import Runtime
from prairie.store.artifacts import Artifact
from prairie.tasks.catalog import check, items
from prairie.tasks.task import Item
from prairie.train.memory import Job
from prairie.train.objective import Objective, length_baseline
from prairie.train.objectives.causal_lm import CausalLM
from prairie.train.objectives.classification import Classification
from prairie.train.objectives.dpo import DPO, DPOConfig, kept_reference
from prairie.train.objectives.kto import KTO, KTOConfig
from prairie.train.objectives.masked_lm import MaskedLM
from prairie.train.objectives.replay import Replay
from prairie.train.objectives.reward import LABELS, Reward
from prairie.train.objectives.seq2seq import Seq2Seq
from prairie.train.ranks import Ranks
from prairie.train.together import fit_together
from prairie.train.tracking import tracking
from prairie.train.trainer import TrainConfig, Trainer

PADDED = 1024
"""Embeddings beyond the tokenizer's tokens that published models have for the sake of round numbers."""


@dataclass
class Start:
    """What training starts from: a base, perhaps an adapter on it, with its tokenizer and template."""

    model: Transformer
    tokenizer: Tokenizer
    template: ChatTemplate | None
    """None: it is no decoder."""
    adapter: LoRA | None = None
    folder: Path | None = None
    """Where it was read from, if it stands alone."""

    @property
    def adapters(self) -> list[AdapterRows]:
        """What the forward pass takes."""
        return [AdapterRows(self.adapter)] if self.adapter is not None else []

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the scores it gives; none of a language model."""
        return (self.adapter.labels if self.adapter is not None else ()) or self.model.config.labels


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
        return Start(model, tokenizer, template_of(folder, tokenizer, model.config), folder=folder)
    base = folder.parent / str(manifest["base_artifact"])
    if not base.is_dir():
        raise ModelError(f"the base of `{artifact.name}` is gone", got=str(base), mend="run the recipe again")
    tokenizer = Tokenizer.load(base)
    lora = LoRA.load(folder)
    model = load_model(base)
    lora.require_base(model, artifact.name)
    return Start(model, tokenizer, template_of(base, tokenizer, model.config), lora)


def import_model(work: Work) -> dict[str, Any]:
    """A Hugging Face folder becomes an artifact: checked, rewritten in our own order, with tokenizer and template."""
    config: Import = work.config
    folder = Path(config.path).expanduser()
    model = load_model(folder)
    tokenizer = Tokenizer.load(folder)
    fits(tokenizer, model.config)
    template = template_of(folder, tokenizer, model.config, config.template)
    origin = {"origin": _origin_of(folder), "license": _license_of(folder)}
    write_model(model, tokenizer, template, work.folder, origin)
    carry_pooling(folder, work.folder)
    return {"parameters": model.config.parameters(), "vocab_size": model.config.vocab_size, **origin}


def _origin_of(folder: Path) -> str:
    """The hub's name and revision of what was fetched from there, else the folder's name."""
    if not (folder / ORIGIN).is_file():
        return folder.name
    found = read_json(folder / ORIGIN)
    return f"{found.get('name')}@{str(found.get('revision'))[:12]}"


def _license_of(folder: Path) -> str | None:
    """What the model's own card states, in the lines between dashes at its top."""
    path = folder / "README.md"
    text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        stated = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return None
    found = stated.get("license") if isinstance(stated, dict) else None
    return found if isinstance(found, str) and found != "unknown" else None


def outside_of_import(config: Import) -> list[str]:
    """Other files, another product."""
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        raise ModelError("no such model folder", got=config.path, wanted="a folder with config.json and safetensors")
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".jinja", ".md"))
    files += sorted(folder.glob("*_Pooling/config.json"))
    return [f"{path.name}:{file_fingerprint(path)}" for path in files]


def config_of(artifact: Artifact) -> ModelConfig:
    """The config of a model, or of the base that an adapter stands on, without reading weights."""
    folder = artifact.path
    manifest = read_manifest(folder)
    if manifest.get("kind") == "adapter":
        folder = folder.parent / str(manifest["base_artifact"])
    return read_config(read_json(folder / "config.json"), str(folder))


def job_of(config: Learning, model: ModelConfig, runtime: Runtime) -> Job:
    """What decides the memory of a training."""
    rank = config.adapter.rank if config.adapter else 0
    longest = min(config.max_tokens, config.tokens_per_batch)
    dtype = "float32" if config.dtype == "auto" else config.dtype
    ranks = runtime.world_size
    tokens = config.tokens_per_batch
    if config.micro_batches < ranks:  # then a rank computes a part of each
        tokens = max(longest, -(-tokens // ranks))
    return Job(
        model, tokens, longest, rank, config.optimizer, dtype, config.activation_checkpointing,
        quantize=config.quantize, keeps_logits=getattr(config, "objective", "") in ("dpo", "kto"),
        ranks=ranks, beside=runtime.beside, shard=config.shard,
    )  # fmt: skip


def fits(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raises ModelError if the tokenizer has ids that the model has not, or if the model has so many more that the
    tokenizer must be another one's."""
    spare = config.vocab_size - tokenizer.vocab_size
    if spare > max(PADDED, config.vocab_size // 10):
        raise ModelError(
            "the model's vocabulary is far larger than the tokenizer's",
            got=f"{tokenizer.vocab_size} tokens for {config.vocab_size} embeddings",
            wanted=f"at most {max(PADDED, config.vocab_size // 10)} embeddings without a token",
            mend="take the tokenizer that the model was trained with",
        )
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
    if config.start is not None:
        _require_fit(work, config_of(work.model(config.start)))
        start = open_start(work.model(config.start))
        base_artifact = base_of(work.model(config.start))
    else:
        assert config.shape is not None and config.tokenizer is not None
        tokenizer_folder = work.inputs[config.tokenizer].product.path
        _require_fit(work, new_model(config.shape, Tokenizer.load(tokenizer_folder).vocab_size))
        start = _fresh(config.shape, tokenizer_folder, work.context.recipe.seed)
        base_artifact = ""
    with _lesson_of(work, start) as lesson:
        return lesson.write(lesson.trainer.fit(), work.folder, base_artifact)


def _require_fit(work: Work, model: ModelConfig) -> None:
    """Raises TrainingError for a training that does not fit; whether it does is the same on all ranks."""
    job_of(work.config, model, work.context.runtime).require_fit(work.name)


def train_together(works: Sequence[Work]) -> list[dict[str, Any]]:
    """Several training stages of adapters on one model, carried out in the same steps."""
    first: Train = works[0].config
    assert first.start is not None
    artifact = works[0].model(first.start)
    start = open_start(artifact)
    if start.adapter is not None:
        raise ModelError(
            "adapters are trained together on a whole model", got=f"stage `{first.start}`, an adapter",
            mend=f"leave `together: {first.together}` out, or merge that adapter first",
        )  # fmt: skip
    with ExitStack() as stack:
        lessons = [stack.enter_context(_lesson_of(work, replace(start))) for work in works]
        figures = fit_together([lesson.trainer for lesson in lessons])
        return [
            lesson.write(its, work.folder, base_of(artifact))
            for lesson, its, work in zip(lessons, figures, works, strict=True)
        ]


def _lesson_of(work: Work, start: Start) -> AbstractContextManager[Lesson]:
    config: Train = work.config
    folders = {name: work.inputs[name].product.path for name in config.sources()}
    records = [r for folder in folders.values() for r in train_records(folder)]
    held_out = {name: held_out_records(folder) for name, folder in folders.items()} if config.evaluation else {}
    return _lesson(
        config, config.objective, records, start, work.scratch, work.context.runtime, work.name,
        kept=work.context.home.references, held_out=held_out, tracked=work.context.home.root / "tracking",
    )  # fmt: skip


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
    *,
    kept: Path,
    tracked: Path | None = None,
    earlier: Sequence[Record] = (),
) -> dict[str, Any]:
    """Trains and writes the model (or adapter) into `folder`; returns the figures. Resumes from `scratch`; `kept` is
    where references lie (`Home.references`), `tracked` where a tracker writes, `earlier` is gone over again as
    `config.replay` says."""
    with _lesson(
        config, objective, records, start, scratch, runtime, title, kept=kept, tracked=tracked, earlier=earlier
    ) as lesson:
        return lesson.write(lesson.trainer.fit(), folder, base_artifact)


@dataclass(frozen=True)
class Lesson:
    """A training that is ready to begin, and how its result is written."""

    trainer: Trainer
    start: Start
    dataset: TokenDataset
    about: dict[str, Any]

    def write(self, figures: dict[str, Any], folder: Path, base_artifact: str) -> dict[str, Any]:
        """The model (or adapter), its metrics and curves, into `folder`, by rank 0; returns all figures."""
        trainer, start, data = self.trainer, self.start, self.dataset.figures
        parameters, processes = start.model.config.parameters(), trainer.ranks.count
        figures = {**figures, **self.about, "dtype": trainer.runtime.dtype, "parameters": parameters}
        figures |= {"processes": processes} if processes > 1 else {}
        with trainer.whole_model():
            if trainer.ranks.leads:
                self._write(figures, folder, base_artifact)
        return {**figures, "data": data}

    def _write(self, figures: dict[str, Any], folder: Path, base_artifact: str) -> None:
        trainer, start = self.trainer, self.start
        if trainer.adapter is None:
            write_model(start.model, start.tokenizer, start.template, folder, {})
            if start.folder is not None:
                carry_pooling(start.folder, folder)
        else:
            _write_adapter(trainer.adapter, start, folder, base_artifact)
        metrics = folder / "metrics.jsonl"
        metrics.write_bytes((trainer.folder / "metrics.jsonl").read_bytes())
        page = curve_page(metrics, trainer.title, {**figures, **self.dataset.figures})
        (folder / "curves.html").write_text(page, encoding="utf-8")


@contextmanager
def _lesson(
    config: Learning,
    objective: str,
    records: Sequence[Record],
    start: Start,
    scratch: Path,
    runtime: Runtime,
    title: str,
    *,
    kept: Path,
    held_out: Mapping[str, Sequence[Record]] | None = None,
    tracked: Path | None = None,
    earlier: Sequence[Record] = (),
) -> Iterator[Lesson]:
    """Everything between the keys of a recipe and the first step.

    `kept` is where references lie; `held_out` are rows by the stage they come from, for `config.evaluation`; `tracked`
    is where a tracker writes; `earlier` are conversations to go over again.
    """
    ranks = Ranks.join(runtime)
    dtype = ranks.first_says(lambda: runtime.computing_in(config.dtype).dtype) if ranks.count > 1 else config.dtype
    runtime = runtime.computing_in(dtype)
    runtime.seed_all()
    labels = labels_of(objective, records, start.labels)
    require_teachable(objective, start.model.config, config.adapter is not None)
    start.model = _with_head(start, objective, labels, runtime.seed, config.adapter)
    marked = not start.model.config.causal
    dataset = dataset_of(records, start.tokenizer, start.template, config, objective, labels, marked=marked)
    dataset.check_refused(config.max_refused)
    about = {**_tell_of(dataset, objective, title, runtime), **_packed(config, start, dataset)}
    loader = Loader(dataset, tokens_per_batch=config.tokens_per_batch, seed=runtime.seed)
    steps = config.steps or max(1, round((config.epochs or 1) * loader.batches_per_epoch / config.micro_batches))
    learned = _objective(objective, config, start, dataset, runtime, kept)
    if earlier and isinstance(config, VoteLearning) and config.replay is not None:
        rows = dataset_of(earlier, start.tokenizer, start.template, config, "causal_lm")
        learned = Replay(learned, rows, len(dataset), config.replay.share, config.replay.weight)
    evaluate = None
    adapter = _adapter_to_train(config, start, runtime.seed, labels)
    if config.evaluation is not None:
        held_out_rows = {
            name: (_objective(objective, config, start, found, runtime, kept), found)
            for name, records in (held_out or {}).items() if records
            for found in [
                dataset_of(records, start.tokenizer, start.template, config, objective, labels, marked=marked)
            ]
        }  # fmt: skip
        evaluate = watcher(config.evaluation, held_out_rows, start.model, start.tokenizer, start.template, adapter)
    settings = train_config(config, steps, runtime.seed)
    track = config.track if ranks.leads else None
    with tracking(track, tracked or scratch, f"{title}-{scratch.name[:12]}", settings.deciding()) as tracker:
        trainer = Trainer(
            start.model, learned, loader, settings, runtime=runtime, folder=scratch, adapter=adapter,
            evaluate=evaluate, tracker=tracker, title=title,
        )  # fmt: skip
        yield Lesson(trainer, start, dataset, about)


def _packed(config: Learning, start: Start, dataset: TokenDataset) -> dict[str, Any]:
    """Keeps the base in fewer bits, if that is asked for, and says what it changed. ModelError without an adapter."""
    if config.quantize is None:
        return {}
    if config.adapter is None and start.adapter is None:
        raise ModelError(
            "only an adapter can learn on a quantised base", got=f"quantize {config.quantize}", mend="add `adapter`"
        )
    known = start.model.quantization
    if known is not None and known.bits == config.quantize:  # by another training on the same base
        return {"quantized": known.to_json()}
    rows = [dataset.ids[a:b].tolist() for a, b in pairwise(dataset.offsets[:9].tolist())]
    return {"quantized": quantize(start.model, config.quantize, rows).to_json()}


def _tell_of(dataset: TokenDataset, objective: str, title: str, runtime: Runtime) -> dict[str, Any]:
    """Says what is about to be learnt from, and what length alone would tell; gives the figures of it."""
    found = dataset.figures
    line = (
        f"{title}: {found['rows']:,} rows, {found['tokens']:,} tokens, {found['supervised_tokens']:,} supervised; "
        f"{found['truncated_rows']:,} rows lose {found['truncated_tokens']:,} tokens, {found['refused_rows']:,} refused"
    )
    about: dict[str, Any] = {}
    if dataset.weights is not None:
        line += f", {found['weighted_rows']:,} of another weight than 1"
    if objective in ("dpo", "reward"):
        about["length_baseline"] = length_baseline(dataset)
        line += f"; length alone tells {about['length_baseline']:.0%} of the pairs"
    if objective == "kto" and dataset.targets is not None:
        about["liked"] = float(dataset.targets.mean())
        line += f"; {about['liked']:.0%} of the answers were liked"
    runtime.progress.say(line)
    return about


def train_config(config: Learning, steps: int, seed: int) -> TrainConfig:
    """The trainer's view of the keys of a recipe."""
    watch = config.evaluation
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
        activation_checkpointing=config.activation_checkpointing,
        shard=config.shard,
        eval_every=watch.every if watch else 0,
        keep_best=watch.keep_best if watch else False,
        patience=watch.patience if watch else 0,
        seed=seed,
    )


def template_of(
    folder: Path, tokenizer: Tokenizer, config: ModelConfig, name: str | None = None
) -> ChatTemplate | None:
    """The template of a decoder: the built-in one of this name, else the folder's own."""
    if config.kind != "decoder":
        return None
    return ChatTemplate.builtin(name, tokenizer) if name else ChatTemplate.load(folder, tokenizer)


def require_teachable(objective: str, config: ModelConfig, adapted: bool) -> None:
    """Raises ModelError if a model of this kind cannot learn by this objective, or not by an adapter."""
    if (config.kind == "encoder_decoder") != (objective == "seq2seq"):
        raise ModelError(
            f"an {config.kind.replace('_', '-')} cannot learn by {objective}", got=config.family,
            wanted="seq2seq" if config.kind == "encoder_decoder" else "an encoder-decoder",
        )  # fmt: skip
    if config.kind == "decoder" or (objective == "seq2seq" and not adapted):
        return
    if objective == "seq2seq":
        raise ModelError("an encoder-decoder is trained as a whole", got="an adapter", mend="leave `adapter` out")
    if objective not in ("masked_lm", "classification"):
        raise ModelError(
            f"an encoder cannot learn by {objective}", got=config.family, wanted="masked_lm or classification"
        )
    if adapted:
        raise ModelError("an encoder is trained as a whole", got="an adapter", mend="leave `adapter` out")


def dataset_of(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    config: Learning,
    objective: str,
    labels: Sequence[str] = (),
    *,
    marked: bool = False,
) -> TokenDataset:
    """Tokens of records for an objective; `labels` are its classes, `marked` is for models that read both ways. Raises
    DataError when nothing is left."""
    if objective == "kto":
        judged = [r for r in records if isinstance(r, Chat) and r.label is not None]
        if len(judged) != len(records):
            raise DataError(
                "kto needs answers with a label", got=f"{len(records) - len(judged)} other rows",
                wanted='`label` true or false in each row: {"messages": ..., "label": true}',
            )  # fmt: skip
        return TokenDataset.from_judged(judged, _needed(template), config.max_tokens, on_long=config.on_long)
    disliked = sum(isinstance(r, Chat) and r.label is False for r in records)
    if disliked:
        raise DataError(
            f"{objective} would learn answers that people disliked", got=f"{disliked} rows whose `label` is false",
            mend="learn from them with objective kto, or leave them out with `want: chat` of the prepare stage",
        )  # fmt: skip
    if objective in ("dpo", "reward"):
        pairs = [r for r in records if isinstance(r, Preference)]
        if len(pairs) != len(records):
            raise DataError(f"{objective} needs preferences", got=f"{len(records) - len(pairs)} other rows")
        return TokenDataset.from_preferences(pairs, _needed(template), config.max_tokens, on_long=config.on_long)
    if objective == "seq2seq":
        return TokenDataset.from_answers(
            [_as_chat(r) for r in records if not isinstance(r, Text)], tokenizer, config.max_tokens,
            on_long=config.on_long,
        )  # fmt: skip
    texts = [r for r in records if isinstance(r, Text)]
    if objective in ("classification", "masked_lm") and len(texts) != len(records):
        raise DataError(f"{objective} needs texts", got=f"{len(records) - len(texts)} other rows")
    if objective == "classification":
        return TokenDataset.from_labelled(
            texts, tokenizer, labels, config.max_tokens, on_long=config.on_long, marked=marked
        )
    if texts and len(texts) != len(records):
        raise DataError("text and conversations are mixed", mend="train on them in two stages")
    if texts:
        return TokenDataset.from_texts(texts, tokenizer, config.max_tokens, marked=marked)
    talks = [_as_chat(r) for r in records]
    return TokenDataset.from_chats(talks, _needed(template), config.max_tokens, on_long=config.on_long)


def _needed(template: ChatTemplate | None) -> ChatTemplate:
    if template is None:
        raise ModelError("conversations need a model that writes", got="one that only reads", wanted="a decoder")
    return template


def _as_chat(record: Record) -> Chat:
    """A preference trains as its chosen side."""
    if isinstance(record, Preference):
        return Chat((*record.prompt, *record.chosen), record.source, record.tags, record.tools, record.weight)
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
    model: Transformer, tokenizer: Tokenizer, template: ChatTemplate | None, folder: Path, facts: dict[str, Any]
) -> None:
    """A folder that transformers, the engine and we can load."""
    facts = {**facts, "tokenizer_hash": tokenizer.hash, **({"template_hash": template.hash} if template else {})}
    save_model(model, folder, **facts)
    tokenizer.save(folder)
    if template is not None:
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


def _adapter_to_train(config: Learning, start: Start, seed: int, labels: tuple[str, ...]) -> LoRA | None:
    """The start's own adapter goes on learning, or a new one stands on it; otherwise a new one, or none. A new one
    that learns scores brings their head."""
    shape = config.adapter
    if start.adapter is not None and (shape is None or not shape.stack):
        return start.adapter
    if shape is None:
        return None
    targets: Any = shape.targets if isinstance(shape.targets, str) else tuple(shape.targets)
    wanted = LoRAConfig(shape.rank, shape.alpha, shape.dropout, targets, shape.rslora, shape.dora)
    return LoRA.create(start.model, wanted, seed, start.adapter, labels)


def labels_of(objective: str, records: Sequence[Record], known: tuple[str, ...]) -> tuple[str, ...]:
    """The scores that an objective wants of a model: those it gives already (`known`), one reward, or the labels of the
    rows, sorted."""
    if objective == "reward":
        return LABELS
    if objective != "classification":
        return ()
    if known:
        return known
    labels = sorted({r.label for r in records if isinstance(r, Text) and r.label})
    if len(labels) < 2:
        raise DataError(
            "classification needs rows of two classes or more", got=f"labels {', '.join(labels) or 'none'}",
            wanted='`label` in each row: {"text": ..., "label": ...}',
        )  # fmt: skip
    return tuple(labels)


def _with_head(
    start: Start, objective: str, labels: tuple[str, ...], seed: int, shape: AdapterShape | None
) -> Transformer:
    """The starting model with the head that the objective wants: its own if it has that, else a fresh one, which a new
    adapter (of `shape`) brings itself."""
    head = start.model.config.head
    if objective == "masked_lm" and start.model.config.kind == "encoder":
        return start.model if head is not None and head.kind == "mlm" else start.model.with_head("mlm", seed=seed)
    if start.labels == labels:
        return start.model
    if not labels or start.labels:
        raise ModelError(
            "the starting model gives other scores than the objective wants",
            got=", ".join(start.labels), wanted=", ".join(labels) or "a language model",
        )  # fmt: skip
    if start.adapter is not None and not (shape is not None and shape.stack):
        raise ModelError(
            "an adapter that has learnt to write gets no head of scores", got="a start that is an adapter",
            mend="start from the model it stands on, or let a new one stand on it (`adapter: {stack: true}`)",
        )  # fmt: skip
    if shape is not None:
        return start.model
    return start.model.with_scores(labels, seed)


def _objective(
    name: str, config: Learning, start: Start, dataset: TokenDataset, runtime: Runtime, kept: Path
) -> Objective:
    """The objective for a dataset; the reference of DPO and KTO is the starting model, so this comes before any step.
    What was computed of it lies in `kept`."""
    match name:
        case "dpo":
            family = DPOConfig(
                loss=config.loss, beta=config.beta, label_smoothing=config.label_smoothing, sft_weight=config.sft_weight
            )
            reference = kept_reference(kept, start.model, dataset, start.adapters, dtype=runtime.torch_dtype())
            return DPO(family, reference)
        case "kto":
            judged = KTOConfig(config.beta, config.desirable_weight, config.undesirable_weight)
            return KTO(judged, kept_reference(kept, start.model, dataset, start.adapters, dtype=runtime.torch_dtype()))
        case "reward":
            return Reward()
        case "classification":
            return Classification()
        case "masked_lm":
            return _masked(start, runtime.seed)
        case "seq2seq":
            return Seq2Seq()
        case _:
            return CausalLM()


def _masked(start: Start, seed: int) -> MaskedLM:
    """Raises ModelError if the tokenizer has no mask token."""
    tokenizer = start.tokenizer
    if tokenizer.mask_id is None or start.model.config.kind != "encoder":
        raise ModelError(
            "masked_lm needs an encoder and a tokenizer with a mask token", got=f"an {start.model.config.kind}",
            mend="start from an encoder, such as BERT",
        )  # fmt: skip
    special = tuple(sorted(tokenizer.special_tokens.values()))
    return MaskedLM(tokenizer.mask_id, start.model.config.vocab_size, special, seed=seed)


def _write_adapter(adapter: LoRA, start: Start, folder: Path, base_artifact: str) -> None:
    adapter.save(
        folder,
        template_hash=_needed(start.template).hash,
        tokenizer_hash=start.tokenizer.hash,
        base_artifact=base_artifact,
        base_quantized=start.model.quantization.bits if start.model.quantization else None,
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
