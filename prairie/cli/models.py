"""`prairie models`: what is registered, where it comes from, which is served; copies in and out."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from prairie.cli.export import export, import_model
from prairie.cli.options import HomeOption, JsonOption, emit, open_home, table, when
from prairie.errors import UsageError

app = typer.Typer(help="List, show, promote, roll back, export and import models.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="spark, spark@3, spark@ARTIFACT, spark:poet")]
WhyOption = Annotated[str | None, typer.Option("--why", help="A reason, for the history.")]


@app.command("list")
def list_models(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Every line, its versions, and which one is served."""
    with open_home(home) as store:
        registry = store.registry
        lines: list[dict[str, Any]] = [
            {
                "line": line,
                "champion": champion.number if (champion := registry.champion(line)) else None,
                "trial": trial.to_json() if (trial := registry.trial(line)) else None,
                "versions": [version.to_json() for version in registry.versions(line)],
            }
            for line in registry.lines()
        ]
        waiting = {line: base.name for line, base in registry.waiting().items()}
        generation = registry.generation()

    def text() -> str:
        if not lines:
            return "No models yet: `prairie demo` makes one, `prairie run RECIPE` makes yours."
        header = ("NAME", "", "KIND", "ARTIFACT", "MADE", "FIGURES")
        rows = [
            (
                version["name"],
                _role(version, line),
                version["kind"],
                version["artifact_id"],
                when(version["created"]),
                figures_text(version["figures"]),
            )
            for line in lines
            for version in line["versions"]
        ]
        return "\n".join([table(header, rows), *map(waits, waiting, waiting.values())])

    emit({"lines": lines, "waiting": waiting, "generation": generation}, as_json, text)


@app.command()
def show(name: NameArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """One version: its files, figures, and the history of its line."""
    with open_home(home) as store:
        version = store.registry.resolve(name)
        artifact = store.artifacts.get(version.artifact_id)
        champion = store.registry.champion(version.line)
        history = [event.to_json() for event in store.registry.history(version.line)]
    size = sum(file["bytes"] for file in artifact.manifest["files"].values())
    facts = {
        **version.to_json(),
        "champion": champion is not None and champion.number == version.number,
        "path": str(artifact.path),
        "bytes": size,
        "artifact": artifact.manifest,
        "history": history,
    }

    def text() -> str:
        lines = [
            f"{version.name}{'  (champion)' if facts['champion'] else ''}",
            f"  kind      {version.kind}",
            f"  artifact  {version.artifact_id}  {artifact.name}",
            f"  base      {version.base_artifact_id}" if version.base_artifact_id else "",
            f"  weights   {version.weights_hash}" if version.weights_hash else "",
            f"  made      {when(artifact.created)}",
            f"  folder    {artifact.path}  ({size / 1e6:,.1f} MB)",
            *(f"  {key:<9} {value}" for key, value in {**artifact.figures, **version.figures}.items()),
            *(f"  {when(e['created'])}  {e['action']} {e['previous'] or '-'} -> {e['number']}" for e in history),
        ]
        return "\n".join(line for line in lines if line)

    emit(facts, as_json, text)


@app.command()
def lineage(name: NameArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """All that a version was made from, down to the votes, by what, where, and how it was judged."""
    with open_home(home) as store:
        tree = store.registry.lineage(name)
    emit(tree, as_json, lambda: "\n".join([tree["name"], *_branches(tree), *_circumstances(tree)]))


@app.command()
def promote(
    name: NameArgument,
    canary: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="First for this share of the users, as 10%; always the same ones."),
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="First unseen: its answers are computed and not shown.")
    ] = False,
    why: WhyOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a version its line's champion, or try it out beside the champion; servers change to it."""
    if canary is not None and shadow:
        raise UsageError(
            "a version is tried out in one way at a time", got="--canary and --shadow", wanted="one of them"
        )
    share = _share(canary) if canary is not None else None
    facts: dict[str, Any]
    with open_home(home) as store:
        if canary is None and not shadow:
            version = store.registry.promote(name, who=_who(), why=why)
            facts = {"promoted": version.name, "version": version.to_json()}
            text = f"{version.name} is the champion of {version.line}."
        else:
            trial = store.registry.try_out(name, share, who=_who(), why=why)
            facts = {"trial": trial.to_json(), "version": trial.version.to_json()}
            shown = "its answers are shown to nobody" if share is None else f"{share:.4g} of the users get its answers"
            text = f"{trial.version.name} is tried out as a {trial.kind}: {shown}."
        facts["generation"] = store.registry.generation()
    emit(facts, as_json, text)


@app.command()
def rollback(
    line: Annotated[str, typer.Argument(metavar="LINE", help="spark or spark:poet")],
    why: WhyOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Undo the last change of a line: end a trial, else make the champion before the present one champion again."""
    with open_home(home) as store:
        trial = store.registry.trial(line)
        version = store.registry.rollback(line, who=_who(), why=why)
        facts = {"champion": version.name, "version": version.to_json(), "generation": store.registry.generation()}
    facts["ended"] = trial.to_json() if trial is not None else None
    again = f"{version.name} is the champion of {version.line} again."
    ended = f"The trial of {trial.version.name} is over, {version.name} stays champion." if trial is not None else again
    emit(facts, as_json, ended)


@app.command()
def history(
    line: Annotated[str, typer.Argument(metavar="LINE", help="spark or spark:poet")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Every promotion, rollback and trial of a line: when, who and why."""
    with open_home(home) as store:
        events = [event.to_json() for event in store.registry.history(line)]
        base = store.registry.waiting().get(line)
    note = [waits(line, base.name)] if base is not None else []
    rows = [(when(e["created"]), e["action"], f"{line}@{e['number']}", e["who"] or "", e["why"] or "") for e in events]
    emit(
        {"line": line, "history": events, "waits_for": base.name if base is not None else None},
        as_json,
        lambda: "\n".join([table(("WHEN", "WHAT", "VERSION", "WHO", "WHY"), rows), *note]),
    )


app.command("export")(export)
app.command("import")(import_model)


def waits(line: str, base: str) -> str:
    """Of a vertical whose line has a new base."""
    return f"{line} stands on the base before {base} and is served on it; it waits for `prairie rejudge {line}`."


def _role(version: dict[str, Any], line: dict[str, Any]) -> str:
    """What a version is to its line."""
    trial = line["trial"]
    if trial is not None and trial["version"] == version["name"]:
        return "shadow" if trial["share"] is None else f"canary {trial['share']:.4g}"
    return "champion" if version["number"] == line["champion"] else ""


def _share(text: str) -> float:
    """ "10%" or "0.1" -> 0.1. Raises UsageError."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UsageError("a share is not a number", got=repr(text), wanted="10% or 0.1") from None


def figures_text(figures: dict[str, Any]) -> str:
    """The first few plain numbers of some figures on one line."""
    numbers = {k: v for k, v in figures.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return "  ".join(f"{key} {value:.4g}" for key, value in list(numbers.items())[:4])


def _who() -> str:
    """The name of the user at this terminal, for the history."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return f"uid {os.getuid()}"


def _circumstances(tree: dict[str, Any]) -> list[str]:
    """What made a version, on which machine, and what the gate and people did with it."""
    made, lines = tree["artifact"], []
    if tree["lineage"].get("recipe"):
        lines.append(f"recipe {tree['lineage']['recipe']} ({str(tree['lineage'].get('recipe_hash', ''))[:16]})")
    if made.get("code"):
        lines.append(f"code {made['code'][:16]}")
    if machine := made.get("machine"):
        lines.append("machine " + ", ".join(f"{key} {value}" for key, value in machine.items()))
    for turn in tree["judged"]:
        verdict, outcome = turn["verdict"], "promoted" if turn["promoted"] else "refused"
        share = f", wins {verdict['win_rate']:.1%} of {verdict['n']} votes" if verdict.get("win_rate") else ""
        lines.append(f"turn {turn['number']}: {outcome}{share}")
        lines += [f"  because {reason}" for reason in verdict.get("reasons", [])]
    lines += [
        f"{when(event['created'])}  {event['action']} {event['previous'] or '-'} -> {event['number']}"
        + (f"  ({event['why']})" if event["why"] else "")
        for event in tree["history"]
    ]
    return lines


def _branches(tree: dict[str, Any]) -> list[str]:
    """A lineage as indented lines."""
    tops = [("", tree["artifact"])]
    if "base" in tree:
        tops.append(("base: ", tree["base"]))
    lines = []

    def draw(node: dict[str, Any], label: str, before: str, last: bool) -> None:
        lines.append(before + ("└─ " if last else "├─ ") + label + _node_text(node))
        below = node.get("inputs", [])
        for index, child in enumerate(below):
            draw(child, "", before + ("   " if last else "│  "), index == len(below) - 1)

    for index, (label, node) in enumerate(tops):
        draw(node, label, "", index == len(tops) - 1)
    return lines


def _node_text(node: dict[str, Any]) -> str:
    if node.get("missing"):
        return f"{node['id']}  (no longer there)"
    text = f"{node['kind']} {node['name']}  {node['id']}"
    if node.get("repeated"):
        return text + "  (shown above)"
    votes = f"  from {len(node['events'])} feedback events" if node["events"] else ""
    return text + votes
