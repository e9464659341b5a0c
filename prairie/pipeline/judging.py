"""The `evaluate` stage: held-out task accuracy, held-out loss, held-out preference accuracy, each with its interval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prairie.data.chat_template import ChatTemplate
from prairie.data.loader import TokenDataset
from prairie.data.records import Chat, Message, Preference, Record, Text
from prairie.engine.language_model import LanguageModel
from prairie.errors import DataError
from prairie.evals.harness import Evaluation
from prairie.evals.statistics import wilson
from prairie.models.lora import AdapterRows
from prairie.models.weights import hash_of
from prairie.pipeline.context import Work
from prairie.pipeline.data_stages import held_out_records
from prairie.pipeline.held_out import SUITE_SEED, score_suite, suite
from prairie.pipeline.model_stages import load_language_model
from prairie.recipe import Evaluate
from prairie.tasks.catalog import check
from prairie.tasks.task import Item
from prairie.train.objectives.causal_lm import held_out_loss
from prairie.train.objectives.dpo import DPOConfig, held_out_preferences, reference_logprobs


def score_sampled(model: LanguageModel, asked: list[Item], max_tokens: int, samples: int) -> dict[str, float]:
    """Accuracy of sampled answers (temperature 1, as people meet them), over all items and samples."""
    prompts = [(Message("user", item.prompt),) for item in asked for _ in range(samples)]
    answers = model.generate(prompts, temperature=1.0, max_tokens=max_tokens, seed=SUITE_SEED)
    questions = [item for item in asked for _ in range(samples)]
    right = sum(check(item, answer.text) for item, answer in zip(questions, answers, strict=True))
    found = wilson(right, len(answers))
    return {"accuracy": found.value, "low": found.low, "high": found.high, "n": len(answers)}


def evaluate_models(work: Work) -> dict[str, Any]:
    """Scores of each named model; the answers lie in `answers-NAME.jsonl`."""
    config: Evaluate = work.config
    asked = suite(config.tasks, config.items)
    scores: dict[str, Any] = {}
    with work.context.runtime.progress.bar(work.name, len(config.models), "model") as bar:
        for name in config.models:
            model = load_language_model(work.model(name), work.context.runtime)
            scores[name] = {"tasks": {}, "loss": {}, "preferences": {}}
            if asked:
                found = score_suite(model, asked, config.max_tokens)
                scores[name]["tasks"] = {task: score.to_json() for task, score in found.tasks.items()}
                _write_answers(work.folder / f"answers-{name}.jsonl", found)
                if config.samples:
                    scores[name]["sampled"] = score_sampled(model, asked, config.max_tokens, config.samples)
            for stage in config.text:
                rows = held_out_records(work.inputs[stage].product.path)
                scores[name]["loss"][stage] = _loss(model, rows, config.row_tokens)
            for stage in config.preferences:
                rows = held_out_records(work.inputs[stage].product.path)
                against = load_language_model(work.model(config.reference or config.models[0]), work.context.runtime)
                scores[name]["preferences"][stage] = _preferences(model, against, rows, config.row_tokens)
            bar.update(model=name)
    return {"models": scores, "items": len(asked)}


def _loss(model: LanguageModel, rows: list[Record], row_tokens: int) -> dict[str, float]:
    if not rows:
        raise DataError("no held-out rows to score", mend="raise `held_out` of the prepare stage")
    if isinstance(rows[0], Text):
        texts = [row for row in rows if isinstance(row, Text)]
        dataset = TokenDataset.from_texts(texts, model.tokenizer, row_tokens)
        figures = held_out_loss(model.model, dataset, _adapters(model), tokenizer=model.tokenizer)
    else:
        talks = [r if isinstance(r, Chat) else Chat((*r.prompt, *r.chosen)) for r in rows if not isinstance(r, Text)]
        dataset = TokenDataset.from_chats(talks, model.template, row_tokens, on_long="truncate")
        figures = held_out_loss(model.model, dataset, _adapters(model))
    return {**figures, "rows": len(dataset)}


def _preferences(
    model: LanguageModel, reference: LanguageModel, rows: list[Record], row_tokens: int
) -> dict[str, float]:
    """Share of held-out pairs ranked as people did: `accuracy` by how much likelier than at the reference each answer
    became (ties, as of the reference itself, count half), `by_likelihood` by its probability alone."""
    pairs = [row for row in rows if isinstance(row, Preference)]
    template = _same_template(model, reference)
    dataset = TokenDataset.from_preferences(pairs, template, row_tokens, on_long="truncate")
    known = reference_logprobs(reference.model, dataset, _adapters(reference))
    figures = held_out_preferences(model.model, dataset, _adapters(model), reference_logps=known, config=DPOConfig())
    if model.adapter_hash == reference.adapter_hash and hash_of(model.model) == hash_of(reference.model):
        figures["accuracy"] = 0.5
    for name, share in (("", figures["accuracy"]), ("likelihood_", figures["accuracy_by_likelihood"])):
        interval = wilson(share * len(dataset), len(dataset))
        figures |= {f"{name}low": interval.low, f"{name}high": interval.high}
    return figures


def _adapters(model: LanguageModel) -> list[AdapterRows]:
    return [AdapterRows(model.lora)] if model.lora is not None else []


def _same_template(model: LanguageModel, reference: LanguageModel) -> ChatTemplate:
    if model.template.hash != reference.template.hash:
        raise DataError("model and reference use different chat templates", got=f"{model.name} and {reference.name}")
    return model.template


def _write_answers(path: Path, found: Evaluation) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for item, answer in zip(found.items, found.answers, strict=True):
            row = {"task": item.task, "language": item.language, "prompt": item.prompt, "want": item.answer}
            stream.write(json.dumps({**row, "answer": answer}, ensure_ascii=False) + "\n")
