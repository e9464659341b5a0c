"""Self-play: the same seed gives the same games, rows say what happened, a collapse is seen and refused."""

from dataclasses import replace

import numpy as np
import pytest

from prairie.errors import DataError
from prairie.games.features import TowerJudge
from prairie.games.go import BLACK, WHITE
from prairie.games.mcts import Opinion
from prairie.games.selfplay import ALL_POINTS, Game, Health, SelfPlay, joined, play
from prairie.models.tower import Tower, TowerConfig

SMALL = SelfPlay(4, visits=16, fast_visits=6, slots=6, opening_moves=2)


def judge():
    return TowerJudge(Tower(TowerConfig.small(12, 7, blocks=2, width=16)).init_weights(0))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_games():
    one, two = (play(judge(), SMALL, games=9, mean_score=1.5, seed=4) for _ in range(2))
    assert one.games == two.games and one.rows.fingerprint == two.rows.fingerprint
    other = play(judge(), SMALL, games=9, mean_score=1.5, seed=5)
    assert other.games != one.games and len(one.games) == 9


def test_rows_say_what_happened():
    played = play(judge(), SMALL, games=8, mean_score=0, seed=1)
    rows, arrays = played.rows, played.rows.arrays
    assert np.allclose(arrays["policy"].sum(axis=1), 1, atol=1e-5)
    assert (np.sign(arrays["lead"]) == arrays["outcome"]).all() and set(arrays["outcome"]) <= {-1.0, 1.0}
    stones = arrays["planes"][:, 1].astype(int) + arrays["planes"][:, 2]
    assert (arrays["planes"][:, 0] == 1).all() and stones.max() == 1
    assert (arrays["policy"][:, :-1].reshape(-1, 4, 4)[stones == 1] == 0).all(), "no row plays where a stone stands"
    # Ownership is of the final board, for the player to move: its sum with komi is the lead.
    komi = arrays["figures"][:, 5] * 20
    assert np.allclose(arrays["owner"].sum(axis=(1, 2)) + komi, arrays["lead"])
    for game, score in zip(played.games, played.scores, strict=True):
        positions = list(game.positions())
        assert positions[-1].over or len(game.moves) == 48
        assert positions[-1].score(0) == score
        early = [move for _, move in game.moves[: int(ALL_POINTS * 16)]]
        passed = [k for k, move in enumerate(early) if move == 16]
        assert all(len(positions[k].legal_moves()) == 1 for k in passed), "a pass only where nothing else was allowed"
    assert len({game.komi for game in played.games}) > 1 and all(game.komi % 1 == 0.5 for game in played.games)
    assert 0.1 < len(rows) / sum(len(game.moves) for game in played.games) < 0.6


def test_games_that_are_played_out_leave_nothing_but_eyes():
    played = play(judge(), replace(SMALL, play_out=True), games=12, mean_score=0, seed=2)
    ends = [list(game.positions())[-1] for game in played.games]
    done = [end for end in ends if end.over]
    assert len(done) > 6
    for end in done:
        for side in (end.by(BLACK), end.by(WHITE)):
            assert all(side.own_eye(move) for move in side.legal_moves()[:-1])


def test_a_decided_game_is_only_ended():
    """A judge that is always sure of Black: after four searches the rest is played with few visits and few rows."""

    def sure(planes, figures):
        black = figures[:, 5] < 0  # komi for the player to move
        return net(planes, figures)._replace(value_R=np.where(black, 1.0, -1.0).astype(np.float32))

    net, settings = judge(), replace(SMALL, full_share=1.0, komi_spread=0.0, opening_moves=0)
    whole, short = (
        play(sure, replace(settings, decided=decided), games=8, mean_score=2, seed=2) for decided in (1.0, 0.5)
    )
    assert len(whole.rows) == sum(len(game.moves) for game in whole.games)
    assert len(short.rows) < 0.6 * sum(len(game.moves) for game in short.games)
    assert short.simulations / sum(len(game.moves) for game in short.games) < 0.6 * settings.visits


@pytest.mark.parametrize(
    ("values", "decided"),
    [
        ([0.9] * 4, True), ([0.9] * 3, False), ([-0.9] * 4, True), ([0.9, 0.9, -0.9, -0.9], False),
        ([0.9, 0.9, 0.9, 0.1, 0.9], False), ([0.9, -0.9, -0.9, -0.9, -0.9], True), ([0.5] * 9, False),
    ],
)  # fmt: skip
def test_when_a_game_is_decided(values, decided):
    game = Game(komi=0.5)
    for value in values:
        game.judged(value, 0.8)
    assert game.decided == decided


def test_parts_are_joined():
    parts = [play(judge(), SMALL, games=3, mean_score=0, seed=seed) for seed in (1, 2)]
    whole = joined(parts)
    assert len(whole.games) == 6 and len(whole.rows) == sum(len(part.rows) for part in parts)
    assert whole.simulations == sum(part.simulations for part in parts)


def test_health_of_real_games():
    health = Health.of(play(judge(), SMALL, games=24, mean_score=0, seed=3))
    assert health.faults(4) == [] and health.mean_length > 11 and health.entropy > 0.5 and health.distinct == 1
    health.check(4)


def test_the_trap_a_fixed_komi_and_free_passing(monkeypatch):
    """A net that only wants to pass: without the two cures its games are two moves long, and are refused."""

    def passes(planes, figures):
        moves = planes.shape[-1] ** 2 + 1
        logits = np.zeros((len(planes), moves), np.float32)
        logits[:, -1] = 12
        return Opinion(logits, np.zeros(len(planes), np.float32), np.zeros(len(planes), np.float32))

    cured = play(passes, SMALL, games=20, mean_score=0, seed=0)
    assert Health.of(cured).mean_length > ALL_POINTS * 16
    monkeypatch.setattr("prairie.games.selfplay.ALL_POINTS", 0.0)
    sick = play(passes, SelfPlay(4, visits=16, fast_visits=6, slots=6, komi_spread=0.0), games=60, mean_score=0, seed=0)
    health = Health.of(sick)
    assert health.mean_length < 6
    with pytest.raises(DataError, match=r"self-play has collapsed.*games last [0-9.]+ moves on 16 points"):
        health.check(4)
    assert BLACK == 1
