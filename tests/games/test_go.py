"""The rules: counted positions, the plain form against the fast one, OpenSpiel, GNU Go."""

import random
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prairie.errors import RequestError
from prairie.games.go import (
    BLACK,
    WHITE,
    Boards,
    Position,
    handicap_points,
    legal_positions,
    move_of,
    other,
    symmetries,
    vertex,
)

GNUGO = shutil.which("gnugo") or shutil.which("gnugo", path="/usr/games")
needs_gnugo = pytest.mark.skipif(GNUGO is None, reason="GNU Go is not installed (Debian: gnugo)")


def board(text, to_move=BLACK):
    rows = text.split()
    return Position.of(len(rows), [".XO".index(c) for row in rows for c in row], to_move)


def test_legal_positions_are_as_many_as_are_known():
    assert (legal_positions(2), legal_positions(3)) == (57, 12_675)


@pytest.mark.slow
def test_legal_positions_of_four_lines():
    assert legal_positions(4) == 24_318_165


def test_capture_suicide_and_ko():
    ko = board(".XO. X..O .XO. ....", WHITE)
    ko = ko.after(5)  # white inside black's mouth: B3 ... the stone at row 1, column 1
    taken = ko.after(6)
    assert taken.stones[5] == 0, "captured"
    assert taken.why_illegal(5) == "superko"
    assert taken.after(15).after(12).why_illegal(5) is None, "after other moves the whole board is a new one"
    assert board("X.X. XXX. .... ....", WHITE).why_illegal(1) == "suicide"
    assert ko.why_illegal(0) is None and ko.why_illegal(1) == "occupied"


def test_send_two_return_one_is_superko():
    """A cycle longer than a ko: the position comes back although no single stone was retaken."""
    position = board(".XX. XXOO OO.O ....", BLACK)
    seen = set()
    for _ in range(6):
        seen.add(position.stones)
        moves = [m for m in position.legal_moves() if m != position.pass_move]
        position = position.after(moves[0])
        assert position.stones not in seen


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 5), st.randoms(use_true_random=False))
def test_the_fast_form_plays_as_the_plain_one(size, chance):
    plain, fast = Position.empty(size), Boards.empty(size, 1)
    for _ in range(3 * size * size):
        legal = fast.legal()[0]
        assert [m for m in range(len(legal)) if legal[m] == 1] == plain.legal_moves()
        for move in np.flatnonzero(legal == 2):
            assert plain.why_illegal(int(move)) == "superko"
        move = chance.choice(
            plain.legal_moves()[: -1 if chance.random() < 0.95 and len(plain.legal_moves()) > 1 else None]
        )
        plain = plain.after(move)
        fast.play([move])
        assert tuple(fast.stones[0, :-1]) == plain.stones
        assert fast.passes[0] == plain.passes and fast.to_move[0] == plain.to_move
        score, owner = fast.areas()
        assert score[0] == plain.score(0) and tuple(owner[0]) == plain.owners
    again = Boards.at([plain])
    assert (again.legal() == fast.legal()).all() and (again.recent == fast.recent).all() and again.key == fast.key


def compare_with_open_spiel(size, games, chance):
    """Random games of both; returns (moves, moves that differ and are superko)."""
    pyspiel = pytest.importorskip("pyspiel", reason="OpenSpiel is not installed (pip install open_spiel)")
    theirs_rules = pyspiel.load_game(f"go(board_size={size},komi=0.5)")
    moves = differing = 0
    boards = Boards.empty(size, games)
    states = [theirs_rules.new_initial_state() for _ in range(games)]
    turned = [move_of(vertex(m, size), size) for m in range(size * size + 1)]
    flip = [(size - 1 - m // size) * size + m % size if m < size * size else m for m in turned]  # theirs: A1 is 0
    going = list(range(games))
    while going:
        legal = boards.legal()
        chosen = []
        for g in going:
            theirs = sorted(flip[m] for m in states[g].legal_actions())
            ours = np.flatnonzero(legal[g] == 1).tolist()
            if theirs != ours:
                assert set(ours) < set(theirs), "we forbid no more than superko does"
                assert all(legal[g, m] == 2 for m in set(theirs) - set(ours))
                differing += 1
            fine = [m for m in ours if m != size * size] or ours
            move = chance.choice(fine if chance.random() < 0.97 else ours)
            states[g].apply_action(flip[move])
            chosen.append(move)
            moves += 1
        boards.play(chosen, going)
        scores, _ = boards.areas()
        for g in going:
            if states[g].is_terminal() and boards.passes[g] >= 2:
                assert states[g].returns()[0] == (1 if scores[g] > 0.5 else -1)
        going = [g for g in going if not states[g].is_terminal()]
    return moves, differing


@pytest.mark.parametrize("size", [5, 9])
def test_random_games_agree_with_open_spiel(size):
    moves, _ = compare_with_open_spiel(size, 60, random.Random(size))
    assert moves > 60 * size


@pytest.mark.slow
def test_ten_thousand_games_agree_with_open_spiel():
    total = [compare_with_open_spiel(size, 2000, random.Random(size)) for size in (3, 4, 5, 7, 9)]
    assert sum(differing for _, differing in total) > 0, "superko should make a difference somewhere"


@needs_gnugo
def test_final_scores_agree_with_gnu_go():
    """Games to the end, so that nothing on the board is dead; GNU Go counts by the Chinese rules."""
    chance = random.Random(3)
    commands, ours = [], []
    for size in (5, 7, 9):
        for _ in range(4):
            position = Position.empty(size)
            commands += [f"boardsize {size}", "clear_board", "komi 0.5"]
            while len(position.moves) < 6 * size * size:
                moves = [m for m in position.legal_moves()[:-1] if not position.own_eye(m)]
                if not moves:
                    break
                position = position.after(chance.choice(moves))
                color = "white" if position.to_move == BLACK else "black"
                commands.append(f"play {color} {vertex(position.moves[-1], size)}")
            filled = position  # the other side plays to its end too
            for _ in range(4 * size * size):
                moves = [m for m in filled.legal_moves()[:-1] if not filled.own_eye(m)]
                filled = filled.after(moves[0] if moves else filled.pass_move)
                if filled.over:
                    break
                color = "white" if filled.to_move == BLACK else "black"
                commands.append(f"play {color} {vertex(filled.moves[-1], size)}")
            commands += ["final_score", "final_status_list dead"]
            ours.append(filled.score(0.5))
    run = subprocess.run(
        [GNUGO, "--mode", "gtp", "--chinese-rules", "--positional-superko", "--forbid-suicide"],
        input="\n".join([*commands, "quit"]) + "\n", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    answers = run.stdout.split("\n\n")
    assert not [answer for answer in answers if answer.startswith("?")]
    scored = [i for i, answer in enumerate(answers) if answer.startswith(("= B+", "= W+"))]
    # Tromp and Taylor take every stone on the board to be alive, so only boards without a dead one can be compared.
    pairs = [(answers[i][2:], score) for i, score in zip(scored, ours, strict=True) if answers[i + 1].strip() == "="]
    assert len(pairs) >= 10
    for theirs, score in pairs:
        assert theirs == f"{'B' if score > 0 else 'W'}+{abs(score)}"


@pytest.mark.parametrize(
    ("rows", "eye"),
    [
        (("..X..", ".XXX.", "XX.XX", ".XXX.", "..X.."), True),
        ((".....", ".XXX.", ".X.X.", ".XXO.", "....."), True),
        ((".....", ".XXO.", ".X.X.", ".OXX.", "....."), False),
        ((".....", ".XXX.", ".X.O.", ".XXX.", "....."), False),
    ],
)
def test_eyes_in_the_middle(rows, eye):
    assert board("\n".join(rows)).own_eye(12) is eye


@pytest.mark.parametrize(
    ("rows", "move", "eye"),
    [
        ((".X...", "XX...", ".....", ".....", "....."), 0, True),
        ((".X...", "XO...", ".....", ".....", "....."), 0, False),  # at the end of the board one is enough
        (("X.X..", "XXX..", ".....", ".....", "....."), 1, True),
        (("X.X..", "OXX..", ".....", ".....", "....."), 1, False),
    ],
)
def test_eyes_at_the_end_of_the_board(rows, move, eye):
    assert board("\n".join(rows)).own_eye(move) is eye


def test_names_of_points():
    assert vertex(0, 9) == "A9" and vertex(80, 9) == "J1" and move_of("j1", 9) == 80 and move_of("PASS", 9) == 81
    for bad in ("I5", "K1", "A0", "A10", "", "5A", "A", "A٣", "A-1"):
        with pytest.raises(RequestError, match="no such point"):
            move_of(bad, 9)


def test_symmetries_are_eight_and_keep_neighbours():
    table = symmetries(4)
    assert len({tuple(row) for row in table}) == 8 and (table[:, -1] == 16).all()
    stones = board("XX.. .O.. .... ....")
    for row in table:
        moved = Position.of(4, [stones.stones[i] for i in row[:-1]], WHITE)
        assert len(moved.legal_moves()) == len(stones.by(WHITE).legal_moves())


def test_handicap_points_are_gnu_gos():
    assert [vertex(p, 9) for p in handicap_points(9, 4)] == ["C3", "G7", "C7", "G3"]
    assert sorted(vertex(p, 19) for p in handicap_points(19, 5)) == sorted(["D4", "Q16", "D16", "Q4", "K10"])
    with pytest.raises(RequestError):
        handicap_points(5, 2)


def test_what_cannot_be_played_is_said():
    with pytest.raises(RequestError, match="D4 cannot be played: got occupied"):
        Position.empty(5).after(move_of("D4", 5)).after(move_of("D4", 5))
    with pytest.raises(RequestError, match="2 to 19"):
        Position.empty(20)
    with pytest.raises(RequestError, match="without a liberty"):
        board("XO OX")
    assert other(BLACK) == WHITE
