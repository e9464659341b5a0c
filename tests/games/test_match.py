"""Matches: GNU Go as peer, every game kept, and engines that fail in every way."""

import json
import os
import shutil
import stat
import sys
import textwrap

import pytest

from prairie.cli.go import summary
from prairie.errors import DataError, GameError, ModelError, StorageFullError
from prairie.games.features import TowerJudge
from prairie.games.match import Engine, Played, Terms, play_match
from prairie.games.player import Player
from prairie.games.sgf import read_sgf
from prairie.models.tower import Tower, TowerConfig

GNUGO = shutil.which("gnugo") or shutil.which("gnugo", path="/usr/games")


@pytest.fixture
def player():
    tower = Tower(TowerConfig.small(12, 7, blocks=2, width=16)).init_weights(0)
    return Player(TowerJudge(tower, seed=None), visits=8)


def terms(**changes):
    given = {"player": "fresh@1", "engine": "x", "size": 5, "komi": 0.5, "games": 2, "color": "both"}
    return Terms(**{**given, **changes})


def script(tmp_path, body):
    """A program that is a GTP engine, or pretends to be one."""
    path = tmp_path / "engine.py"
    path.write_text(
        "import sys, time\nsaid = 0\nfor line in sys.stdin:\n" + textwrap.indent(textwrap.dedent(body), "    ")
    )
    return f"{sys.executable} {path}"


PASSES = """
word = line.split()[0]
print("= pass\\n" if word == "genmove" else "= W+1.5\\n" if word == "final_score" else "= \\n", flush=True)
"""


@pytest.mark.skipif(GNUGO is None, reason="GNU Go is not installed (Debian: gnugo)")
def test_games_against_gnu_go_are_kept_and_counted(tmp_path, player):
    command = "gnugo --mode gtp --chinese-rules --level 1"
    with Engine(command) as engine:
        done = list(play_match(terms(engine=command, opening_moves=2), player, engine, tmp_path))
    records = [read_sgf(path.read_bytes())[0] for path in sorted(tmp_path.glob("*.sgf"))]
    assert len(records) == 2 and [p.color for p in done] == [1, 2]
    assert records[0].moves[:2] == records[1].moves[:2], "a pair begins with the same random moves"
    assert records[0].names[1] == command and records[1].names[0] == command
    assert all(len(list(record.positions())) == len(record.moves) + 1 for record in records)
    assert sum(p.outcome for p in done) == sum(r.winner() == p.color for r, p in zip(records, done, strict=True))


def test_a_match_goes_on_where_it_stopped(tmp_path, player):
    with Engine(script(tmp_path, PASSES)) as engine:
        match = play_match(terms(games=3, color="black"), player, engine, tmp_path / "m")
        first = next(match)
        match.close()
        kept = (tmp_path / "m" / "game-0001.sgf").read_text()
        done = list(play_match(terms(games=3, color="black"), player, engine, tmp_path / "m"))
    assert [p.number for p in done] == [0, 1, 2] and done[0] == first and done[0].outcome == 0.0
    assert (tmp_path / "m" / "game-0001.sgf").read_text() == kept and "RE[W+1.5]" in kept
    with (
        Engine(script(tmp_path, PASSES)) as engine,
        pytest.raises(DataError, match=r"holds another match: got komi 7\.5"),
    ):
        list(play_match(terms(komi=7.5, games=3, color="black"), player, engine, tmp_path / "m"))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("(;GM[1]FF[4]SZ[5]KM[0.5];B[aa];W[aa", "the property W of an SGF has no value"),
        ("(;GM[1]FF[4]SZ[5]KM[0.5]RE[B+1];B[aa];W[aa])", "white A5, cannot be played"),
        ("(;GM[1]FF[4]SZ[5]KM[0.5];B[aa])", "result missing"),
        ("(;GM[1]FF[4]SZ[7]KM[0.5]RE[B+1];B[aa])", "got 7 lines"),
    ],
)
def test_a_damaged_game_is_not_counted(tmp_path, player, damage, sentence):
    with Engine(script(tmp_path, PASSES)) as engine:
        list(play_match(terms(games=1), player, engine, tmp_path / "m"))
        (tmp_path / "m" / "game-0001.sgf").write_text(damage)
        with pytest.raises(DataError, match=rf"game-0001.sgf is no finished game.*{sentence}.*is played again"):
            list(play_match(terms(games=1), player, engine, tmp_path / "m"))


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("time.sleep(200)", "has not answered for 1 s: got after the command `boardsize 5`"),
        ("sys.exit(3)", "has died"),
        ("print('hello\\n', flush=True)", "answers what is no GTP .'hello'."),
        ("print('? no\\n', flush=True)", r"does not take `boardsize 5`: got \? no"),
        ("print('= Z99\\n', flush=True)", "a move that cannot be played: got 'Z99' .no point."),
    ],
)
def test_an_engine_that_fails_is_one_sentence(tmp_path, player, body, sentence):
    with (
        Engine(script(tmp_path, body), limit_s=1 if "sleep" in body else 100) as engine,
        pytest.raises(GameError, match=sentence) as caught,
    ):
        list(play_match(terms(color="white"), player, engine, tmp_path / "m"))
    assert "\n" not in str(caught.value) and "kept" in str(caught.value)


def test_games_before_a_death_are_kept(tmp_path, player):
    body = PASSES + "\nsaid += word == 'final_score'\nif said == 2: sys.exit(1)\n"
    with Engine(script(tmp_path, body)) as engine, pytest.raises(GameError, match="has died"):
        list(play_match(terms(games=5), player, engine, tmp_path / "m"))
    assert sorted(p.name for p in (tmp_path / "m").glob("*.sgf")) == ["game-0001.sgf", "game-0002.sgf"]


def test_a_missing_engine_is_one_sentence():
    with pytest.raises(GameError, match="not on this machine: got no-such-gnugo; install it"):
        Engine("no-such-gnugo --mode gtp")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path, player):
    (tmp_path / "m").mkdir()
    os.chmod(tmp_path / "m", stat.S_IRUSR | stat.S_IXUSR)
    with Engine(script(tmp_path, PASSES)) as engine, pytest.raises(Exception, match="cannot be written"):
        list(play_match(terms(), player, engine, tmp_path / "m"))


def test_a_full_disk_keeps_the_games(tmp_path, player, monkeypatch):
    from pathlib import Path

    real = Path.write_text

    def full(self, text, **kwargs):
        if self.name == "game-0002.part":
            raise OSError(28, "No space left on device")
        return real(self, text, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with Engine(script(tmp_path, PASSES)) as engine, pytest.raises(StorageFullError, match="games before it are kept"):
        list(play_match(terms(), player, engine, tmp_path / "m"))
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["game-0001.sgf", "match.json"]
    kept = (tmp_path / "m" / "game-0001.sgf").read_bytes()
    monkeypatch.undo()  # there is space again
    with Engine(script(tmp_path, PASSES)) as engine:
        done = list(play_match(terms(), player, engine, tmp_path / "m"))
    assert [p.number for p in done] == [0, 1] and (tmp_path / "m" / "game-0001.sgf").read_bytes() == kept


def test_a_match_on_a_board_that_the_net_was_not_made_for(tmp_path):
    tower = Tower(TowerConfig.small(12, 7, blocks=2, width=16, boards=(7,))).init_weights(0)
    small = Player(TowerJudge(tower, seed=None), visits=8)
    with Engine(script(tmp_path, PASSES)) as engine, pytest.raises(ModelError, match="got 5 lines, wanted 7"):
        list(play_match(terms(), small, engine, tmp_path / "m"))
    assert not (tmp_path / "m").exists()


def test_the_summary():
    found = summary([Played(k, 1 + k % 2, outcome, "B+1", 30) for k, outcome in enumerate([1, 1, 0, 0.5])])
    assert (found["wins"], found["losses"], found["draws"]) == (2, 1, 1)
    assert found["elo"] == pytest.approx(88.7, abs=0.1) and found["interval"]["low"] < 0.625 < found["interval"]["high"]
    assert found["by_color"]["white"] == {"games": 2, "won": 1.5}
    json.dumps(summary([Played(0, 1, 1, "B+1", 3)]), allow_nan=False)
