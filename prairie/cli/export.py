"""`prairie export` and `prairie import`: models out of the house and into it."""

from __future__ import annotations

import re
import shutil
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from prairie.cli.options import HomeOption, JsonOption, emit, open_home, say
from prairie.errors import ModelError, UsageError


class Form(StrEnum):
    """What an export is."""

    hf = "hf"
    peft = "peft"
    gguf = "gguf"


class Dtype(StrEnum):
    """What the numbers of an export are."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


def export(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="spark, spark@3, spark:poet, or a model folder.")],
    folder: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="A new folder; the same as --out.")] = None,
    to: Annotated[
        Form | None, typer.Option("--to", help="hf, peft or gguf; default: hf for a model, peft for an adapter.")
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option("--dtype", help="f32, f16, bf16, for GGUF q8_0 and q4_0 too; default: as it is, f16 for GGUF."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge an adapter into its base and check the result.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="A new folder.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model as a Hugging Face folder, a PEFT adapter or a GGUF file, with a card that says where it is from."""
    from prairie.pipeline.export import export as write
    from prairie.pipeline.export import origin_of

    if folder is not None and out is not None:
        raise UsageError("two folders to export to", got=f"{folder} and --out {out}", wanted="one")
    target = folder or out or Path(_plain(name))
    with open_home(home) as store:
        origin = origin_of(name, store)
        facts = write(origin, target, to.value if to else None, dtype.value if dtype else None, merge)
    facts |= {
        "kind": "adapter" if facts["to"] == "peft" else "model",
        "base": origin.base.name if origin.base else None,
    }
    if facts["to"] == "peft":
        say(f"This is an adapter; the model that it stands on is artifact {facts['base']}.")
    if facts.get("kept_f16"):
        say(f"{len(facts['kept_f16'])} tensors stayed f16: their rows do not fill blocks of 32.")
    if facts.get("tokenizer"):
        say(f"llama.cpp's tokenizer: {facts['tokenizer']}.")
    if facts.get("merge_error") is not None:
        say(f"Merging changed no logit by more than {facts['merge_error']:.1g} of the largest.")
    emit(facts, as_json, f"{origin.name} is in {target}.")


def import_model(
    source: Annotated[
        str, typer.Argument(metavar="DIR_OR_HUB_NAME", help="A Hugging Face folder with safetensors, or owner/model.")
    ],
    line: Annotated[
        str | None,
        typer.Argument(metavar="[LINE]", help="The line that it becomes a version of; default: its own name."),
    ] = None,
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
    from prairie.pipeline.hub import HUB_NAME, fetch
    from prairie.pipeline.run import run
    from prairie.recipe import resolve_recipe
    from prairie.runtime import Progress, Runtime

    folder = Path(source).expanduser().absolute()
    from_hub = not folder.exists() and HUB_NAME.fullmatch(source) is not None
    if not folder.is_dir() and not from_hub:
        raise ModelError("no such model folder", got=source, wanted="a folder, or a name of the hub: owner/model")
    line = line or _line_of(source)
    with open_home(home, make=True) as store:
        if from_hub:
            say(f"Fetching {source} ...")
            folder = fetch(source, store.root / "downloads")
        # The same two stages as in a recipe, so that the same folder gives the same artifact there.
        stages = {
            "model": {"kind": "import", "path": str(folder), "template": template},
            "publish": {"kind": "publish", "line": line, "model": "model"},
        }
        recipe = resolve_recipe({"name": "import", "stages": stages}, where="import")
        made = run(Context(recipe, store, Runtime.detect(progress=Progress(quiet=as_json))), HANDLERS)
        version = store.registry.resolve(f"{line}@{made['publish'].figures['version']}")
        if from_hub:
            shutil.rmtree(folder, ignore_errors=True)  # the artifact holds it now
    facts: dict[str, Any] = {"imported": version.name, "version": version.to_json(), **made["model"].figures}
    emit(facts, as_json, f"{version.name} is artifact {version.artifact_id}.")


def _plain(name: str) -> str:
    """spark:poet@3 -> spark-poet-3"""
    return re.sub(r"[^\w.-]+", "-", Path(name).name or name)


def _line_of(source: str) -> str:
    """The last part of a path or of a hub name, as a line may be called."""
    name = re.sub(r"[^a-z0-9._-]+", "-", Path(source.partition("@")[0]).name.lower()).strip("-._")
    if not name:
        raise UsageError("this source gives no name for a line", got=source, wanted="LINE after it")
    return name
