"""Go on the wheel: a turn leaves games, a candidate, a verdict; a kill changes nothing; collapse is refused."""

import io
import shutil
from dataclasses import replace

import numpy as np
import pytest

from prairie.cli.turn import _go_stage
from prairie.data.positions import PositionDataset
from prairie.errors import DataError, NotFoundError, RecipeError
from prairie.evals.sequential import sequential_test
from prairie.flywheel import go
from prairie.flywheel.gate import Verdict, judge_games
from prairie.flywheel.go import HANDLERS as GO
from prairie.games.duel import duel
from prairie.games.mcts import Opinion
from prairie.games.sgf import read_sgf
from prairie.models.tower import load_tower
from prairie.pipeline.context import Context
from prairie.pipeline.handlers import HANDLERS
from prairie.pipeline.run import run
from prairie.recipe import GoLearning, GoMatch, GoPlay, resolve_recipe
from prairie.runtime import Progress, Runtime
from prairie.store.home import Home

pytestmark = pytest.mark.long

RECIPE = {
    "name": "go3", "seed": 1,
    "stages": {
        "net": {"kind": "tower", "size": 3, "blocks": 2, "width": 16},
        "publish": {"kind": "publish", "line": "go3", "model": "net"},
        "turns": {
            "kind": "selfplay", "line": "go3", "start": "publish", "turns": 2,
            "play": {"games": 12, "visits": 12, "fast_visits": 4, "slots": 6, "full_share": 0.5},
            "learn": {"batch": 32, "passes": 2, "window": 2},
            "match": {"games": 12, "visits": 4, "opening_moves": 2},
        },
        "larger": {"kind": "tower", "size": 4, "start": "turns"},
    },
}  # fmt: skip


def context(folder):
    quiet = Progress(io.StringIO(), quiet=True)
    return Context(resolve_recipe(RECIPE), Home(folder), Runtime(threads=1, seed=1, progress=quiet))


def turned(folder):
    """The recipe carried out, and what its turns came to."""
    with (made := context(folder)).home:
        run(made, {**HANDLERS, **GO})
        return made.made["turns"].figures, [t.to_json() for t in made.home.registry.turns("go3")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("go") / "home"
    return folder, *turned(folder)


def test_what_was_learned_on_a_small_board_goes_on_on_a_larger_one(whole):
    with Home(whole[0]) as home:
        champion = load_tower(home.artifacts.get(home.registry.champion("go3").artifact_id).path)
        (found,) = [artifact for artifact in home.artifacts.list() if artifact.name == "larger"]
        larger = load_tower(found.path)
    assert larger.config == replace(champion.config, boards=(4,))
    assert all((value == champion.state_dict()[name]).all() for name, value in larger.state_dict().items())
    stage = {"kind": "tower", "size": 4, "start": "turns", "width": 16}
    with pytest.raises(RecipeError, match="leave `blocks` and `width` out"):
        resolve_recipe({**RECIPE, "stages": {**RECIPE["stages"], "larger": stage}})


def test_a_turn_leaves_games_a_candidate_and_a_verdict(whole):
    folder, figures, turns = whole
    assert [turn["number"] for turn in turns] == [1, 2] and len(figures["turns"]) == 2
    with Home(folder) as home:
        versions = home.registry.versions("go3")
        assert [version.kind for version in versions] == ["tower"] * 3
        champion = home.registry.champion("go3")
        assert champion.artifact_id == figures["champion_artifact"]
        for turn in turns:
            records, candidate = home.artifacts.get(turn["dataset"]), home.artifacts.get(turn["candidate"])
            rows = PositionDataset.load([records.path])
            assert len(rows) == records.figures["rows"] > 20
            assert len(read_sgf((records.path / "games.sgf").read_bytes())) == 12
            assert records.inputs == [turn["champion"]] and set(records.inputs) < set(candidate.inputs)
            assert load_tower(candidate.path).config.boards == (3,)
            assert turn["promoted"] == turn["verdict"]["passed"]
            assert Verdict.from_json(turn["verdict"]).to_json() == turn["verdict"]
        second = home.artifacts.get(turns[1]["candidate"])
        assert set(second.inputs) == {turns[1]["champion"], turns[0]["dataset"], turns[1]["dataset"]}, "the window"
    assert figures["turns"][0]["health"]["games"] == 12
    assert [point["cpu_minutes"] for point in figures["curve"]] == sorted(p["cpu_minutes"] for p in figures["curve"])


def test_every_key_of_play_reaches_the_self_play():
    usual = GoPlay()
    for name in GoPlay.model_fields.keys() - {"games"}:
        value = getattr(usual, name)
        other = usual.model_copy(update={name: not value if isinstance(value, bool) else value + 0.25})
        assert go.self_play_of(other, 5) != go.self_play_of(usual, 5), name


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "where",
    [pytest.param("play", marks=SLOW), pytest.param("learn", marks=SLOW), "match", pytest.param("record", marks=SLOW)],
)
def test_a_kill_anywhere_changes_nothing(whole, tmp_path, monkeypatch, where):
    """The process dies in the second turn; the same command ends with the turns of an undisturbed run."""
    monkeypatch.setattr(go, "PART_GAMES", 12)
    calls = {"count": 0}
    places = {"play": "_keep", "learn": "save_tower", "match": "_write"}
    owner, name = (go, places[where]) if where in places else (go.Flywheel, "_remember")
    real = getattr(owner, name)

    def dies(*args, **kwargs):
        calls["count"] += 1
        if calls["count"] == 3 or (where == "record" and calls["count"] == 2):
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, dies)
    if where in ("play", "learn", "match"):
        calls["count"] = 1  # in the second turn
    with pytest.raises(KeyboardInterrupt):
        turned(tmp_path / "home")
    monkeypatch.undo()
    _, turns = turned(tmp_path / "home")
    wanted = whole[2]
    for mine, theirs in zip(turns, wanted, strict=True):
        for key in ("number", "champion", "candidate", "dataset", "verdict", "promoted"):
            assert mine[key] == theirs[key], key


def test_parts_are_alike_and_make_up_the_whole():
    assert [go.parts_of(games) for games in (12, 192, 320, 321)] == [[12], [96, 96], [160, 160], [107, 107, 107]]
    assert sum(go.parts_of(1003)) == 1003 and max(go.parts_of(1003)) <= go.PART_GAMES


def test_done_again_nothing_is_turned_twice(whole):
    figures, turns = turned(whole[0])
    assert figures == whole[1] and turns == whole[2]


def test_collapsed_games_are_refused_and_nothing_changes(whole, tmp_path, monkeypatch):
    from prairie.games import selfplay

    real = selfplay.Health.of

    def sick(played):
        return selfplay.Health(**{**real(played).__dict__, "mean_length": 2.0})

    monkeypatch.setattr(go.Health, "of", staticmethod(sick))
    with pytest.raises(DataError, match="self-play has collapsed, its games are not learnt from: got games last 2"):
        turned(tmp_path / "home")
    with Home(tmp_path / "home") as home:
        assert home.registry.turns("go3") == [] and home.registry.champion("go3").number == 1
        assert not list((home.root / "artifacts").glob("*games*"))


def test_the_next_turn_by_hand_goes_on_as_before(whole):
    with Home(whole[0]) as home:
        stage = _go_stage(home, "go3")
        given = RECIPE["stages"]["turns"]
        assert stage["seed"] == 1 and stage["play"]["visits"] == given["play"]["visits"]
        assert stage["learn"]["batch"] == 32 and stage["match"]["games"] == 12
        assert _go_stage(home, "spark") is None
        with pytest.raises(NotFoundError, match="not been turned"):
            go.stage_of(home, "never")


def test_a_candidate_may_begin_from_one_that_was_refused(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "home")
    with (made := context(tmp_path / "home")).home as home:
        last, champion = home.registry.turns("go3")[-1], home.registry.champion("go3")
        records = home.artifacts.get(last.dataset)
        for begin, parent in (("newest", last.candidate), ("champion", champion.artifact_id)):
            keys = GoLearning(begin=begin, batch=32, passes=0.5, window=1, owner=1.0)
            candidate = go.GoLearner(made, keys).learn(champion, records)
            assert home.artifacts.get(candidate.artifact_id).inputs == [parent, records.id]
    assert last.candidate != champion.artifact_id, "refused, or both begin from the same"


def uniform(planes, figures):
    """Every move alike, by a fixed rule that no batch can change."""
    rows, moves = len(planes), planes.shape[-1] ** 2 + 1
    logits = np.tile(np.linspace(0, 0.3, moves, dtype=np.float32), (rows, 1))
    return Opinion(logits, np.zeros(rows, np.float32), np.zeros(rows, np.float32))


def test_a_net_against_itself_comes_out_even():
    found = duel(uniform, uniform, size=4, pairs=6, visits=12, komi=0.5, opening_moves=3, seed=2)
    assert [a + b for a, b in zip(found.outcomes[::2], found.outcomes[1::2], strict=True)] == [1.0] * 6
    assert found.lengths[::2] == found.lengths[1::2], "both games of a pair are the same game"


def test_a_net_that_knows_the_rules_beats_one_that_does_not():
    def passes(planes, figures):
        opinion = uniform(planes, figures)
        opinion.logits_RM[:, -1] += 20
        return opinion

    found = duel(uniform, passes, size=3, pairs=6, visits=24, komi=0.5, opening_moves=1, seed=0)
    assert np.mean(found.outcomes) > 0.7


@pytest.mark.slow
def test_the_gate_on_known_strengths():
    """Equal nets are promoted in at most 5% of matches, +70 Elo in at least 90%, in fewer games than a fixed match."""
    rules = GoMatch()
    chance = np.random.default_rng(7)

    def decided(elo, matches=300):
        share = 1 / (1 + 10 ** (-elo / 400))
        passed, games = 0, []
        for outcomes in (chance.random((matches, rules.games)) < share).astype(float):
            test = sequential_test((outcomes[::2] + outcomes[1::2]) / 2, wanted=rules.wanted, least=6)
            passed += test.decision == "better"
            games.append(2 * test.decided_after if test.decided_after else rules.games)
        return passed / matches, float(np.mean(games))

    equal, games_equal = decided(0)
    better, games_better = decided(70)
    assert equal <= 0.05 and better >= 0.9
    assert games_equal < 300 and games_better < 300


def test_the_verdict_of_a_match():
    won = judge_games([1, 0] + [1, 1] * 14, wanted=0.6, rules={"komi": 0.5})
    assert won.passed and won.units == "pairs" and won.users == 15 and "PROMOTE" in won.text() and "games" in won.text()
    even = judge_games([1, 0] * 100, wanted=0.6)
    assert not even.passed and "below the 60% that would be worth finding" in even.reasons[0]
    few = judge_games([1, 1] * 6, wanted=0.6)
    assert not few.passed and "undecided after all 12 games" in few.reasons[0]
    with pytest.raises(DataError, match="made of pairs"):
        judge_games([1, 0, 1])
