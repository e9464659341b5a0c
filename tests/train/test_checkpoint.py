"""Whole or not at all: kills and faults at every point of a save, damage of every kind, full disks."""

import errno
import json
import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from prairie.errors import CheckpointError, StorageFullError
from prairie.train.checkpoint import (
    Checkpoints,
    generator_states,
    generators_apart,
    replace_text,
    restore_generators,
)


def tensors(step: int, size: int = 50):
    return {"weights": {"w": torch.full((size,), float(step))}, "optimizer": {"step/w": torch.tensor(float(step))}}


def save(checkpoints: Checkpoints, step: int, size: int = 50):
    return checkpoints.save(step, tensors(step, size), {"progress": {"step": step}})


def test_what_is_read_is_what_was_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.newest() is None
    for step in (5, 10, 15):
        save(checkpoints, step)
    assert checkpoints.steps() == [10, 15]
    found = checkpoints.newest()
    assert found.step == 15 and found.state == {"progress": {"step": 15}}
    assert torch.equal(found.tensors["weights"]["w"], torch.full((50,), 15.0))
    assert found.tensors["optimizer"]["step/w"].shape == ()
    assert {p.name for p in found.path.iterdir()} == {
        "weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json",
    }  # fmt: skip


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "flipped bit": lambda c: flip(c / "weights.safetensors"),
    "flipped bit in the optimiser": lambda c: flip(c / "optimizer.safetensors"),
    "cut short": lambda c: os.truncate(c / "weights.safetensors", 60),
    "emptied": lambda c: os.truncate(c / "state.json", 0),
    "file gone": lambda c: (c / "weights.safetensors").unlink(),
    "manifest gone": lambda c: (c / "manifest.json").unlink(),
    "manifest torn": lambda c: os.truncate(c / "manifest.json", 30),
    "manifest of another shape": lambda c: (c / "manifest.json").write_text("[]"),
    "state changed": lambda c: (c / "state.json").write_text((c / "state.json").read_text().replace("15", "16")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_said_once_and_the_one_before_is_used(kind, tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    for step in (10, 15):
        save(checkpoints, step)
    DAMAGE[kind](checkpoints.path(15))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.read(15)
    said: list[str] = []
    assert checkpoints.newest(said.append).step == 10
    assert len(said) == 1 and "step-000000015" in said[0] and "step 10 is used" in said[0] and "\n" not in said[0]
    assert checkpoints.newest(said.append).step == 10 and len(said) == 1
    save(checkpoints, 15)
    assert checkpoints.newest(said.append).step == 15


def test_when_all_are_damaged_the_run_starts_over(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    save(checkpoints, 3)
    flip(checkpoints.path(3) / "weights.safetensors")
    said: list[str] = []
    assert checkpoints.newest(said.append) is None
    assert "starts from step 0" in said[0]


class Stopped(BaseException):
    """As a kill: nothing but the operating system may catch it."""


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir", "rmdir", "unlink"])
def test_stopped_at_any_call_leaves_a_sound_checkpoint(call, tmp_path, monkeypatch):
    """The process stops at the k-th call of each kind that touches the disk, for every k, cleaning up nothing."""
    real = getattr(os, call)
    reached = 0
    for k in range(1, 40):
        checkpoints = Checkpoints(tmp_path / f"{k}", keep=1)
        save(checkpoints, 1)
        calls = 0

        def fault(*args, k=k, **kwargs):
            nonlocal calls
            calls += 1
            if calls >= k:
                raise Stopped  # also in the clean-up that follows: a killed process cleans nothing
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fault)
            try:
                save(checkpoints, 2)
                stopped = False
            except Stopped:
                stopped = True
        found = Checkpoints(tmp_path / f"{k}", keep=1).newest(lambda line: pytest.fail(line))
        assert found.step in (1, 2), (call, k)
        assert torch.equal(found.tensors["weights"]["w"], torch.full((50,), float(found.step)))
        assert not [p for p in (tmp_path / f"{k}").iterdir() if p.name.startswith(".")], "leftovers are swept"
        if not stopped:
            assert found.step == 2
            break
        reached = k
    else:
        pytest.fail(f"more than 40 calls of {call}")
    assert reached


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_no_room_is_one_sentence_and_nothing_is_left(number, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    save(checkpoints, 1)

    def full(descriptor):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageFullError) as caught:
            save(checkpoints, 2)
    assert "\n" not in str(caught.value) and "MB free" in str(caught.value)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-000000001"]
    assert checkpoints.newest().step == 1


def test_other_errors_of_the_disk_are_not_called_full(tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError(errno.EIO, "I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="I/O error"):
            save(Checkpoints(tmp_path / "c"), 2)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MB."""
    at = tmp_path / "disk"
    at.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", at], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield at
    subprocess.run(["umount", at], check=True)


@pytest.mark.parametrize("size", [30_000, 62_000, 120_000, 400_000])
def test_a_really_full_disk_leaves_the_checkpoint_before(small_disk, size):
    """Full in the optimiser's file, near the end, or at once: whichever library writes, the sentence is the same."""
    checkpoints = Checkpoints(small_disk / "c", keep=1)
    save(checkpoints, 1, size=30_000)
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 780_000)
    with pytest.raises(StorageFullError, match="No space left"):
        save(checkpoints, 2, size=size)
    assert [p.name for p in (small_disk / "c").iterdir()] == ["step-000000001"]
    assert checkpoints.newest().step == 1
    filler.unlink()
    save(checkpoints, 2, size=30_000)
    assert checkpoints.newest().step == 2


def test_replace_text_is_whole_or_not_at_all(small_disk):
    path = small_disk / "metrics.jsonl"
    replace_text(path, "old\n")
    with pytest.raises(StorageFullError):
        replace_text(path, "x" * 2_000_000)
    assert path.read_text() == "old\n" and [p.name for p in small_disk.iterdir()] == ["metrics.jsonl"]


def test_generators_go_through_json():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    random.gauss(0, 1), np.random.normal(), torch.randn(3)  # leaves the second half of a pair waiting
    states = json.loads(json.dumps(generator_states()))

    def draw():
        ours = random.gauss(0, 1), random.random(), torch.randn(5).tolist()
        return *ours, float(np.random.normal()), np.random.randint(9)

    first = draw()
    assert draw() != first
    restore_generators(states)
    assert draw() == first


def test_generators_apart():
    torch.manual_seed(0)
    with generators_apart():
        inside = torch.randn(3)
        random.seed(5)
    assert torch.equal(torch.randn(3), inside)


def test_nothing_in_the_room_unpickles():
    """Tensors are safetensors and the rest is JSON."""
    import prairie.train

    for path in Path(prairie.train.__path__[0]).rglob("*.py"):
        source = path.read_text()
        assert "pickle" not in source.replace("no pickle", "").replace("needs no pickle", ""), path
        assert "torch.save" not in source and "torch.load" not in source, path
