"""`--plan`: what a recipe would do and cost, before anything is trained.

Data and tokenizer stages are really carried out (they are cheap, and the run reuses them); training stages are counted:
rows, tokens, shares cut and refused, one example with its loss mask token by token, parameters, memory, time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from prairie.data.chat_template import ChatTemplate
from prairie.data.loader import Batch, Loader, TokenDataset
from prairie.data.tokenizer import Tokenizer
from prairie.errors import TrainingError
from prairie.models.config import ModelConfig
from prairie.models.transformer import Transformer
from prairie.models.weights import load_model
from prairie.ops.attention import PackedDocuments
from prairie.pipeline.context import Context
from prairie.pipeline.data_stages import train_records
from prairie.pipeline.handlers import HANDLERS
from prairie.pipeline.model_stages import dataset_of, job_of, labels_of, new_model, require_teachable, template_of
from prairie.pipeline.run import carry_out
from prairie.recipe import Import, Sample, Train
from prairie.train.memory import machine_memory_mb, memory_of

PLANNED_KINDS = ("prepare", "tokenizer", "import")
"""Stages that a plan carries out."""
PROBE_PARAMETERS = 50_000_000
"""Up to this size one real step is timed; above, the time follows from the machine's matrix product."""
EFFICIENCY = 0.35
"""Share of the matrix product's rate that a training step of a large model reaches, as measured in benchmarks."""
EXAMPLE_TOKENS = 160


@dataclass
class PlannedStage:
    """What is known of one stage beforehand."""

    name: str
    kind: str
    about: str
    figures: dict[str, Any] = field(default_factory=dict)
    example: list[tuple[str, bool]] = field(default_factory=list)
    """Tokens of one row, each with whether it is supervised."""
    refusal: TrainingError | None = None
    """Why the stage cannot be carried out on this machine."""

    def to_json(self) -> dict[str, Any]:
        refusal = {"refusal": str(self.refusal)} if self.refusal else {}
        return {
            **{field.name: getattr(self, field.name) for field in fields(self) if field.name != "refusal"},
            **refusal,
        }


@dataclass
class Plan:
    """All stages in order, with the sums."""

    recipe: str
    recipe_hash: str
    stages: list[PlannedStage]

    @property
    def seconds(self) -> float:
        return sum(stage.figures.get("estimated_s", 0.0) for stage in self.stages)

    @property
    def memory_mb(self) -> float:
        return max((stage.figures.get("memory_mb", 0.0) for stage in self.stages), default=0.0)

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "recipe_hash": self.recipe_hash,
            "estimated_s": round(self.seconds, 3),
            "memory_mb": round(self.memory_mb),
            "machine_memory_mb": machine_memory_mb(),
            "stages": [stage.to_json() for stage in self.stages],
        }

    def check_fits(self) -> None:
        """Raises TrainingError, with the ways out, for the first stage that needs more memory than there is."""
        for stage in self.stages:
            if stage.refusal is not None:
                raise stage.refusal

    def text(self) -> str:
        """For people; supervised tokens of an example stand in ⟦ ⟧."""
        lines = [f"{self.recipe}  ({self.recipe_hash[:12]})"]
        for stage in self.stages:
            figures = "  ".join(f"{k} {_shown(v)}" for k, v in stage.figures.items() if not isinstance(v, list | dict))
            lines.append(f"- {stage.name} ({stage.kind}): {stage.about}")
            if figures:
                lines.append(f"    {figures}")
            for fault in stage.figures.get("refused_rows_list", [])[:3]:
                lines.append(f"    refused row {fault['row']}: {fault['reason']}")
            if stage.example:
                lines.append("    one row, ⟦supervised⟧ token by token:")
                lines.append("    " + "".join(f"⟦{t}⟧" if mask else f"{t}·" for t, mask in stage.example))
        lines.append(
            f"training takes about {self.seconds:.0f} s and {self.memory_mb:,.0f} MB"
            f" of this machine's {machine_memory_mb():,} MB; sampling, evaluation and turns come on top"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Origin:
    """What a training stage would start from."""

    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None


def plan_recipe(context: Context) -> Plan:
    """Raises what the data stages raise: a bad recipe or bad rows are found here and not after an hour."""
    recipe = context.recipe
    plan = Plan(recipe.name, recipe.hash(), [])
    origins: dict[str, _Origin] = {}
    with context.home.lock("run"):
        for name in recipe.order():
            config = recipe.stages[name]
            if config.kind in PLANNED_KINDS:
                context.made[name] = made = carry_out(context, HANDLERS[config.kind], name, config)
                about = "already there" if made.reused else f"made in {made.seconds:.1f} s"
                figures = {k: v for k, v in made.figures.items() if k != "seconds"}
                plan.stages.append(PlannedStage(name, config.kind, about, figures))
                if isinstance(config, Import):
                    origins[name] = _imported(context, name)
            elif isinstance(config, Train):
                plan.stages.append(_training(context, name, config, origins))
            else:
                plan.stages.append(PlannedStage(name, config.kind, _about(config)))
    return plan


def _training(context: Context, name: str, config: Train, origins: dict[str, _Origin]) -> PlannedStage:
    origin = origins[config.start] if config.start in origins else _new(context, config)
    origins[name] = origin
    parameters = origin.config.parameters()
    c, job = origin.config, job_of(config, origin.config, context.runtime)
    memory = memory_of(job)
    figures: dict[str, Any] = {"parameters": parameters, "trained_parameters": job.trained}
    figures |= {"memory_mb": round(memory.total), "memory": memory.text()}
    what = f"{config.objective}, {f'adapter of rank {job.rank}' if job.rank else 'all weights'}"
    try:
        job.require_fit(name)
    except TrainingError as error:
        return PlannedStage(name, config.kind, what, figures, refusal=error)
    unknown = [s for s in config.sources() if s not in context.made]
    if unknown:
        return PlannedStage(name, config.kind, f"{what}; its rows come from `{unknown[0]}`, not made yet", figures)
    records = [record for source in config.sources() for record in train_records(context.made[source].product.path)]
    labels = labels_of(config.objective, records, origin.config.labels)
    require_teachable(config.objective, origin.config, config.adapter is not None)
    marked = not origin.config.causal
    dataset = dataset_of(records, origin.tokenizer, origin.template, config, config.objective, labels, marked=marked)
    dataset.check_refused(config.max_refused)
    loader = Loader(dataset, tokens_per_batch=config.tokens_per_batch, seed=context.recipe.seed)
    steps = config.steps or max(1, round((config.epochs or 1) * loader.batches_per_epoch / config.micro_batches))
    refused = dataset.figures["refused_rows"]
    figures |= {k: v for k, v in dataset.figures.items() if k != "refused"}
    figures["truncated_share"] = dataset.figures["truncated_rows"] / max(1, dataset.figures["rows"])
    figures["refused_share"] = refused / max(1, refused + len(dataset))
    figures["steps"] = steps
    batch = loader.next_step()[0]
    per_step_s = _step_seconds(c, batch) * config.micro_batches
    figures["estimated_s"] = round(steps * per_step_s, 3)
    figures["refused_rows_list"] = dataset.figures["refused"]
    return PlannedStage(name, config.kind, what, figures, _example(dataset, origin.tokenizer))


def _new(context: Context, config: Train) -> _Origin:
    assert config.shape is not None and config.tokenizer is not None
    folder = context.made[config.tokenizer].product.path
    tokenizer = Tokenizer.load(folder)
    return _Origin(new_model(config.shape, tokenizer.vocab_size), tokenizer, ChatTemplate.load(folder, tokenizer))


def _imported(context: Context, name: str) -> _Origin:
    folder = context.made[name].product.path
    tokenizer = Tokenizer.load(folder)
    config = load_model(folder).config
    return _Origin(config, tokenizer, template_of(folder, tokenizer, config))


def _example(dataset: TokenDataset, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    ids, mask = dataset.row(0)
    return [
        (tokenizer.decode([int(i)], skip_special=False).replace("\n", "⏎"), bool(m))
        for i, m in zip(ids[:EXAMPLE_TOKENS], mask[:EXAMPLE_TOKENS], strict=True)
    ]


def _step_seconds(config: ModelConfig, batch: Batch) -> float:
    """The time of one forward and backward pass on this machine."""
    if config.parameters() > PROBE_PARAMETERS:
        flops = config.flops_per_token(max(batch.lengths)) * len(batch.tokens_N)
        return flops / (EFFICIENCY * _matmul_rate(config))
    model = Transformer(config).init_weights(0)
    times = []
    for _ in range(3):  # the first pass warms up
        began = time.perf_counter()
        hidden = model(batch.tokens_N, PackedDocuments(batch.lengths))
        model.cross_entropy(hidden, batch.labels_N).backward()
        times.append(time.perf_counter() - began)
    return 1.1 * min(times)  # the optimiser's step comes on top


def _matmul_rate(config: ModelConfig) -> float:
    """Floating-point operations a second of the model's largest product."""
    x, w = torch.randn(1024, config.dim), torch.randn(config.dim, config.ffn_dim)
    began = time.perf_counter()
    for _ in range(3):
        x @ w
    return 3 * 2 * x.shape[0] * w.numel() / (time.perf_counter() - began)


def _about(config: Any) -> str:
    if isinstance(config, Sample):
        return f"{config.answers} answers to {config.prompts} prompts of each of {', '.join(config.tasks)}"
    return (type(config).__doc__ or "").split(".")[0]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
