"""The loop with stand-in roles: what it records, what a crash leaves, and that no work turns twice."""

from dataclasses import dataclass, field

import pytest

from prairie.errors import ConflictError, DataError, NotFoundError
from prairie.evals.statistics import Interval
from prairie.flywheel.gate import Comparison, TaskChange, Verdict, judge
from prairie.flywheel.loop import Flywheel
from prairie.flywheel.probes import Probe
from prairie.store.home import Home


def made(home, kind, name, inputs=()):
    with home.artifacts.create(kind, name, {"name": name}, list(inputs)) as folder:
        (folder / "content").write_text(name)
    return home.artifacts.get(home.artifacts.id_of(kind, {"name": name}, list(inputs), ""))


def verdict(passed):
    votes = [Comparison(f"u{n}", "p", 1.0 if passed or n % 2 else 0.0) for n in range(12)]
    found = judge(votes, probes=[Probe("length", 1.1, 0.5, 2.0)])
    assert found.passed is passed
    return found


@dataclass
class Roles:
    """All three roles; notes what was asked of them, and fails where it is told to."""

    home: Home
    passed: bool = True
    fail: str = ""
    called: list = field(default_factory=list)

    def _enter(self, name):
        self.called.append(name)
        if name == self.fail:
            raise DataError(f"{name} failed")

    def act(self, champion):
        self._enter("act")
        return made(self.home, "votes", f"votes on {champion.name}")

    def learn(self, champion, records):
        self._enter("learn")
        artifact = made(self.home, "candidate", f"after {champion.name}", [champion.artifact_id, records.id])
        return self.home.registry.register(champion.line, artifact.id, kind="model")

    def judge(self, candidate, champion):
        self._enter("judge")
        assert candidate.number > champion.number
        return verdict(self.passed)


@pytest.fixture
def home(tmp_path):
    with Home(tmp_path / "home") as home:
        first = home.registry.register("spark", made(home, "model", "first").id, kind="model")
        home.registry.promote(first)
        yield home


def wheel(roles):
    return Flywheel("spark", roles.home.registry, roles, roles, roles)


def state(home):
    registry = home.registry
    return registry.champion("spark").number, len(registry.turns("spark")), len(registry.history("spark"))


def test_a_turn_promotes_the_better_one_and_keeps_the_champion_otherwise(home):
    turned = wheel(Roles(home)).turn()
    assert (turned.number, turned.winner, state(home)) == (1, turned.candidate, (2, 1, 2))
    assert home.registry.history("spark")[-1].verdict == turned.verdict.to_json()
    kept = wheel(Roles(home, passed=False)).turn()
    assert (kept.number, kept.winner, state(home)) == (2, kept.champion, (2, 2, 2))
    row = home.registry.turns("spark")[-1]
    assert (row.champion, row.candidate, row.dataset, row.promoted) == (
        kept.champion.artifact_id, kept.candidate.artifact_id, kept.records.id, False,
    )  # fmt: skip


def test_a_dry_turn_changes_no_champion(home):
    turned = wheel(Roles(home)).turn(dry=True)
    assert turned.verdict.passed and state(home) == (1, 0, 1)


@pytest.mark.parametrize("role", ["act", "learn", "judge"])
def test_whatever_fails_changes_nothing_and_is_done_again(home, role):
    with pytest.raises(DataError, match=f"{role} failed"):
        wheel(Roles(home, fail=role)).turn(key="k")
    assert state(home) == (1, 0, 1)
    turned = wheel(Roles(home)).turn(key="k")
    assert (turned.candidate.number, state(home)) == (2, (2, 1, 2)), "the candidate has one number, not two"


@pytest.mark.parametrize("passed", [True, False])
def test_the_same_work_does_not_turn_twice(home, passed):
    """As when a stage is killed after the turn and before its artifact is sealed."""
    first = wheel(Roles(home, passed)).turn(key="stage")
    before = state(home)
    again = Roles(home, not passed)
    second = wheel(again).turn(key="stage")
    assert again.called == [] and state(home) == before
    assert second.to_json() == first.to_json()
    assert second == first and second.verdict.text() == first.verdict.text()
    home.registry.promote("spark@1")
    assert wheel(again).turn(key="stage").winner == first.winner
    assert home.registry.champion("spark").number == 1, "what people decided since stays"
    third = wheel(Roles(home)).turn(key="another stage")
    assert third.number == 2


def test_a_crash_at_the_record_leaves_all_or_nothing(home):
    """The database dies at the turn's row, at the champion's or at the history's: neither stands; then both do."""
    for when in ("before insert on turns", "after insert on turns", "before update on lines",
                 "before insert on registry_events", "after insert on registry_events"):  # fmt: skip
        home.database.write(
            lambda c, when=when: c.exec_driver_sql(f"create trigger t {when} begin select raise(abort, 'cut'); end")
        )
        with pytest.raises(Exception, match="cut"):
            wheel(Roles(home)).turn(key="k")
        assert state(home) == (1, 0, 1), when
        home.database.write(lambda c: c.exec_driver_sql("drop trigger t"))
    wheel(Roles(home)).turn(key="k")
    assert state(home) == (2, 1, 2)


def test_a_champion_that_changed_under_way_is_not_overruled(home):
    other = home.registry.register("spark", made(home, "model", "by hand").id, kind="model")

    class Meanwhile(Roles):
        def judge(self, candidate, champion):
            self.home.registry.promote(other)
            return super().judge(candidate, champion)

    with pytest.raises(ConflictError, match="the champion of spark changed while turn 1 was under way"):
        wheel(Meanwhile(home)).turn(key="k")
    assert home.registry.champion("spark") == other and home.registry.turns("spark") == []
    assert wheel(Roles(home)).turn(key="k").champion == other


def test_a_line_without_a_champion_cannot_turn(home):
    home.registry.register("poet", made(home, "model", "poem").id, kind="model")
    roles = Roles(home)
    with pytest.raises(NotFoundError, match="line `poet` has no champion"):
        Flywheel("poet", home.registry, roles, roles, roles).turn()
    with pytest.raises(NotFoundError, match="no such model: got `nobody`"):
        Flywheel("nobody", home.registry, roles, roles, roles).turn()
    assert roles.called == []


def test_a_verdict_is_read_back_as_it_was():
    change = TaskChange("numbers", 0.5, 0.6, Interval(0.1, -0.05, 0.25, 40), 0.05)
    whole = Verdict(
        False, 0.6, 0.4, 0.8, 20, 10, 12, 1, 7, 0.95, {"numbers": change}, (Probe("p", 1.0, 0.0, 2.0),), ("noise",)
    )
    assert Verdict.from_json(whole.to_json()) == whole
    before = {k: v for k, v in whole.to_json().items() if k not in ("test", "planned", "judge_noise")}
    assert Verdict.from_json(before) == whole, "a turn that was recorded before there was a sequential test"
    votes = [Comparison(f"u{n}", "p", float(n % 3 > 0)) for n in range(12)]
    noisy = judge(votes, planned=40, against_itself=votes)
    assert Verdict.from_json(noisy.to_json()) == noisy and noisy.judge_noise.n == 12
    assert Verdict.from_json(judge([]).to_json()).text() == judge([]).text()


def test_a_turn_nobody_voted_in_can_be_recorded(home):
    class Nobody(Roles):
        def judge(self, candidate, champion):
            return judge([])

    turned = wheel(Nobody(home)).turn(key="k")
    assert not turned.verdict.passed
    assert wheel(Nobody(home)).turn(key="k").to_json() == turned.to_json()
