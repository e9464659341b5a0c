"""What every stage is given (recipe, home, machine, the services that run) and what a stage leaves behind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from prairie.errors import RecipeError
from prairie.recipe import Recipe
from prairie.runtime import Runtime
from prairie.store.artifacts import Artifact
from prairie.store.home import Home


@dataclass(frozen=True)
class Made:
    """What a stage left: an immutable artifact, or (for a service or a publication) figures alone."""

    name: str
    kind: str
    figures: dict[str, Any]
    artifact: Artifact | None = None
    seconds: float = 0.0
    reused: bool = False

    @property
    def product(self) -> Artifact:
        """The artifact. Raises RecipeError if the stage leaves none."""
        if self.artifact is None:
            raise RecipeError(f"stage `{self.name}` leaves no artifact", got=self.kind, wanted="a stage that makes one")
        return self.artifact

    @property
    def identity(self) -> str:
        """The artifact id that later stages stand on; empty for a service."""
        return self.artifact.id if self.artifact else str(self.figures.get("artifact", ""))

    @property
    def stands_on(self) -> list[str]:
        """The artifacts that what is made from this stage is made from: after a turn, its champion as well."""
        return [id for id in dict.fromkeys((self.identity, str(self.figures.get("champion_artifact", "")))) if id]


@dataclass
class Context:
    """One run: given to every stage, never global."""

    recipe: Recipe
    home: Home
    runtime: Runtime
    services: list[Any] = field(default_factory=list)
    """Child processes that the run opened, in order."""
    made: dict[str, Made] = field(default_factory=dict)
    asked_to_stop: bool = False
    """Set when a signal has asked a process that only follows another one."""


@dataclass(frozen=True)
class Work:
    """One stage about to be carried out."""

    context: Context
    name: str
    config: Any
    inputs: Mapping[str, Made]
    folder: Path
    """Where the product is written; becomes the artifact when the stage ends well."""
    scratch: Path
    """Survives a kill: checkpoints live here until the artifact exists."""
    identity: str = ""
    """The id that the artifact will have, the same when the work is done again; empty if it leaves none."""

    def model(self, name: str) -> Artifact:
        """The model that a stage gave: what it made, what it published, or the champion after its turn."""
        made = self.inputs[name]
        champion = made.figures.get("champion_artifact") or (made.artifact is None and made.figures.get("artifact"))
        return self.context.home.artifacts.get(str(champion)) if champion else made.product


Make = Callable[[Work], dict[str, Any]]


@dataclass(frozen=True)
class Handler:
    """How a kind of stage is carried out. `make` returns the figures."""

    make: Make
    rooms: tuple[str, ...]
    """The rooms whose source is the stage's code revision."""
    always: bool = False
    """True: a service or a publication, carried out in every run, leaves no artifact."""
    shared: bool = False
    """True: several processes carry it out together, each calls `make`; otherwise one does, and the others wait."""
    make_together: Callable[[Sequence[Work]], list[dict[str, Any]]] | None = None
    """`make` for several stages at once, where they may be carried out in the same steps."""
    outside: Callable[[Any], list[str]] = lambda config: []
    """Fingerprints of what the stage reads from outside the recipe (a file, the interpreter)."""


@cache
def code_revision(rooms: tuple[str, ...]) -> str:
    """sha256 over the source of rooms: another revision of the code makes another artifact."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for room in sorted(rooms):
        at = package / room
        for path in sorted(at.rglob("*.py")) if at.is_dir() else [at.with_suffix(".py")]:
            digest.update(str(path.relative_to(package)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
