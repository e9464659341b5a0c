"""What every command shares: `--home DIR`, `--json`, and one way to print. Imports nothing heavy."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prairie.errors import NotFoundError

if TYPE_CHECKING:
    from prairie.data.personal import FindNames
    from prairie.data.records import Preference
    from prairie.store.home import Home

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", metavar="DIR", help="Where everything is kept; else $PRAIRIE_HOME, else ~/.prairie."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads to compute with; default: OMP_NUM_THREADS, else all cores.")
]

GoldOption = Annotated[
    Path | None,
    typer.Option("--gold", metavar="FILE", help="Preferences known to be right, by which people are trusted."),
]


def emit(obj: Any, as_json: bool, text: str | Callable[[], str] = "") -> None:
    """Prints the result of a command: `obj` as one JSON object, or `text` for people (nothing when it is empty)."""
    if as_json:
        print(json.dumps(obj, ensure_ascii=False, default=str))
        return
    shown = text() if callable(text) else text
    if shown:
        print(shown)


def say(text: str) -> None:
    """A line beside the result, on stderr."""
    print(text, file=sys.stderr)


NamesOption = Annotated[
    bool, typer.Option("--names", help="Mask names of people too, by a library that is installed (extra `names`).")
]


def find_names(asked: bool) -> FindNames | None:
    """What finds names, if it is asked for. Raises UsageError when no library that does is installed."""
    if not asked:
        return None
    from prairie.data.personal_names import name_finder

    return name_finder()


def open_home(home: Path | None, *, make: bool = False) -> Home:
    """The home of a command. A folder that was named but is not there is made only if `make`. Raises NotFoundError."""
    from prairie.store.home import Home

    if home is not None and not make and not home.expanduser().is_dir():
        raise NotFoundError("no such home", got=str(home), wanted="a folder that `prairie run` or `prairie demo` made")
    return Home(home)


def read_gold(file: Path | None) -> list[Preference]:
    """The preferences of a `--gold` file; none without one. Raises DataError when it holds none."""
    if file is None:
        return []
    from prairie.data.sources import read_records

    return read_records(file, want="preference").records


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows as aligned columns, for people. A wide (Chinese) character counts as two columns."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(_width(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)) for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def when(seconds: float) -> str:
    """UNIX seconds as local time."""
    import time

    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def short(text: str, width: int) -> str:
    """One line of at most `width` columns."""
    line = " ".join(text.split())
    if _width(line) <= width:
        return line
    kept = ""
    for character in line:
        if _width(kept + character) > width - 1:
            break
        kept += character
    return kept + "…"


def _width(text: str) -> int:
    import unicodedata

    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
