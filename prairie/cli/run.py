"""`prairie run`, `prairie demo`: a recipe carried out, planned, or shown as a schema."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from prairie.cli.options import HomeOption, JsonOption, ThreadsOption, emit
from prairie.cli.processes import are_to_be_started, run_in
from prairie.errors import UsageError
from prairie.runtime import process_rank


def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one that comes with Prairie.")] = "",
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changed keys.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would happen; train nothing.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes.")] = False,
    no_serve: Annotated[bool, typer.Option("--no-serve", help="End when the stages are done.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share each training's steps.")] = 1,
    threads: ThreadsOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Carry out a recipe: make what is missing, resume what was cut off, skip what is there."""
    from prairie.recipe import json_schema

    if schema:
        print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
        return
    if not recipe:
        raise UsageError("no recipe was named", mend="prairie run RECIPE.yaml [key=value ...]")
    if are_to_be_started(processes):
        run_in(processes)
    if plan and process_rank():
        return  # one process plans
    if plan:
        from prairie.pipeline.plan import plan_recipe

        planned = plan_recipe(_context(recipe, overrides or [], home, threads, quiet=as_json))
        emit(planned.to_json(), as_json, planned.text())
        planned.check_fits()
        return
    result = run_recipe(recipe, overrides or [], home=home, threads=threads, keep_open=not no_serve, quiet=as_json)
    if not process_rank():
        emit(result, as_json, result["table"])


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one that comes with Prairie.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changed keys.")] = None,
    threads: ThreadsOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a recipe would do and cost; train nothing."""
    run(recipe, overrides, plan=True, threads=threads, home=home, as_json=as_json)


def demo(
    port: Annotated[int, typer.Option(help="Where the chat page stays open.")] = 8000,
    no_serve: Annotated[bool, typer.Option("--no-serve", help="End instead of keeping the chat page open.")] = False,
    threads: ThreadsOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make, serve and improve a small assistant in minutes, from nothing but this machine."""
    result = run_recipe("spark", [f"port={port}"], home=home, threads=threads, keep_open=not no_serve, quiet=as_json)
    emit(result, as_json, result["table"])


def run_recipe(
    recipe: str | Path,
    overrides: list[str],
    *,
    home: Path | None = None,
    threads: int | None = None,
    keep_open: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Runs a recipe and returns every stage's figures; the same function is `prairie.run`."""
    from prairie.flywheel.stages import HANDLERS as TURNING
    from prairie.pipeline.handlers import HANDLERS
    from prairie.pipeline.report import result_of
    from prairie.pipeline.run import run as carry_out
    from prairie.train.ranks import Ranks

    context = _context(recipe, overrides, home, threads, quiet)
    try:
        with _asked_to_stop(context):
            carry_out(context, {**HANDLERS, **TURNING, **_go(context)})
        result = result_of(context)
        if context.services and keep_open:
            _stay_open(context, result)
    finally:
        for service in reversed(context.services):
            service.stop()
        Ranks(context.runtime.rank, context.runtime.world_size).leave()
    return result


def _go(context: Any) -> Any:
    """How the stages of Go are carried out, where the recipe has any: numba is loaded for those who play."""
    if not {"tower", "games", "imitate", "selfplay"} & {stage.kind for stage in context.recipe.stages.values()}:
        return {}
    from prairie.games import require

    require()
    from prairie.flywheel.go import HANDLERS
    from prairie.flywheel.recorded import HANDLERS as RECORDED

    return {**HANDLERS, **RECORDED}


def find_recipe(name: str | Path) -> Path:
    """A file, or a recipe that comes with Prairie (beside the package in a checkout, inside it once installed)."""
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    package = Path(__file__).parent.parent
    for folder in (package.parent / "recipes", package / "recipes"):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    return path


def _context(recipe: str | Path, overrides: list[str], home: Path | None, threads: int | None, quiet: bool) -> Any:
    from prairie.pipeline.context import Context
    from prairie.recipe import load_recipe
    from prairie.runtime import Progress, Runtime
    from prairie.store.home import Home

    loaded = load_recipe(find_recipe(recipe), overrides)
    progress = Progress(quiet=quiet or process_rank() > 0)
    runtime = Runtime.detect(seed=loaded.seed, threads=threads, progress=progress)
    ours = any(word.startswith("--processes") for word in sys.argv) or runtime.world_size == 1
    started_by = [] if ours else ["torchrun", "--nproc-per-node", str(runtime.beside), "-m"]
    runtime = replace(runtime, command=shlex.join([*started_by, "prairie", *sys.argv[1:]]))
    return Context(loaded, Home(home), runtime)


@contextmanager
def _asked_to_stop(context: Any) -> Iterator[None]:
    """SIGTERM between two trainings ends the run at once, with the command that goes on; inside one the trainer has its
    own way. What is made stays made."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        if context.runtime.rank:
            context.asked_to_stop = True  # rank 0 may be in the middle of a stage: they agree before the next one
            return
        context.runtime.progress.say(f"stopped by SIGTERM; go on with: {context.runtime.command}")
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stay_open(context: Any, result: dict[str, Any]) -> None:
    """Waits for Ctrl-C or SIGTERM with the chat page open."""
    say = context.runtime.progress.say
    say(result["table"])
    say(f"\nchat page: {context.services[-1].url}/   report: {result.get('report', '-')}\nCtrl-C ends.")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(0.5):
        if context.services[-1].process.poll() is not None:
            say("the server has ended")
            return
