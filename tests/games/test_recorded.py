"""Recorded games become rows that say what happened; a game whose end is not known is left out and counted."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest

from prairie.errors import DataError, RecipeError
from prairie.games.go import BLACK, WHITE
from prairie.games.match import PLACES
from prairie.games.recorded import rows_of
from prairie.games.sgf import GameRecord, read_sgf, write_sgf
from prairie.pipeline.context import Context
from prairie.pipeline.handlers import HANDLERS
from prairie.pipeline.run import run
from prairie.recipe import resolve_recipe
from prairie.runtime import Progress, Runtime
from prairie.store.home import Home

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "go" / "gnugo_sgf.zip"


def game(moves, result, size=3, **more):
    turns = tuple((BLACK if k % 2 == 0 else WHITE, move) for k, move in enumerate(moves))
    return GameRecord(size, turns, 0.5, result=result, **more)


WON = [4, 9, 3, 9, 5, 9, 9]
"""Black takes the middle row, White passes: nine points, all Black's."""


def test_rows_say_what_was_played_and_how_it_ended():
    rows, left_out = rows_of([(game(WON, "B+8.5"), None)], 3)
    arrays = rows.arrays
    assert len(rows) == 7 and not left_out
    assert arrays["policy"].argmax(1).tolist() == WON and (arrays["policy"].sum(1) == 1).all()
    assert arrays["outcome"].tolist() == [1, -1, 1, -1, 1, -1, 1] and arrays["lead"].tolist()[:2] == [8.5, -8.5]
    assert (arrays["owner"][0] == 1).all() and (arrays["owner"][1] == -1).all()
    assert np.allclose(arrays["figures"][:2, 5] * 20, [-0.5, 0.5]), "komi, as the player to move sees it"
    assert arrays["planes"][2, 1].reshape(-1).tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_what_cannot_be_learnt_from_is_counted_by_reason():
    games = [
        game(WON, "B+8.5"), game(WON, "W+R"), game(WON, ""), game([4, 9, 9], "B+8.5"), game(WON, "B+8.5", size=5),
        game(WON, "B+8.5", white=(0,)), game([4, 4, 3, 9, 5, 9, 9], "B+8.5"),
    ]  # fmt: skip
    rows, left_out = rows_of([(one, None) for one in games], 3)
    assert len(rows) == 7 and dict(left_out) == {
        "its last board does not say who won": 1, "no result": 1, "hardly a move": 1, "another board": 1,
        "stones before the first move": 1, "an illegal move": 1,
    }  # fmt: skip
    with pytest.raises(DataError, match="no game can be learnt from: got 1 with no result"):
        rows_of([(game(WON, ""), None)], 3)


def carried_out(folder, stages):
    recipe = resolve_recipe({"name": "t", "seed": 1, "stages": stages})
    quiet = Runtime(threads=1, seed=1, progress=Progress(io.StringIO(), quiet=True))
    from prairie.flywheel.go import HANDLERS as GO
    from prairie.flywheel.recorded import HANDLERS as RECORDED

    with Home(folder) as home:
        made = Context(recipe, home, quiet)
        run(made, {**HANDLERS, **GO, **RECORDED})
        return made.made


def test_a_net_imitates_a_file(tmp_path):
    (tmp_path / "games.sgf").write_text("".join(write_sgf(game(WON, "B+8.5")) for _ in range(4)))
    stages = {
        "net": {"kind": "tower", "size": 3, "blocks": 2, "width": 16},
        "recorded": {"kind": "games", "size": 3, "path": str(tmp_path / "games.sgf")},
        "imitated": {"kind": "imitate", "start": "net", "games": ["recorded"], "epochs": 30, "batch": 28, "lr": 0.01},
    }  # fmt: skip
    made = carried_out(tmp_path / "home", stages)
    assert made["recorded"].figures["games"] == 4 and made["recorded"].figures["rows"] == 28
    assert made["imitated"].figures["loss_last"] < made["imitated"].figures["loss_first"] - 0.5
    with pytest.raises(DataError, match="the games are on another board than the net's: got 3, wanted 5"):
        carried_out(tmp_path / "home", {**stages, "net": {**stages["net"], "size": 5}})
    with pytest.raises(RecipeError, match="give `path` or `engine`"):
        resolve_recipe({"name": "t", "stages": {"recorded": {"kind": "games", "size": 3}}})
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"bad\.zip cannot be read"):
        carried_out(tmp_path / "home", {"recorded": {**stages["recorded"], "path": str(tmp_path / "bad.zip")}})


@pytest.mark.skipif(not SHARED.is_file(), reason="the shared Go games are not on this machine")
def test_real_records(tmp_path):
    made = carried_out(tmp_path / "home", {"recorded": {"kind": "games", "size": 9, "path": str(SHARED)}})
    figures = made["recorded"].figures
    assert figures["games"] >= 1 and figures["rows"] > 20 and sum(figures["left_out"].values()) > 100


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("gnugo") or any(Path(place, "gnugo").is_file() for place in PLACES)), reason="no gnugo"
)
def test_gnugo_against_itself(tmp_path):
    engine = "gnugo --mode gtp --chinese-rules --never-resign --level 1"
    made = carried_out(tmp_path / "home", {"recorded": {"kind": "games", "size": 5, "engine": engine, "games": 6}})
    figures = made["recorded"].figures
    assert figures["games"] >= 4 and figures["rows"] > 60
    games = read_sgf((made["recorded"].product.path / "games.sgf").read_bytes())
    assert len({one.moves for one in games}) == 6, "random openings"
