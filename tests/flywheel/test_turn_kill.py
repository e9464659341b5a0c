"""kill -9 at random moments of a turn: no half-promoted model, and the turn ends as it would have ended undisturbed.

The learning is part of the turn, so the trainer dies as often as the rest. `PRAIRIE_KILLS=1000` asks for more kills.
"""

import io
import os
import random
import shutil
import signal
import time

import pytest

from prairie.flywheel.chat import ChatActor, ChatGate, ChatLearner
from prairie.flywheel.loop import Flywheel
from prairie.pipeline.context import Context
from prairie.recipe import GateRules, VoteLearning, resolve_recipe
from prairie.runtime import Progress, Runtime
from prairie.store.home import Home

KILLS = int(os.environ.get("PRAIRIE_KILLS", "100"))
LEARN = VoteLearning(steps=12, tokens_per_batch=512, max_tokens=128, lr=1e-2, weight_decay=0.0, adapter={"rank": 4})


def turn(home):
    recipe = resolve_recipe({"name": "t", "seed": 3, "stages": {"base": {"kind": "import", "path": "-"}}})
    context = Context(recipe, home, Runtime(threads=1, seed=3, progress=Progress(io.StringIO(), quiet=True)))
    gate = ChatGate(context, GateRules(items=20), ["numbers"], max_tokens=8)
    return Flywheel(
        "spark", home.registry, ChatActor(context, "spark"), ChatLearner(context, LEARN, "turn-spark"), gate
    ).turn(key="k")


def turn_in_a_process(root):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with Home(root) as home:
            turn(home)
        code = 0
    finally:
        os._exit(code)


def outcome(root):
    """What must be the same whatever was killed on the way; None while the turn is not recorded."""
    with Home(root) as home:
        registry = home.registry
        turns, champion = registry.turns("spark"), registry.champion("spark")
        promotions = [event.number for event in registry.history("spark")]
        if not turns:
            assert champion.number == 1 and promotions == [1], "promoted without its turn"
            return None
        assert len(turns) == 1 and promotions == [1, 2], "promoted once, with its turn"
        assert champion.artifact_id == turns[0].candidate
        events = home.feedback.events()
        assert len(events) == len({event.id for event in events}) == 60, "no vote lost or doubled"
        for artifact in home.artifacts.list():
            home.artifacts.verify(artifact.id)
        return champion.weights_hash, turns[0].candidate, turns[0].dataset, turns[0].verdict


def emptied(url):
    """A database as it was before its first use."""
    if url is not None:
        import psycopg

        with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")


@pytest.mark.slow
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("where", ["sqlite", "postgres"])
def test_a_turn_that_is_killed_ends_as_an_undisturbed_one(where, make_voted, tmp_path, monkeypatch, request):
    url = request.getfixturevalue("postgres_url") if where == "postgres" else None
    if url:
        monkeypatch.setenv("PRAIRIE_DATABASE", url)
    chance, kills, round, seconds = random.Random(where), 0, 0, 3.0
    while kills < KILLS:
        emptied(url)
        root = tmp_path / f"home-{round}"
        make_voted(root)
        while True:
            began, child = time.monotonic(), turn_in_a_process(root)
            wanted = chance.uniform(0, 1.05 * seconds)
            while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() - began < wanted:
                time.sleep(0.002)
            if ended[0] == 0:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
                outcome(root)
                continue
            assert ended[1] == 0
            break
        found = outcome(root)
        # The same home, its database and its votes, turned once more from before the turn and left in peace.
        with Home(root) as home:
            undo(home)
        began = time.monotonic()
        assert os.waitpid(turn_in_a_process(root), 0)[1] == 0
        seconds = time.monotonic() - began
        assert outcome(root) == found, f"after {kills} kills"
        shutil.rmtree(root, ignore_errors=True)
        round += 1
    print(f"{where}: {kills} kills in {round} turns")


def undo(home):
    """Takes the turn out of the database and what it made from the disk, as if it had not been."""
    from sqlalchemy import delete, update

    from prairie.store.schema import LINES, REGISTRY_EVENTS, TURNS, VERSIONS

    def run(connection):
        connection.execute(delete(TURNS))
        connection.execute(delete(REGISTRY_EVENTS).where(REGISTRY_EVENTS.c.number == 2))
        connection.execute(update(LINES).values(champion=1))
        connection.execute(delete(VERSIONS).where(VERSIONS.c.number == 2))

    home.database.write(run)
    for artifact in home.artifacts.list():
        if artifact.kind != "model":
            artifact.path.chmod(0o755)
            shutil.rmtree(artifact.path)
    shutil.rmtree(home.root / "references", ignore_errors=True)
