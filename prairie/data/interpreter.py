"""A corpus that every machine has: the text of the running Python interpreter (PSF licence), read where it lies.

Three kinds of documents: the language reference's topics (`pydoc_data.topics`), a module's docstrings as one page of
prose, and a module's source. Files are parsed, never imported or run. The same Python version gives the same documents
in the same order. Not here: anything from site-packages, tests of the standard library, the web.
"""

from __future__ import annotations

import ast
import hashlib
import os
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from prairie.data.records import Text
from prairie.errors import DataError

LONGEST_DOCUMENT = 20_000
"""Characters; a longer document is cut at a line, so that no single module fills a small corpus."""

SHARES = {"topics": 0.4, "docstrings": 0.4, "source": 0.2}
"""Parts of the corpus by bytes while every kind lasts: mostly prose, because the model is to talk."""

_NOT_PROSE = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "pydoc_data",
    "encodings",
    "turtledemo",
    "distutils",
}


def interpreter_texts(
    limit_bytes: int, seed: int, *, split: Literal["train", "held_out", "all"] = "train", one_in: int = 20
) -> list[Text]:
    """Documents of at most `limit_bytes` of UTF-8 in all (fewer where the interpreter has no more), shuffled by `seed`.

    Held out is one document in `one_in`, chosen by a hash of its name whatever the seed and the limit; a module's
    docstrings and its source fall on the same side. Raises DataError when the interpreter's library cannot be read.
    """
    if limit_bytes <= 0:
        raise DataError("a corpus needs room", got=f"limit_bytes {limit_bytes}", wanted="a positive number of bytes")
    waiting = {kind: _shuffled(pages, split, one_in, f"{seed}/{kind}") for kind, pages in _pages().items()}
    used = dict.fromkeys(SHARES, 0)
    chosen: list[Text] = []
    while (room := limit_bytes - sum(used.values())) > 0 and any(waiting.values()):
        kind = min((kind for kind in SHARES if waiting[kind]), key=lambda kind: used[kind] / SHARES[kind])
        name, read = waiting[kind].pop()
        text = _cut(read(), LONGEST_DOCUMENT)
        size = len(text.encode())
        if size > room:
            text = _cut(text, room // 4)  # a character has at most four bytes
            size, used[kind] = len(text.encode()), limit_bytes  # the last document: the corpus is full
        else:
            used[kind] += size
        if text:
            chosen.append(Text(text, source=name))
    if not chosen:
        raise DataError("the interpreter's library gives no text", wanted="a Python with its standard library as files")
    return chosen


Page = tuple[str, Callable[[], str]]


def _pages() -> dict[str, list[Page]]:
    """Kind -> (source name, how to read it), in a fixed order. Reading waits until a document is chosen."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(_modules(library))
    names = [path.relative_to(library).as_posix() for path in files]
    return {
        "topics": _topics(),
        "docstrings": [
            (f"docstrings:{name}", _reader(_docstrings, path)) for name, path in zip(names, files, strict=True)
        ],
        "source": [(f"source:{name}", _reader(_source, path)) for name, path in zip(names, files, strict=True)],
    }


def _modules(library: Path) -> Iterator[Path]:
    """The library's source files; folders that are not wanted (installed packages: thousands) are not even entered."""
    for folder, below, names in os.walk(library):
        below[:] = [name for name in below if name not in _NOT_PROSE]
        yield from (Path(folder, name) for name in names if name.endswith(".py") and name not in _NOT_PROSE)


def _reader(read: Callable[[Path], str], path: Path) -> Callable[[], str]:
    return lambda: read(path)


def _topics() -> list[Page]:
    try:
        from pydoc_data.topics import topics  # a large module: loaded only when a corpus is made
    except ImportError:  # some distributions strip it
        return []

    def page(text: str) -> Callable[[], str]:
        return lambda: text.strip() + "\n"

    return [(f"topics:{name}", page(text)) for name, text in sorted(topics.items())]


def _shuffled(pages: list[Page], split: str, one_in: int, seed: str) -> list[Page]:
    def held_out(name: str) -> bool:
        return int(hashlib.sha256(name.partition(":")[2].encode()).hexdigest()[:8], 16) % one_in == 0

    kept = [page for page in pages if split == "all" or held_out(page[0]) == (split == "held_out")]
    random.Random(seed).shuffle(kept)
    return kept


def _source(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _docstrings(path: Path) -> str:
    """A module's documentation as a page: its own docstring, then every class and function that has one."""
    try:
        module = ast.parse(_source(path))
    except (SyntaxError, ValueError):  # a template or another version's syntax is no reason to stop
        return ""
    parts = [f"{path.stem}\n", *_documented(module)]
    return "\n".join(parts) if len(parts) > 1 else ""


def _documented(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    if text := ast.get_docstring(node):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield f"{node.name}({ast.unparse(node.args)})\n"
            case ast.ClassDef():
                yield f"class {node.name}\n"
        yield f"{text.strip()}\n"
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child)


def _cut(text: str, characters: int) -> str:
    if len(text) <= characters:
        return text
    head = text[: max(0, characters)]
    return head[: head.rfind("\n") + 1] or head
