"""Carries out a recipe: stages in order, what exists is not made again, a crash resumes where it stood.

A product's id is the hash of its stage's keys, of the ids of what it reads and of the code revision of its rooms.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from prairie.errors import RecipeError
from prairie.pipeline.context import Context, Handler, Made, Work, code_revision
from prairie.recipe import AnyStage


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
            context.runtime.progress.say(f"[{number}/{len(order)}] {name}")
            made = carry_out(context, handlers[recipe.stages[name].kind], name, recipe.stages[name])
            context.made[name] = made
            context.runtime.progress.say(f"    {_summary(made)}")
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
    store = context.home.artifacts
    keys = {
        **config.model_dump(mode="json", by_alias=True),
        "seed": context.recipe.seed,
        "reads": {read: made.identity for read, made in inputs.items()},
        "outside": handler.outside(config),
    }
    below = list(dict.fromkeys(id for made in inputs.values() for id in made.stands_on))
    code = code_revision(handler.rooms)
    identity = store.id_of(config.kind, keys, below, code)
    found = store.find(identity)
    if found is not None:
        context.home.clear_work(identity)  # of a run that was killed between sealing and clearing
        return Made(name, config.kind, found.figures, found, time.monotonic() - began, reused=True)
    figures: dict[str, Any] = {}
    with store.create(config.kind, name, keys, below, code, figures=figures) as folder:
        figures.update(handler.make(Work(context, name, config, inputs, folder, context.home.work(identity), identity)))
        figures["seconds"] = round(time.monotonic() - began, 2)
    context.home.clear_work(identity)
    return Made(name, config.kind, figures, store.get(identity), time.monotonic() - began)


def _summary(made: Made) -> str:
    shown = {k: v for k, v in made.figures.items() if isinstance(v, int | float | str) and not isinstance(v, bool)}
    figures = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in list(shown.items())[:7])
    where = f"{made.artifact.id[:12]}  " if made.artifact else ""
    return f"{where}{'was there' if made.reused else f'{made.seconds:.1f}s'}  {figures}"
