"""Records: read, replayed, written, read back by us and by sgfmill; what is bad is refused in a sentence."""

import gzip
import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from prairie.errors import DataError
from prairie.games.go import BLACK, WHITE, move_of
from prairie.games.sgf import GameRecord, read_sgf, result_text, write_sgf

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "go"


def test_written_is_read_back():
    moves = tuple((BLACK if i % 2 == 0 else WHITE, move_of(text, 9)) for i, text in enumerate(["E5", "C3", "pass"]))
    record = GameRecord(
        9, moves, 6.5, (0, 1), (80,), WHITE, 2, "B+3.5", ("a]b\\", "白"), {0: "begin", 2: "a ] in it"}
    )  # fmt: skip
    assert read_sgf(write_sgf(record)) == [record]
    assert read_sgf(write_sgf(record).encode()) == [record]


def test_sgfmill_reads_ours():
    sgfmill = pytest.importorskip("sgfmill.sgf", reason="sgfmill is not installed")
    record = GameRecord(5, ((BLACK, 12), (WHITE, 0), (BLACK, 25)), 7.5, result="W+2.5", names=("x", "y"))
    theirs = sgfmill.Sgf_game.from_string(write_sgf(record))
    assert (theirs.get_size(), theirs.get_komi(), theirs.get_winner()) == (5, 7.5, "w")
    played = [node.get_move() for node in theirs.get_main_sequence()][1:]
    assert played == [("b", (2, 2)), ("w", (4, 0)), ("b", None)]  # sgfmill counts rows from below


def test_main_line_old_names_and_rectangles():
    text = "x (;GaMe[1]SiZe[9]AddBlack[aa:bb];Black[cc](;White[dd];B[tt])(;W[ee]))(;GM[1]SZ[5])"
    first, second = read_sgf(text)
    assert first.black == (0, 1, 9, 10) and [move for _, move in first.moves] == [20, 30, 81] and second.size == 5


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no SGF"),
        ("hello", "no SGF"),
        ("(;SZ[9];B[aa]", "ends in the middle"),
        ("(;SZ[9]B)", "property B of an SGF has no value"),
        ("(;SZ[9] 17)", "no SGF: got '1'"),
        ("(;GM[6]SZ[9])", r"not of a game of Go: got GM\[6\]"),
        ("(;SZ[9:8])", "board cannot be used: got SZ.9:8."),
        ("(;SZ[25])", "board cannot be used"),
        ("(;SZ[x])", "board cannot be used"),
        ("(;SZ[9];B[zz])", r"not on its board: got \[zz\], wanted aa to ii"),
        ("(;SZ[9]KM[six])", "KM of a record is no number"),
        ("(;SZ[9];B[aa];AW[bb])", "set up in the middle of the record, after move 1"),
    ],
)
def test_what_is_no_record_is_refused(text, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        read_sgf(text)
    assert "\n" not in str(caught.value)


def test_an_illegal_move_is_named():
    (record,) = read_sgf("(;SZ[5];B[cc];W[cc])")
    with pytest.raises(DataError, match="move 2 of the record, white C3, cannot be played: got occupied"):
        list(record.positions())
    (record,) = read_sgf("(;SZ[2]AB[aa][ab]AW[ba][bb])")
    with pytest.raises(DataError, match="cannot stand"):
        list(record.positions())


def test_results():
    assert [result_text(score) for score in (3.5, -24.5, 0, 1)] == ["B+3.5", "W+24.5", "0", "B+1"]
    assert GameRecord(9, result="W+R").winner() == WHITE and GameRecord(9).winner() is None


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared games are not on this machine")
def test_the_shared_records_are_read():
    lines = gzip.decompress((SHARED / "katago_games.jsonl.gz").read_bytes()).splitlines()
    texts = [json.loads(line)["sgf"] for line in lines]
    archive = zipfile.ZipFile(SHARED / "gnugo_sgf.zip")
    texts += [archive.read(name) for name in archive.namelist()[::12]]
    found = Counter()
    for text in texts:
        try:
            for record in read_sgf(text):
                assert len(list(record.positions())) == len(record.moves) + 1
                assert read_sgf(write_sgf(record))[0].moves == record.moves
                found["read"] += 1
        except DataError as error:
            found[error.what] += 1
    assert found["the record's board cannot be used"] == 40, "boards that are not square"
    assert found["read"] >= 220 and sum(found.values()) - found["read"] - 40 <= 3
