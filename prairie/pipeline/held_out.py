"""Held-out questions and rows: what a finished model is scored on, and what a training looks at while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prairie.data.chat_template import ChatTemplate
from prairie.data.loader import TokenDataset
from prairie.data.records import Message
from prairie.data.tokenizer import Tokenizer
from prairie.engine.language_model import LanguageModel
from prairie.errors import DataError, ModelError
from prairie.evals.harness import Evaluation, evaluate
from prairie.models.lora import AdapterRows, LoRA
from prairie.models.transformer import Transformer
from prairie.recipe import HeldOut
from prairie.tasks.catalog import items
from prairie.tasks.task import Item
from prairie.train.objective import Objective, held_out_figures

SUITE_SEED = 20_000
"""The frozen suite: the same held-out items for every model of every turn."""
WATCH_SEED = 30_000
"""Other items for what is looked at during a training: a best checkpoint must not be chosen on the suite's."""


def suite(tasks: list[str], count: int, seed: int = SUITE_SEED) -> list[Item]:
    """Held-out items of some tasks: of the frozen suite, or with another seed others."""
    return items(tasks, "held_out", count, seed)


def score_suite(model: LanguageModel, asked: list[Item], max_tokens: int) -> Evaluation:
    """Greedy answers to the items, and what they scored."""

    def generate(prompts: list[list[Message]]) -> list[str]:
        return [c.text for c in model.generate(prompts, temperature=0.0, max_tokens=max_tokens)]

    return evaluate(generate, asked)


def watcher(
    config: HeldOut,
    rows: Mapping[str, tuple[Objective, TokenDataset]],
    model: Transformer,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    adapter: LoRA | None,
) -> Callable[[], dict[str, Any]]:
    """What a trainer calls to evaluate the model as it is now.

    Gives `held_out` (by the stage of the rows: the objective's own loss and figures), `tasks` (accuracies) and `score`,
    higher is better: minus the loss over all held-out rows, or the mean accuracy. Raises DataError if there is nothing
    to score on.
    """
    if not rows and (config.by == "loss" or not config.tasks):
        raise DataError("an evaluation needs held-out rows", got="none", mend="raise `held_out` of the prepare stage")
    if config.tasks and template is None:
        raise ModelError(
            "tasks are answered by a model that writes", got="one that only reads", mend="leave `tasks` out"
        )
    asked = suite(config.tasks, config.items, WATCH_SEED) if config.tasks else []
    adapters = [AdapterRows(adapter)] if adapter is not None else []

    def look() -> dict[str, Any]:
        held_out = {name: held_out_figures(one, model, dataset, adapters) for name, (one, dataset) in rows.items()}
        tasks: dict[str, float] = {}
        if asked and template is not None:
            answering = LanguageModel(model, tokenizer, template, lora=adapter)
            scores = score_suite(answering, asked, config.max_tokens).tasks
            tasks = {task: score.accuracy for task, score in scores.items()}
        if config.by == "loss":
            counts = [found["count"] for found in held_out.values()]
            score = -sum(found["loss"] * found["count"] for found in held_out.values()) / sum(counts)
        else:
            accuracies = list(tasks.values()) or [found["accuracy"] for found in held_out.values()]
            score = sum(accuracies) / len(accuracies)
        return {"held_out": held_out, "tasks": tasks, "score": score}

    return look
