"""A write that was cut off, and a clock that jumps back: what was kept is whole, and what came later counts."""

import shutil
import sqlite3
import time

import pytest

from prairie.data.records import Message
from prairie.errors import StoreError
from prairie.store.feedback import FeedbackEvent, Response
from prairie.store.home import Home


def vote(number):
    return FeedbackEvent("r", "comment", {"text": str(number)}, user="ann")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.71, 0.93, 1.0])
def test_a_torn_write_ahead_log_keeps_a_beginning_of_the_votes(tmp_path, share):
    """As after a power cut, where the end of the file never reached the disk."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    torn.mkdir()
    with Home(whole) as home:
        home.feedback.start_response(Response("r", "m", (Message("user", "hi"),)))
        ids = [home.feedback.add(vote(number), f"key {number}")[0] for number in range(20)]
        shutil.copy(whole / "prairie.db", torn / "prairie.db")
        log = (whole / "prairie.db-wal").read_bytes()
    (torn / "prairie.db-wal").write_bytes(log[: int(len(log) * share)])
    if not _has_tables(tmp_path, torn):
        return  # so early that the tables themselves were in the lost part: an empty home
    with Home(torn) as home:
        kept = [event.id for event in home.feedback.events()]
        assert kept == ids[: len(kept)] and (share < 1 or kept == ids)
        if home.feedback.responses():
            for number in range(20):  # whoever was not answered sends again
                home.feedback.add(vote(number), f"key {number}")
            assert [event.value["text"] for event in home.feedback.events()] == [str(n) for n in range(20)]
    with sqlite3.connect(torn / "prairie.db") as connection:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)


def test_a_torn_artifact_is_refused_and_an_unfinished_one_is_nobodys(tmp_path):
    with Home(tmp_path / "home") as home:
        with home.artifacts.create("data", "rows", {"n": 1}) as folder:
            (folder / "rows.jsonl").write_text("{}\n" * 100)
        artifact = home.artifacts.list()[0]
        for name in ("rows.jsonl", "manifest.json"):
            file = artifact.path / name
            before = file.read_bytes()
            artifact.path.chmod(0o755)
            file.chmod(0o644)
            file.write_bytes(before[: len(before) // 2])
            with pytest.raises(StoreError):
                home.artifacts.get(artifact.id)
            file.write_bytes(before)
        home.artifacts.verify(artifact.id)
        half = home.root / "tmp" / f"{artifact.id}.half"
        half.mkdir(parents=True)
        (half / "rows.jsonl").write_text("{")
        assert [found.id for found in home.artifacts.list()] == [artifact.id]


def test_what_comes_later_counts_though_the_clock_jumped_back(tmp_path, monkeypatch):
    with Home(tmp_path / "home") as home:
        home.feedback.start_response(Response("r", "m", (Message("user", "hi"),)))
        home.feedback.add(FeedbackEvent("r", "thumb", "up", user="ann"), "first")
        for number in (1, 2):
            with home.artifacts.create("model", f"m{number}", {"n": number}) as folder:
                (folder / "x").write_text(str(number))
            ids = [artifact.id for artifact in home.artifacts.list() if artifact.name == f"m{number}"]
            home.registry.register("spark", ids[0], kind="model")
        home.registry.promote("spark@1")
        before, generation = time.time(), home.registry.generation()
        monkeypatch.setattr(time, "time", lambda: before - 3600.0)
        assert home.feedback.abort_started() == 1, "an answer is left open by whoever died, whatever its clock said"
        home.feedback.add(FeedbackEvent("r", "thumb", "down", user="ann", created=time.time()), "second")
        assert [vote.event.thumb for vote in home.feedback.votes()] == ["down"]
        home.registry.promote("spark@2")
        assert home.registry.generation() > generation and home.registry.champion("spark").number == 2
        assert [event.number for event in home.registry.history("spark")] == [1, 2]
        assert home.registry.rollback("spark").number == 1


def _has_tables(tmp_path, torn):
    """Whether the cut database holds the table of votes; looked at in a copy."""
    copy = tmp_path / "copy"
    shutil.copytree(torn, copy)
    with sqlite3.connect(copy / "prairie.db") as connection:
        return bool(connection.execute("select 1 from sqlite_master where name = 'feedback_events'").fetchall())
