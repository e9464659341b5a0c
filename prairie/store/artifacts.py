"""Immutable folders, named by the hash of what they were made from: same config, inputs and code, same id.

    id = store.id_of("model", config, inputs=[data.id, base.id], code=code_hash)
    artifact = store.find(id)
    if artifact is None:
        figures = {}
        with store.create("model", "tiny", config, [data.id, base.id], code_hash, figures=figures) as folder:
            ...                       # write files into `folder`, fill `figures`
        artifact = store.get(id)

Nothing stands under HOME/artifacts that is not whole: the files are hashed and synced in HOME/tmp and then renamed. A
crash leaves only rubbish in HOME/tmp, which the next `create` removes. Not here: what the files mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prairie.errors import NotFoundError, RequestError, StoreError
from prairie.recipe import canonical
from prairie.store.disk import disk_errors, sync_file, sync_tree
from prairie.store.locks import guards, take

if TYPE_CHECKING:
    from prairie.store.home import Home

MANIFEST = "manifest.json"
ID_LENGTH = 16
ID = re.compile(rf"[0-9a-f]{{{ID_LENGTH}}}")


@dataclass(frozen=True)
class Artifact:
    """A finished folder and what is known of it."""

    id: str
    kind: str
    name: str
    path: Path
    manifest: dict[str, Any]

    @property
    def figures(self) -> dict[str, Any]:
        """What its maker measured: losses, rows, tokens, seconds."""
        return dict(self.manifest.get("figures") or {})

    @property
    def inputs(self) -> list[str]:
        """Ids of the artifacts that it was made from."""
        return list(self.manifest.get("inputs") or [])

    @property
    def events(self) -> list[str]:
        """Ids of the feedback events that stand in it (datasets made from votes)."""
        return list(self.manifest.get("events") or [])

    @property
    def is_model(self) -> bool:
        """Whether it holds weights: every model and adapter folder of Prairie states its hashes in `prairie.json`."""
        return "prairie.json" in self.manifest["files"]

    @property
    def created(self) -> float:
        """UNIX seconds."""
        return float(self.manifest["created"])


class ArtifactStore:
    """HOME/artifacts. Methods raise StoreError for damage and StorageFullError when the disk is full."""

    def __init__(self, home: Home) -> None:
        self.folder = home.root / "artifacts"
        self._tmp = home.root / "tmp"

    @staticmethod
    def id_of(kind: str, config: Any, inputs: Sequence[str], code: str) -> str:
        """The first 16 hex digits of the sha256 of all that makes the content: the order of `inputs` counts."""
        text = canonical({"kind": kind, "config": config, "inputs": list(inputs), "code": code})
        return hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH]

    def find(self, id: str) -> Artifact | None:
        """The finished artifact, or None. Checks that every file is there with its size; `verify` reads them all."""
        path = self.folder / id
        if not ID.fullmatch(id) or not path.exists():
            return None
        artifact = self._read(path)
        for name, facts in artifact.manifest["files"].items():
            try:
                size = (path / name).stat().st_size
            except OSError:
                size = None
            if size != facts["bytes"]:
                raise self._damaged(id, f"{name} of {size} bytes" if size is not None else f"no {name}")
        return artifact

    def get(self, id: str) -> Artifact:
        """The artifact with this id or with the only id that begins so (4 digits or more). Raises NotFoundError."""
        artifact = self.find(id)
        if artifact is None and len(id) >= 4:
            matching = [path.name for path in self._paths() if path.name.startswith(id)]
            if len(matching) > 1:
                raise NotFoundError(f"artifact {id} is not clear", got=", ".join(matching), wanted="one id")
            artifact = self.find(matching[0]) if matching else None
        if artifact is None:
            raise NotFoundError("no such artifact", got=id, wanted=f"the name of a folder in {self.folder}")
        return artifact

    def list(self, kind: str | None = None) -> Sequence[Artifact]:
        """All finished artifacts, oldest first."""
        all_ = sorted((self._read(path) for path in self._paths()), key=lambda a: (a.created, a.id))
        return [artifact for artifact in all_ if kind is None or artifact.kind == kind]

    @contextmanager
    def create(
        self,
        kind: str,
        name: str,
        config: Any,
        inputs: Sequence[str] = (),
        code: str = "",
        *,
        figures: MutableMapping[str, Any] | None = None,
        events: Sequence[str] | None = None,
    ) -> Iterator[Path]:
        """Yields an empty folder to write into; when the block ends well it becomes the artifact, otherwise it is gone.

        `figures` and `events` are read when the block ends, so the block may fill them. If the artifact exists already
        (find it first), the block's files are thrown away and the existing one stays as it is.
        """
        id = self.id_of(kind, config, inputs, code)
        self.collect()
        what = f"artifact {id} ({name}) cannot be written"
        with disk_errors(what):
            folder, descriptor = self._new_folder(id)
        try:
            with disk_errors(what, only_full=True):
                yield folder
            with disk_errors(what):
                self._finish(id, folder, kind, name, config, inputs, code, figures or {}, events or [])
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            _lock_of(folder).unlink(missing_ok=True)
            os.close(descriptor)

    def verify(self, id: str) -> None:
        """Reads every file again. Raises StoreError naming the first one that is missing, changed or too many."""
        artifact = self.find(id)
        if artifact is None:
            raise NotFoundError("no such artifact", got=id, wanted=f"the name of a folder in {self.folder}")
        known = artifact.manifest["files"]
        for name, facts in known.items():
            with disk_errors(f"artifact {id} cannot be read"):
                if _sha256(artifact.path / name) != facts["sha256"]:
                    raise self._damaged(id, f"{name} with another content")
        for name in _files(artifact.path):
            if name not in known and name != MANIFEST:
                raise self._damaged(id, f"an unknown file {name}")
        made_of = (artifact.kind, artifact.manifest["config"], artifact.inputs, artifact.manifest["code"])
        if self.id_of(*made_of) != id:
            raise self._damaged(id, "a manifest of another id")

    def collect(self) -> int:
        """Removes what dead processes left in HOME/tmp; returns how many folders."""
        count = 0
        with disk_errors(f"{self._tmp} cannot be cleaned"):
            for lock in self._tmp.glob("*.lock"):
                descriptor = take(lock)
                if descriptor is None:
                    continue  # its owner lives
                folder = lock.with_suffix("")
                count += folder.exists()
                shutil.rmtree(folder, ignore_errors=True)
                lock.unlink(missing_ok=True)
                os.close(descriptor)
        return count

    def made_from(self, ids: Sequence[str]) -> Sequence[Artifact]:
        """All artifacts that stand on one of `ids`, directly or through others, and `ids` themselves, oldest first."""
        reached = set(ids)
        every = self.list()
        grown = True
        while grown:
            new = {a.id for a in every if a.id not in reached and reached & set(a.inputs)}
            reached |= new
            grown = bool(new)
        return [artifact for artifact in every if artifact.id in reached]

    def _paths(self) -> Sequence[Path]:
        with disk_errors(f"{self.folder} cannot be read"):
            return [path for path in self.folder.iterdir() if ID.fullmatch(path.name)]

    def _new_folder(self, id: str) -> tuple[Path, int]:
        """A fresh folder in HOME/tmp and the descriptor whose lock says that its owner lives."""
        while True:
            folder = self._tmp / f"{id}.{os.getpid()}.{secrets.token_hex(4)}"
            descriptor = take(_lock_of(folder))
            # A collector may have unlinked the file between its making and its locking: then the lock guards nothing,
            # even if a second collector has made such a file again.
            if descriptor is not None and guards(descriptor, _lock_of(folder)):
                folder.mkdir()
                return folder, descriptor
            if descriptor is not None:
                os.close(descriptor)

    def _finish(
        self,
        id: str,
        folder: Path,
        kind: str,
        name: str,
        config: Any,
        inputs: Sequence[str],
        code: str,
        figures: Mapping[str, Any],
        events: Sequence[str],
    ) -> None:
        files = {}
        for file in _files(folder):
            path = folder / file
            if file == MANIFEST or path.is_symlink():
                raise StoreError(f"artifact {id} may not hold {file}", wanted=f"plain files, none named {MANIFEST}")
            files[file] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
            path.chmod(path.stat().st_mode & ~0o222)
        manifest = {
            "id": id,
            "kind": kind,
            "name": name,
            "config": config,
            "inputs": list(inputs),
            "code": code,
            "files": files,
            "figures": dict(figures),
            "events": list(events),
            "created": time.time(),
            "machine": {
                "system": platform.system(),
                "processor": platform.machine(),
                "cores": os.cpu_count(),
                "python": platform.python_version(),
            },
        }
        path = folder / MANIFEST
        try:
            text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RequestError(f"the manifest of artifact {id} ({name}) is not JSON", got=str(error)) from None
        path.write_text(text + "\n", encoding="utf-8")
        path.chmod(0o444)
        sync_tree(folder)
        try:
            os.rename(folder, self.folder / id)
        except OSError:
            if self.find(id) is None:
                raise
            return  # somebody else was first: what stands is not touched
        sync_file(self.folder)

    def _read(self, path: Path) -> Artifact:
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            return Artifact(manifest["id"], manifest["kind"], manifest["name"], path, manifest)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(path.name, f"{type(error).__name__} in {MANIFEST}") from None

    def _damaged(self, id: str, got: str) -> StoreError:
        return StoreError(
            f"artifact {id} is damaged",
            got=got,
            mend=f"remove {self.folder / id} and make it again with the same command",
        )


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")


def _files(folder: Path) -> list[str]:
    """Names of all files below a folder, with `/`, sorted."""
    return sorted(
        Path(path, name).relative_to(folder).as_posix() for path, _, names in os.walk(folder) for name in names
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
