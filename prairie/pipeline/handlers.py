"""Which function carries out which kind of stage, and whose source is its code revision."""

from __future__ import annotations

from collections.abc import Mapping

from prairie.pipeline.context import Handler
from prairie.pipeline.data_stages import outside_of_prepare, prepare, tokenizer
from prairie.pipeline.judging import evaluate_models
from prairie.pipeline.model_stages import import_model, outside_of_import, sample, train, train_together
from prairie.pipeline.publishing import publish, serve
from prairie.pipeline.report import report

DATA = ("data", "tasks", "pipeline/data_stages")
LEARNING = ("data", "models", "ops", "train", "pipeline/model_stages", "pipeline/held_out")

HANDLERS: Mapping[str, Handler] = {
    "prepare": Handler(prepare, DATA, outside=outside_of_prepare),
    "tokenizer": Handler(tokenizer, DATA),
    "import": Handler(import_model, LEARNING, outside=outside_of_import),
    "train": Handler(train, LEARNING, shared=True, make_together=train_together),
    "sample": Handler(sample, (*LEARNING, "engine", "tasks")),
    "evaluate": Handler(evaluate_models, (*LEARNING, "engine", "tasks", "evals", "pipeline/judging")),
    "publish": Handler(publish, (), always=True),
    "serve": Handler(serve, (), always=True),
    "report": Handler(report, (), always=True),
}
