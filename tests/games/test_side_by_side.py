"""Play in threads: the same outcome however many run, a failure and a lost interest end what is under way."""

import threading
import time

import pytest
import torch

from prairie.games.curve import Step, learning_curve
from prairie.games.features import TowerJudge
from prairie.games.selfplay import SelfPlay, play
from prairie.games.side_by_side import Stopped, side_by_side
from prairie.models.tower import Tower, TowerConfig

pytestmark = pytest.mark.long


def test_games_do_not_depend_on_how_many_play_at_once():
    tower = Tower(TowerConfig.small(12, 7, blocks=2, width=16)).init_weights(0)

    def games(threads):
        def part(seed):
            judge = TowerJudge(tower, seed=seed)
            return lambda watch: play(judge, SelfPlay(3, slots=4), games=5, mean_score=0, seed=seed)

        return [played.games for played in side_by_side([part(seed) for seed in range(3)], threads)]

    before = torch.get_num_threads()
    assert games(1) == games(3)
    assert torch.get_num_threads() == before


def test_a_failure_is_raised_and_the_others_are_stopped():
    begun, ended = threading.Event(), threading.Event()

    def fails(watch):
        begun.wait(10)
        raise ValueError("no")

    def goes_on(watch):
        begun.set()
        try:
            while True:
                watch.go_on()
                time.sleep(0.005)
        except Stopped:
            ended.set()
            raise

    with pytest.raises(ValueError, match="no"):
        list(side_by_side([fails, goes_on], 2))
    assert ended.is_set()
    begun.clear()
    ended.clear()
    found = side_by_side([lambda watch: begun.wait(10), goes_on, goes_on], 2)
    assert next(found)
    found.close()
    assert ended.is_set(), "who wants no more need not wait"


def test_the_curve_adds_what_promotions_brought():
    points = learning_curve([Step(60, 0.75, True), Step(30, 0.9, False), Step(90, 1.0, True)])
    assert [point.cpu_minutes for point in points] == [1.0, 1.5, 3.0]
    assert points[0].elo == points[1].elo == pytest.approx(190.8, abs=0.1), "a candidate that was refused adds nothing"
    assert points[2].elo == pytest.approx(190.8 + 676.1, abs=0.2), "a match won whole is bounded"
