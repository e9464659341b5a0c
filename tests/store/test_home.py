"""The home: where it is, who may read it, and locks between processes."""

import os
import signal
import stat
import time

import pytest

from prairie.errors import BusyError, RequestError, StoreError
from prairie.store.home import Home, default_home


def test_the_default_home(monkeypatch, tmp_path):
    monkeypatch.setenv("PRAIRIE_HOME", str(tmp_path / "there"))
    assert default_home() == tmp_path / "there"
    assert Home().root == tmp_path / "there"
    monkeypatch.delenv("PRAIRIE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_home() == tmp_path / ".prairie"


def test_only_the_owner_reads_it(tmp_path):
    home = Home(tmp_path / "home")
    assert stat.S_IMODE(home.root.stat().st_mode) == 0o700


def test_a_home_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made"):
        Home(tmp_path / "file" / "home")


def test_a_lock_excludes_and_names_the_pid(home):
    with home.lock("spark:poet"):
        with (
            pytest.raises(BusyError, match=rf"`spark:poet` of .* is in use by process {os.getpid()}"),
            home.lock("spark:poet"),
        ):
            pass
        with home.lock("another"):
            pass
    with home.lock("spark:poet"):
        pass


def test_another_process_is_named_and_its_death_frees_the_lock(home):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with home.lock("run"):
            os.write(writing, b"held")
            signal.pause()
        os._exit(0)
    try:
        assert os.read(reading, 4) == b"held"
        with pytest.raises(BusyError, match=f"process {child}"), home.lock("run"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
    with home.lock("run"):
        pass


def test_waiting_for_a_lock(home):
    (reading, writing), (told, telling) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with home.lock("run"):
            os.write(writing, b"!")
            os.read(told, 1)
            time.sleep(0.3)
        os._exit(0)
    os.read(reading, 1)
    with pytest.raises(BusyError), home.lock("run"):
        pass
    os.write(telling, b"!")
    with home.lock("run", wait_s=60):
        pass
    os.waitpid(child, 0)


def test_work_folders(home):
    folder = home.work("abc")
    (folder / "checkpoint").write_text("x")
    assert home.work("abc") == folder and (folder / "checkpoint").exists()
    home.clear_work("abc")
    assert not folder.exists()
    for name in ("../up", "", ".hidden", "a/b"):
        with pytest.raises(RequestError):
            home.work(name)


def test_work_is_one_callers_and_kept_when_it_fails(home):
    with home.working("abc") as folder:
        (folder / "half").touch()
        with pytest.raises(BusyError, match=r"`work-abc` of .* is in use"), home.working("abc"):
            pass
    assert not folder.exists()
    with pytest.raises(ZeroDivisionError), home.working("abc") as folder:
        (folder / "half").touch()
        1 / 0  # noqa: B018
    with home.working("abc") as again:
        assert (again / "half").exists()
