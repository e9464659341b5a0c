"""Two turns of one line at once, from Python: one goes on, the other is told so in a sentence; nothing is left half."""

import io
import multiprocessing
import os
import shutil
import threading
import time

import pytest

from prairie.errors import BusyError
from prairie.flywheel.chat import ChatActor, ChatGate, ChatLearner, make_candidate
from prairie.flywheel.loop import Flywheel
from prairie.pipeline.context import Context
from prairie.recipe import GateRules, VoteLearning, resolve_recipe
from prairie.runtime import Progress, Runtime
from prairie.store.home import Home

pytestmark = pytest.mark.long

LEARN = VoteLearning(steps=12, tokens_per_batch=512, max_tokens=128, lr=1e-2, weight_decay=0.0, adapter={"rank": 4})


class Slow(ChatGate):
    """The gate, which waits before it judges."""

    def judge(self, candidate, champion):
        self.wait()
        return super().judge(candidate, champion)


def wheel_of(home, wait=lambda: None):
    recipe = resolve_recipe({"name": "t", "seed": 3, "stages": {"base": {"kind": "import", "path": "-"}}})
    context = Context(recipe, home, Runtime(threads=1, seed=3, progress=Progress(io.StringIO(), quiet=True)))
    gate = Slow(context, GateRules(items=20), ["numbers"], max_tokens=8)
    gate.wait = wait
    return Flywheel("spark", home.registry, ChatActor(context, "spark"), ChatLearner(context, LEARN), gate)


def settled(home):
    """What both ways must leave: one turn, one promotion, no unfinished work."""
    registry = home.registry
    (turn,) = registry.turns("spark")
    assert [event.number for event in registry.history("spark")] == [1, 2] and turn.promoted
    assert registry.champion("spark").artifact_id == turn.candidate
    assert not list((home.root / "work").iterdir()) and not list((home.root / "tmp").iterdir())
    return turn


def test_two_threads(voted):
    judging, go_on, told = threading.Event(), threading.Event(), []
    with Home(voted) as home:

        def turn():
            told.append(wheel_of(home, lambda: (judging.set(), go_on.wait(60))).turn(key="first"))

        thread = threading.Thread(target=turn)
        thread.start()
        assert judging.wait(60)
        for key in ("first", "other", None):
            with pytest.raises(BusyError, match=f"`turn-spark` of .* is in use by process {os.getpid()}"):
                wheel_of(home).turn(key=key)
        go_on.set()
        thread.join(60)
        assert settled(home).candidate == told[0].candidate.artifact_id
        assert wheel_of(home).turn(key="first").to_json() == told[0].to_json(), "recalled, not turned again"


def _turns_and_waits(path, judging):
    def wait():
        judging.touch()
        time.sleep(300)

    with Home(path) as home:
        wheel_of(home, wait).turn(key="k")


def test_two_processes_and_the_dead_hold_nothing(voted):
    judging = voted / "judging"
    # Not forked: a copy of a process whose threads wait for each other may wait for ever.
    child = multiprocessing.get_context("spawn").Process(target=_turns_and_waits, args=(voted, judging))
    child.start()
    try:
        while not judging.exists():
            assert child.is_alive(), "the turn ended before its gate"
            time.sleep(0.05)
        with Home(voted) as home, pytest.raises(BusyError, match=f"`turn-spark` of .* in use by process {child.pid}"):
            wheel_of(home).turn(key="k")
    finally:
        child.kill()
        child.join()
    with Home(voted) as home:
        turned = wheel_of(home).turn(key="k")
        assert settled(home).candidate == turned.candidate.artifact_id


def test_equal_work_is_done_by_one_at_a_time(voted, tmp_path):
    """The same candidate asked for by somebody else than a turn, as a rebuild would: no shared scratch folder."""

    def made(home):
        wheel = wheel_of(home)
        champion = home.registry.champion("spark")
        parent, records = home.artifacts.get(champion.artifact_id), wheel.actor.act(champion)
        return make_candidate(wheel.actor.context, LEARN, parent, records, "turn")

    shutil.copytree(voted, tmp_path / "calm")
    with Home(tmp_path / "calm") as home:
        calm = made(home)
    with Home(voted) as home:
        with home.working(calm.id) as folder, pytest.raises(BusyError, match=f"`work-{calm.id}` of .* is in use"):
            made(home)
        again = made(home)
        assert again.id == calm.id and not folder.exists()
        weights = {name: facts for name, facts in calm.manifest["files"].items() if name.endswith(".safetensors")}
        assert weights and weights.items() <= again.manifest["files"].items()
