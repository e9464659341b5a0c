"""`prairie models`: what is registered, where it comes from, which is served; copies in and out."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prairie.cli.options import HomeOption, JsonOption, emit, open_home, say, table, when
from prairie.errors import RequestError

if TYPE_CHECKING:
    from prairie.store.artifacts import Artifact

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
                "versions": [version.to_json() for version in registry.versions(line)],
            }
            for line in registry.lines()
        ]
        generation = registry.generation()

    def text() -> str:
        if not lines:
            return "No models yet: `prairie demo` makes one, `prairie run RECIPE` makes yours."
        header = ("NAME", "", "KIND", "ARTIFACT", "MADE", "FIGURES")
        rows = [
            (
                version["name"],
                "champion" if version["number"] == line["champion"] else "",
                version["kind"],
                version["artifact_id"],
                when(version["created"]),
                figures_text(version["figures"]),
            )
            for line in lines
            for version in line["versions"]
        ]
        return table(header, rows)

    emit({"lines": lines, "generation": generation}, as_json, text)


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
    """All that a version was made from, down to the votes."""
    with open_home(home) as store:
        tree = store.registry.lineage(name)
    emit(tree, as_json, lambda: "\n".join([tree["name"], *_branches(tree)]))


@app.command()
def promote(name: NameArgument, why: WhyOption = None, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Make a version its line's champion; servers change to it."""
    with open_home(home) as store:
        version = store.registry.promote(name, who=_who(), why=why)
        facts = {"promoted": version.name, "version": version.to_json(), "generation": store.registry.generation()}
    emit(facts, as_json, f"{version.name} is the champion of {version.line}.")


@app.command()
def rollback(
    line: Annotated[str, typer.Argument(metavar="LINE", help="spark or spark:poet")],
    why: WhyOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the champion before the present one champion again."""
    with open_home(home) as store:
        version = store.registry.rollback(line, who=_who(), why=why)
        facts = {"champion": version.name, "version": version.to_json(), "generation": store.registry.generation()}
    emit(facts, as_json, f"{version.name} is the champion of {version.line} again.")


@app.command()
def export(
    name: NameArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a model as a Hugging Face folder, an adapter as PEFT's."""
    with open_home(home) as store:
        version = store.registry.resolve(name)
        artifact = store.artifacts.get(version.artifact_id)
        store.artifacts.verify(artifact.id)
        copy_artifact(artifact, folder)
    facts = {"exported": version.name, "folder": str(folder), "kind": version.kind, "base": version.base_artifact_id}
    if version.base_artifact_id:
        say(f"This is an adapter; the model that it stands on is artifact {version.base_artifact_id}.")
    emit(facts, as_json, f"{version.name} is in {folder}.")


@app.command("import")
def import_model(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face folder with safetensors.")],
    line: Annotated[str, typer.Argument(metavar="LINE", help="The line that it becomes a version of.")],
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            help="A built-in chat template instead of its own: chatml, llama3, zephyr, mistral, gemma, plain.",
        ),
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take in an open model; it becomes its line's champion."""
    from prairie.pipeline.context import Context
    from prairie.pipeline.handlers import HANDLERS
    from prairie.pipeline.run import run
    from prairie.recipe import resolve_recipe
    from prairie.runtime import Progress, Runtime

    # The same two stages as in a recipe, so that the same folder gives the same artifact there.
    stages = {
        "model": {"kind": "import", "path": str(folder.expanduser().absolute()), "template": template},
        "publish": {"kind": "publish", "line": line, "model": "model"},
    }
    recipe = resolve_recipe({"name": "import", "stages": stages}, where="import")
    with open_home(home, make=True) as store:
        made = run(Context(recipe, store, Runtime.detect(progress=Progress(quiet=as_json))), HANDLERS)
        version = store.registry.resolve(f"{line}@{made['publish'].figures['version']}")
    facts = {"imported": version.name, "version": version.to_json(), **made["model"].figures}
    emit(facts, as_json, f"{version.name} is artifact {version.artifact_id}.")


def copy_artifact(artifact: Artifact, folder: Path) -> None:
    """Copies an artifact's files, writable, to a folder that must be new or empty: all of them or none.

    Raises RequestError when the folder holds something, StorageFullError when the disk is full.
    """
    from prairie.store.disk import disk_errors, sync_tree

    with disk_errors(f"{folder} cannot be written"):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RequestError(f"{folder} holds something already", wanted="a new or empty folder")
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        part = folder.absolute().with_name(f"{folder.name}.{secrets.token_hex(4)}.part")
        try:
            for name in artifact.manifest["files"]:
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(artifact.path / name, part / name)
            sync_tree(part)
            os.rename(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


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
