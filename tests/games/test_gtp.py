"""The engine side of GTP: answers, errors in GNU Go's own words, analysis, clocks."""

import io
import shutil
import subprocess

import pytest

from prairie.games.features import TowerJudge
from prairie.games.gtp import Clock, Engine, serve
from prairie.games.player import Player
from prairie.models.tower import Tower, TowerConfig

GNUGO = shutil.which("gnugo") or shutil.which("gnugo", path="/usr/games")


def engine(size=5, visits=16, boards=()):
    tower = Tower(TowerConfig.small(12, 7, blocks=2, width=16, boards=boards)).init_weights(3)
    return Engine(Player(TowerJudge(tower, seed=None), visits=visits), size=size, name="Prairie", version="test@1")


def answers(lines, **settings):
    player = engine(**settings)
    return [player.answer(line) for line in lines]


SCRIPT = """\
protocol_version
foo
12 foo
known_command foo
known_command play
known_command
boardsize
boardsize x
boardsize 40
boardsize 5
komi
komi x
komi 0.5
play
play black
play x C3
play black Z3
play black I3
play black C9
13 play black C3
play white C3
play b D3
genmove
genmove x
undo
undo
undo
undo
time_settings
time_settings x 1 1
time_settings 10 5 1
fixed_handicap 2
fixed_handicap x
fixed_handicap
boardsize 9
fixed_handicap 12
fixed_handicap 3
fixed_handicap 2
set_free_handicap A1 B2
clear_board
set_free_handicap A1 A1
set_free_handicap A1
set_free_handicap
clear_board
loadsgf /nowhere/to/be/found.sgf
loadsgf
# a comment alone

play b pass
play w PASS
23  play B a2  # hello
boardsize 5
play b C3
final_score
reg_genmove y
final_status_list dead"""


@pytest.mark.skipif(GNUGO is None, reason="GNU Go is not installed (Debian: gnugo)")
def test_it_answers_as_gnu_go_does():
    run = subprocess.run(
        [GNUGO, "--mode", "gtp", "--chinese-rules"], input=SCRIPT + "\nquit\n", capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    theirs = run.stdout.split("\n\n")[:-2]
    ours = [answer.removesuffix("\n\n") for answer in answers(SCRIPT.splitlines()) if answer]
    commands = [line for line in SCRIPT.splitlines() if line.strip() and not line.startswith("#")]
    unlike = [
        (command, our, their)
        for command, our, their in zip(commands, ours, theirs, strict=True)
        if our.strip() != their.strip()
    ]
    assert not unlike


def test_a_game_is_played_to_its_end():
    player = engine(visits=24)
    for _ in range(40):
        for color in ("black", "white"):
            move = player.answer(f"genmove {color}")
            assert move.startswith("= ") and move.endswith("\n\n")
        if player.position.over:
            break
    assert player.answer("final_score")[2] in "BW0"
    assert player.answer("genmove black").startswith("= "), "a client may ask on"
    assert "(;GM[1]" in player.answer("printsgf") and "RU[Chinese]" in player.answer("printsgf")


def test_undo_takes_back_the_ko_too():
    player = engine()
    for move in ("b B1", "w C1", "b A2", "w D2", "b B3", "w C3", "b C2", "w B2"):
        assert player.answer(f"play {move}").startswith("=")
    assert player.answer("is_legal b C2") == "= 0\n\n", "ko"
    assert player.answer("play b C2") == "? illegal move\n\n"
    assert player.answer("undo") == "= \n\n" and player.answer("is_legal w B2") == "= 1\n\n"
    assert player.answer("last_move") == "= black C2\n\n"


def test_handicap_sgf_and_board(tmp_path):
    player = engine(size=9)
    assert player.answer("fixed_handicap 2") == "= G7 C3\n\n"
    player.answer("play w E5")
    (tmp_path / "game.sgf").write_text(player.answer("printsgf")[2:])
    assert player.answer(f"loadsgf {tmp_path / 'game.sgf'}") == "= black\n\n"
    assert player.record().handicap == 2 and player.position.stones.count(1) == 2
    assert " 5 . . . . O . . . ." in player.answer("showboard")
    assert player.answer("place_free_handicap 3") == "? board not empty\n\n"


def test_a_net_for_other_boards_is_not_played():
    player = engine(size=7, boards=(7,))
    assert player.answer("boardsize 9") == "? unacceptable size\n\n" and player.answer("boardsize 7") == "= \n\n"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("(;GM[1]FF[4]SZ[5];B[aa];W[aa", "? cannot open or parse '{}'"),
        ("(;GM[1]FF[4]SZ[5];B[aa];W[aa])", "? cannot open or parse '{}'"),
        ("(;GM[1]FF[4]SZ[40];B[aa])", "? cannot open or parse '{}'"),
        ("\0\xff no game at all", "? cannot open or parse '{}'"),
        ("(;GM[1]FF[4]SZ[9];B[aa])", "? the net was not made for this board: got 9 lines, wanted 5."),
    ],
)
def test_a_bad_sgf_is_one_answer_and_changes_nothing(tmp_path, text, answer):
    player, path = engine(boards=(5,)), tmp_path / "bad.sgf"
    path.write_bytes(text.encode("latin-1"))
    player.answer("play b C3")
    assert player.answer(f"loadsgf {path}") == answer.format(path) + "\n\n"
    assert player.answer("last_move") == "= black C3\n\n" and player.position.size == 5


def test_analysis_streams_until_the_next_line():
    said = []
    player = engine()
    stops = iter([False, False, True])
    end = player.answer("5 kata-analyze b 5 maxmoves 3 ownership true", said.append, lambda: next(stops))
    assert said[0] == "=5\n" and end == "\n" and len(said) == 4
    assert said[1].count("info move") <= 3 and len(said[1].split("ownership ")[1].split()) == 25
    assert "winrate 0." in said[1] and " pv " in said[1]
    lizzie = []
    player.answer("lz-analyze 5", lizzie.append, lambda: True)
    assert 0 <= int(lizzie[1].split("winrate ")[1].split()[0]) <= 10000
    assert player.answer("lz-analyze foo 5", said.append) == "? unknown analysis option\n\n"


def test_a_pipe_is_served():
    out = io.StringIO()
    serve(engine(), io.StringIO("1 name\r\n\t2 boardsize 7 # x\n\nkata-analyze 5\nquit\nname\n"), out)
    text = out.getvalue()
    assert text.startswith("=1 Prairie\n\n=2 \n\n=\ninfo move") and text.endswith("\n\n= \n\n")


def test_clocks():
    clock = Clock(100, 0, 0, given=True)
    assert clock.allowance_s(1, 20) == pytest.approx(4.5)
    clock.left[1] = (10.0, 5)
    assert clock.allowance_s(1, 20) == pytest.approx(1.8)
    assert Clock().allowance_s(1, 20) == float("inf")
    player = engine()
    player.answer("time_settings 0 1 0")
    assert player.clock.allowance_s(1, 20) == float("inf"), "time without stones is no limit (GTP 2)"
    player.answer("time_settings 0 3 1")
    assert player.clock.allowance_s(1, 20) == pytest.approx(2.7)
