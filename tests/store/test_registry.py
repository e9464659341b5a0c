"""The registry: numbers, champions, history, names, lineage, turns."""

import json
import threading

import pytest

from prairie.errors import ConflictError, NotFoundError, RequestError, StoreError
from prairie.store.home import Home
from prairie.store.registry import Registry


def make(home, name, inputs=(), kind="model", events=(), weights_hash=None):
    config = {"name": name}
    with home.artifacts.create(kind, name, config, list(inputs), "code", events=list(events)) as folder:
        (folder / "prairie.json").write_text(json.dumps({"weights_hash": weights_hash or f"hash of {name}"}))
    return home.artifacts.get(home.artifacts.id_of(kind, config, list(inputs), "code"))


@pytest.fixture
def line(home):
    """spark@1..4, none promoted."""
    return [home.registry.register("spark", make(home, f"m{n}").id, kind="model") for n in range(1, 5)]


def test_numbers_grow_and_an_artifact_keeps_its_own(home):
    artifact = make(home, "m")
    version = home.registry.register("spark", artifact.id, kind="model", figures={"loss": 2.0}, lineage={"turn": 1})
    assert (version.name, version.weights_hash, version.figures) == ("spark@1", "hash of m", {"loss": 2.0})
    assert home.registry.register("spark", artifact.id, kind="model") == version
    assert home.registry.register("spark", make(home, "n").id, kind="model").number == 2
    assert home.registry.register("other", artifact.id, kind="model").name == "other@1"
    assert home.registry.lines() == ["other", "spark"]


def test_what_cannot_be_registered(home):
    artifact, other = make(home, "m"), make(home, "n")
    with pytest.raises(NotFoundError, match="no such artifact"):
        home.registry.register("spark", "0123456789abcdef", kind="model")
    for name in ("Spark", "spark@1", "a:b:c", "", "../x", "spark:"):
        with pytest.raises(RequestError, match="a line cannot have this name"):
            home.registry.register(name, artifact.id, kind="model")
    home.registry.register("spark:poet", artifact.id, kind="adapter", base=other.id)
    with pytest.raises(ConflictError, match="on another base"):
        home.registry.register("spark:poet", artifact.id, kind="adapter")


def test_promote_roll_back_and_the_generation(home, line):
    registry = home.registry
    assert registry.champion("spark") is None
    assert registry.generation() == 0
    generations = []
    for name in ("spark@1", "spark@2", "spark@4"):
        registry.promote(name, verdict={"better": True}, who="me", why="because")
        generations.append(registry.generation())
    registry.promote("spark@4")  # is it already
    assert registry.generation() == generations[-1]
    assert registry.rollback("spark", why="worse").number == 2
    assert registry.champion("spark").number == 2
    assert registry.rollback("spark").number == 1
    registry.promote("spark@3")
    assert registry.rollback("spark").number == 1
    with pytest.raises(NotFoundError, match="no champion before spark@1"):
        registry.rollback("spark")
    assert registry.generation() > generations[-1]
    assert sorted({*generations}) == generations
    history = [(e.action, e.previous, e.number) for e in registry.history("spark")]
    assert history == [
        ("promote", None, 1),
        ("promote", 1, 2),
        ("promote", 2, 4),
        ("rollback", 4, 2),
        ("rollback", 2, 1),
        ("promote", 1, 3),
        ("rollback", 3, 1),
    ]
    assert (registry.history("spark")[0].verdict, registry.history("spark")[0].why) == ({"better": True}, "because")


def test_a_trial_beside_the_champion(home, line):
    registry = home.registry
    with pytest.raises(NotFoundError, match="no champion beside which spark@2 could be tried out"):
        registry.try_out("spark@2")
    registry.promote("spark@1")
    for share in (0, 1, -0.5, 10):
        with pytest.raises(RequestError, match="share of the users is impossible"):
            registry.try_out("spark@2", share)
    with pytest.raises(RequestError, match="spark@1 is the champion already"):
        registry.try_out("spark@1")
    before = registry.generation()
    shadow = registry.try_out("spark@2", who="me")
    assert (shadow.kind, shadow.version.name, registry.trial("spark")) == ("shadow", "spark@2", shadow)
    canary = registry.try_out("spark@2", 0.1)
    assert (canary.kind, canary.share, registry.try_out("spark@2", 0.1)) == ("canary", 0.1, canary)
    assert registry.generation() > before and registry.champion("spark").number == 1
    assert not registry.end_trial(shadow), "that one is over already"
    assert registry.trial("spark") == canary
    assert registry.rollback("spark", why="no").number == 1, "the last change was the trial"
    assert registry.trial("spark") is None
    with pytest.raises(NotFoundError, match="no champion before"):
        registry.rollback("spark")
    registry.promote(registry.try_out("spark@3", 0.5).version)
    assert registry.trial("spark") is None and registry.champion("spark").number == 3
    with pytest.raises(ConflictError, match="spark@1 is champion no more"):
        registry.rollback("spark", only=1)
    assert registry.rollback("spark", only=3).number == 1
    assert [(e.action, e.number) for e in registry.history("spark")] == [
        ("promote", 1), ("shadow", 2), ("end", 2), ("canary", 2), ("end", 2), ("canary", 3), ("end", 3),
        ("promote", 3), ("rollback", 1),
    ]  # fmt: skip


def test_a_trial_ends_in_the_transaction_that_changes_the_champion(home, line):
    registry = home.registry
    registry.promote("spark@1")
    trial = registry.try_out("spark@2", 0.2)
    sabotage(home, "throne", "before update on lines")
    with pytest.raises(StoreError, match="no throne"):
        registry.promote("spark@2")
    assert registry.trial("spark") == trial and registry.history("spark")[-1].action == "canary"


def sabotage(home, name, when):
    """From now on the database refuses such a write, saying `no NAME`."""
    steps = [f"create trigger {name} {when} begin select raise(abort, 'no {name}'); end"]
    if home.url:  # Postgres
        body = f"$$ begin raise exception 'no {name}'; end $$"
        steps = [
            f"create function no_{name}() returns trigger language plpgsql as {body}",
            f"create trigger {name} {when} for each row execute function no_{name}()",
        ]
    home.database.write(lambda connection: [connection.exec_driver_sql(step) for step in steps])


def test_the_champion_and_its_history_are_one_transaction(home, line, monkeypatch):
    """If the history cannot be written, the champion does not change either."""
    home.registry.promote("spark@1")
    with pytest.raises(RequestError, match="a value cannot be stored: got Object of type object is not JSON"):
        home.registry.promote("spark@2", verdict={"not json": object()})
    sabotage(home, "purpose", "before insert on registry_events")
    with pytest.raises(StoreError, match="no purpose"):
        home.registry.promote("spark@2")
    assert home.registry.champion("spark").number == 1
    assert len(home.registry.history("spark")) == 1


def test_another_process_sees_the_generation(home, line):
    with Home(home.root) as other:
        before = other.registry.generation()
        home.registry.promote("spark@1")
        assert other.registry.generation() > before
        assert other.registry.champion("spark").number == 1


def test_promotions_from_many_threads_are_all_in_the_history(home, line):
    threads = [threading.Thread(target=home.registry.promote, args=(f"spark@{n % 4 + 1}",)) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    history = home.registry.history("spark")
    assert home.registry.champion("spark").number == history[-1].number
    assert [e.previous for e in history[1:]] == [e.number for e in history[:-1]]


def test_names(home, line):
    registry = home.registry
    with pytest.raises(NotFoundError, match="line spark has no champion"):
        registry.resolve("spark")
    registry.promote("spark@2")
    assert registry.resolve("spark").number == 2
    assert registry.resolve("spark@3").number == 3
    assert registry.resolve("spark@newest").number == 4
    assert registry.resolve(f"spark@{line[0].artifact_id[:8]}").number == 1
    poet = registry.register("spark:poet", line[1].artifact_id, kind="adapter", base=line[0].artifact_id)
    registry.promote(poet)
    assert registry.resolve("spark:poet") == poet == registry.resolve("spark:poet@1")
    with pytest.raises(NotFoundError, match=r"no such model: got `sprak`, wanted spark, spark:poet"):
        registry.resolve("sprak")
    for name in ("spark@9", "spark@ffffffff", "spark@", "spark@x"):
        with pytest.raises(NotFoundError):
            registry.resolve(name)
    assert [v.name for v in registry.versions_of(line[0].artifact_id)] == ["spark@1", "spark:poet@1"]


def test_lineage_goes_down_to_the_votes(home):
    data = make(home, "chats", kind="dataset")
    base = make(home, "base", inputs=[data.id])
    votes = make(home, "votes", inputs=[data.id], kind="dataset", events=["fb-1", "fb-2"])
    adapter = make(home, "tuned", inputs=[base.id, votes.id, "00000000deadbeef"], kind="adapter")
    version = home.registry.register("spark:poet", adapter.id, kind="adapter", base=base.id)
    tree = home.registry.lineage(version)
    assert tree["name"] == "spark:poet@1"
    top = tree["artifact"]
    assert [node["id"] for node in top["inputs"]] == [base.id, votes.id, "00000000deadbeef"]
    assert top["inputs"][0]["inputs"][0]["name"] == "chats"
    assert top["inputs"][1]["events"] == ["fb-1", "fb-2"]
    assert top["inputs"][1]["inputs"] == [{"id": data.id, "kind": "dataset", "name": "chats", "repeated": True}]
    assert top["inputs"][2] == {"id": "00000000deadbeef", "missing": True}
    assert tree["base"]["repeated"]
    json.dumps(tree)


def test_turns(home, line):
    registry = home.registry
    verdict = {"p": 0.01, "pair": (1, 2)}
    turn = registry.record_turn("spark", 1, "a", "b", "d", verdict, False)
    assert (turn.verdict, turn.key) == ({"p": 0.01, "pair": [1, 2]}, None)
    assert registry.record_turn("spark", 1, "a", "b", "d", verdict, False) == turn
    with pytest.raises(ConflictError, match="turn 1 of line spark is recorded already"):
        registry.record_turn("spark", 1, "a", "b", "d", {"p": 0.5}, False)
    registry.record_turn("spark", 2, "b", None, None, {}, False)
    assert [t.number for t in registry.turns("spark")] == [1, 2]
    assert registry.turns("other") == []
    assert registry.history("spark") == []


def test_a_turn_and_its_promotion_are_one_transaction(home, line):
    registry = home.registry
    registry.promote(line[0])
    outcome = (line[0].artifact_id, line[1].artifact_id, "d", {"passed": True}, True)
    for name, when in (
        ("turn", "before insert on turns"),
        ("history", "before insert on registry_events"),
        ("champion", "before update on lines"),
    ):
        sabotage(home, name, when)
        with pytest.raises(StoreError, match=f"no {name}"):
            registry.record_turn("spark", 1, *outcome)
        assert (registry.champion("spark"), registry.turns("spark"), len(registry.history("spark"))) == (line[0], [], 1)
        of_table = f" on {when.split()[-1]}" if home.url else ""
        home.database.write(lambda c, name=name, of=of_table: c.exec_driver_sql(f"drop trigger {name}{of}"))
    turn = registry.record_turn("spark", 1, *outcome)
    assert registry.champion("spark") == line[1] and registry.turns("spark") == [turn]
    promotion = registry.history("spark")[-1]
    assert (promotion.previous, promotion.why, promotion.verdict) == (1, "turn 1", {"passed": True})


def test_a_turn_is_found_by_its_key_and_not_recorded_twice(home, line):
    registry = home.registry
    registry.promote(line[0])
    outcome = (line[0].artifact_id, line[1].artifact_id, "d", {}, True)
    turn = registry.record_turn("spark", 1, *outcome, key="k")
    assert registry.turn_of("spark", "k") == turn
    assert registry.turn_of("spark", "other") is None and registry.turn_of("other", "k") is None
    registry.rollback("spark")
    assert registry.record_turn("spark", 1, *outcome, key="k") == turn
    assert registry.champion("spark") == line[0], "a repeat does not undo a roll-back"
    with pytest.raises(ConflictError, match="turn 1 of line spark is recorded already"):
        registry.record_turn("spark", 2, *outcome, key="k")


def test_who_cannot_win_a_turn(home, line):
    registry = home.registry
    with pytest.raises(ConflictError, match="champion of spark changed while turn 1 was under way: got nobody"):
        registry.record_turn("spark", 1, line[0].artifact_id, line[1].artifact_id, "d", {}, True)
    registry.promote(line[2])
    with pytest.raises(ConflictError, match="got spark@3"):
        registry.record_turn("spark", 1, line[0].artifact_id, line[1].artifact_id, "d", {}, True)
    with pytest.raises(NotFoundError, match="no version of spark"):
        registry.record_turn("spark", 1, line[2].artifact_id, "ffffffffffffffff", "d", {}, True)
    assert registry.turns("spark") == [] and registry.champion("spark") == line[2]


def test_a_registry_opens_a_home_by_its_path(home, line):
    registry = Registry(home.root)
    assert registry.lines() == ["spark"]
    registry.home.close()
