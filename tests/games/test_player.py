"""A player and the end of a game: it passes only where it wins however the dead stones are counted."""

import shutil
from pathlib import Path

import pytest

from prairie.games.features import TowerJudge
from prairie.games.go import BLACK, WHITE, Position, move_of, vertex
from prairie.games.match import Engine
from prairie.games.player import Player
from prairie.models.katago import load_katago
from prairie.models.tower import Tower, TowerConfig

KATAGO = Path(__file__).resolve().parents[3] / "shared" / "data" / "models" / "katago_g170-b6c96.bin.gz"
GNUGO = shutil.which("gnugo") or shutil.which("gnugo", path="/usr/games")
needs_katago = pytest.mark.skipif(not KATAGO.is_file(), reason="the shared KataGo net is not on this machine")
KOMI = 14.5
WON_BY_A_LONE_STONE = """
    . . X O . . .
    X . X O . . .
    X . X O . X .
    . X X O . . .
    . . X O . . .
    X . X X O . .
    . X . . . . ."""
"""Because of the stone at F5 White's side is nobody's by the area on the board. White has just passed."""
ALIVE_BY_THE_AREA_ALONE = """
    O . O O O X .
    . O X X O O O
    O O O X X X X
    X X O X . . .
    . O X X . . .
    . O X . . X .
    . O X . . . ."""
"""Of a lost game: the stones at A4 and B4 are dead, F7 as well; White has just passed."""
TWO_EYES = """
    . X . X O
    X X X X O
    O O O O O
    O . O . O
    . O O O ."""
"""Each side has nothing left but to fill its own eyes."""


def board(text, to_move=BLACK):
    rows = [line.split() for line in text.split("\n") if line.strip()]
    return Position.of(len(rows), [".XO".index(c) for row in rows for c in row], to_move)


@pytest.fixture(scope="module")
def katago():
    return TowerJudge(load_katago(KATAGO), seed=None)


@pytest.fixture
def fresh():
    return TowerJudge(Tower(TowerConfig.small(12, 7, blocks=2, width=16)).init_weights(0), seed=None)


@needs_katago
def test_it_plays_on_where_only_its_own_way_of_counting_wins(katago):
    lone = board(WON_BY_A_LONE_STONE, WHITE).after(49)
    player = Player(katago, visits=60)
    assert lone.score(KOMI) > 0 and not player.may_pass(lone, KOMI)
    assert player.may_pass(lone, -20.5), "won by more than all that is doubted"
    assert player.may_pass(lone, KOMI + 5), "lost by the area as well: nothing is saved by playing on"
    assert player.think(lone, KOMI).move != lone.pass_move
    lost = board(ALIVE_BY_THE_AREA_ALONE, WHITE).after(49)
    assert lost.score(8.5) > 0 and not player.may_pass(lost, 8.5)
    assert player.think(lost, 8.5).move != lost.pass_move
    trusting = Player(katago, visits=60)
    trusting.may_pass = lambda position, komi: True
    assert trusting.think(lost, 8.5).move == lost.pass_move


@pytest.mark.slow
@needs_katago
@pytest.mark.skipif(GNUGO is None, reason="GNU Go is not installed (Debian: gnugo)")
def test_passing_there_loses_by_gnu_gos_count_and_playing_on_wins(katago):
    begun = board(WON_BY_A_LONE_STONE, WHITE)
    player = Player(katago, visits=100)
    with Engine("gnugo --mode gtp --chinese-rules --never-resign --level 10") as engine:

        def set_up():
            for command in ("boardsize 7", "clear_board", f"komi {KOMI}"):
                engine.ask(command)
            for point, color in enumerate(begun.stones):
                if color:
                    engine.ask(f"play {'black' if color == BLACK else 'white'} {vertex(point, 7)}")
            engine.ask("play white pass")

        set_up()
        engine.ask("play black pass")
        assert engine.ask("final_score").startswith("W+")
        set_up()
        position = begun.after(49)
        while not position.over:
            if position.to_move == BLACK:
                move = player.think(position, KOMI).move
                engine.ask(f"play black {vertex(move, 7)}")
            else:
                move = move_of(engine.ask("genmove white"), 7)
            position = position.after(move)
        assert engine.ask("final_score").startswith("B+") and position.score(KOMI) > 0


@needs_katago
def test_playing_on_does_not_fill_the_last_eyes(katago):
    player = Player(katago, visits=60)
    player.may_pass = lambda position, komi: False
    full = board(TWO_EYES, WHITE).after(25)
    assert full.score(-20.5) > 0 and player.think(full, -20.5).move == full.pass_move


def test_a_forbidden_pass_is_not_looked_at_and_old_visits_of_it_do_not_count(fresh):
    player = Player(fresh, visits=80)
    position = Position.empty(3).after(4)
    player.may_pass = lambda position, komi: True
    asked = player.think(position, 0.5)
    assert position.pass_move in {c.move for c in asked.candidates}
    player.may_pass = lambda position, komi: False
    again = player.think(position, 0.5, visits=160)
    assert position.pass_move not in {c.move for c in again.candidates}
    following = position.after(0).after(8)
    assert position.pass_move not in {c.move for c in player.think(following, 0.5).candidates}


def test_ownership_is_the_mean_of_all_symmetries(fresh):
    player = Player(fresh, visits=2)
    plain, turned = Position.empty(5).after(1), Position.empty(5).after(5)
    owners, other = (player.owners(position, 0.5).reshape(5, 5) for position in (plain, turned))
    assert pytest.approx(other, abs=1e-5) == owners.T
    once, turned_once = (player.look(position, 0.5).owner_P.reshape(5, 5) for position in (plain, turned))
    assert pytest.approx(turned_once) != once.T
