"""`prairie`: finds the command, calls it, and turns how it ends into an exit code and one sentence.

Command modules are imported when they are called, so that `prairie --help` answers at once. Exit codes: 0 done, 1 an
error (one sentence on stderr), 2 wrong usage, 130 Ctrl-C. Not here: what a command does.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
import typer.core
import typer.main

from prairie.errors import PrairieError
from prairie.runtime import end_soon

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("prairie.cli.run:demo", "Make, serve and improve a small assistant in minutes."),
    "run": ("prairie.cli.run:run", "Carry out a recipe; resume what was cut off, skip what is made."),
    "plan": ("prairie.cli.run:plan", "Say what a recipe would do and cost; train nothing."),
    "models": ("prairie.cli.models:app", "List, show, promote, roll back, export and import models."),
    "import": (
        "prairie.cli.export:import_model",
        "Take in an open model: a folder, or a name of the Hugging Face hub.",
    ),
    "export": (
        "prairie.cli.export:export",
        "Write a model as Hugging Face folder, PEFT adapter or GGUF, with its card.",
    ),
    "chat": ("prairie.cli.chat:chat", "Talk to a model in the terminal."),
    "evaluate": ("prairie.cli.evaluate:evaluate", "Score models on held-out tasks, with intervals."),
    "serve": ("prairie.cli.serve:serve", "Serve models over OpenAI's HTTP API, with a chat page."),
    "turn": ("prairie.cli.turn:turn", "Turn a line's wheel once: learn from votes, judge, promote or keep."),
    "gate": ("prairie.cli.turn:gate", "Judge whether one model is better than another."),
    "lineage": ("prairie.cli.models:lineage", "Show all that a model was made from, down to the votes."),
    "reproduce": ("prairie.cli.remake:reproduce", "Make a model again from its lineage and compare."),
    "rejudge": ("prairie.cli.turn:rejudge", "Train verticals again on their line's new base, and judge them."),
    "rebuild": ("prairie.cli.remake:rebuild", "Make champions again without what people had forgotten."),
    "go": ("prairie.cli.go:app", "Play Go: a line as a GTP engine, matches against other engines."),
    "feedback": ("prairie.cli.feedback:app", "List, count, export and forget what people said."),
    "keys": ("prairie.cli.keys:app", "Make and revoke API keys of the server."),
    "doctor": ("prairie.cli.doctor:doctor", "Look at this machine: what it has, what will be fast."),
}
"""Name -> (where the command is, what it does in one line). A Typer app is a group, a function is a command."""

# What the parser raises for wrong usage; older releases of typer have it from click, newer ones from themselves.
_WRONG_USAGE: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class _Commands(typer.core.TyperGroup):
    """A group whose commands are known by name and loaded when called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        found = getattr(importlib.import_module(module), attribute)
        if isinstance(found, typer.Typer):
            app = found
        else:
            app = typer.Typer()
            app.command(cmd_name, help=found.__doc__ or COMMANDS[cmd_name][1])(found)
        # Rich takes a third of a second to load, and its boxes do not survive a pipe.
        app.rich_markup_mode = None
        app.pretty_exceptions_enable = False
        app._add_completion = False
        command = typer.main.get_command(app)
        command.name = cmd_name
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        # For the suggestion after a mistyped name, which looks at the commands that are loaded.
        self.commands: Any = dict.fromkeys(COMMANDS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in COMMANDS.items()])


def _version_text() -> str:
    from importlib import metadata

    try:
        return metadata.version("prairie")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _version(value: bool) -> None:
    if value:
        print(f"prairie {_version_text()}")
        raise typer.Exit


app = typer.Typer(cls=_Commands, rich_markup_mode=None, add_completion=False, no_args_is_help=True)


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """A language model of your own, on your own hardware, that its users' votes keep improving."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The `prairie` command. Always ends by SystemExit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character must not stop the command
            stream.reconfigure(errors="backslashreplace")
    end_soon()
    sys.exit(_ending(lambda: _run(given), given))


def _run(arguments: list[str]) -> None:
    command = typer.main.get_command(app)
    with command.make_context("prairie", arguments) as context:
        command.invoke(context)
    sys.stdout.flush()


def _ending(run: Callable[[], None], arguments: list[str]) -> int:
    """The exit code of a run; prints the sentence that goes with it."""
    try:
        run()
        return 0
    except PrairieError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except _WRONG_USAGE as error:
        return _wrong_usage(error)
    except typer.Exit as end:
        return _flushed(end.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        return _deaf()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except Exception as error:
        log = _write_log(arguments, error)
        text = " ".join(str(error).split())[:300]
        print(
            f"error: unexpected {type(error).__name__}{f' ({text})' if text else ''}; the traceback is in {log}.",
            file=sys.stderr,
        )
        return 1


def _wrong_usage(error: Any) -> int:
    """Prints what the parser did not understand, and where help is."""
    context = getattr(error, "ctx", None)
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError" or not message:
        print(context.get_help() if context else message, file=sys.stderr)
    else:
        print(f"error: {message}", file=sys.stderr)
        if context is not None:
            print(f"See `{context.command_path} --help`.", file=sys.stderr)
    return int(error.exit_code)


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _deaf()
    return code


def _deaf() -> int:
    """Nobody reads stdout any more (`| head`): end as other programs do, and say nothing at exit either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + 13


def _write_log(arguments: list[str], error: Exception) -> Path:
    """Writes the traceback to a file in HOME/logs, or in the system's tmp folder when that cannot be written."""
    import traceback

    from prairie.store.home import default_home

    named = [value for name, value in itertools.pairwise(arguments) if name == "--home"]
    named += [argument.removeprefix("--home=") for argument in arguments if argument.startswith("--home=")]
    text = f"prairie {_version_text()}: {arguments}\n\n{''.join(traceback.format_exception(error))}"
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    home = Path(named[-1]).expanduser() if named else default_home()
    for folder in (home / "logs", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
            return folder / name
        except OSError:
            continue
    print(text, file=sys.stderr)
    return Path("the lines above")


if __name__ == "__main__":
    main()
