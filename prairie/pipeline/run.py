"""Carries out a recipe: stages in order, what exists is not made again, a crash resumes where it stood.

A product's id is the hash of its stage's keys, of the ids of what it reads and of the code revision of its rooms.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from prairie.errors import RecipeError
from prairie.pipeline.context import Context, Handler, Made, Work, code_revision
from prairie.recipe import AnyStage
from prairie.store.artifacts import Artifact


def run(context: Context, handlers: Mapping[str, Handler]) -> dict[str, Made]:
    """Every stage of the recipe, in order. Raises PrairieError; what was made until then stays and is reused.

    The home is locked meanwhile: BusyError if another run works in it.
    """
    recipe = context.recipe
    order = recipe.order()
    for name in order:
        if recipe.stages[name].kind not in handlers:
            raise RecipeError(f"stage `{name}` cannot be carried out here", got=recipe.stages[name].kind)
    with context.home.lock("run"):
        context.home.artifacts.collect()
        for number, name in enumerate(order, 1):
            stage, beside = recipe.stages[name], recipe.together(name)
            handler = handlers[stage.kind]
            if name not in context.made:
                context.runtime.progress.say(f"[{number}/{len(order)}] {', '.join(beside)}")
                if len(beside) > 1:
                    context.made.update(make_together(context, handler, beside))
                else:
                    context.made[name] = carry_out(context, handler, name, stage)
            context.runtime.progress.say(f"    {_summary(context.made[name])}")
    return context.made


def carry_out(context: Context, handler: Handler, name: str, config: AnyStage) -> Made:
    """One stage: found, or made and sealed."""
    inputs = {read: context.made[read] for read in config.reads()}
    began = time.monotonic()
    if handler.always:
        scratch = context.home.work(f"{context.recipe.name}-{name}")
        figures = handler.make(Work(context, name, config, inputs, scratch, scratch))
        return Made(name, config.kind, figures, seconds=time.monotonic() - began)
    return make_artifact(context, handler, name, config, inputs)


def make_artifact(context: Context, handler: Handler, name: str, config: Any, inputs: Mapping[str, Made]) -> Made:
    """The artifact of a stage: the existing one, or a new one."""
    began = time.monotonic()
    plan = _Plan(context, handler, name, config, inputs)
    found = plan.found()
    if found is not None:
        return Made(name, config.kind, found.figures, found, time.monotonic() - began, reused=True)
    with plan.making() as (work, figures):
        figures.update(handler.make(work))
    return plan.made(time.monotonic() - began)


def make_together(context: Context, handler: Handler, names: Sequence[str]) -> dict[str, Made]:
    """The artifacts of several stages, those that do not exist made in the same steps."""
    began = time.monotonic()
    plans = []
    for name in names:
        config = context.recipe.stages[name]
        plans.append(_Plan(context, handler, name, config, {read: context.made[read] for read in config.reads()}))
    there = {plan.name: found for plan in plans if (found := plan.found())}
    lacking = [plan for plan in plans if plan.name not in there]
    with ExitStack() as stack:
        begun = [stack.enter_context(plan.making()) for plan in lacking]
        works = [work for work, _ in begun]
        assert handler.make_together is not None
        results = handler.make_together(works) if len(works) > 1 else [handler.make(work) for work in works]
        for (_, figures), result in zip(begun, results, strict=True):
            figures.update(result)
    seconds = time.monotonic() - began
    return {
        plan.name: Made(plan.name, plan.config.kind, there[plan.name].figures, there[plan.name], seconds, reused=True)
        if plan.name in there
        else plan.made(seconds)
        for plan in plans
    }


class _Plan:
    """The artifact that a stage will leave, known before it is made."""

    def __init__(self, context: Context, handler: Handler, name: str, config: Any, inputs: Mapping[str, Made]) -> None:
        self.context, self.name, self.config, self.inputs = context, name, config, inputs
        self.keys = {
            **config.model_dump(mode="json", by_alias=True),
            "seed": context.recipe.seed,
            "reads": {read: made.identity for read, made in inputs.items()},
            "outside": handler.outside(config),
        }
        self.below = list(dict.fromkeys(id for made in inputs.values() for id in made.stands_on))
        self.code = code_revision(handler.rooms)
        self.identity = context.home.artifacts.id_of(config.kind, self.keys, self.below, self.code)
        self.figures: dict[str, Any] = {}

    def found(self) -> Artifact | None:
        """The artifact, if an earlier run has made it."""
        found = self.context.home.artifacts.find(self.identity)
        if found is not None:
            self.context.home.clear_work(self.identity)  # of a run that was killed between sealing and clearing
        return found

    @contextmanager
    def making(self) -> Iterator[tuple[Work, dict[str, Any]]]:
        """The work, and the figures to fill; when the block ends well the artifact is sealed."""
        began = time.monotonic()
        context, store = self.context, self.context.home.artifacts
        kind = self.config.kind
        with store.create(kind, self.name, self.keys, self.below, self.code, figures=self.figures) as folder:
            scratch = context.home.work(self.identity)
            yield Work(context, self.name, self.config, self.inputs, folder, scratch, self.identity), self.figures
            self.figures["seconds"] = round(time.monotonic() - began, 2)
        context.home.clear_work(self.identity)

    def made(self, seconds: float) -> Made:
        """What was sealed."""
        artifact = self.context.home.artifacts.get(self.identity)
        return Made(self.name, self.config.kind, self.figures, artifact, seconds)


def _summary(made: Made) -> str:
    shown = {k: v for k, v in made.figures.items() if isinstance(v, int | float | str) and not isinstance(v, bool)}
    figures = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in list(shown.items())[:7])
    where = f"{made.artifact.id[:12]}  " if made.artifact else ""
    return f"{where}{'was there' if made.reused else f'{made.seconds:.1f}s'}  {figures}"
