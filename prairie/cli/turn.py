"""`prairie turn`, `prairie gate`: the wheel by hand, on the votes that people cast."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from prairie.cli.options import (
    GoldOption,
    HomeOption,
    JsonOption,
    NamesOption,
    ThreadsOption,
    emit,
    find_names,
    open_home,
    read_gold,
)

LEARN = {
    "epochs": 2, "tokens_per_batch": 4096, "lr": 1e-3, "beta": 0.1, "sft_weight": 0.2, "weight_decay": 0.0,
    "on_long": "truncate", "adapter": {"rank": 16, "alpha": 32.0},
}  # fmt: skip
"""How a line learns from votes when its command says nothing else."""

JudgeOption = Annotated[
    str | None,
    typer.Option(
        "--judge",
        metavar="URL",
        help="A model judges instead of people: `reward`, trained on the votes of those who do not teach, or one"
        " behind a URL ($PRAIRIE_JUDGE_KEY is its key).",
    ),
]
JudgeModelOption = Annotated[str, typer.Option("--judge-model", help="The name of that model at its URL.")]
TasksOption = Annotated[str, typer.Option(help="The suite that may not fall, joined by commas; default: all tasks.")]


def turn(
    line: Annotated[str, typer.Argument(help="The line to turn.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of learning.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Learn and judge; record and promote nothing.")] = False,
    tasks: TasksOption = "",
    gold: GoldOption = None,
    names: NamesOption = False,
    judge: JudgeOption = None,
    judge_model: JudgeModelOption = "default",
    threads: ThreadsOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a line's wheel once: learn from the votes since its last turn, judge, promote or keep."""
    from prairie.errors import PrairieError

    context, again, left = _context(line, home, threads, overrides or [], as_json), list[Any](), list[str]()
    with context.home.lock("run"):
        wheel = _wheel(context, line, tasks, gold, names, judge, judge_model)
        turned = wheel.turn(dry=dry_run)
        for vertical, base in [] if dry_run else _waiting(context, of=line):
            try:
                again.append(_judged_again(context, vertical, base, tasks, judge, judge_model))
            except PrairieError as error:  # the turn of its base stands, and it waits on
                left.append(f"{vertical} still waits for `prairie rejudge {vertical}`: {error}")
    found = {**turned.to_json(), "dry_run": dry_run, "verticals": [_told(*one) for one in again], "waiting": left}
    text = [f"turn {turned.number} of {line}: {turned.candidate.name}\n{turned.verdict.text()}", _texts(again), *left]
    emit(found, as_json, "\n".join(filter(None, text)))


def rejudge(
    line: Annotated[
        str | None, typer.Argument(metavar="[VERTICAL]", help="Only this one; none = all that wait.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Train and judge; record and promote nothing.")] = False,
    tasks: TasksOption = "",
    judge: JudgeOption = None,
    judge_model: JudgeModelOption = "default",
    threads: ThreadsOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train verticals again on their line's new base, and judge each against what is served on the old one."""
    from prairie.store.registry import Registry

    context = _context("rejudge", home, threads, [], as_json)
    if line is not None:
        Registry(context.home).require_vertical(line)
    with context.home.lock("run"):
        again = [
            _judged_again(context, vertical, base, tasks, judge, judge_model, dry=dry_run)
            for vertical, base in _waiting(context) if line in (None, vertical)
        ]  # fmt: skip
    found = {"dry_run": dry_run, "turns": [_told(*one) for one in again]}
    emit(found, as_json, _texts(again) or "No vertical waits to be judged on a new base.")


def gate(
    candidate: Annotated[str, typer.Argument(help="The version that wants to be champion.")],
    champion: Annotated[str, typer.Argument(help="The version that it is compared with.")],
    tasks: TasksOption = "",
    judge: JudgeOption = None,
    judge_model: JudgeModelOption = "default",
    threads: ThreadsOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge whether one model is better than another by held-out people's votes, or a model's; changes nothing."""
    from prairie.store.registry import Registry

    context = _context("gate", home, threads, [], as_json)
    registry = Registry(context.home)
    new, old = registry.resolve(candidate), registry.resolve(champion)
    if new.kind == "tower":
        from prairie.flywheel.go import GoGate
        from prairie.recipe import GoMatch

        verdict = GoGate(context, GoMatch()).judge(new, old)
    else:
        verdict = _chat_gate(context, old.line, tasks, judge, judge_model).judge(new, old)
    found = {"candidate": new.name, "champion": old.name, "verdict": verdict.to_json()}
    emit(found, as_json, f"{new.name} against {old.name}\n{verdict.text()}")


def _chat_gate(context: Any, line: str, tasks: str, judge: str | None, judge_model: str) -> Any:
    """The gate of a line that talks: held-out people's votes, a reward model trained on them, or a judge behind a
    URL."""
    from prairie.evals.judge import Judge
    from prairie.flywheel.chat import ChatGate, judged_vote, rules_for

    rules, names = context.recipe.stages["turn"].gate, _tasks(tasks)
    if judge is None:
        return ChatGate(context, rules, names)
    if judge == "reward":
        from prairie.flywheel.reward_judge import train_reward_judge

        trained = train_reward_judge(context, line)
        rules, right = rules_for(rules, trained.accuracy), trained.accuracy
        vote = judged_vote(context, trained, rules, names, accuracy=right)
        return ChatGate(context, rules, names, vote, units="questions", judge_accuracy=right)
    asked = Judge(judge, judge_model, os.environ.get("PRAIRIE_JUDGE_KEY") or None)
    return ChatGate(context, rules, names, judged_vote(context, asked, rules, names), units="questions")


def _wheel(
    context: Any, line: str, tasks: str, gold: Path | None, names: bool, judge: str | None, judge_model: str
) -> Any:
    """The loop of a line: people's votes, or, for a line that plays Go, games."""
    from prairie.flywheel.chat import ChatActor, ChatLearner
    from prairie.flywheel.loop import Flywheel
    from prairie.recipe import GoTurns
    from prairie.store.registry import Registry

    config: Any = context.recipe.stages["turn"]
    if isinstance(config, GoTurns):
        from prairie.flywheel import go  # numba is loaded for those who play

        return go.wheel(context, line, config.play, config.learn, config.match)
    return Flywheel(
        line,
        Registry(context.home),
        ChatActor(context, line, gold=read_gold(gold), objective=config.learn.objective, names=find_names(names)),
        ChatLearner(context, config.learn, f"turn-{line}"),
        _chat_gate(context, line, tasks, judge, judge_model),
    )


def _waiting(context: Any, of: str | None = None) -> list[tuple[str, Any]]:
    """Verticals that wait to be judged on a new base, those of one line or all, and that base."""
    from prairie.store.registry import Registry

    waiting = Registry(context.home).waiting().items()
    return [(vertical, base) for vertical, base in waiting if of in (None, vertical.partition(":")[0])]


def _judged_again(
    context: Any, vertical: str, base: Any, tasks: str, judge: str | None, judge_model: str, dry: bool = False
) -> tuple[Any, str]:
    """A turn of a vertical that waits: made again on its line's new base, whose name is told too."""
    from prairie.flywheel.loop import Flywheel
    from prairie.flywheel.remake import Rebase
    from prairie.store.registry import Registry

    roles = Rebase(context, base.base_artifact_id or base.artifact_id)
    gate = _chat_gate(context, vertical, tasks, judge, judge_model)
    return Flywheel(vertical, Registry(context.home), roles, roles, gate).turn(dry=dry), base.name


def _told(turned: Any, base: str) -> dict[str, Any]:
    return {**turned.to_json(), "base": base}


def _texts(again: list[tuple[Any, str]]) -> str:
    return "\n".join(
        f"turn {turned.number} of {turned.champion.line}: {turned.candidate.name} is {turned.champion.name} on"
        f" {base}\n{turned.verdict.text()}" for turned, base in again
    )  # fmt: skip


def _go_stage(home: Any, line: str) -> dict[str, Any] | None:
    """How a line that plays Go was turned last; None for another line. No game is loaded to find out."""
    from prairie.store.registry import Registry

    registry = Registry(home)
    if all(
        version.kind != "tower" for found in registry.lines() if found == line for version in registry.versions(line)
    ):
        return None
    from prairie.games import require

    require()
    from prairie.flywheel.go import stage_of

    return stage_of(home, line)


def _context(line: str, home: Path | None, threads: int | None, overrides: list[str], quiet: bool) -> Any:
    """A run of one stage, the turn; overrides name keys of its `learn`."""
    from prairie.pipeline.context import Context
    from prairie.recipe import resolve_recipe
    from prairie.runtime import Progress, Runtime

    learn = {key: value for key, value in LEARN.items() if key != "epochs" or not _sets(overrides, "steps")}
    store = open_home(home)
    stage: dict[str, Any] = {"kind": "turn", "line": line, "start": "-", "server": "-", "tasks": [], "learn": learn}
    stage = _go_stage(store, line) or stage
    tree = {"name": "turn", "about": f"a turn of {line}", "seed": stage.pop("seed", 0), "stages": {"turn": stage}}
    recipe = resolve_recipe(tree, [f"turn.learn.{override}" for override in overrides], "the command")
    runtime = Runtime.detect(seed=recipe.seed, threads=threads, progress=Progress(quiet=quiet))
    return Context(recipe, store, runtime)


def _sets(overrides: list[str], key: str) -> bool:
    return any(override.startswith(f"{key}=") for override in overrides)


def _tasks(names: str) -> list[str]:
    from prairie.tasks.catalog import TASKS, task

    return [task(name.strip()).name for name in names.split(",") if name.strip()] or list(TASKS)
