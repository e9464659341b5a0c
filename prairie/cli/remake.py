"""`prairie reproduce`, `prairie rebuild`: a model made again, to compare it or without what was taken back."""

from __future__ import annotations

from typing import Annotated

import typer

from prairie.cli.options import HomeOption, JsonOption, ThreadsOption, emit, open_home
from prairie.errors import ModelError

NameArgument = Annotated[str, typer.Argument(metavar="MODEL", help="spark, spark@3, or an artifact's id")]


def reproduce(
    model: NameArgument, threads: ThreadsOption = None, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Make a model again from its lineage and compare every file; changes nothing."""
    from prairie.flywheel.remake import reproduce
    from prairie.runtime import Progress, Runtime

    with open_home(home) as store:
        id = model if store.artifacts.find(model) else store.registry.resolve(model).artifact_id
        runtime = Runtime.detect(threads=threads, progress=Progress(quiet=as_json))
        found = reproduce(store, store.artifacts.get(id), runtime)

    def text() -> str:
        lines = [f"{'same' if same else 'OTHER'}  {name}" for name, same in found.files.items()]
        code = "the same code" if found.same_code else "other code than then"
        outcome = "comes out the same" if found.same else "comes out differently"
        return "\n".join([*lines, f"{found.artifact.kind} {id} {outcome}, by {code}, in {found.seconds:.1f} s"])

    emit(found.to_json(), as_json, text)
    if not found.same:
        raise ModelError(
            f"{model} was not reproduced", got=", ".join(name for name, same in found.files.items() if not same),
            wanted="the same bytes in every file",
            mend="use the machine, the threads and the versions that made it" if found.same_code else
            "use the revision of Prairie that made it",
        )  # fmt: skip


def rebuild(
    line: Annotated[
        str | None, typer.Argument(metavar="[LINE]", help="Only this line; none = all in the queue.")
    ] = None,
    threads: ThreadsOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make champions again without what people had forgotten; the new versions wait for a gate."""
    from prairie.flywheel.remake import rebuild
    from prairie.runtime import Progress, Runtime

    with open_home(home) as store:
        if line is not None:
            store.registry.champion(line)  # an unknown one is an error, not an empty queue
        queue = [name for name in store.feedback.to_rebuild() if line in (None, name.partition("@")[0])]
        runtime = Runtime.detect(threads=threads, progress=Progress(quiet=as_json))
        with store.lock("run"):
            made = [(name, rebuild(store, store.registry.resolve(name), runtime).name) for name in queue]

    def text() -> str:
        if not made:
            return "Nothing waits to be rebuilt."
        return "\n".join(f"{new} is {old} without what was forgotten: prairie gate {new} {old}" for old, new in made)

    emit({"rebuilt": [{"champion": old, "version": new} for old, new in made]}, as_json, text)
