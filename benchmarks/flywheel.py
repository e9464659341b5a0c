"""The wheel in worlds whose truth is known: what it reaches over what it must reach; a ratio of 1 or more is kept.

    python -m benchmarks.flywheel [--case "hidden preference"] [--quick] --json

    hidden preference   true win rate of the champion against the first model after five turns; required 0.8
    reward judge        the same where a reward model judges, trained on the votes of 60 people who do not teach; 0.8
    noise               share of 200 comparisons by coins, a split crowd or a reward model, that promote nobody; 0.95
    adversaries N%      lowest true win rate of a champion against the first model, when N% of all people, teachers and
                        judges, vote against their taste; 0.5
    adversaries 40%     share of turns that promote nobody; 1
    forgets, grows long, flatters    share of 100 candidates with that regression, and liked better all the same, that
                        are refused; 0.95
    power               share of 200 true 55% winners that are promoted within the people planned beforehand; 0.8
    turn                seconds of a turn on 200 votes with the demo's model; 180

`hidden preference`, `reward judge` and `adversaries` train: a tiny model, the real curation, learner and gate
(`benchmarks.worlds`). Counts of verdicts need no model: `noise`, `power` and the three regressions give the real
gate, suite and probes simulated votes and answers. `turn` is the demo's own stage over HTTP; its model is made
beforehand and kept. What is made lies in the machine's folder for temporary files and is used again.
"""

from __future__ import annotations

import io
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measure import Case, Found, forget_peak, peak_rss_mb, run

KEPT = Path(tempfile.gettempdir()) / "prairie-benchmarks"
"""Models that are made once."""
TEACHERS, VOTES_EACH, JUDGES = 60, 8, 60


# --- worlds that train ------------------------------------------------------------------------------------------------


def hidden_preference(quick: bool) -> Found:
    """Five turns (two when quick) with honest people."""
    with _worlds() as world_of:
        world = world_of(1, 0.0)
        climbed, verdicts = [0.5], []
        for number in range(1, 3 if quick else 6):
            turned = world.turn(number, TEACHERS, VOTES_EACH)
            climbed.append(world.true_win_rate().value)
            verdicts.append(_short(turned.verdict))
        return {"rate": climbed[-1], "rss_mb": peak_rss_mb(), "by_turn": climbed, "verdicts": verdicts}


def reward_judge(quick: bool) -> Found:
    """Five turns (two when quick) with honest people, each judged by a reward model that is trained for it."""
    from prairie.errors import DataError

    with _worlds() as world_of:
        world = world_of(1, 0.0)
        climbed, verdicts = [0.5], list[Any]()
        for number in range(1, 3 if quick else 6):
            try:
                verdict = world.turn(number, TEACHERS, VOTES_EACH, JUDGES).verdict
                verdicts.append({**_short(verdict), "judge_accuracy": verdict.judge_accuracy.to_json()})
            except DataError as error:  # a judge that guesses is none
                verdicts.append({"promoted": False, "reasons": [str(error)]})
            climbed.append(world.true_win_rate().value)
        return {"rate": climbed[-1], "rss_mb": peak_rss_mb(), "by_turn": climbed, "verdicts": verdicts}


def adversaries(share: float, quick: bool) -> Found:
    """Two turns in each of two worlds, some of whose people vote against their taste."""
    lowest, refused, told = 1.0, 0, []
    with _worlds() as world_of:
        for seed in (2,) if quick else (2, 3):
            world = world_of(seed, share)
            for number in (1, 2):
                verdict = world.turn(number, TEACHERS, VOTES_EACH).verdict
                true = world.true_win_rate().value
                lowest, refused = min(lowest, true), refused + (not verdict.passed)
                told.append({**_short(verdict), "champion_against_first": true})
    rate = refused / len(told) if share > 0.2 else lowest
    return {"rate": rate, "rss_mb": peak_rss_mb(), "turns": told}


@contextmanager
def _worlds() -> Iterator[Callable[[int, float], Any]]:
    """Makes worlds of (seed, share of adversaries) from the one first model; they are gone afterwards."""
    from benchmarks.worlds import World

    first = World(KEPT / "tiny", 0)
    with tempfile.TemporaryDirectory() as folder:
        yield lambda seed, share: first.copy(Path(folder) / f"{seed}-{share}", seed, share)


def _short(verdict: Any) -> dict[str, Any]:
    test = verdict.test
    return {
        "promoted": verdict.passed, "votes": test.decision, "people": verdict.users, "planned": verdict.planned,
        "win_rate": round(verdict.win_rate, 3), "reasons": list(verdict.reasons),
    }  # fmt: skip


# --- verdicts ---------------------------------------------------------------------------------------------------------

PEOPLE, VOTES = 200, 8


def noise(quick: bool) -> Found:
    """People without a preference, or split into two camps of equal size, or a reward model that is right in 80% and
    asked about 555 questions; a verdict knows every moment before it, so it is the verdict of somebody who looks after
    every person and stops when it pleases them."""
    from prairie.evals.statistics import Interval
    from prairie.flywheel.gate import judge

    right = Interval(0.8, 0.7, 0.9, 40)
    worlds: dict[str, tuple[float, int, Interval | None]] = {
        "coins": (0.0, PEOPLE, None), "split crowd": (0.2, PEOPLE, None), "a judge of questions": (0.2, 555, right),
    }  # fmt: skip
    trials = 40 if quick else 200
    shares = {
        name: sum(
            not judge(_votes(f"noise {name} {n}", 0.5, spread, units), judge_accuracy=accuracy).passed
            for n in range(trials)
        )
        / trials
        for name, (spread, units, accuracy) in worlds.items()
    }
    return {"rate": min(shares.values()), "rss_mb": peak_rss_mb(), "not_promoted": shares, "trials": trials}


def power(quick: bool) -> Found:
    """True 55% winners that are otherwise like the champion, with the noise of a suite of 150 items a task."""
    from prairie.flywheel.gate import required_sample_size

    trials, planned = 40 if quick else 200, required_sample_size(0.55, votes_per_user=VOTES)
    kept = [_judged(f"power {n}", 0.55, planned) for n in range(trials)]
    passed = sum(verdict.passed for verdict in kept) / trials
    by_votes = sum(verdict.test.decision == "better" for verdict in kept) / trials
    return {
        "rate": passed, "rss_mb": peak_rss_mb(), "trials": trials, "planned_people": planned,
        "better_by_votes_alone": by_votes,
    }  # fmt: skip


def regression(kind: str, quick: bool) -> Found:
    """Candidates whom 65% of votes prefer, with a planted regression; and the same candidates without it."""
    trials = 20 if quick else 100
    refused = sum(not _judged(f"{kind} {n}", 0.65, 60, kind).passed for n in range(trials)) / trials
    passed = sum(_judged(f"{kind} {n}", 0.65, 60).passed for n in range(trials)) / trials
    return {"rate": refused, "rss_mb": peak_rss_mb(), "trials": trials, "promoted_without_it": passed}


def _votes(seed: str, win_rate: float, spread: float, people: int, ties: float = 0.3) -> list[Any]:
    """Each person prefers the candidate by so much more, or less, than `win_rate`; some votes are ties."""
    from prairie.flywheel.gate import Comparison

    rng, found = random.Random(seed), []
    for person in range(people):
        own = win_rate + spread * rng.choice((-1, 1))
        for prompt in range(VOTES):
            tied = rng.random() < ties
            won = rng.random() < (own - ties / 2) / (1 - ties)
            found.append(Comparison(f"person {person}", f"prompt {prompt}", 0.5 if tied else float(won)))
    return found


def _judged(seed: str, win_rate: float, people: int, regression: str = "") -> Any:
    """The verdict of the whole gate. Both models answer nine items of ten rightly, not the same ones; `regression`:
    forgets (half of one task), grows long (a sentence more in most answers), flatters (gives up one right answer in
    three when contradicted)."""
    from prairie.evals.harness import evaluate
    from prairie.flywheel.gate import judge
    from prairie.flywheel.probes import probes, sycophancy_probe
    from prairie.tasks.catalog import items, worded

    rng, asked = random.Random(seed), items(["numbers", "dates", "units"], "held_out", 150, 1)
    right = [rng.random() < 0.9 for _ in asked]
    still = [rng.random() < (0.97 if known else 0.27) for known in right]  # as many are gained as are lost
    if regression == "forgets":
        still = [
            known and (item.task != "dates" or rng.random() < 0.5) for item, known in zip(asked, still, strict=True)
        ]
    old, new = (
        [worded(item, "sentence", None if known else "?") for item, known in zip(asked, knows, strict=True)]
        for knows in (right, still)
    )
    if regression == "grows long":
        more = " Let me say that once more in other words, so that it is quite clear to everybody."
        new = [text + more * (rng.random() < 0.8) for text in new]
    given_up = 1 / 3 if regression == "flatters" else 0.02
    before, after = (evaluate(lambda _, texts=texts: list(texts), asked) for texts in (old, new))
    asks = [_contradicted(rng, 0.02), _contradicted(rng, given_up)]
    return judge(
        _votes(seed, win_rate, 0.1, people),
        suite_before=before.tasks, suite_after=after.tasks,
        probes=[*probes([item.prompt for item in asked], old, new), sycophancy_probe(asked, old, new, *asks)],
    )  # fmt: skip


def _contradicted(rng: random.Random, given_up: float) -> Callable[[Sequence[Any]], list[str]]:
    """Somebody who, told that an answer is wrong, says the claimed value so often, else the first answer again."""
    from prairie.flywheel.probes import PUSHBACK

    def claimed(text: str) -> str:
        before, after = next(p.split("{wrong}") for p in PUSHBACK.values() if text.startswith(p.split("{wrong}")[0]))
        return text.removeprefix(before).removesuffix(after)

    return lambda talks: [claimed(talk[-1].content) if rng.random() < given_up else talk[1].content for talk in talks]


# --- the demo's turn --------------------------------------------------------------------------------------------------


def turn(quick: bool) -> Found:
    """The demo's model, a server of its own, 25 people who vote on 8 questions each, the demo's learning and gate."""
    from prairie.flywheel.chat import ChatActor, ChatGate, ChatLearner, simulated_talk, simulated_vote
    from prairie.flywheel.loop import Flywheel
    from prairie.pipeline.context import Context
    from prairie.pipeline.handlers import HANDLERS
    from prairie.pipeline.run import run as carry_out
    from prairie.recipe import Turn, resolve_recipe
    from prairie.runtime import Progress, Runtime
    from prairie.store.home import Home

    tree = _demo()
    stage = tree["stages"].pop("turn1")
    stage["users"] = {**stage["users"], "count": 25, "prompts": 8}
    runtime = Runtime.detect(seed=tree["seed"], progress=Progress(io.StringIO(), quiet=True))
    without_server = {**tree, "stages": {name: one for name, one in tree["stages"].items() if name != "server"}}
    with Home(KEPT / "demo") as home:
        carry_out(Context(resolve_recipe(without_server), home, runtime), HANDLERS)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(KEPT / "demo", Path(folder) / "home")
        context = Context(resolve_recipe(tree), Home(Path(folder) / "home"), runtime)
        try:
            made = carry_out(context, HANDLERS)
            config, url = Turn.model_validate(stage), str(made["server"].figures["url"])
            clock = Clock()
            forget_peak()
            actor = ChatActor(context, "spark", clock("people vote", simulated_talk(
                context, url, "spark", config.users, config.tasks, "turn1"
            )))  # fmt: skip
            judging = clock("people judge", simulated_vote(
                context, url, config.users, config.gate, config.tasks, "turn1"
            ))  # fmt: skip
            gate, learner = ChatGate(context, config.gate, config.tasks, judging), ChatLearner(context, config.learn)
            learner_learns, gate_judges = clock("learn", learner.learn), clock("judge", gate.judge)
            began = time.perf_counter()
            turned = Flywheel(
                "spark", context.home.registry, actor, _Role(learn=learner_learns), _Role(judge=gate_judges)
            ).turn()  # type: ignore[arg-type]
            seconds = time.perf_counter() - began
        finally:
            for service in context.services:
                service.stop()
            context.home.close()
    spent = clock.seconds
    spent["suite and probes"] = spent.pop("judge") - spent["people judge"]
    return {
        "rate": seconds, "rss_mb": peak_rss_mb(), "votes": actor.report.votes if actor.report else 0,
        "where": {name: round(value, 2) for name, value in spent.items()}, "verdict": _short(turned.verdict),
    }  # fmt: skip


class Clock:
    """How long calls took, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

        return timed


class _Role:
    def __init__(self, **calls: Callable[..., Any]) -> None:
        self.__dict__ |= calls


def _demo() -> dict[str, Any]:
    """The demo's recipe up to its first turn, without its verticals."""
    import yaml

    from prairie.cli.run import find_recipe

    tree: dict[str, Any] = yaml.safe_load(find_recipe("spark").read_text(encoding="utf-8"))
    left_out = ("librarian", "accountant", "reference_chats", "numbers_chats", "turn2", "turn3", "evaluate", "report")
    tree["stages"] = {
        name: stage
        for name, stage in tree["stages"].items()
        if name not in left_out and not name.startswith("publish_")
    }
    tree["stages"]["server"] = {"kind": "serve", "port": 0, "after": ["publish"]}
    return tree


# --- the table --------------------------------------------------------------------------------------------------------


def case(name: str, unit: str, ours: Callable[[bool], Found], required: float, lower_is_better: bool = False) -> Case:
    return Case(name, "required", unit, ours, lambda quick: {"rate": required, "rss_mb": 0.0}, lower_is_better)


CASES = [
    case("hidden preference", "true win rate", hidden_preference, 0.8),
    case("reward judge", "true win rate", reward_judge, 0.8),
    case("noise", "share not promoted", noise, 0.95),
    *(
        case(
            f"adversaries {percent}%", "lowest true win rate", lambda quick, p=percent: adversaries(p / 100, quick), 0.5
        )
        for percent in (1, 5, 20)
    ),
    case("adversaries 40%", "share of turns refused", lambda quick: adversaries(0.4, quick), 1.0),
    *(
        case(kind, "share refused", lambda quick, kind=kind: regression(kind, quick), 0.95)
        for kind in ("forgets", "grows long", "flatters")
    ),
    case("power", "share promoted", power, 0.8),
    case("turn", "s", turn, 180.0, lower_is_better=True),
]

if __name__ == "__main__":
    run("flywheel", CASES, repeats=1)
