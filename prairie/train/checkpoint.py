"""A run's state on disk: written whole or not at all, checked before it is used, the last few kept.

    FOLDER/step-000000120/{weights,optimizer}.safetensors, state.json, manifest.json (sha256 and size of each)

A checkpoint is written aside, synced, then renamed, so a kill or a full disk leaves the one before it. A damaged one is
noticed by its manifest, said in a line and removed, and the one before it is used. Tensors are safetensors and the rest
is JSON: nothing here can run code when read.

Not here: what the state means (trainer), artifacts that others read (store).
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prairie.errors import CheckpointError, StorageFullError

MANIFEST = "manifest.json"
STATE = "state.json"
ASIDE = ".aside-"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` by file and name, on the CPU; `state` is JSON."""

    step: int
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """The steps of the checkpoints on disk, sound or not, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m[1]) for path in self.folder.iterdir() if (m := re.fullmatch(r"step-(\d+)", path.name)))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Writes one checkpoint and drops those beyond the last `keep`.

        Raises StorageFullError when the disk is full or not writable; the checkpoints before this one stand then.
        """
        target, aside = self.path(step), self.folder / f"{ASIDE}{step:09d}"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            try:
                aside.mkdir()
                for name, named in tensors.items():
                    save_file({k: v.detach().cpu().contiguous() for k, v in named.items()}, aside / _file(name))
                (aside / STATE).write_text(json.dumps(state))
                manifest = {"step": step, "files": {path.name: _sealed(path) for path in sorted(aside.iterdir())}}
                (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
                sync(aside / MANIFEST)
                sync(aside)
                if target.exists():
                    self._drop(target)
                aside.rename(target)
                sync(self.folder)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
            for old in self.steps()[: -self.keep]:
                self._drop(self.path(old))
        return target

    def newest(self, say: Callable[[str], None] = lambda line: None, at_most: int | None = None) -> Checkpoint | None:
        """The newest sound checkpoint (with `at_most`: of that step or an earlier one), None if there is none. Damaged
        ones are told to `say` in a line and removed."""
        with writing(self.folder):
            self._sweep()
            for step in reversed(self.steps()):
                if at_most is not None and step > at_most:
                    continue
                try:
                    return self.read(step)
                except CheckpointError as error:
                    before = [s for s in self.steps() if s < step]
                    instead = f"the one of step {before[-1]} is used" if before else "the run starts from step 0"
                    say(f"{str(error).rstrip('.')}; it is removed and {instead}.")
                    self._drop(self.path(step))
        return None

    def read(self, step: int) -> Checkpoint:
        """Raises CheckpointError if a file is missing, of another length or of another content than was written."""
        path = self.path(step)
        try:
            files = json.loads((path / MANIFEST).read_text())["files"]
            for name, wanted in files.items():
                if (path / name).stat().st_size != wanted["bytes"] or _sha256(path / name) != wanted["sha256"]:
                    raise ValueError(f"{name} is not as it was written")
            tensors = {name[: -len(".safetensors")]: load_file(path / name) for name in files if _is_tensors(name)}
            return Checkpoint(step, path, tensors, json.loads((path / STATE).read_text()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise CheckpointError(f"the checkpoint {path} is damaged", got=error, wanted="what was written") from error

    def _drop(self, path: Path) -> None:
        """Away in one move first: a kill in between must not leave half a checkpoint under its name."""
        away = path.with_name(f"{ASIDE}old-{path.name}")
        path.rename(away)
        shutil.rmtree(away, ignore_errors=True)

    def _sweep(self) -> None:
        """Removes what a killed process left aside."""
        for path in self.folder.glob(f"{ASIDE}*"):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full or read-only disk becomes StorageFullError in one sentence, whichever library met it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if number not in _NO_ROOM:
            raise
        free_mb = 0.0
        with suppress(OSError):
            free_mb = shutil.disk_usage(path if path.exists() else path.parent).free / 1e6
        raise StorageFullError(
            f"{path} cannot be written ({os.strerror(number)})",
            got=f"{free_mb:.0f} MB free",
            mend="make room or the folder writable and run the same command again; what was saved before is whole",
        ) from error


def replace_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all. Raises StorageFullError."""
    with writing(path):
        aside = path.with_name(f"{ASIDE}{path.name}")
        try:
            aside.write_text(text)
            sync(aside)
            aside.replace(path)
            sync(path.parent)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def sync(path: Path) -> None:
    """Forces a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def generator_states() -> dict[str, Any]:
    """The state of every generator that training may draw from, as JSON: Python, numpy, torch, CUDA where in use."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    states = {
        "python": [version, list(words), gauss],
        "numpy": {**legacy, "state": {"key": legacy["state"]["key"].tolist(), "pos": int(legacy["state"]["pos"])}},
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = base64.b64encode(torch.cuda.get_rng_state().numpy().tobytes()).decode()
    return states


def restore_generators(states: Mapping[str, Any]) -> None:
    """The inverse of `generator_states`."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = states["numpy"]
    key = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy_state, "state": {"key": key, "pos": numpy_state["state"]["pos"]}})
    torch.set_rng_state(_bytes_tensor(states["torch"]))
    if "cuda" in states:
        torch.cuda.set_rng_state(_bytes_tensor(states["cuda"]))


@contextmanager
def generators_apart() -> Iterator[None]:
    """What happens inside cannot move the generators outside: an evaluation must not change what is learned."""
    states = generator_states()
    try:
        yield
    finally:
        restore_generators(states)


def _bytes_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).clone()


def _file(name: str) -> str:
    return f"{name}.safetensors"


def _is_tensors(name: str) -> bool:
    return name.endswith(".safetensors")


def _sealed(path: Path) -> dict[str, Any]:
    sync(path)
    return {"sha256": _sha256(path), "bytes": path.stat().st_size}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
