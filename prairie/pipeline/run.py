"""Carries out a recipe: stages in order, what exists is not made again, a crash resumes where it stood.

A product's id is the hash of its stage's keys, of the ids of what it reads and of the code revision of its rooms.
Where several processes run one recipe (torchrun), rank 0 makes what is made and tells the others, who take it from the
store; a training is carried out by all of them, who share its steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from prairie.errors import RecipeError, TrainingError
from prairie.pipeline.context import Context, Handler, Made, Work, code_revision
from prairie.recipe import AnyStage
from prairie.store.artifacts import Artifact
from prairie.train.ranks import ALONE, Ranks


def run(context: Context, handlers: Mapping[str, Handler]) -> dict[str, Made]:
    """Every stage of the recipe, in order. Raises PrairieError; what was made until then stays and is reused.

    The home is locked meanwhile: BusyError if another run works in it. TrainingError on the other ranks if rank 0
    fails, SystemExit on all if one is asked to stop.
    """
    recipe = context.recipe
    order = recipe.order()
    for name in order:
        if recipe.stages[name].kind not in handlers:
            raise RecipeError(f"stage `{name}` cannot be carried out here", got=recipe.stages[name].kind)
    ranks = Ranks.join(context.runtime)
    alone = replace(context, runtime=context.runtime.alone())
    with ExitStack() as stack, _ending_together(context):
        ranks.first_says(lambda: stack.enter_context(_held(context)))
        for number, name in enumerate(order, 1):
            stage, beside = recipe.stages[name], recipe.together(name)
            handler = handlers[stage.kind]
            if name not in context.made:
                _stop_if_asked(context, ranks)
                context.runtime.progress.say(f"[{number}/{len(order)}] {', '.join(beside)}")
                if handler.shared and len(beside) == 1:
                    context.made[name] = carry_out(context, handler, name, stage, ranks)
                else:
                    context.made.update(_made_by_the_first(alone, handler, beside, ranks))
            context.runtime.progress.say(f"    {_summary(context.made[name])}")
    return context.made


@contextmanager
def _held(context: Context) -> Iterator[None]:
    with context.home.lock("run"):
        context.home.artifacts.collect()
        yield


def _stop_if_asked(context: Context, ranks: Ranks) -> None:
    """A signal to a process that only waits is heard where all of them meet: before the next stage."""
    if ranks.most([float(context.asked_to_stop)])[0]:
        context.runtime.progress.say(f"stopped by SIGTERM; go on with: {context.runtime.command}")
        raise SystemExit(0)


@contextmanager
def _ending_together(context: Context) -> Iterator[None]:
    """A rank that is asked to stop, and loses the others as they stop, has not failed."""
    try:
        yield
    except TrainingError:
        if context.asked_to_stop:
            raise SystemExit(0) from None
        raise


def _made_by_the_first(context: Context, handler: Handler, names: Sequence[str], ranks: Ranks) -> dict[str, Made]:
    """One stage, or several at once, by rank 0; the others take what it made from the store."""
    here: dict[str, Made] = {}

    def make() -> dict[str, str]:
        if len(names) > 1:
            here.update(make_together(context, handler, names))
        else:
            here[names[0]] = carry_out(context, handler, names[0], context.recipe.stages[names[0]])
        return {name: _told(made) for name, made in here.items()}

    told = ranks.first_says(make)
    return here or {name: _heard(context, name, facts) for name, facts in told.items()}


def _told(made: Made) -> str:
    facts = {"figures": made.figures, "id": made.identity, "seconds": made.seconds, "reused": made.reused}
    return json.dumps({**facts, "leaves": made.artifact is not None}, default=str)


def _heard(context: Context, name: str, facts: str) -> Made:
    told = json.loads(facts)
    artifact = context.home.artifacts.get(told["id"]) if told["leaves"] else None
    kind = context.recipe.stages[name].kind
    return Made(name, kind, told["figures"], artifact, told["seconds"], told["reused"])


def carry_out(context: Context, handler: Handler, name: str, config: AnyStage, ranks: Ranks = ALONE) -> Made:
    """One stage: found, or made and sealed; by several `ranks` together if its handler says that it is shared."""
    inputs = {read: context.made[read] for read in config.reads()}
    began = time.monotonic()
    if handler.always:
        scratch = context.home.work(f"{context.recipe.name}-{name}")
        figures = handler.make(Work(context, name, config, inputs, scratch, scratch))
        return Made(name, config.kind, figures, seconds=time.monotonic() - began)
    return make_artifact(context, handler, name, config, inputs, ranks)


def make_artifact(
    context: Context, handler: Handler, name: str, config: Any, inputs: Mapping[str, Made], ranks: Ranks = ALONE
) -> Made:
    """The artifact of a stage: the existing one, or a new one."""
    began = time.monotonic()
    plan = _Plan(context, handler, name, config, inputs)
    ranks.require_same(plan.identity, f"stage `{name}`")
    if ranks.first_says(lambda: plan.found() is not None):
        found = context.home.artifacts.get(plan.identity)
        return Made(name, config.kind, found.figures, found, time.monotonic() - began, reused=True)
    with plan.making() if ranks.leads else plan.helping() as (work, figures):
        figures.update(handler.make(work))
        ranks.meet()  # nobody needs the work folder any more
    ranks.meet()  # it is sealed
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

    @contextmanager
    def helping(self) -> Iterator[tuple[Work, dict[str, Any]]]:
        """The same for a rank that shares the work, and leaves the writing to rank 0."""
        scratch = self.context.home.work(self.identity)
        yield Work(self.context, self.name, self.config, self.inputs, scratch, scratch, self.identity), self.figures

    def made(self, seconds: float) -> Made:
        """What was sealed."""
        artifact = self.context.home.artifacts.get(self.identity)
        return Made(self.name, self.config.kind, self.figures, artifact, seconds)


def _summary(made: Made) -> str:
    shown = {k: v for k, v in made.figures.items() if isinstance(v, int | float | str) and not isinstance(v, bool)}
    figures = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in list(shown.items())[:7])
    where = f"{made.artifact.id[:12]}  " if made.artifact else ""
    return f"{where}{'was there' if made.reused else f'{made.seconds:.1f}s'}  {figures}"
