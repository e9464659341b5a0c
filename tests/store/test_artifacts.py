"""Artifacts: whole or not there, never changed, known by what they were made from."""

import errno
import json
import os
import signal
import threading

import pytest

from prairie.errors import NotFoundError, RequestError, StorageFullError, StoreError
from prairie.store import artifacts, disk
from prairie.store.home import Home


def make(store, name="m", config=None, inputs=(), content="weights", **more):
    config = {"name": name} if config is None else config
    with store.create("model", name, config, inputs, "code", **more) as folder:
        (folder / "sub").mkdir()
        (folder / "model.safetensors").write_text(content)
        (folder / "sub" / "config.json").write_text("{}")
    return store.get(store.id_of("model", config, inputs, "code"))


def rubbish(home):
    return sorted(path.name for path in (home.root / "tmp").iterdir())


def test_the_id_is_of_all_that_makes_the_content():
    from prairie.store.artifacts import ArtifactStore

    id_of = ArtifactStore.id_of
    same = id_of("model", {"a": 1, "b": [2, "文"]}, ["x", "y"], "c")
    assert same == id_of("model", {"b": [2, "文"], "a": 1}, ["x", "y"], "c")
    assert len(same) == 16
    others = [
        id_of("adapter", {"a": 1, "b": [2, "文"]}, ["x", "y"], "c"),
        id_of("model", {"a": 1.5, "b": [2, "文"]}, ["x", "y"], "c"),
        id_of("model", {"a": 1, "b": [2, "文"]}, ["y", "x"], "c"),
        id_of("model", {"a": 1, "b": [2, "文"]}, ["x", "y"], "d"),
    ]
    assert len({same, *others}) == 5


def test_what_is_made_is_found_with_its_manifest(home):
    figures = {}
    id = home.artifacts.id_of("model", {"lr": 0.1}, ["0" * 16], "code")
    assert home.artifacts.find(id) is None
    with home.artifacts.create(
        "model", "m", {"lr": 0.1}, ["0" * 16], "code", figures=figures, events=["fb-1"]
    ) as folder:
        (folder / "a.txt").write_text("hello")
        figures["loss"] = 1.5
        assert home.artifacts.find(id) is None
    artifact = home.artifacts.find(id)
    assert artifact.path == home.root / "artifacts" / id
    assert (artifact.kind, artifact.name, artifact.inputs, artifact.events) == ("model", "m", ["0" * 16], ["fb-1"])
    assert artifact.figures == {"loss": 1.5}
    assert artifact.manifest["files"]["a.txt"] == {
        "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
        "bytes": 5,
    }
    assert rubbish(home) == []
    home.artifacts.verify(id)
    assert home.artifacts.get(id[:6]).id == id
    with pytest.raises(NotFoundError):
        home.artifacts.get("ffff")


def test_files_are_read_only_and_an_existing_artifact_is_never_overwritten(home):
    first = make(home.artifacts, content="first")
    again = make(home.artifacts, content="second")
    assert again.id == first.id
    assert (again.path / "model.safetensors").read_text() == "first"
    assert again.manifest == first.manifest
    assert all(not path.stat().st_mode & 0o222 for path in first.path.rglob("*") if path.is_file())
    assert rubbish(home) == []


def test_an_error_leaves_nothing(home):
    with pytest.raises(ZeroDivisionError), home.artifacts.create("model", "m", {}) as folder:
        (folder / "half").write_text("x")
        _ = 1 / 0
    assert home.artifacts.list() == []
    assert rubbish(home) == []


def test_an_error_of_the_maker_stays_its_own(home):
    with pytest.raises(FileNotFoundError), home.artifacts.create("model", "m", {}):
        os.stat("/no/such/file")


@pytest.mark.parametrize("where", ["maker", "sync"])
def test_a_full_disk_leaves_nothing(home, monkeypatch, where):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "sync":
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFullError, match="the disk is full"), home.artifacts.create("model", "m", {}) as folder:
        (folder / "half").write_text("x")
        if where == "maker":
            full()
    monkeypatch.undo()
    assert home.artifacts.list() == []
    assert rubbish(home) == []
    make(home.artifacts)


def test_all_is_on_the_disk_before_it_has_its_name(home, monkeypatch):
    """Every file, then every folder, then the rename, then the folder of all artifacts."""
    done = []
    sync, rename = disk.sync_file, os.rename
    monkeypatch.setattr(disk, "sync_file", lambda path: (done.append(path.name), sync(path)))
    monkeypatch.setattr("prairie.store.artifacts.sync_file", lambda path: (done.append(path.name), sync(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append("RENAME"), rename(a, b)))
    make(home.artifacts)
    at = done.index("RENAME")
    assert {"manifest.json", "model.safetensors", "config.json", "sub"} <= set(done[:at])
    assert done[at + 1 :] == ["artifacts"]


@pytest.mark.parametrize("damage", ["flip", "missing", "longer", "extra", "manifest"])
def test_verify_finds_damage(home, damage):
    artifact = make(home.artifacts)
    file = artifact.path / "model.safetensors"
    file.chmod(0o644)
    if damage == "flip":
        file.write_text("Weights")
    elif damage == "missing":
        file.unlink()
    elif damage == "longer":
        file.write_text("weights!")
    elif damage == "extra":
        (artifact.path / "sub" / "more").write_text("")
    else:
        manifest = artifact.path / "manifest.json"
        manifest.chmod(0o644)
        facts = json.loads(manifest.read_text())
        facts["config"] = {"name": "another"}
        manifest.write_text(json.dumps(facts))
    with pytest.raises(StoreError, match=rf"artifact {artifact.id} is damaged.*make it again"):
        home.artifacts.verify(artifact.id)
    if damage in ("missing", "longer"):
        with pytest.raises(StoreError, match="is damaged"):
            home.artifacts.find(artifact.id)


def test_a_broken_manifest_is_damage_not_absence(home):
    artifact = make(home.artifacts)
    (artifact.path / "manifest.json").unlink()
    with pytest.raises(StoreError, match="is damaged"):
        home.artifacts.find(artifact.id)


def test_what_is_no_plain_file_is_refused(home):
    with pytest.raises(StoreError, match="may not hold link"), home.artifacts.create("model", "m", {}) as folder:
        (folder / "link").symlink_to("/etc/passwd")
    with (
        pytest.raises(StoreError, match=r"may not hold manifest\.json"),
        home.artifacts.create("model", "m", {}) as folder,
    ):
        (folder / "manifest.json").write_text("{}")
    with (
        pytest.raises(RequestError, match="not JSON"),
        home.artifacts.create("model", "m", {}, figures={"loss": float("nan")}),
    ):
        pass
    assert home.artifacts.list() == [] and rubbish(home) == []


def test_kill_in_the_middle_leaves_only_what_the_next_one_removes(home):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with Home(home.root).artifacts.create("model", "dying", {}) as folder:
            (folder / "half").write_text("x" * 1000)
            os.write(writing, b"!")
            signal.pause()
        os._exit(0)
    try:
        assert os.read(reading, 1) == b"!"
        held = rubbish(home)
        assert len(held) == 2  # the folder and its lock
        make(home.artifacts, "while it lives")
        assert rubbish(home) == held, "the folder of a living process is not touched"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
    assert [a.name for a in home.artifacts.list()] == ["while it lives"]
    make(home.artifacts, "the next one")
    assert rubbish(home) == []
    assert len(home.artifacts.list()) == 2


def test_many_make_the_same_at_once(home):
    results, errors = [], []
    barrier = threading.Barrier(8)

    def go(number):
        barrier.wait()
        try:
            results.append(make(home.artifacts, content=f"{number}"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=go, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len({(r.path / "model.safetensors").read_text() for r in results}) == 1
    home.artifacts.verify(results[0].id)
    assert rubbish(home) == []


def test_a_lock_file_that_collectors_have_replaced_guards_nothing(home, monkeypatch):
    real, taken = artifacts.take, []

    def replaced_once(path):
        descriptor = real(path)
        if not taken:
            path.unlink()
            path.touch()
        taken.append(path)
        return descriptor

    monkeypatch.setattr(artifacts, "take", replaced_once)
    folder, descriptor = home.artifacts._new_folder("0" * 16)
    os.close(descriptor)
    assert len(taken) == 2 and folder.with_name(folder.name + ".lock") == taken[1]


def test_made_from_follows_the_inputs(home):
    store = home.artifacts
    data = make(store, "data")
    base = make(store, "base")
    child = make(store, "child", inputs=[base.id, data.id])
    grandchild = make(store, "grandchild", inputs=[child.id])
    assert [a.name for a in store.made_from([data.id])] == ["data", "child", "grandchild"]
    assert [a.name for a in store.made_from([grandchild.id])] == ["grandchild"]
    assert [a.name for a in store.list("model")] == ["data", "base", "child", "grandchild"]
    assert store.list("dataset") == []
